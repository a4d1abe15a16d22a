"""A run's models: loaded from published layouts, strictly, or built from nothing (scratch.py).

Loading reads safetensors only. A missing or unexpected key, a wrong shape, a truncated or a pickle file is a UserError
that names it; no weight is ever silently left random. FLUX and Qwen2-VL, 39 of dev's 40 GB, are read tensor by tensor to
where they are used (reading.py); CLIP, VAE and the rest of generation by the libraries' own from_pretrained (strict.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.models import AutoencoderKL, FluxTransformer2DModel
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen2VLProcessor,
    T5EncoderModel,
)

from megaflux.common.errors import UserError
from megaflux.config.schema import Config
from megaflux.models.connector import build_connector
from megaflux.models.loading_errors import named
from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.models.parameters import base_fingerprints, weights_fingerprint
from megaflux.models.reading import Target, fill, shapes, tensors, weight_files, without_weights
from megaflux.models.scratch import build_clip, build_transformer, build_vlm, TINY, vlm_configuration
from megaflux.common.paths import SHIPPED
from megaflux.models.shipped import VAES
from megaflux.models.sources import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, model_problems, opened
from megaflux.models.strict import FOLDER_FILES, load_linear, load_strict, silent_libraries
from megaflux.models.t5 import T5Path
from megaflux.models.tiny_vlm import load_tiny_vlm
from megaflux.models.vlm import Trunk
from megaflux.models.vlm_folder import VlmFolder, open_vlm, read_config
from megaflux.models.vlm_parts import split_vlm


@dataclass
class Models:
    """Everything a run needs, on one device."""

    trainable: Qwen2VLFlux
    trunk: Trunk
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    pooled_projections: Tensor
    """(1, P): CLIP's pooled vector of the empty prompt."""
    base: str = ""
    """Fingerprint of all weights as they were loaded or built, before any training and without `init`."""
    base_parts: dict[str, str] = field(default_factory=dict)
    """The same of each part: flux, vlm, vae, connector; and of CLIP, of which only the pooled vector is kept, and which `base`
    does not cover (nor does it in older checkpoints). Without CLIP where that vector was drawn (bench/random_models.py)."""
    init: str | None = None
    """Fingerprint of what the run began with in their place (training/checkpoint/init_folder.py); None: they themselves."""
    t5: T5Path | None = None
    """The released weights' text path; None in training."""
    vae_visits: bool = False
    """Whether the VAE is on the device only while it works (training/frozen.py)."""

    @property
    def origin(self) -> dict[str, Any]:
        """What the weights began from, as plain data that checkpoints store: base, base_parts, init."""
        return {"base": self.base, "base_parts": self.base_parts, "init": self.init}

    def resident(self) -> tuple[nn.Module, ...]:
        """The modules whose weights stay on the device all the time."""
        trunk: tuple[nn.Module, ...] = () if self.trunk.released else (self.trunk.vlm,)
        return (self.trainable, *trunk, *(() if self.vae_visits else (self.vae,)))

    def to(self, device: torch.device | str, dtype: torch.dtype | None) -> Models:
        """Move all models to a device and cast their parameters (dtype None: only move); RoPE's frequencies stay
        float32."""
        modules: tuple[nn.Module, ...] = (self.trainable, self.trunk.vlm, self.vae)
        for module in modules:
            move_to(module, device, dtype)
        self.pooled_projections = self.pooled_projections.to(device, dtype)
        if self.t5 is not None:
            self.t5.to(device, dtype)
        return self


