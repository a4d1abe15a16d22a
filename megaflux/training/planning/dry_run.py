"""`--dry-run`: what a configuration would do and cost, and everything wrong with it. Nothing is loaded or
allocated."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from megaflux.common.errors import UserError
from megaflux.config.parse import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.data.reading import shm_room
from megaflux.data.reading.options import PREFETCH_FACTOR
from megaflux.models.pretrained import meta_models
from megaflux.training.checkpoint import space
from megaflux.training.checkpoint import state as checkpoint
from megaflux.training.checkpoint.weights import count_trained
from megaflux.training.ds_config import compute_dtype, uses_bf16, uses_kernels, zero_stage
from megaflux.training.planning.cache_size import size_of_config
from megaflux.training.planning.checks import find_notes, find_problems
from megaflux.training.planning.costs import Flops, StageCosts, frozen_flops, stage_table, token_counts, training_flops
from megaflux.training.planning.dry_run_table import assumptions, gpus_of, micro_batch_lines, print_table
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.memory import Memory, counted, stage_memory
from megaflux.training.planning.micro_batch import Choice

GIGA = 1e9


def dry_run(
    config: Config,
    ds_config: dict[str, Any],
    world_size: int,
    json_path: str | None = None,
    assumed: Assumed | None = None,
) -> int:
    """Print the resolved configuration, stage table, FLOPs, memory, speed and problems; exit code 0, or 2
    with problems.

    json_path: a file for the same as JSON. assumed: what a person says of the GPUs; where nothing is said of their kind,
    stages, memory and days are for an A100 80 GB, and the table of micro-batches for all that are known.
    UserError where the JSON file cannot be written.
    """
    wanted = config.train.micro_batch_size
    config = config.for_world(world_size)
    print(config.with_batches(config.train.drawn_per_rank, wanted or config.train.micro_batch_size).to_yaml())
    problems = find_problems(config, ds_config, world_size)
    report: dict[str, Any] = {"stages": [], "flops_per_image": None, "memory_gb_per_gpu": None}
    try:
        report |= _costs(config, ds_config, world_size, assumed or Assumed(), wanted == "auto", problems)
    except UserError as error:
        problems.append(str(error))
    notes = find_notes(config)
    for note in notes:
        print(f"note: {note}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems)} problem{'s' * (len(problems) != 1)} found")
    if json_path:
        _write_json(json_path, report | {"world_size": world_size, "notes": notes, "problems": problems})
    return 2 if problems else 0


def _costs(
    config: Config, ds_config: dict[str, Any], world_size: int, assumed: Assumed, choose: bool, problems: list[str]
) -> dict[str, Any]:
    """Print what the configuration costs and return it for the JSON file; a problem more where it does not
    fit. choose: the micro-batch of each stage for images per second."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        module, trunk = meta_models(config)
    except UserError:
        raise
    except Exception as error:  # sizes that a library refuses, in its own words
        raise UserError(f"model: the networks cannot be built: {' '.join(str(error).split())[:200]}") from error
    gpus = gpus_of(assumed)
    found = micro_batch_lines(config, ds_config, world_size, module, trunk, gpus, choose)
    gpu = gpus[0]
    chosen = [line.choice for line in found if line.gpu == gpu and line.cache == config.data.cache and line.chosen]
    buckets = list(chosen[0].seconds)
    table = stage_table(config, module)
    flops = [
        _flops_by_bucket(config, module, trunk, stage, buckets, choice.policies)
        for stage, choice in zip(config.stages, chosen, strict=True)
    ]
    means = [_mean([f.model for f in row.values()]) for row in flops]
    updates = [row.updates for row in table]
    flops_per_image = sum(m * u for m, u in zip(means, updates, strict=True)) / sum(updates)
    needs = [
        (
            choice,
            stage_memory(
                config.with_batches(config.train.drawn_per_rank, choice.micro_batch_size),
                ds_config,
                world_size,
                module,
                trunk,
                stage,
                bucket,
                choice.policies,
            ),
        )
        for stage, choice in zip(config.stages, chosen, strict=True)
        for bucket in buckets
    ]
    largest, memory = max(needs, key=lambda need: need[1].total)
    item = compute_dtype(ds_config).itemsize
    seconds = sum(row.updates * choice.mean_seconds for row, choice in zip(table, chosen, strict=True))
    speed = config.train.updates * config.train.global_batch_size / seconds
    mfu = flops_per_image * speed / (world_size * gpu.peak_tflops * 1e12)

    _print_stages(config, table, means)
    _print_flops(config, buckets, flops)
    _print_memory(largest.micro_batch_size, ds_config, world_size, memory)
    handed_over = _handed_over(config, buckets)
    if handed_over:
        print(f"  {'in /dev/shm, pictures from loader processes':<46}{handed_over / GIGA:>9.3f}")
    cache = size_of_config(config, ds_config, trunk, buckets) if config.data.cache else None
    if cache is not None:
        print(cache.estimated())
    _print_policies(config, ds_config, chosen)
    print_table(found, config, world_size, choose)
    print(
        f"\nSpeed on {world_size} {gpu.name}, of what is chosen: {speed:.3g} images/s, {mfu:.0%} MFU "
        f"(recomputation left out); {config.train.updates} "
        f"updates of {config.train.global_batch_size} images take {_duration(seconds)}\n"
    )
    sizes = [
        space.checkpoint_bytes(sum(row.trainable.values()), count_trained(config, module, stage), item)
        for stage, row in enumerate(table)
    ]
    _print_checkpoints(config, sizes, speed)
    if memory.total / GIGA > gpu.memory_gb:
        mends = [] if choose else ["lower train.micro_batch_size or set it to auto"]
        if config.model.activation_checkpointing not in ("auto", "full"):
            mends.append("set model.activation_checkpointing to auto")
        mends.append("use more GPUs or zero3.json")
        problems.append(
            f"memory: {memory.total / GIGA:.1f} GB per GPU is more than {gpu.memory_gb:g} GB; {', '.join(mends)}"
        )
    images = config.train.global_batch_size
    return {
        "stages": [asdict(row) | {"flops_per_image": mean} for row, mean in zip(table, means, strict=True)],
        "flops_per_image": flops_per_image,
        "flops": {
            stage.name: {str(b): asdict(f) | {"model": f.model, "hardware": f.hardware} for b, f in row.items()}
            for stage, row in zip(config.stages, flops, strict=True)
        },
        "memory_gb_per_gpu": memory.total / GIGA,
        "memory": asdict(memory),
        "shared_memory_gb_per_gpu": handed_over / GIGA,
        "cache": cache.as_json() if cache is not None else None,
        "activation_checkpointing": {
            s.name: list(choice.policies) for s, choice in zip(config.stages, chosen, strict=True)
        },
        "micro_batch_size": {s.name: choice.micro_batch_size for s, choice in zip(config.stages, chosen, strict=True)},
        "micro_batches": [line.as_json(scope, images) for line in found for scope in ("largest", "mean")],
        "assumptions": assumptions(found, world_size),
        "checkpoint_gb": {s.name: size / GIGA for s, size in zip(config.stages, sizes, strict=True)},
        "gpu": gpu.name,
        "images_per_second": speed,
        "days": seconds / 86400,
        "mfu": mfu,
        "peak_tflops": gpu.peak_tflops,
    }


