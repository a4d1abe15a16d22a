"""Bytes per GPU of a configuration: weights, gradients, optimizer shards, activations. Formulas, no measurement;
`python -m megaflux.bench memory` compares them with an update on fake tensors and with a real DeepSpeed engine's tensors.

P parameters that train, L the largest of them, N all of a part, R ranks, E reduce_bucket_size, w bytes per weight (2 in
bfloat16, 4 in float32). DeepSpeed 0.19.8, read in runtime/zero/stage_1_and_2.py and stage3.py.

- weights: w N for FLUX, all of Qwen2-VL (no lm_head), connector and VAE on every GPU. If data.cache has trunk, of Qwen2-VL
  only the layers apart from it (`Config.vlm_layers`), unless conditions have words; if it has latents, no VAE
  (training/frozen.py). Parameters that train are moved into ZeRO's buffer, not copied. ZeRO-3 shards the modules in the
  engine (FLUX, connector, Qwen's last layers) over R, and gathers at most stage3_max_live_parameters at a time.
- optimizer: 16 P / R: float32 master, Adam's two moments, and the float32 sum of the gradients of the rank's own part, from
  an update's first reduction to its step; in float32 the sum takes 8 P / R. The step works in place. optim.ema_decay adds
  4 P / R for the weights' average. With offload_optimizer masters, moments and average are on the host, as are a second
  gradient and a copy in w bytes; the GPU keeps ZeRO-2's sum, 4 P / R, and w L to copy through.
- gradients, during the backward pass: a bucket of w E (twice with overlap_comm; the whole bucket, however small P is);
  while it is reduced, its slices joined and, for a wider communication_data_type, copied: up to max(E, L) elements each;
  and w L for the gradient that is being added to it. ZeRO-3's bucket is in communication_data_type and never freed.
- activations: `training/planning/activations.py`.
- transient, allocated only while activations are not, so that the larger of the two counts: the VAE's encoder before each
  forward pass (data.cache without latents) and its decoder for panels (`latents.coding_peak`); with latents cached also its
  weights, which are on the GPU only then.
- runtime: an estimated 2 GB for the CUDA context, NCCL and libraries. Fragmentation is not counted.
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
from megaflux.config.schema import Stage
from megaflux.data.buckets import Bucket
from megaflux.models.flux import POLICIES, Policy
from megaflux.models.latents import coding_peak
from megaflux.models.pretrained import AutoencoderKL, Models
from megaflux.training.distributed import min_over_ranks
from megaflux.training.ds_config import bucket_elements, sent_bytes, zero_stage
from megaflux.training.planning.activations import activation_bytes, block_units
from megaflux.training.planning.costs import vae_config
from megaflux.training.planning.gradients import flux_gradients
from megaflux.training.planning.sizes import Sizes
from megaflux.training.stages import trainable_names

log = logging.getLogger("megaflux")
RUNTIME_BYTES = 2 * 10**9
USABLE = 0.92  # of a GPU's memory; the rest is for fragmentation and what the formulas leave out
PANEL = 4  # pictures that a panel decodes at a time, independent of the micro-batch


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one GPU at the peak of a stage, and on the host where the optimizer is offloaded."""

    stage: str
    bucket: str
    weights: dict[str, int]
    """flux, vlm, connector; vae, unless latents are cached; gathered (ZeRO-3)."""
    gradients: int
    """In flight: ZeRO's bucket and what reducing it needs."""
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


def memory_per_gpu(sizes: Sizes) -> StageMemory:
    """Memory at the stage and bucket that need most. Activation policy auto counts as full everywhere."""
    needs = (stage_memory(sizes, stage, bucket) for stage in sizes.config.stages for bucket in sizes.buckets)
    return max(needs, key=lambda memory: memory.total)


