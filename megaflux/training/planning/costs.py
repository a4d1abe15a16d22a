"""Parameters and FLOPs of a configuration, with its frozen parameters taken into account; from module shapes alone.

Symbols: B images per micro-batch, L image tokens of FLUX, T condition tokens, S tokens of the cut chat turn,
R turns (references), P patches of Qwen's ViT, W FLUX's width. FLOPs are 2 x multiply-adds of matrix products; element-wise operations
are not counted. All numbers are for conditions of mode `image`.

A training step of one image (Qwen2VLFlux: Qwen layer -> connector -> FLUX):
- forward: 2 in out tokens for every linear, 4 (T + L)^2 W for each FLUX block's attention, 4 R S^2 D for
  Qwen's.
- dX, the gradient of inputs: as much as the linear's forward, where a trainable parameter is upstream of the input
  (planning/gradients.py). In the published stages that is all of FLUX, since the Qwen layer and the connector are upstream of
  every block, but not `x_embedder`, the modulation linears while `time_text_embed` is frozen, the first block's image q, k,
  v while that block's modulation and `x_embedder` are frozen. Of Qwen's layers those that train, as the others come first.
- dW, the gradient of weights: as much again, for trainable linears only. With kernels q, k and v are one product, so a list
  of components that names only one or two of them costs the dW of all three there; and to_out.0 and to_add_out are one
  operation, so where one trains and nothing is upstream of either, the other's stream has a backward pass as well. Neither
  is counted.
- attention backward: twice its forward (dQ, dK, dV, dP), where any of q, k and v has a gradient. A flash kernel recomputes
  QK^T, half a forward more.
  A block in activation policy `mlp` recomputes its MLP's first product, one in `full` its whole forward, and then the
  Qwen layers that train are recomputed too; a block that has no backward pass recomputes nothing. All this is `recompute`,
  which counts as hardware FLOPs but not for MFU.
- frozen: the forward of the trunk and the VAE's encoder, unless data.cache has their output. Causal attention counts in
  full, as in torch's FlopCounterMode.
"""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megaflux.common.errors import UserError
from megaflux.config.presets import FLUX_VAE
from megaflux.config.schema import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import AutoencoderKL, meta_models
from megaflux.models.shipped import VAES
from megaflux.models.tokens import Tokens, count_tokens
from megaflux.training.planning.gradients import flux_gradients
from megaflux.training.stages import locate, trainable_names

MODULATION = re.compile(r"transformer\.(.*\.(norm1|norm1_context|norm)|norm_out)\.linear")


@dataclass(frozen=True)
class StageCosts:
    """One row of the stage table."""

    name: str
    updates: int
    blocks: list[int]
    """FLUX blocks that train, double ones first; "all" as every index."""
    trainable: dict[str, int]
    """Trainable parameters of flux, connector and vlm."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image in one training step; see the module's docstring."""

    forward_linear: int
    forward_attention: int
    backward_inputs: int
    backward_weights: int
    backward_attention: int
    frozen: int
    recompute: int

    @property
    def model(self) -> int:
        """FLOPs that MFU counts: all but recomputation."""
        trained = self.forward_linear + self.forward_attention + self.backward_inputs + self.backward_weights
        return trained + self.backward_attention + self.frozen

    @property
    def hardware(self) -> int:
        """FLOPs that the device computes."""
        return self.model + self.recompute


# --- parameters ---------------------------------------------------------------------------------------------


def stage_table(config: Config, module: Any) -> list[StageCosts]:
    """The configured stages and what each trains. module: Qwen2VLFlux, on any device, meta included. Raises UserError if a
    listed block matches no parameter."""
    num_double = len(module.transformer.transformer_blocks)
    num_blocks = num_double + len(module.transformer.single_transformer_blocks)
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    table = []
    for stage, updates in zip(config.stages, config.stage_updates(), strict=True):
        trainable = dict.fromkeys(("flux", "connector", "vlm"), 0)
        for name in trainable_names(module, stage):
            trainable[locate(name, num_double).group] += sizes[name]
        blocks = (
            list(stage.blocks) if isinstance(stage.blocks, tuple) else [b for b in range(num_blocks) if stage.lists(b)]
        )
        table.append(StageCosts(stage.name, updates, blocks, trainable))
    return table


# --- FLOPs --------------------------------------------------------------------------------------------------


def token_counts(config: Config, bucket: Bucket, references: int | None = None) -> Tokens:
    """Sequence lengths of a bucket's picture. references: pictures that condition it, taken to be of the bucket's size; None: their
    mean over batches, rounded up."""
    vision = config.model.vlm_config.get("vision_config", {})
    patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    turns = math.ceil(config.data.references.mean_turns) if references is None else references
    return count_tokens(bucket.height, bucket.width, config.model.vlm_max_tokens, patch, merge, turns)


