"""What a configuration costs: everything that the dry run prints and writes as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megaflux.data.buckets import Bucket
from megaflux.data.reading import shm_room
from megaflux.data.reading.options import PREFETCH_FACTOR
from megaflux.training.checkpoint import space
from megaflux.training.checkpoint.weights import count_trained
from megaflux.training.ds_config import compute_dtype, zero_stage
from megaflux.training.planning.cache_size import CacheSize, size_of_config
from megaflux.training.planning.costs import Flops, StageCosts, frozen_flops, stage_table, token_counts, training_flops
from megaflux.training.planning.dry_run_table import Line, assumptions, gpus_of, micro_batch_lines
from megaflux.training.planning.gpus import Assumed, Gpu
from megaflux.training.planning.memory import StageMemory, stage_memory
from megaflux.training.planning.micro_batch import Choice
from megaflux.training.planning.sizes import Sizes

GIGA = 1e9
DAY = 86400


@dataclass(frozen=True)
class Estimate:
    """Costs of a run. Sequences have one element per stage."""

    sizes: Sizes
    gpu: Gpu
    """The GPU that memory and speed are for."""
    lines: Sequence[Line]
    """Every micro-batch on every GPU."""
    chosen: Sequence[Choice]
    """Each stage's plan on `gpu`."""
    buckets: Sequence[Bucket]
    table: Sequence[StageCosts]
    flops: Sequence[dict[Bucket, Flops]]
    memory: StageMemory
    """Of the stage and bucket that need most."""
    memory_choice: Choice
    """The plan of that stage."""
    handed_over: int
    """Bytes of /dev/shm that one rank's loader processes fill with pictures."""
    cache: CacheSize | None
    """Of data.cache; None: nothing is cached."""
    checkpoints: Sequence[int]
    """Bytes of one checkpoint."""

    @property
    def mean_flops(self) -> list[float]:
        """Model FLOPs of one image in each stage, averaged over buckets."""
        return [_mean([flops.model for flops in row.values()]) for row in self.flops]

    @property
    def flops_per_image(self) -> float:
        """Model FLOPs of one image, averaged over updates."""
        updates = [row.updates for row in self.table]
        return sum(m * u for m, u in zip(self.mean_flops, updates, strict=True)) / sum(updates)

    @property
    def seconds(self) -> float:
        """Predicted time of all updates."""
        return sum(row.updates * choice.mean_seconds for row, choice in zip(self.table, self.chosen, strict=True))

    @property
    def speed(self) -> float:
        """Predicted images per second, on all GPUs together."""
        train = self.sizes.config.train
        return train.updates * train.global_batch_size / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the fraction of the GPUs' peak, without recomputation."""
        return self.flops_per_image * self.speed / (self.sizes.ranks * self.gpu.peak_tflops * 1e12)

    def memory_problem(self, choose: bool) -> str | None:
        """One line if the plan does not fit the GPU, with the remedies; else None. choose: whether the micro-batch is chosen."""
        if self.memory.total / GIGA <= self.gpu.memory_gb:
            return None
        remedies = [] if choose else ["lower train.micro_batch_size or set it to auto"]
        if self.sizes.config.model.activation_checkpointing not in ("auto", "full"):
            remedies.append("set model.activation_checkpointing to auto")
        remedies.append("use more GPUs" + " or zero3.json" * (zero_stage(self.sizes.ds_config) < 3))
        total = self.memory.total / GIGA
        return f"memory: {total:.1f} GB per GPU is more than {self.gpu.memory_gb:g} GB; {', '.join(remedies)}"

    def as_json(self) -> dict[str, Any]:
        """Plain data for the JSON file."""
        config = self.sizes.config
        names = [stage.name for stage in config.stages]
        images = config.train.global_batch_size
        return {
            "stages": [
                asdict(row) | {"flops_per_image": mean} for row, mean in zip(self.table, self.mean_flops, strict=True)
            ],
            "flops_per_image": self.flops_per_image,
            "flops": {
                name: {str(b): asdict(f) | {"model": f.model, "hardware": f.hardware} for b, f in row.items()}
                for name, row in zip(names, self.flops, strict=True)
            },
            "memory_gb_per_gpu": self.memory.total / GIGA,
            "memory": asdict(self.memory),
            "shared_memory_gb_per_gpu": self.handed_over / GIGA,
            "cache": self.cache.as_json() if self.cache is not None else None,
            "activation_checkpointing": {n: list(c.policies) for n, c in zip(names, self.chosen, strict=True)},
            "micro_batch_size": {n: c.micro_batch_size for n, c in zip(names, self.chosen, strict=True)},
            "micro_batches": [line.as_json(scope, images) for line in self.lines for scope in ("largest", "mean")],
            "assumptions": assumptions(self.lines, self.sizes.ranks),
            "checkpoint_gb": {name: size / GIGA for name, size in zip(names, self.checkpoints, strict=True)},
            "gpu": self.gpu.name,
            "images_per_second": self.speed,
            "days": self.seconds / DAY,
            "mfu": self.mfu,
            "peak_tflops": self.gpu.peak_tflops,
        }


def estimate(sizes: Sizes, assumed: Assumed, choose: bool) -> Estimate:
    """The costs of a run. assumed: what the user states about the GPUs. choose: whether each stage's micro-batch is chosen
    for images per second. Raises UserError if a stage's block matches no parameter."""
    config = sizes.config
    gpus = gpus_of(assumed)
    lines, gpu = micro_batch_lines(sizes, gpus, choose), gpus[0]
    chosen = [line.choice for line in lines if line.gpu == gpu and line.cache == config.data.cache and line.chosen]
    buckets = list(chosen[0].seconds)
    table = stage_table(config, sizes.module)
    flops = [
        {
            bucket: training_flops(
                sizes.module,
                stage,
                token_counts(config, bucket),
                frozen_flops(config, sizes.trunk, bucket),
                choice.policies,
            )
            for bucket in buckets
        }
        for stage, choice in zip(config.stages, chosen, strict=True)
    ]
    needs = [
        (choice, stage_memory(sizes.cut_into(choice.micro_batch_size), stage, bucket, choice.policies))
        for stage, choice in zip(config.stages, chosen, strict=True)
        for bucket in buckets
    ]
    memory_choice, memory = max(needs, key=lambda need: need[1].total)
    item = compute_dtype(sizes.ds_config).itemsize
    return Estimate(
        sizes=sizes,
        gpu=gpu,
        lines=lines,
        chosen=chosen,
        buckets=buckets,
        table=table,
        flops=flops,
        memory=memory,
        memory_choice=memory_choice,
        handed_over=_handed_over(sizes, buckets),
        cache=size_of_config(config, sizes.ds_config, sizes.trunk, buckets) if config.data.cache else None,
        checkpoints=[
            space.checkpoint_bytes(
                sum(row.trainable.values()),
                count_trained(config, sizes.module, stage),
                item,
                config.optim.ema_decay > 0,
            )
            for stage, row in enumerate(table)
        ],
    )


def _handed_over(sizes: Sizes, buckets: Sequence[Bucket]) -> int:
    """Bytes of /dev/shm that one rank's loader processes fill with pictures. A run counts its own dataset, cached arrays
    included, and asks the machine."""
    sample = max(shm_room.sample_bytes(bucket, {"image": "bytes"}) for bucket in buckets)
    return shm_room.batches_bytes(sizes.drawn * sample, sizes.config.data.num_workers, PREFETCH_FACTOR)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
