"""Bytes per GPU of a configuration: weights, gradients, optimizer shards, activations. Formulas, no
measurement.

P parameters that train, N all that a part holds, R ranks, w bytes per weight (2 in bfloat16, 4 in float32),
B images per micro-batch, W FLUX's width, r its MLP ratio (4), L image and T condition tokens.

- weights: w N for FLUX, the whole of Qwen2-VL (no lm_head), connector and VAE on every GPU. ZeRO-3 shards
  what is in the engine (FLUX, connector, Qwen's last layer) over R, and gathers at most
  stage3_max_live_parameters at a time.
- gradients: w P / R for the rank's own part (ZeRO-2, 3; w P below), and one bucket being reduced: up to
  reduce_bucket_size elements in w bytes, and a copy in communication_data_type where that is wider.
- optimizer: 16 P / R (P below ZeRO-1): float32 master, two moments of Adam, float32 sum over micro-batches.
  With offload_optimizer it is on the host.
- activations, eager diffusers on a GPU, in units of w W (T + L) bytes per image (saved by autograd;
  statistics and tables left out). A block always keeps the inputs of its norms (1 each), q and k before their
  norms (2), q, k, v and the output of attention (4), and the MLP's pre-activation (r). One that trains keeps
  more, for dW and dscale:
      double block:  8 + r frozen   12 + r + L / (T + L) `attention`   14 + 2 r `block`
      single block:  7 + r frozen   10 + r               `attention`   11 + 2 r `block`
  With activation checkpointing: 1 per block, and everything of the one block being recomputed.
- Qwen's last layer: about 16 D + 4 I per token of the turn (width D, MLP width I); its input only if
  recomputed.
- transient, alive only while activations are not, so that the larger of the two counts: the VAE's encoder,
  about four maps of its first width at full resolution per image of the micro-batch (data.cache without
  latents), and the flat float32 copy of the rank's gradients in the optimizer's step.
- runtime: 1 GB for the CUDA context and libraries. Fragmentation is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megaflux.config import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import AutoencoderKL
from megaflux.training.costs import StageCosts, Tokens, stage_table, token_counts, vae_config
from megaflux.training.ds_config import uses_bf16, zero_stage

RUNTIME_BYTES = 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a stage, and on the host where the optimizer is offloaded."""

    stage: str
    bucket: str
    weights: dict[str, int]
    """flux, vlm, connector, vae; gathered (ZeRO-3)."""
    gradients: int
    optimizer: int
    activations: int
    transient: int
    runtime: int
    host_optimizer: int

    @property
    def total(self) -> int:
        """Peak bytes on the GPU."""
        fixed = sum(self.weights.values()) + self.gradients + self.optimizer + self.runtime
        return fixed + max(self.activations, self.transient)


def memory_per_gpu(
    config: Config, ds_config: dict[str, Any], world_size: int, module: nn.Module, trunk: nn.Module,
    buckets: Sequence[Bucket],
) -> Memory:  # fmt: skip
    """Memory at the stage and bucket that need most. module, trunk: as `meta_models` gives them."""
    table, vae = stage_table(config, module), _vae(config)
    cases = [
        _memory(config, ds_config, world_size, module, trunk, vae, stage, row, bucket)
        for stage, row in zip(config.stages, table, strict=True)
        for bucket in buckets
    ]
    return max(cases, key=lambda memory: memory.total)


def activation_bytes(config: Config, module: nn.Module, stage: Stage, tokens: Tokens, width: int) -> int:
    """Bytes that autograd keeps of FLUX's blocks and the Qwen layer for one image; width: bytes per
    number."""
    transformer, text = module.transformer, module.vlm.config
    both = tokens.condition + tokens.image
    units = block_units(module, stage, tokens)
    recomputes = config.model.activation_checkpointing
    kept = len(units) + max(units) if recomputes else sum(units)
    layer = text.hidden_size if recomputes else 16 * text.hidden_size + 4 * text.intermediate_size
    return round(width * (kept * both * transformer.inner_dim + layer * tokens.turn))


def block_units(module: nn.Module, stage: Stage, tokens: Tokens) -> list[float]:
    """What each FLUX block keeps without recomputation, in units of one hidden state of T + L tokens."""
    transformer = module.transformer
    num_double = len(transformer.transformer_blocks)
    ratio = 4  # FluxSingleTransformerBlock's mlp_ratio and FeedForward's mult
    share = tokens.image / (tokens.condition + tokens.image)
    kept = {
        "double": {"frozen": 8 + ratio, "attention": 12 + ratio + share, "block": 14 + 2 * ratio},
        "single": {"frozen": 7 + ratio, "attention": 10 + ratio, "block": 11 + 2 * ratio},
    }
    units = []
    for index in range(num_double + len(transformer.single_transformer_blocks)):
        trains = stage.blocks == "all" or index in stage.blocks
        components = ("attention" if stage.components == "attention" else "block") if trains else "frozen"
        units.append(kept["double" if index < num_double else "single"][components])
    return units


def _memory(
    config: Config, ds_config: dict[str, Any], world_size: int, module: nn.Module, trunk: nn.Module,
    vae: AutoencoderKL, stage: Stage, row: StageCosts, bucket: Bucket,
) -> Memory:  # fmt: skip
    zero = ds_config.get("zero_optimization", {})
    level, batch = zero_stage(ds_config), config.for_world(world_size).train.micro_batch_size
    width = 2 if uses_bf16(ds_config) else 4
    trainable = sum(row.trainable.values())
    parts = {
        "flux": _numel(module.transformer),
        "vlm": _numel(module.vlm),
        "connector": _numel(module.connector),
    }
    weights = {name: width * n // (world_size if level == 3 else 1) for name, n in parts.items()}
    weights["vlm"] += width * _numel(trunk)
    weights["vae"] = width * _numel(vae)
    if level == 3 and world_size > 1:
        live = min(sum(parts.values()), int(zero.get("stage3_max_live_parameters", 1e9)))
        weights["gathered"] = width * live
    bucket_size = min(trainable, int(zero.get("reduce_bucket_size", 5e8)))
    wide = {"fp32": 4, "fp16": 2, "bf16": 2}.get(ds_config.get("communication_data_type"), width)
    gradients = width * trainable // (world_size if level >= 2 else 1)
    gradients += bucket_size * (width + (wide if wide > width else 0))
    shard = trainable // (world_size if level >= 1 else 1)
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") not in ("none", None)
    tokens = _worst_tokens(config, bucket)
    encode = 0
    if "latents" not in config.data.cache:
        encode = batch * 4 * vae.config.block_out_channels[0] * bucket.height * bucket.width * width
    return Memory(
        stage=row.name,
        bucket=str(bucket),
        weights=weights,
        gradients=gradients,
        optimizer=0 if offloaded else 16 * shard,
        activations=batch * activation_bytes(config, module, stage, tokens, width),
        transient=max(encode, 0 if offloaded else 4 * shard),
        runtime=RUNTIME_BYTES,
        host_optimizer=16 * shard if offloaded else 0,
    )


def _worst_tokens(config: Config, bucket: Bucket) -> Tokens:
    tokens = token_counts(config, bucket)
    caption = config.model.caption_max_tokens if config.data.condition.image_text else 0
    return Tokens(tokens.image, tokens.condition + caption, tokens.turn + caption, tokens.patches)


def _vae(config: Config) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**vae_config(config))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