def training_flops(
    module: Any, stage: Stage, tokens: Tokens, frozen: int = 0, policies: Sequence[str] | None = None
) -> Flops:
    """FLOPs of one image in one training step of a stage.

    module: Qwen2VLFlux, on any device, meta included. frozen: FLOPs of the frozen networks (`frozen_flops`). policies: none,
    mlp or full for each FLUX block, double ones first; None: nothing is recomputed."""
    trainable, found = set(trainable_names(module, stage)), flux_gradients(module.transformer, stage)
    policies = policies or ["none"] * len(found.blocks)
    linear = dx = dw = 0
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        cost = 2 * layer.in_features * layer.out_features * _tokens_seen(name, tokens)
        linear += cost
        dx += cost if _needs_input_gradient(name, module, stage, found.inputs) else 0
        dw += cost if f"{name}.weight" in trainable else 0
    block, layers = _block_attention(module, tokens), len(module.vlm.layers)
    forward = len(found.blocks) * block + _layers_attention(module, tokens, layers)
    backward = sum(b.attention for b in found.blocks) * block + _layers_attention(module, tokens, stage.vlm_layers)
    again = recomputation(module, stage, tokens).of(policies)
    return Flops(linear, forward, dx, dw, 2 * backward, frozen, backward // 2 + again)


@dataclass(frozen=True)
class Recomputation:
    """FLOPs of one image that a stage's backward pass recomputes, by activation policy."""

    mlp: list[int]
    """Of each block in policy mlp, double ones first."""
    full: list[int]
    """Of each block in policy full."""
    layers: int
    """Of Qwen's layers that train, if any block's policy is full."""

    def of(self, policies: Sequence[str]) -> int:
        """Total with one policy per block."""
        chosen = {"none": [0] * len(self.mlp), "mlp": self.mlp, "full": self.full}
        total = sum(chosen[policy][block] for block, policy in enumerate(policies))
        return total + (self.layers if "full" in policies else 0)


def recomputation(module: Any, stage: Stage, tokens: Tokens) -> Recomputation:
    """The cost of each policy for each block in a stage. module: Qwen2VLFlux, on any device, meta included."""
    transformer = module.transformer
    num_double = len(transformer.transformer_blocks)
    blocks = flux_gradients(transformer, stage).blocks
    attention = _block_attention(module, tokens)
    full = [attention * block.backward for block in blocks]
    mlp, again = [0] * len(full), _layers_attention(module, tokens, stage.vlm_layers)
    frozen_layers = len(module.vlm.layers) - stage.vlm_layers
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        cost = 2 * layer.in_features * layer.out_features * _tokens_seen(name, tokens)
        place = re.match(r"transformer\.(single_)?transformer_blocks\.(\d+)\.(.+)", name)
        if place is None:
            # Checkpointing stops at the last tensor that the backward pass reads, before a layer's last linear.
            trains = name.startswith("vlm.") and _layer(name) >= frozen_layers
            again += cost if trains and not name.endswith("down_proj") else 0
            continue
        index = int(place[2]) + (num_double if place[1] else 0)
        block = blocks[index]
        full[index] += cost * block.backward
        stream = block.streams[-1 if place[3] != "ff_context.net.0.proj" else 0]
        mlp[index] += cost if place[3] in MLP_IN and stream.mlp else 0
    return Recomputation(mlp, full, again)


MLP_IN = ("proj_mlp", "ff.net.0.proj", "ff_context.net.0.proj")


def _block_attention(module: Any, tokens: Tokens) -> int:
    """FLOPs of the attention of a FLUX block, forward."""
    return 4 * (tokens.condition + tokens.image) ** 2 * module.transformer.inner_dim


def _layers_attention(module: Any, tokens: Tokens, layers: int) -> int:
    """FLOPs of the attention of so many of Qwen's layers, forward."""
    return 4 * layers * tokens.turns * tokens.turn**2 * module.vlm.config.hidden_size


def _layer(name: str) -> int:
    """Index of the layer of a linear of `vlm`."""
    return int(name.split(".")[2])


def frozen_flops(config: Config, trunk: nn.Module | None, bucket: Bucket) -> int:
    """FLOPs of the forward of the trunk and the VAE's encoder for one image, without what data.cache has.

    trunk: Qwen2VLModel without its last layers, on any device, meta included; None: built from the configuration if needed."""
    return sum(frozen_parts(config, trunk, bucket))


def frozen_parts(config: Config, trunk: nn.Module | None, bucket: Bucket) -> tuple[int, int]:
    """(trunk, VAE) of `frozen_flops`; 0 for what data.cache has, and the mean over updates of what it has for some."""
    encode = seen = 0
    if config.trunk_share:
        whole = trunk_flops(meta_models(config)[1] if trunk is None else trunk, token_counts(config, bucket))
        seen = round(config.trunk_share * whole)
    if "latents" not in config.data.cache:
        encode = vae_encode_flops(json.dumps(vae_config(config)), bucket.height, bucket.width)
    return seen, encode


def trunk_flops(trunk: Any, tokens: Tokens) -> int:
    """FLOPs of the forward of Qwen2-VL's ViT (each patch attends to all P) and decoder layers (no lm_head) for the references of one
    image."""
    flops, patches = 0, tokens.patches * tokens.turns
    for name, layer in trunk.named_modules():
        if isinstance(layer, nn.Linear):
            seen = tokens.turn * tokens.turns
            if name.startswith("visual."):
                seen = tokens.condition if "merger" in name else patches
            flops += 2 * layer.in_features * layer.out_features * seen
        elif isinstance(layer, nn.Conv3d):  # patches do not overlap: one matrix product each
            flops += 2 * layer.in_channels * layer.out_channels * math.prod(layer.kernel_size) * patches
    vision, text = trunk.config.vision_config, trunk.config.text_config
    flops += 4 * len(trunk.visual.blocks) * patches * tokens.patches * vision.embed_dim
    return flops + 4 * len(trunk.language_model.layers) * tokens.turns * tokens.turn**2 * text.hidden_size


@lru_cache(maxsize=64)
def vae_encode_flops(config_json: str, height: int, width: int) -> int:
    """FLOPs of the forward of AutoencoderKL's encoder, run on the meta device, for one picture of height x width px."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae: Any = AutoencoderKL(**json.loads(config_json))
        encoder = vae.encoder
        encoder(torch.empty(1, encoder.conv_in.in_channels, height, width))
    return counter.get_total_flops()


def vae_config(config: Config) -> dict[str, Any]:
    """Arguments of AutoencoderKL: those in the local folder that the configuration names, else FLUX.1's published ones.
    Raises UserError if the folder's config.json cannot be read."""
    model = config.model
    folder = VAES.get(model.vae or "") or Path(model.vae or f"{model.flux}/vae")
    if model.vae not in VAES and not (folder / "config.json").is_file():
        return FLUX_VAE
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({error}); restore the VAE's folder") from None
    return {key: value for key, value in values.items() if not key.startswith("_")}


_counted: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()
_trunks: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
"""Module that FLOPs were counted for -> the trunk upstream of it, on the meta device, where the caller gave none."""


def train_flops_per_image(
    config: Config, module: nn.Module, stage: Stage | int, bucket: Bucket, trunk: nn.Module | None = None
) -> int:
    """Model FLOPs of one image of a bucket in a stage (given itself or as an index), for MFU: forward, dX, dW and attention's
    backward, without recomputation. The trunk and the VAE count unless data.cache has their output. Cached per module, so
    it is cheap to call for every micro-batch."""
    stage = config.stages[stage] if isinstance(stage, int) else stage
    known = _counted.setdefault(module, {})
    turns = config.data.references.mean_turns
    key = (stage.trained, bucket.size, config.data.cache, config.trunk_share, config.model.vlm_max_tokens, turns)
    if key not in known:
        if trunk is None and config.trunk_share:
            if module not in _trunks:  # half a second for `dev`: not again for each stage and bucket
                _trunks[module] = meta_models(config)[1]
            trunk = _trunks[module]
        frozen = frozen_flops(config, trunk, bucket)
        known[key] = training_flops(module, stage, token_counts(config, bucket), frozen).model
    return known[key]


def _tokens_seen(name: str, tokens: Tokens) -> int:
    """Tokens per image that a linear of Qwen2VLFlux processes."""
    if name.startswith("vlm."):
        return tokens.turn * tokens.turns
    if name == "connector" or name == "transformer.context_embedder":
        return tokens.condition
    if MODULATION.fullmatch(name) or ".time_text_embed." in name:
        return 1
    if ".single_transformer_blocks." in name:
        return tokens.condition + tokens.image
    text = re.search(r"\.(attn\.add_|attn\.to_add_out|ff_context\.)", name)
    return tokens.condition if text else tokens.image


def _needs_input_gradient(name: str, module: Any, stage: Stage, of_flux: frozenset[str]) -> bool:
    """Whether a trainable parameter is upstream of a linear's input. of_flux: FLUX's linears where one is."""
    if name.startswith("vlm."):  # of the first layer that trains: its norms
        return _layer(name) >= len(module.vlm.layers) - stage.vlm_layers
    if name == "connector":
        return stage.vlm_layers > 0
    return name.removeprefix("transformer.") in of_flux