def _handed_over(config: Config, buckets: Sequence[Bucket]) -> int:
    """Bytes of /dev/shm that one rank's loading processes fill with pictures. A run counts what its dataset holds, cached
    arrays included, and asks the machine."""
    sample = max(shm_room.sample_bytes(bucket, {"image": "bytes"}) for bucket in buckets)
    return shm_room.batches_bytes(config.train.drawn_per_rank * sample, config.data.num_workers, PREFETCH_FACTOR)


def _flops_by_bucket(
    config: Config,
    module: nn.Module,
    trunk: nn.Module,
    stage: Stage,
    buckets: Sequence[Bucket],
    policies: Sequence[str],
) -> dict[Bucket, Flops]:
    return {
        bucket: training_flops(
            module, stage, token_counts(config, bucket), frozen_flops(config, trunk, bucket), policies
        )
        for bucket in buckets
    }


def _print_stages(config: Config, table: list[StageCosts], means: list[float]) -> None:
    print(f"{'stage':<10}{'updates':>9}  {'set':<10}{'FLUX':>15}{'connector':>13}{'Qwen2-VL':>13}{'FLOP/image':>13}")
    for stage, row, mean in zip(config.stages, table, means, strict=True):
        counts = row.trainable
        print(
            f"{row.name:<10}{row.updates:>9}  {stage.components:<10}{counts['flux']:>15,}"
            f"{counts['connector']:>13,}{counts['vlm']:>13,}{_si(mean):>13}"
        )
        print(f"{'':<10}blocks: {'all' if stage.blocks == 'all' else ' '.join(map(str, row.blocks))}")


