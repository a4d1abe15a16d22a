"""Bytes per GPU of a configuration: weights, gradients, optimizer shards, activations. Formulas, no measurement;
`python -m megaflux.bench memory` holds them against one update on fake tensors and a real DeepSpeed engine's tensors.

P parameters that train, L the largest of them, N all that a part holds, R ranks, E reduce_bucket_size, w bytes per
weight (2 in bfloat16, 4 in float32). DeepSpeed 0.19.8, read in runtime/zero/stage_1_and_2.py and stage3.py.

- weights: w N for FLUX, the whole of Qwen2-VL (no lm_head), connector and VAE on every GPU. Where data.cache holds trunk,
  of Qwen2-VL only the last layer, and where it holds latents, no VAE (training/frozen.py). What trains is moved into ZeRO's
  buffer, not copied. ZeRO-3 shards what is in the engine (FLUX, connector, Qwen's last layer) over R, and gathers
  at most stage3_max_live_parameters at a time.
- optimizer: 16 P / R: float32 master, two moments of Adam, float32 sum of the gradients of the rank's own part, from an
  update's first reduction to its step; in float32 the sum takes 8 P / R. The step works in place. With offload_optimizer
  masters and moments are on the host, as are a second gradient and a copy in w bytes; the GPU keeps ZeRO-2's sum,
  4 P / R, and w L to copy through.
- gradients, while the backward pass runs: a bucket of w E (twice with overlap_comm; as a whole, however small P is) and,
  while it is reduced, its slices joined and, in a wider communication_data_type, copied: up to max(E, L) elements in
  both; and w L that is on its way there. ZeRO-3's bucket is in communication_data_type and never freed.
- activations: `training/planning/activations.py`.
- transient, alive only while activations are not, so that the larger of the two counts: the VAE, whose encoder works
  before each forward pass (data.cache without latents) and whose decoder makes the panels (`latents.coding_peak`); with
  latents cached its weights too, which are there only then.
- runtime: 2 GB for the CUDA context, NCCL and the libraries, which is an estimate. Fragmentation is not counted.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from megaflux.common.ranks import World
from megaflux.config.parse import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.models.flux import POLICIES, Policy
from megaflux.models.latents import coding_peak
from megaflux.models.pretrained import AutoencoderKL, Models
from megaflux.models.tokens import Tokens
from megaflux.training.distributed import min_over_ranks
from megaflux.training.ds_config import bucket_elements, sent_bytes, uses_kernels, weight_bytes, zero_stage
from megaflux.training.planning.activations import activation_bytes, block_units
from megaflux.training.planning.costs import token_counts, vae_config
from megaflux.training.stages import trainable_names

log = logging.getLogger("megaflux")
RUNTIME_BYTES = 2 * 10**9
USABLE = 0.92  # of a GPU's memory: fragmentation and what the formulas leave out take the rest
PANEL = 4  # pictures that a panel decodes at a time, whatever the micro-batch


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a stage, and on the host where the optimizer is offloaded."""

    stage: str
    bucket: str
    weights: dict[str, int]
    """flux, vlm, connector; vae, unless latents are cached; gathered (ZeRO-3)."""
    gradients: int
    """In flight: ZeRO's bucket, and what reducing it takes."""
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
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    module: nn.Module,
    trunk: nn.Module,
    buckets: Sequence[Bucket],
) -> Memory:
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
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    module: nn.Module,
    trunk: nn.Module,
    buckets: Sequence[Bucket],
    stage: Stage,
    gpu_bytes: int,
    uneven: Sequence[bool] | None = None,
) -> list[Policy]:
    """The activation policy of each FLUX block in a stage, double blocks first, as model.activation_checkpointing
    has it; auto: the least recomputation that fits in gpu_bytes at every bucket.

    auto starts with full everywhere and gives memory first to those blocks that save most FLOPs per byte: full ->
    mlp in the last block and in those that keep least, then mlp -> none. Without kernels it is none or full for all
    blocks. uneven: blocks that keep their q, k, v product too (`flux.uneven_norms`); None: none does.
    """
    transformer = module.transformer
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    wanted, fused = config.model.activation_checkpointing, uses_kernels(config, ds_config)
    if wanted != "auto":
        return [wanted] * blocks

    batch = config.for_world(world_size).train.micro_batch_size
    width = weight_bytes(ds_config)
    given = config, ds_config, world_size, module, trunk, stage
    fixed = [(stage_memory(*given, bucket), _worst_tokens(config, bucket)) for bucket in buckets]

    def fits(policies: list[Policy]) -> bool:
        for memory, tokens in fixed:
            kept = activation_bytes(module, stage, tokens, width, policies, fused, uneven)
            if replace(memory, activations=batch * kept).total > gpu_bytes:
                return False
        return True

    if not fused:
        return ["none"] * blocks if fits(["none"] * blocks) else ["full"] * blocks
    kept = block_units(module.transformer, stage, _worst_tokens(config, buckets[0]), True, uneven)
    # First the last block: what it keeps it would compute again while all others' is still there.
    order = sorted(range(blocks), key=lambda block: (block < blocks - 1, kept[block], -block))
    steps = [(block, policy) for policy in ("mlp", "none") for block in order]
    # The more steps, the more memory (the first step's transient apart), so the last that fits is found by halves.
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_after(steps[:middle], blocks)) else (low, middle - 1)
    return _after(steps[:low], blocks)


