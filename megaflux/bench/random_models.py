"""Models with random weights, allocated where they are used: no file, no copy on the host; for measuring only.

Every parameter is drawn by one seeded generator of the device: the same bits each time on the same kind of device, others
on another kind (a CPU and a GPU, or two GPUs with different numbers of multiprocessors). Scales are such that activations
stay of the order of 1: the models train in bfloat16 without NaN, and learn nothing useful.

`random_vae` and `random_vlm` need torch, diffusers and transformers; `random_models` also what training needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
from diffusers.models import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from transformers import Qwen2VLModel, Qwen2VLProcessor

from megaflux.bench.activations import in_dtype
from megaflux.bench.arms import random_flux
from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED
from megaflux.models.loading_errors import named
from megaflux.models.scratch import tiny_processor, tokenizer_of, vlm_configuration

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from megaflux.config.schema import Config
    from megaflux.models.pretrained import Models

M = TypeVar("M", bound=nn.Module)

# config.json of black-forest-labs/FLUX.1-dev, vae/ and scheduler/
VAE_SCALES = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True}
SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def random_vae(
    vae_config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> AutoencoderKL:
    """A frozen VAE with random weights in `dtype` on `device`, in evaluation mode.

    vae_config: arguments of AutoencoderKL, for instance of FLUX.1's vae/config.json; keys beginning with "_" are ignored.
    Its encoder makes latents of (B, latent_channels, height / 8, width / 8) for FLUX's four levels, standard deviation
    of the order of 1. UserError naming vae_config where it is not one of a VAE.
    """
    values = {key: value for key, value in vae_config.items() if not key.startswith("_")}
    with named("vae_config"):
        vae = _built(lambda: AutoencoderKL(**values), dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("weight"):  # of a GroupNorm
                parameter.fill_(1)
            else:
                parameter.zero_()
    return vae.requires_grad_(False).eval()


def random_vlm(
    vlm_config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> tuple[Qwen2VLModel, Qwen2VLProcessor]:
    """Qwen2-VL of the given sizes with random weights in `dtype` on `device`, in evaluation mode, and its processor with
    the shipped tokenizer; RoPE's frequencies are float32.

    vlm_config: as `model.vlm_config`: `text_config` and `vision_config` with transformers' keys. Weights are normal with the
    text model's initializer_range (transformers: 0.02), norms are 1. UserError naming vlm_config where it is not one of a Qwen2-VL.
    """
    processor = tiny_processor()
    with named("vlm_config"):
        config = vlm_configuration(vlm_config, tokenizer_of(processor))
        vlm = _built(lambda: Qwen2VLModel(config), dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    std = config.text_config.initializer_range
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):  # of a LayerNorm or RMSNorm
                parameter.fill_(1)
            else:
                parameter.normal_(0, std, generator=generator)
    return vlm.eval(), processor


def random_models(config: Config, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Models:
    """The models of a configuration with random weights on a device: what `megaflux.models.pretrained.load_models`
    returns, for machines without the published weights. For measuring only.

    Sizes are `model.flux_config`, `model.vlm_config` and the config.json of the folder `model.vae` (FLUX.1's VAE where it has
    none), of `tiny` too; weights come from `run.seed`. dtype: of every parameter; None: bfloat16. CLIP is not built: its pooled vector
    (1, pooled_projection_dim) is random too. UserError where the configuration names weights, or the sizes don't fit each other.
    """
    from megaflux.models.connector import build_connector
    from megaflux.models.parameters import base_fingerprints
    from megaflux.models.pretrained import Parts, assemble
    from megaflux.training.planning.costs import vae_config

    model, seed = config.model, config.run.seed
    dtype, device = dtype or torch.bfloat16, torch.device(device)
    for field, source in (("flux", model.flux), ("vlm", None if model.vlm == SHIPPED else model.vlm)):
        if source:
            raise UserError(
                f"model.{field}: {source}, but random models read no weights; set model.{field} to null and the "
                f"sizes in model.{field}_config"
            )
    with named("model.flux_config"):
        transformer = random_flux(model.flux_config, dtype, device, seed)
    vlm, processor = random_vlm(model.vlm_config, dtype, device, seed + 1)
    vlm.set_attn_implementation(model.attention)
    vae = random_vae(VAE_SCALES | vae_config(config), dtype, device, seed + 2)
    flux = transformer.config
    connector = build_connector(vlm.config.text_config.hidden_size, flux["joint_attention_dim"], seed)
    generator = torch.Generator(device).manual_seed(seed + 3)
    pooled = torch.randn(1, flux["pooled_projection_dim"], generator=generator, device=device)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    parts = Parts(transformer, connector.to(device, dtype), vlm, processor, vae, scheduler, pooled)
    models = assemble(parts, model.vlm_max_tokens, model.caption_max_tokens, config.vlm_layers)
    models.base, models.base_parts = base_fingerprints(models.trainable, models.trunk.vlm, models.vae)
    return models.to(device, dtype)


def _built(make: Callable[[], M], dtype: torch.dtype, device: torch.device | str) -> M:
    """What `make` returns, its parameters in dtype on the device from the start."""
    with torch.device(device):
        return in_dtype(dtype, make)
