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
- activations, in units of w W (T + L) bytes per image (saved by autograd; statistics and tables left out). With
  kernels a block keeps the inputs of its norms (1 each), q, k, v and the output of attention (4) and the MLP's
  pre-activation (r); where its modulations train, what its gates scale as well (1 each):
      double block:  6 + r frozen   8 + r `attention` and `block`
      single block:  5 + r frozen   6 + r `attention` and `block`
  and, of a micro-batch above 1, the slices of attention's output that trainable linears read, copied: L / (T + L)
  for `attention`, 1 for `block`, in double blocks. A block with q/k norm weights near zero keeps q, k and v before
  their norms too (3). Policy mlp: r less.
- without kernels, eager diffusers: q and k before their norms too (2), and the inputs of linears that train:
      double block:  8 + r frozen   12 + r + L / (T + L) `attention`   14 + 2 r `block`
      single block:  7 + r frozen   10 + r               `attention`   11 + 2 r `block`
- policy full, either way: 1 per block, and everything of the one block being recomputed. Of what policy none keeps,
  the most that any one block does is counted once more in policy mlp, for what lives while its gradients are made.
- Qwen's last layer: about 16 D + 4 I per token of the turn (width D, MLP width I); its input only if
  recomputed.
- transient, alive only while activations are not, so that the larger of the two counts: the VAE's encoder,
  about four maps of its first width at full resolution per image of the micro-batch (data.cache without
  latents), and the flat float32 copy of the rank's gradients in the optimizer's step.
- runtime: 1 GB for the CUDA context and libraries. Fragmentation is not counted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from megaflux.config import Config, Stage
from megaflux.data.buckets import Bucket, make_buckets
from megaflux.models.flux import POLICIES, Policy, uneven_norms
from megaflux.models.pretrained import AutoencoderKL, Models, meta_models
from megaflux.training.costs import Tokens, stage_table, token_counts, vae_config
from megaflux.training.distributed import World, min_over_ranks
from megaflux.training.ds_config import uses_bf16, uses_kernels, zero_stage

log = logging.getLogger("megaflux")
RUNTIME_BYTES = 10**9
MLP_RATIO = 4  # r: FluxSingleTransformerBlock's mlp_ratio and FeedForward's mult


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
    """Memory at the stage and bucket that need most. module, trunk: as `meta_models` gives them. Activation policy
    auto counts as the one that keeps least; `policies_for` says what it becomes."""
    return max(
        (
            stage_memory(config, ds_config, world_size, module, trunk, stage, bucket)
            for stage in config.stages
            for bucket in buckets
        ),
        key=lambda memory: memory.total,
    )


def policies_for(
    config: Config, ds_config: dict[str, Any], world_size: int, module: nn.Module, trunk: nn.Module,
    buckets: Sequence[Bucket], stage: Stage, gpu_bytes: int, uneven: Sequence[bool] | None = None,
) -> list[Policy]:  # fmt: skip
    """The activation policy of each FLUX block in a stage, double blocks first, as model.activation_checkpointing
    has it; auto: the least recomputation that fits in gpu_bytes at every bucket.

    auto starts with full everywhere and gives memory first to those blocks that save most FLOPs per byte: full ->
    mlp in blocks that keep least, then mlp -> none. Without kernels it is none or full for all blocks. uneven: blocks
    that keep their q, k, v product too (`flux.uneven_norms`); None: none does.
    """
    transformer = module.transformer
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    wanted, fused = config.model.activation_checkpointing, uses_kernels(config, ds_config)
    if wanted != "auto":
        return [wanted] * blocks

    def fits(policies: list[Policy]) -> bool:
        needs = (
            stage_memory(config, ds_config, world_size, module, trunk, stage, bucket, policies, uneven).total
            for bucket in buckets
        )
        return max(needs) <= gpu_bytes

    if not fused:
        return ["none"] * blocks if fits(["none"] * blocks) else ["full"] * blocks
    batch = config.for_world(world_size).train.micro_batch_size
    kept = block_units(module, stage, _worst_tokens(config, buckets[0]), True, batch, uneven)
    order = sorted(range(blocks), key=lambda block: kept[block])
    steps = [(block, policy) for policy in ("mlp", "none") for block in order]
    # The more steps, the more memory (the first step's transient apart), so the last that fits is found by halves.
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_after(steps[:middle], blocks)) else (low, middle - 1)
    return _after(steps[:low], blocks)


def usable(gpu_bytes: float) -> int:
    """What of a GPU's memory the formulas may plan with: fragmentation and what they leave out take the rest."""
    return int(0.92 * gpu_bytes)


def counted(policies: Sequence[Policy]) -> str:
    """Policies in words for people: "40 blocks none, 17 mlp"."""
    parts = [f"{policies.count(policy)} {policy}" for policy in POLICIES if policy in policies]
    return f"of {len(policies)} blocks: " + ", ".join(parts)


