"""The dry run's text: stages, FLOPs, memory, speed and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

from megaflux.config.recipe import PARTS, Part, Stage
from megaflux.config.schema import Config
from megaflux.training.checkpoint.retention import most_at_once
from megaflux.training.ds_config import uses_bf16, zero_stage
from megaflux.training.planning.costs import token_counts
from megaflux.training.planning.dry_run_table import print_table
from megaflux.training.planning.estimate import GIGA, Estimate
from megaflux.training.planning.memory import counted
from megaflux.training.text import duration


def print_estimate(found: Estimate, choose: bool) -> None:
    """Print what a run costs. choose: whether the micro-batch is chosen for images per second."""
    train, ranks = found.sizes.config.train, found.sizes.ranks
    _print_stages(found)
    _print_flops(found)
    _print_memory(found)
    if found.handed_over:
        print(f"  {'in /dev/shm, pictures from loader processes':<46}{found.handed_over / GIGA:>9.3f}")
    if found.cache is not None:
        print(found.cache.estimated())
    _print_policies(found)
    print_table(found.lines, found.sizes, choose)
    print(
        f"\nSpeed on {ranks} {found.gpu.name}, of what is chosen: {found.speed:.3g} images/s, {found.mfu:.0%} MFU "
        f"(recomputation left out); {train.updates} "
        f"updates of {train.global_batch_size} images take {duration(found.seconds)}\n"
    )
    _print_checkpoints(found)


def _print_stages(found: Estimate) -> None:
    config = found.sizes.config
    wide, names = _width(config), [_set_name(stage) for stage in config.stages]
    most = max(10, *(len(name) + 1 for name in names))
    print(
        f"{'stage':<{wide}}{'updates':>9}  {'set':<{most}}{'FLUX':>15}{'connector':>13}{'Qwen2-VL':>13}{'FLOP/image':>13}"
    )
    for stage, name, row, mean in zip(config.stages, names, found.table, found.mean_flops, strict=True):
        counts = row.trainable
        print(
            f"{row.name:<{wide}}{row.updates:>9}  {name:<{most}}{counts['flux']:>15,}"
            f"{counts['connector']:>13,}{counts['vlm']:>13,}{_si(mean):>13}"
        )
        blocks = stage.blocks if isinstance(stage.blocks, str) else " ".join(map(str, row.blocks))
        print(f"{'':<{wide}}blocks: {blocks}")
        if name == "a list":
            print(f"{'':<{wide}}components: {', '.join(stage.components)}")
        if line := _rates(config, stage, [part for part in PARTS if counts[part]]):
            print(f"{'':<{wide}}{line}")


def _set_name(stage: Stage) -> str:
    """What the table calls a stage's components."""
    if stage.blocks == "none":
        return "none"
    return stage.components if isinstance(stage.components, str) else "a list"


def _width(config: Config) -> int:
    """Of a column of stages' names."""
    return max(10, *(len(stage.name) + 1 for stage in config.stages))


def _rates(config: Config, stage: Stage, parts: Sequence[Part]) -> str:
    """The peak rates and weight decays of the parts that train in a stage, on one line, each where it differs between parts
    or stages; empty where none does."""
    everywhere = [peak for other in config.stages for peak in config.optim.peaks(other).values()]
    peaks, shown = config.optim.peaks(stage), []
    for name, field in (("lr", "lr"), ("weight decay", "weight_decay")):
        if len({getattr(peak, field) for peak in everywhere}) > 1:
            values = {part: getattr(peaks[part], field) for part in parts}
            one = len(set(values.values())) == 1
            texts = (
                [f"{value:g}" for value in values.values()][:1] if one else [f"{p} {v:g}" for p, v in values.items()]
            )
            shown.append(f"{name}: {', '.join(texts)}")
    return "; ".join(shown)


def _print_flops(found: Estimate) -> None:
    config = found.sizes.config
    print("\nFLOP per image; model: forward, dX, dW, attention's backward, frozen networks if not cached; hardware:")
    print("with recomputation. The mean above weighs all buckets equally.")
    head = ("forward", "dX", "dW", "attn bwd", "frozen", "model", "hardware")
    wide = _width(config)
    print(f"{'stage':<{wide}}{'bucket':<20}{'tokens':>12}" + "".join(f"{name:>10}" for name in head))
    for stage, row in zip(config.stages, found.flops, strict=True):
        for bucket in found.buckets:
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
            print(f"{stage.name:<{wide}}{bucket!s:<20}{lengths:>12}" + "".join(f"{_si(v):>10}" for v in values))


def _print_memory(found: Estimate) -> None:
    memory, ds_config, ranks = found.memory, found.sizes.ds_config, found.sizes.ranks
    precision = "bfloat16" if uses_bf16(ds_config) else "float32"
    print(
        f"\nGB per GPU: {ranks} GPU{'s' * (ranks > 1)}, ZeRO-{zero_stage(ds_config)}, {precision}, "
        f"micro-batch {found.memory_choice.micro_batch_size}; peak: {memory.stage}, {memory.bucket}"
    )
    averaged = found.sizes.config.optim.ema_decay > 0
    lines = {f"weights, {name}": size for name, size in memory.weights.items()}
    lines |= {
        "gradients in flight": memory.gradients,
        f"optimizer shard{', average' * averaged}, sum of gradients": memory.optimizer,
        "activations": memory.activations,
        "or, when larger: VAE encode or decode": memory.transient,
        "CUDA, NCCL and libraries": memory.runtime,
    }
    for name, size in lines.items():
        print(f"  {name:<46}{size / GIGA:>9.3f}")
    print(f"  {'total':<46}{memory.total / GIGA:>9.3f}")
    if memory.host_optimizer:
        print(f"  {'on the host: optimizer shard':<46}{memory.host_optimizer / GIGA:>9.3f}")


def _print_policies(found: Estimate) -> None:
    config = found.sizes.config
    kernels = "megaflux_kernels" if found.sizes.fused else "diffusers' own path"
    print(
        f"\nFLUX runs on {kernels}; what its blocks recompute (model.activation_checkpointing "
        f"{config.model.activation_checkpointing}):"
    )
    for stage, choice in zip(config.stages, found.chosen, strict=True):
        print(f"  {stage.name:<{_width(config)}}micro-batch {choice.micro_batch_size}: {counted(choice.policies)}")


def _print_checkpoints(found: Estimate) -> None:
    config, sizes = found.sizes.config, found.checkpoints
    every, most = config.train.checkpoint_every, most_at_once(config, 0)
    between = duration(every * config.train.global_batch_size / found.speed)
    shown = ", ".join(f"{size / GIGA:.3g} GB in {stage.name}" for stage, size in zip(config.stages, sizes, strict=True))
    print(
        f"Checkpoints: {shown}; one every {every} update{'s' * (every > 1)}, which is {between} at this speed and the most "
        f"that a crash costs; up to {most} at once, {most * max(sizes) / GIGA:.3g} GB of run.dir's disk\n"
    )


def _si(flops: float) -> str:
    """Three digits and a unit: 1.81e14 -> 181 T."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops:.3g}"