def usable(gpu_bytes: float) -> int:
    """What of a GPU's memory the formulas may plan with: fragmentation and what they leave out take the rest."""
    return int(USABLE * gpu_bytes)


def counted(policies: Sequence[Policy]) -> str:
    """Policies in words for people: "40 blocks none, 17 mlp"."""
    parts = [f"{policies.count(policy)} {policy}" for policy in POLICIES if policy in policies]
    return f"of {len(policies)} blocks: " + ", ".join(parts)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device as its driver and torch's allocator see them."""

    total: int
    free: int
    """That nobody has, as the driver counts."""
    reserved: int = 0
    """That this process's allocator has; of it `allocated` is in use."""
    allocated: int = 0

    def plannable(self, own: int) -> int:
        """What the total of `stage_memory` may come to, once the engine is built. own: bytes of it that live already.

        Only what is free can be had: memory that something else holds, in this process or another, is not planned with.
        """
        available = self.free + self.reserved - self.allocated
        return own + RUNTIME_BYTES + available - (self.total - usable(self.total))


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of a rank's device; on a CPU its share of the host's. What is garbage is freed first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))
    import psutil

    host, ranks = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return DeviceMemory(host.total // ranks, host.available // ranks)


def budget(world: World, models: Models, optimizer: torch.optim.Optimizer | None = None) -> int:
    """What `policies_for` may plan with on the machines at hand, alike on all ranks: what is really free on the smallest
    GPU, or of a rank's share of the host, and what of the total lives already. Call it when the stage's engine is built.
    Collective.

    optimizer: the engine's inner one, whose shards are then known to live already; without it they are planned for anew.
    """
    modules = models.resident()
    tensors = [getattr(p, "ds_tensor", p) for module in modules for p in module.parameters()]  # ZeRO-3 empties p itself
    if optimizer is not None:
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return min_over_ranks(device_memory(world.device).plannable(_bytes_on(world.device, tensors)), world)


def _bytes_on(device: torch.device, tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages on a device, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _after(steps: Sequence[tuple[int, Policy]], blocks: int) -> list[Policy]:
    return [dict(steps).get(block, "full") for block in range(blocks)]


def stage_memory(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    module: nn.Module,
    trunk: nn.Module,
    stage: Stage,
    bucket: Bucket,
    policies: Sequence[Policy] | None = None,
    uneven: Sequence[bool] | None = None,
) -> Memory:
    """Memory of one stage at one bucket. policies: of each block; None: as configured, auto as full."""
    vae = _vae(json.dumps(vae_config(config)))
    if policies is None:
        wanted = config.model.activation_checkpointing
        transformer = module.transformer
        blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
        policies = ["full" if wanted == "auto" else wanted] * blocks
    batch = config.for_world(world_size).train.micro_batch_size
    width = weight_bytes(ds_config)
    cached = config.data.cache
    weights = _weights(ds_config, world_size, module, None if "trunk" in cached else trunk, width)
    gradients, optimizer, host_optimizer = zero_bytes(ds_config, world_size, module, stage, width)
    tokens = _worst_tokens(config, bucket)
    kept = activation_bytes(module, stage, tokens, width, policies, uses_kernels(config, ds_config), uneven)
    sizes = bucket.height, bucket.width, width
    encode, _ = coding_peak(vae.config.block_out_channels, batch, *sizes)
    _, decode = coding_peak(vae.config.block_out_channels, max(batch, PANEL), *sizes)
    if "latents" in cached:  # it comes for a panel, and leaves
        transient = decode + width * _numel(vae)
    else:
        weights["vae"], transient = width * _numel(vae), max(encode, decode)
    return Memory(
        stage=stage.name,
        bucket=str(bucket),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=batch * kept,
        transient=transient,
        runtime=RUNTIME_BYTES,
        host_optimizer=host_optimizer,
    )


def _weights(
    ds_config: dict[str, Any], world_size: int, module: nn.Module, trunk: nn.Module | None, width: int
) -> dict[str, int]:
    parts = {"flux": _numel(module.transformer), "vlm": _numel(module.vlm), "connector": _numel(module.connector)}
    sharded = zero_stage(ds_config) == 3
    weights = {name: width * n // (world_size if sharded else 1) for name, n in parts.items()}
    weights["vlm"] += 0 if trunk is None else width * _numel(trunk)
    if sharded and world_size > 1:
        live = ds_config.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9)
        weights["gathered"] = width * min(sum(parts.values()), int(live))
    return weights


def zero_bytes(
    ds_config: dict[str, Any], world_size: int, module: nn.Module, stage: Stage, width: int
) -> tuple[int, int, int]:
    """(gradients in flight, optimizer, optimizer on the host): bytes of DeepSpeed's ZeRO-2 or ZeRO-3 on a rank."""
    zero, level = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    sizes = trained_sizes(module, stage)
    shard = sum(sizes) // (world_size if level >= 1 else 1)
    bucket = bucket_elements(ds_config)
    reduced = max(bucket, max(sizes))
    wide = sent_bytes(ds_config)
    gradients = width * max(sizes)  # on its way into the bucket
    if level == 3:
        gradients, total = gradients + wide * (bucket + reduced), 4 * shard
    else:
        gradients += width * bucket * (2 if zero.get("overlap_comm") else 1)
        gradients += reduced * (width + (wide if wide > width else 0))
        total = (4 if width < 4 else 8) * shard
    if zero.get("offload_optimizer", {}).get("device", "none") in ("none", None):
        return gradients, 12 * shard + total, 0
    on_gpu = 0 if level == 3 else total + width * max(sizes)
    return gradients, on_gpu, (16 + width) * shard + width * max(sizes)


def trained_sizes(module: nn.Module, stage: Stage) -> list[int]:
    """Numbers in each parameter that a stage trains. Remembered per module: a plan asks for it hundreds of times."""
    known, key = _trained.setdefault(module, {}), (stage.blocks, stage.components)
    if key not in known:
        names = set(trainable_names(module, stage))
        known[key] = [parameter.numel() for name, parameter in module.named_parameters() if name in names]
    return known[key]


def _worst_tokens(config: Config, bucket: Bucket) -> Tokens:
    tokens = token_counts(config, bucket)
    caption = config.model.caption_max_tokens if config.data.condition.image_text else 0
    return Tokens(tokens.image, tokens.condition + caption, tokens.turn + caption, tokens.patches)


@lru_cache(maxsize=8)
def _vae(config_json: str) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**json.loads(config_json))


def _numel(module: nn.Module) -> int:
    if module not in _counted:
        _counted[module] = sum(parameter.numel() for parameter in module.parameters())
    return _counted[module]


_counted: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_trained: weakref.WeakKeyDictionary[nn.Module, dict[tuple, list[int]]] = weakref.WeakKeyDictionary()