def policies_for(sizes: Sizes, stage: Stage, limit: int) -> list[Policy]:
    """The activation policy of each FLUX block in a stage, double blocks first, as in model.activation_checkpointing;
    auto: the least recomputation that fits in `limit` bytes at every bucket.

    auto starts with full in every block that has a backward pass and spends memory first on the blocks that save most
    FLOPs per byte: full -> mlp in
    the last block and in those that keep least, then mlp -> none. Without kernels it is none or full for all blocks.
    """
    blocks, wanted = sizes.blocks, sizes.config.model.activation_checkpointing
    if wanted != "auto":
        return [wanted] * blocks

    batch = sizes.micro_batch_size
    fixed = [(stage_memory(sizes, stage, bucket), sizes.longest_tokens(bucket)) for bucket in sizes.buckets]

    def fits(policies: list[Policy]) -> bool:
        for memory, tokens in fixed:
            kept = activation_bytes(sizes.module, stage, tokens, sizes.width, policies, sizes.fused, sizes.uneven)
            if replace(memory, activations=batch * kept).total > limit:
                return False
        return True

    if not sizes.fused:
        return ["none"] * blocks if fits(["none"] * blocks) else ["full"] * blocks
    tokens = sizes.longest_tokens(sizes.buckets[0])
    transformer = sizes.module.transformer
    kept = block_units(transformer, stage, tokens, True, sizes.uneven)
    # The last block first: what it recomputes would be added while all others' activations are still kept.
    gradients = flux_gradients(transformer, stage).blocks
    order = sorted(
        (b for b in range(blocks) if gradients[b].backward), key=lambda block: (block < blocks - 1, kept[block], -block)
    )
    upgrades: tuple[Policy, ...] = ("mlp", "none")
    steps = [(block, policy) for policy in upgrades for block in order]
    idle: list[tuple[int, Policy]] = [(block, "none") for block in range(blocks) if not gradients[block].backward]
    # More steps take more memory (apart from the first step's transient), so bisect for the last that fits.
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_after(idle + steps[:middle], blocks)) else (low, middle - 1)
    return _after(idle + steps[:low], blocks)


def usable(gpu_bytes: float) -> int:
    """Bytes of a GPU's memory that a plan may use: `USABLE` of it."""
    return int(USABLE * gpu_bytes)