def choose_policies(
    config: Config, ds_config: dict[str, Any], world: World, models: Models, stage: Stage
) -> list[Policy]:
    """`policies_for` on the machines at hand, alike on all ranks: the smallest GPU's memory less what others use of
    it, or a rank's share of the memory that is free now. Collective."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        others = max(0, total - free - torch.cuda.memory_reserved(world.device) - RUNTIME_BYTES)
        memory = total - others
    else:
        import psutil

        memory = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        memory += sum(p.numel() * p.element_size() for p in models.trainable.parameters())  # here already
    buckets = make_buckets(config.data.aspect_ratios, config.data.longest_side)
    uneven = uneven_norms(models.trainable.transformer) if uses_kernels(config, ds_config) else None
    if uneven and any(uneven):
        log.info("%d of %d FLUX blocks keep their q, k, v product: norm weights near zero", sum(uneven), len(uneven))
    # Sizes as they are on the meta device: ZeRO-3 leaves the real parameters empty.
    return policies_for(config, ds_config, world.size, *meta_models(config), buckets, stage,
                        usable(min_over_ranks(memory, world)), uneven)  # fmt: skip


def _after(steps: Sequence[tuple[int, Policy]], blocks: int) -> list[Policy]:
    return [dict(steps).get(block, "full") for block in range(blocks)]


def activation_bytes(
    module: nn.Module, stage: Stage, tokens: Tokens, width: int, policies: Sequence[Policy], fused: bool = True,
    micro_batch_size: int = 1, uneven: Sequence[bool] | None = None,
) -> int:  # fmt: skip
    """Bytes that autograd keeps of FLUX's blocks and the Qwen layer for one image. width: bytes per number;
    policies: one per block; fused: with kernels."""
    transformer, text = module.transformer, module.vlm.config
    both = tokens.condition + tokens.image
    units = block_units(module, stage, tokens, fused, micro_batch_size, uneven)
    kept = sum({"none": unit, "mlp": unit - MLP_RATIO, "full": 1}[p] for unit, p in zip(units, policies, strict=True))
    again = {"none": 0, "mlp": MLP_RATIO, "full": max(units)}
    kept += max(again[policy] for policy in policies)
    layer = text.hidden_size if "full" in policies else 16 * text.hidden_size + 4 * text.intermediate_size
    return round(width * (kept * both * transformer.inner_dim + layer * tokens.turn))


def block_units(
    module: nn.Module, stage: Stage, tokens: Tokens, fused: bool, micro_batch_size: int = 1,
    uneven: Sequence[bool] | None = None,
) -> list[float]:  # fmt: skip
    """What each FLUX block keeps without recomputation, in units of one hidden state of T + L tokens."""
    transformer = module.transformer
    num_double = len(transformer.transformer_blocks)
    ratio = MLP_RATIO
    share = tokens.image / (tokens.condition + tokens.image)
    if fused:
        copied = 1 if micro_batch_size > 1 else 0
        kept = {
            "double": {"frozen": 6 + ratio, "attention": 8 + ratio + share * copied, "block": 8 + ratio + copied},
            "single": {"frozen": 5 + ratio, "attention": 6 + ratio, "block": 6 + ratio},
        }
    else:
        kept = {
            "double": {"frozen": 8 + ratio, "attention": 12 + ratio + share, "block": 14 + 2 * ratio},
            "single": {"frozen": 7 + ratio, "attention": 10 + ratio, "block": 11 + 2 * ratio},
        }
    units = []
    for index in range(num_double + len(transformer.single_transformer_blocks)):
        trains = stage.blocks == "all" or index in stage.blocks
        components = ("attention" if stage.components == "attention" else "block") if trains else "frozen"
        units.append(kept["double" if index < num_double else "single"][components])
    if uneven:
        units = [unit + 3 if keeps else unit for unit, keeps in zip(units, uneven, strict=True)]
    return units


def stage_memory(
    config: Config, ds_config: dict[str, Any], world_size: int, module: nn.Module, trunk: nn.Module, stage: Stage,
    bucket: Bucket, policies: Sequence[Policy] | None = None, uneven: Sequence[bool] | None = None,
) -> Memory:  # fmt: skip
    """Memory of one stage at one bucket. policies: of each block; None: as configured, auto as full."""
    vae = _vae(json.dumps(vae_config(config)))
    row = next(row for row in stage_table(config, module) if row.name == stage.name)
    if policies is None:
        wanted = config.model.activation_checkpointing
        transformer = module.transformer
        blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
        policies = ["full" if wanted == "auto" else wanted] * blocks
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
        activations=batch
        * activation_bytes(module, stage, tokens, width, policies, uses_kernels(config, ds_config), batch, uneven),
        transient=max(encode, 0 if offloaded else 4 * shard),
        runtime=RUNTIME_BYTES,
        host_optimizer=16 * shard if offloaded else 0,
    )


def _worst_tokens(config: Config, bucket: Bucket) -> Tokens:
    tokens = token_counts(config, bucket)
    caption = config.model.caption_max_tokens if config.data.condition.image_text else 0
    return Tokens(tokens.image, tokens.condition + caption, tokens.turn + caption, tokens.patches)


@lru_cache(maxsize=8)
def _vae(config_json: str) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**json.loads(config_json))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