def _print_flops(config: Config, buckets: Sequence[Bucket], flops: list[dict[Bucket, Flops]]) -> None:
    print("\nFLOP per image; model: forward, dX, dW, attention's backward, frozen networks if not cached; hardware:")
    print("with recomputation. The mean above weighs the buckets alike.")
    head = ("forward", "dX", "dW", "attn bwd", "frozen", "model", "hardware")
    print(f"{'stage':<10}{'bucket':<20}{'tokens':>12}" + "".join(f"{name:>10}" for name in head))
    for stage, row in zip(config.stages, flops, strict=True):
        for bucket in buckets:
            f, tokens = row[bucket], token_counts(config, bucket)
            values = (
                f.forward_linear + f.forward_attention,
                f.backward_inputs,
                f.backward_weights,
                f.backward_attention,
                f.frozen,
                f.model,
                f.hardware,
            )
            lengths = f"{tokens.image}+{tokens.condition}"
            print(f"{stage.name:<10}{bucket!s:<20}{lengths:>12}" + "".join(f"{_si(v):>10}" for v in values))


def _print_memory(micro_batch_size: int, ds_config: dict[str, Any], world_size: int, memory: Memory) -> None:
    precision = "bfloat16" if uses_bf16(ds_config) else "float32"
    print(
        f"\nGB per GPU: {world_size} GPU{'s' * (world_size > 1)}, ZeRO-{zero_stage(ds_config)}, {precision}, "
        f"micro-batch {micro_batch_size}; peak: {memory.stage}, {memory.bucket}"
    )
    lines = {f"weights, {name}": size for name, size in memory.weights.items()}
    lines |= {
        "gradients in flight": memory.gradients,
        "optimizer shard, sum of gradients": memory.optimizer,
        "activations": memory.activations,
        "or, when larger: VAE encode or decode": memory.transient,
        "CUDA, NCCL and libraries": memory.runtime,
    }
    for name, size in lines.items():
        print(f"  {name:<46}{size / GIGA:>9.3f}")
    print(f"  {'total':<46}{memory.total / GIGA:>9.3f}")
    if memory.host_optimizer:
        print(f"  {'on the host: optimizer shard':<46}{memory.host_optimizer / GIGA:>9.3f}")


def _print_policies(config: Config, ds_config: dict[str, Any], chosen: Sequence[Choice]) -> None:
    kernels = "megaflux_kernels" if uses_kernels(config, ds_config) else "diffusers' own path"
    print(
        f"\nFLUX runs on {kernels}; what its blocks compute again (model.activation_checkpointing "
        f"{config.model.activation_checkpointing}):"
    )
    for stage, choice in zip(config.stages, chosen, strict=True):
        print(f"  {stage.name:<10}micro-batch {choice.micro_batch_size}: {counted(choice.policies)}")


def _print_checkpoints(config: Config, sizes: Sequence[int], speed: float) -> None:
    every, most = config.train.checkpoint_every, checkpoint.most_at_once(config, 0)
    between = _duration(every * config.train.global_batch_size / speed)
    shown = ", ".join(f"{size / GIGA:.3g} GB in {stage.name}" for stage, size in zip(config.stages, sizes, strict=True))
    print(
        f"Checkpoints: {shown}; one every {every} update{'s' * (every > 1)}, which is {between} at this speed and the most "
        f"that a crash costs; up to {most} at once, {most * max(sizes) / GIGA:.3g} GB of run.dir's disk\n"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _si(flops: float) -> str:
    """Three digits and a unit: 1.81e14 -> 181 T."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _write_json(path: str, report: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; give a file in a folder that can be written") from None