def move_to(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Move a module to a device and cast its parameters (dtype None: only move). Buffers keep their dtype: RoPE's inv_freq
    loses its angles in bf16.

    On a CPU every parameter starts at a multiple of 64 bytes afterwards, which one mapped from a file need not: matrix
    products round by the alignment, and the same weights from two files would give different last bits.
    """
    module.to(device)
    for parameter in module.parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            continue  # quantized: its dtype must not change
        data = parameter.data.to(dtype)
        aligned = data.device.type != "cpu" or data.data_ptr() % 64 == 0
        parameter.data = data if aligned else data.clone()


def load_models(config: Config, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Models:
    """The models of a configuration on a device: loaded where it names a source, else built from its seed.

    dtype: of every parameter; None: each part's own, bfloat16 for published weights. Published weights are read straight
    to the device: beside what the models keep there, the host holds no more than the largest tensor and 1 GB. On a CPU
    without a dtype they stay mapped from their files. UserError naming every missing or incomplete source (sources.py),
    before any weight is read.
    """
    if found := list(model_problems(config.model)):
        raise UserError("; ".join(found))
    model, seed, target = config.model, config.run.seed, Target(device, dtype)
    way = model.seeded
    folder = open_vlm(model.vlm, model.attention) if model.vlm not in (None, SHIPPED) else None
    if folder is not None:
        folder.check_turns(config.data.condition.chat_modes)
    own = torch.bfloat16 if model.flux else torch.float32  # published weights are bf16; casting up comes later
    if model.flux:
        transformer = load_transformer(model.flux, own, target)
        scheduler = load_scheduler(model.flux)
        clip, clip_tokenizer = load_clip(model.flux)
    else:
        transformer = build_transformer(model.flux_config, seed, way)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        clip, clip_tokenizer = build_clip(model.clip_config, seed, way)
    pooled = empty_prompt_pooled(clip, clip_tokenizer)
    vae = load_vae(model.vae, model.flux)
    if folder is not None:
        vlm, processor = load_vlm(folder, target=target)
    elif model.vlm == SHIPPED:
        vlm, processor = load_tiny_vlm(model.vlm_config, model.attention, own, target)
    else:
        vlm, processor = build_vlm(model.vlm_config, seed, way)
    connector = build_connector(
        vlm.config.text_config.hidden_size, transformer.config["joint_attention_dim"], seed, way
    )
    parts = Parts(transformer, connector.to(own), vlm, processor, vae, scheduler, pooled)
    models = assemble(parts, model.vlm_max_tokens, model.caption_max_tokens, config.vlm_layers)
    models.base, models.base_parts = base_fingerprints(
        models.trainable, models.trunk.vlm, models.vae, samples=target.samples
    )
    models.base_parts["clip"] = weights_fingerprint(clip)
    return models if target.mapped else models.to(device, dtype)


@dataclass(frozen=True)
class Parts:
    """The modules and values that `assemble` makes a run's models of."""

    transformer: FluxTransformer2DModel
    connector: nn.Linear
    vlm: Qwen2VLModel
    """Whole; `assemble` cuts it into trunk and tail."""
    processor: Qwen2VLProcessor
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    pooled_projections: Tensor
    """(1, P): CLIP's pooled vector of the empty prompt."""


def assemble(parts: Parts, max_image_tokens: int, max_caption_tokens: int, vlm_layers: int = 1) -> Models:
    """The models made of these parts. UserError where the parts do not fit each other.

    max_image_tokens, max_caption_tokens: of a condition (`Trunk`). vlm_layers: of Qwen2-VL, apart from the trunk."""
    flux, vae, connector, pooled = parts.transformer.config, parts.vae, parts.connector, parts.pooled_projections
    packed = vae.config["latent_channels"] * 4
    if packed != flux["in_channels"]:
        raise UserError(
            f"model.vae: {vae.config['latent_channels']} latent channels pack to {packed}, "
            f"but the transformer reads {flux['in_channels']}; use the VAE that belongs to it"
        )
    if pooled.shape[-1] != flux["pooled_projection_dim"]:
        raise UserError(
            f"model: CLIP's pooled vector has {pooled.shape[-1]} channels, the transformer reads "
            f"{flux['pooled_projection_dim']}"
        )
    ends = (parts.vlm.config.text_config.hidden_size, flux["joint_attention_dim"])
    if (connector.in_features, connector.out_features) != ends:
        raise UserError(
            f"connector: {connector.in_features} -> {connector.out_features} channels, but Qwen2-VL gives "
            f"{ends[0]} and the transformer reads {ends[1]}"
        )
    trunk_model, tail = split_vlm(parts.vlm, vlm_layers)
    trunk = Trunk(trunk_model, parts.processor, max_image_tokens, max_caption_tokens)
    vae.requires_grad_(False).eval()
    return Models(Qwen2VLFlux(tail, connector, parts.transformer), trunk, vae, parts.scheduler, pooled.detach())


# --- published layouts ----------------------------------------------------------------------------------------------


def load_transformer(source: str, dtype: torch.dtype, target: Target | None = None) -> FluxTransformer2DModel:
    """`transformer/` of a FLUX.1 folder or hub name in diffusers' layout, loaded in `dtype` to where `target` says."""
    where = f"{source}/transformer"
    place = opened(source, ("transformer/*",))
    with named(where), silent_libraries():
        config = FluxTransformer2DModel.load_config(place, subfolder="transformer")
        _refuse_quantized(where, config.get("quantization_config"))
        with without_weights():
            transformer = FluxTransformer2DModel.from_config(config)
        files = weight_files(place, "transformer", DIFFUSERS_WEIGHTS)
        fill(transformer, files, dtype, target or Target(), where)
    transformer.register_to_config(_name_or_path=source)
    return transformer.eval()


def load_vae(source: str | None, flux: str | None) -> AutoencoderKL:
    """The VAE of `source` (a VAE folder, or `tiny` or `tiny-icons`, the shipped ones), else `vae/` of the FLUX folder."""
    if source in VAES:
        return load_strict(AutoencoderKL, str(VAES[source]), torch_dtype=torch.float32)
    if source:
        return load_strict(AutoencoderKL, source, torch_dtype=torch.float32)
    if not flux:
        raise UserError(
            "model.vae: a model built from nothing needs a VAE; set model.vae to a folder, tiny or tiny-icons"
        )
    return load_strict(AutoencoderKL, flux, subfolder="vae", torch_dtype=torch.float32)


def load_scheduler(source: str) -> FlowMatchEulerDiscreteScheduler:
    """`scheduler/` of a FLUX.1 folder or hub name."""
    place = opened(source, ("scheduler/*",))
    with named(f"{source}/scheduler"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(place, subfolder="scheduler")
    return scheduler


def load_clip(source: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """`text_encoder/` and `tokenizer/` of a FLUX.1 folder."""
    # The published file also carries position_ids, a buffer that transformers no longer registers.
    clip = load_strict(
        CLIPTextModel,
        source,
        subfolder="text_encoder",
        dtype=torch.float32,
        allow_unexpected=lambda key: key.endswith("embeddings.position_ids"),
    )
    place = opened(source, ("tokenizer/*",))
    with named(f"{source}/tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
    return clip, tokenizer


def load_vlm(
    source: str | VlmFolder, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16, target: Target | None = None
) -> tuple[Qwen2VLModel, Qwen2VLProcessor]:
    """Model and processor of a Qwen2-VL folder or hub name, or of one that `open_vlm` has read, loaded in `dtype` to where
    `target` says. lm_head, which nothing uses, is not read."""
    folder = open_vlm(source, attention) if isinstance(source, str) else source
    config, where = folder.config, folder.source
    with named(where), silent_libraries():
        _refuse_quantized(where, getattr(config, "quantization_config", None))
        for part in (config, config.text_config, config.vision_config):
            part.dtype = dtype
        with without_weights():
            vlm = Qwen2VLModel(config)
        fill(vlm, weight_files(folder.place, "", TRANSFORMERS_WEIGHTS), dtype, target or Target(), where, vlm_name)
    return vlm.eval(), folder.processor


def vlm_name(key: str) -> str | None:
    """Qwen2VLModel's name of a stored key. Keys are as published (model.*, visual.*), as newer libraries save them
    (model.language_model.*, model.visual.*), or the model's own. None: lm_head."""
    if key == "lm_head.weight":
        return None
    if key.startswith(("model.language_model.", "model.visual.")):
        return key.removeprefix("model.")
    return f"language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key


def _refuse_quantized(where: str, quantization: object) -> None:
    if quantization:
        raise UserError(
            f"{where}/config.json: quantization_config: quantized weights are not read; give the plain ones"
        )


def load_t5_encoder(root: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[T5EncoderModel, Any]:
    """(T5EncoderModel, tokenizer) of text_encoder_2/ and tokenizer_2/ of a FLUX.1 folder or an export."""
    encoder = load_strict(
        T5EncoderModel,
        str(root),
        subfolder="text_encoder_2",
        dtype=dtype,
        allow_missing=lambda key: key == "encoder.embed_tokens.weight",  # tied to shared.weight
        allow_unexpected=lambda key: key == "encoder.embed_tokens.weight",
    )
    with named(f"{root}/tokenizer_2"):
        tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer_2")
    return encoder, tokenizer


def load_t5(root: Path, dtype: torch.dtype = torch.bfloat16) -> T5Path:
    """The T5 text path of an export: text_encoder_2/, tokenizer_2/ and t5_embedder/."""
    encoder, tokenizer = load_t5_encoder(root, dtype)
    return T5Path(tokenizer, encoder, load_linear(root / "t5_embedder/model.safetensors"))


def read_lm_head(source: str) -> Tensor | None:
    """lm_head.weight of a Qwen2-VL folder or hub name; None where it holds none (it is tied, or was left out)."""
    place = opened(source, FOLDER_FILES)
    with named(source):
        for file in weight_files(place, "", TRANSFORMERS_WEIGHTS):
            if "lm_head.weight" in shapes(file):
                return next(tensors(file, ["lm_head.weight"]))[1]
    return None


@torch.no_grad()
def empty_prompt_pooled(clip: CLIPTextModel, tokenizer: CLIPTokenizer) -> Tensor:
    """CLIP's pooled vector of the empty prompt, (1, P): FLUX's pooled_projections, as Qwen2-VL replaces the prompt."""
    tokens = tokenizer("", padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return clip(input_ids=tokens["input_ids"]).pooler_output


def meta_models(config: Config) -> tuple[Qwen2VLFlux, Qwen2VLModel]:
    """(trainable module, frozen trunk) on the meta device: names and shapes, without memory. Sizes are those of the local
    folders that the configuration names, else those of its own tables."""
    model = config.model
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**_local_config(model.flux, "transformer", model.flux_config))
        vlm = Qwen2VLModel(_local_vlm_config(model.vlm, model.vlm_config))
        width = vlm.config.text_config.hidden_size
        connector = build_connector(width, transformer.config["joint_attention_dim"], config.run.seed)
    trunk, tail = split_vlm(vlm, config.vlm_layers)
    return Qwen2VLFlux(tail, connector, transformer), trunk


def _local_config(source: str | None, subfolder: str, default: dict[str, Any]) -> dict[str, Any]:
    if source is None or not (Path(source) / subfolder / "config.json").is_file():
        return default
    with named(f"{source}/{subfolder}/config.json"):
        values = FluxTransformer2DModel.load_config(source, subfolder=subfolder)
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _local_vlm_config(source: str | None, default: dict[str, Any]) -> Qwen2VLConfig:
    drawn_or_shipped = source in (None, SHIPPED)
    if source is not None and not drawn_or_shipped and (Path(source) / "config.json").is_file():
        with named(f"{source}/config.json"):
            return read_config(source, source)
    tokenizer = Qwen2TokenizerFast.from_pretrained(TINY / "tokenizer") if drawn_or_shipped else None
    return vlm_configuration(default, tokenizer)