def counted(policies: Sequence[Policy]) -> str:
    """Policies as text: "of 57 blocks: 40 none, 17 mlp"."""
    parts = [f"{policies.count(policy)} {policy}" for policy in POLICIES if policy in policies]
    return f"of {len(policies)} blocks: " + ", ".join(parts)


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one device, by its driver and torch's allocator."""

    total: int
    free: int
    """Free by the driver's count."""
    reserved: int = 0
    """Held by this process's allocator; `allocated` of it is in use."""
    allocated: int = 0

    def plannable(self, own: int) -> int:
        """Bytes that the total of `stage_memory` may reach, once the engine is built. own: the part of that total which is
        allocated already.

        Memory that anything else holds, in this process or another, is not available.
        """
        available = self.free + self.reserved - self.allocated
        return own + RUNTIME_BYTES + available - (self.total - usable(self.total))


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory of a rank's device; of a CPU its share of the host's. Frees garbage first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free, torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device))
    import psutil

    host, ranks = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return DeviceMemory(host.total // ranks, host.available // ranks)


def budget(world: World, models: Models, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes that a plan may use on these machines, the same on all ranks: what is free on the smallest GPU, or of a rank's
    share of the host, plus the part of the total that is allocated already. Call it when the stage's engine is built.
    Collective.

    optimizer: the engine's inner one, whose shards then count as allocated; None: they are still to be allocated.
    """
    modules = models.resident()
    tensors = [getattr(p, "ds_tensor", p) for module in modules for p in module.parameters()]  # ZeRO-3 empties p itself
    if optimizer is not None:
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return min_over_ranks(device_memory(world.device).plannable(_bytes_on(world.device, tensors)), world)


def _bytes_on(device: torch.device, tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages on a device, each storage counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _after(steps: Sequence[tuple[int, Policy]], blocks: int) -> list[Policy]:
    """Policies after these changes (block, new policy) to full everywhere."""
    return [dict(steps).get(block, "full") for block in range(blocks)]


def stage_memory(sizes: Sizes, stage: Stage, bucket: Bucket, policies: Sequence[Policy] | None = None) -> StageMemory:
    """Memory of one stage at one bucket. policies: one per FLUX block; None: as configured, auto as full everywhere."""
    config, ds_config, width, batch = sizes.config, sizes.ds_config, sizes.width, sizes.micro_batch_size
    vae: Any = _vae(json.dumps(vae_config(config)))
    if policies is None:
        wanted = config.model.activation_checkpointing
        policies = ["full" if wanted == "auto" else wanted] * sizes.blocks
    weights = _weights(sizes)
    averaged = config.optim.ema_decay > 0
    gradients, optimizer, host_optimizer = zero_bytes(ds_config, sizes.ranks, sizes.module, stage, width, averaged)
    tokens = sizes.longest_tokens(bucket)
    kept = activation_bytes(sizes.module, stage, tokens, width, policies, sizes.fused, sizes.uneven)
    picture = bucket.height, bucket.width, width
    encode, _ = coding_peak(vae.config.block_out_channels, batch, *picture)
    _, decode = coding_peak(vae.config.block_out_channels, max(batch, PANEL), *picture)
    if "latents" in config.data.cache:  # the VAE is on the GPU only for a panel
        transient = decode + width * _numel(vae)
    else:
        weights["vae"], transient = width * _numel(vae), max(encode, decode)
    return StageMemory(
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


def _weights(sizes: Sizes) -> dict[str, int]:
    """Bytes of weights on a GPU by part, without the VAE's."""
    module, ds_config, ranks, width = sizes.module, sizes.ds_config, sizes.ranks, sizes.width
    parts = {"flux": _numel(module.transformer), "vlm": _numel(module.vlm), "connector": _numel(module.connector)}
    sharded = zero_stage(ds_config) == 3
    weights = {name: width * n // (ranks if sharded else 1) for name, n in parts.items()}
    weights["vlm"] += width * _numel(sizes.trunk) if sizes.config.trunk_share else 0
    if sharded and ranks > 1:
        live = ds_config.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9)
        weights["gathered"] = width * min(sum(parts.values()), int(live))
    return weights


def zero_bytes(
    ds_config: dict[str, Any], world_size: int, module: nn.Module, stage: Stage, width: int, averaged: bool = False
) -> tuple[int, int, int]:
    """(gradients in flight, optimizer, optimizer on the host): bytes of ZeRO-2 or ZeRO-3 on a rank. width: bytes per
    weight. averaged: with an average of the weights (optim.ema_decay)."""
    zero, level = ds_config.get("zero_optimization", {}), zero_stage(ds_config)
    sizes = trained_sizes(module, stage)
    shard = sum(sizes) // (world_size if level >= 1 else 1)
    bucket = bucket_elements(ds_config)
    reduced = max(bucket, max(sizes))
    wide = sent_bytes(ds_config)
    gradients = width * max(sizes)  # being added to the bucket
    if level == 3:
        gradients, total = gradients + wide * (bucket + reduced), 4 * shard
    else:
        gradients += width * bucket * (2 if zero.get("overlap_comm") else 1)
        gradients += reduced * (width + (wide if wide > width else 0))
        total = (4 if width < 4 else 8) * shard
    kept = (16 if averaged else 12) * shard
    if zero.get("offload_optimizer", {}).get("device", "none") in ("none", None):
        return gradients, kept + total, 0
    on_gpu = 0 if level == 3 else total + width * max(sizes)
    return gradients, on_gpu, kept + (4 + width) * shard + width * max(sizes)


def trained_sizes(module: nn.Module, stage: Stage) -> list[int]:
    """Number of values in each parameter that a stage trains. Cached per module, as planning asks for it hundreds of times."""
    known, key = _trained.setdefault(module, {}), stage.trained
    if key not in known:
        names = set(trainable_names(module, stage))
        known[key] = [parameter.numel() for name, parameter in module.named_parameters() if name in names]
    return known[key]


@lru_cache(maxsize=8)
def _vae(config_json: str) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(**json.loads(config_json))


def _numel(module: nn.Module) -> int:
    if module not in _counted:
        _counted[module] = sum(parameter.numel() for parameter in module.parameters())
    return _counted[module]


_counted: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_trained: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], list[int]]] = weakref.WeakKeyDictionary()
