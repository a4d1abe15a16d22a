"""python -m megaflux.bench step: forward and backward of FLUX, diffusers against ours, in one process.

Random weights, normal inputs, the frozen parameters of stage 1, a gradient for the condition, no optimizer. First the
numerics gate; then the arms in turns, there and back (ABBA), each sample timed. At the start of each turn come the matrix
products and the attention of a step alone, which are the limit: fraction_of_limit = limit / step.

An arm's rows are written after its last sample: a killed bench, run again with --resume, measures only the arms without
rows, or without fraction_of_limit because a part of the limit failed. An arm that fails loses only its own rows: a line
says why, and the others continue.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import limits, numerics
from megaflux.bench.activations import freeze, trainable_flux
from megaflux.bench.arms import ARMS, Arms, is_compiled, random_flux, random_inputs
from megaflux.bench.sizes import Sizes, add_size_arguments, pixels, sizes
from megaflux.common.errors import is_out_of_memory
from megaflux.training.planning.gpus import peak_tflops_for
from megaflux_kernels import cudnn
from megaflux_kernels.bench.machine import attention_backend, clocks, default_device, facts, first_line
from megaflux_kernels.bench.report import (
    Parser,
    Report,
    Row,
    add_report_arguments,
    one_of,
    open_report,
    positive,
    table,
)
from megaflux_kernels.bench.timing import median, quantile, samples_ms

BENCH = "step"
LIMIT = "limit"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROUNDS = 4  # there, back, there, back; the samples are divided among them. A CPU is shared: two samples each
RATIOS = (
    ("ours-none", "diffusers-eager"),
    ("ours-mlp", "diffusers-eager-full"),
    ("ours-none", "diffusers-compile"),
    ("ours-mlp", "diffusers-compile-full"),
    ("ours-full", "diffusers-eager-full"),
)


@dataclass(frozen=True)
class Timing:
    """Where and how often arms are timed."""

    device: torch.device
    samples: int
    """Timed steps of each arm."""
    warmup: int
    """Steps of each arm before its first sample."""


@dataclass(frozen=True)
class Todo:
    """What is left to measure at one grid."""

    grid: tuple[int, int]
    """Rows and columns of image tokens."""
    shape: str
    """Its name in the report (`Sizes.shape`)."""
    arms: list[str]


@dataclass
class Measured:
    """An arm's samples so far."""

    times: list[float] = field(default_factory=list)
    """Milliseconds per step."""
    extra: dict[str, int] = field(default_factory=dict)
    """peak_bytes and saved_bytes, where they were measured."""


def add_arguments(parser: Parser) -> None:
    on_gpu = default_device().type == "cuda"
    known = [arm for arm in ARMS if on_gpu or not is_compiled(arm)]
    parser.add_argument(
        "--arms",
        type=partial(one_of, known=ARMS, what="arm"),
        default=known,
        metavar="A,B",
        help=f"of {', '.join(ARMS)} (default: all on a GPU, those not compiled on a CPU)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=20 if on_gpu else 8,
        metavar="N",
        help="timed steps of each arm (default 20 on a GPU, 8 on a CPU)",
    )
    parser.add_argument(
        "--warmup",
        type=positive,
        default=5 if on_gpu else 2,
        metavar="N",
        help="steps of each arm before its first sample (default 5 on a GPU, 2 on a CPU)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16" if on_gpu else "float32",
        help="of weights and inputs (default bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=None if on_gpu else 1,
        metavar="N",
        help="of torch on the CPU (default 1 on a CPU: on a machine that others use too, threads wait for each other)",
    )
    parser.add_argument(
        "--attention",
        choices=("auto", *BACKENDS),
        default="auto",
        help="backend of scaled_dot_product_attention for all arms (default auto: torch chooses)",
    )
    add_size_arguments(parser, full=on_gpu, components="attention")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Exit code: 0, also where memory was too small or torch.compile cannot compile here; 1 where the numerics gate
    refuses, before anything is timed, and where an arm failed in another way, with all other rows written."""
    device, dtype = default_device(), DTYPES[args.dtype]
    chosen = sizes(parser, args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("highest")
    failed = False
    with sdpa_kernel(BACKENDS[args.attention]) if args.attention != "auto" else nullcontext():
        backend = backends(parser, args, chosen, dtype, device)
        report = open_report(parser, args, facts(device, backend))
        print(
            f"{report.facts['device']}, attention {backend}, torch {torch.__version__}, commit "
            f"{(report.facts['commit'] or 'unknown')[:12]}; stage 1 trains {chosen.components} of blocks "
            f"{','.join(map(str, chosen.train_blocks))}"
        )
        todo = []
        for grid in args.grids:
            shape = chosen.shape(grid, args.dtype)
            arms = [arm for arm in args.arms if not report.has(BENCH, arm, shape, "fraction_of_limit")]
            if skipped := len(args.arms) - len(arms):
                print(f"{shape}: {skipped} of {len(args.arms)} arms are in {args.json} already")
            exact, lost = past_gate(chosen, grid, dtype, device, arms)
            if exact is None:
                return 1
            failed |= lost
            todo += [Todo(grid, shape, exact)] if exact else []
        if todo:
            failed |= measure(report, chosen, todo, dtype, Timing(device, args.samples, args.warmup))
    print()
    print(table(row for row in report.rows if row.bench == BENCH))
    for line in ratios(report.rows):
        print(line)
    return int(failed)


def backends(parser: Parser, args: argparse.Namespace, chosen: Sizes, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that attention really uses at the given lengths, such as "cudnn", or "cudnn, flash" where they differ.
    A chosen backend that does not support them, or is wrong there, ends the process with one line."""
    found = []
    for rows, columns in args.grids:
        tokens = rows * columns + chosen.text
        problem = cudnn.problem(tokens)
        if problem and args.attention == "cudnn":
            parser.error(f"--attention cudnn: {problem}; use --attention flash")
        try:
            backend = attention_backend(device, dtype, chosen.heads, chosen.head_dim, tokens)
        except RuntimeError as error:
            parser.error(f"--attention {args.attention}: not for these tensors on {device} ({first_line(error)})")
        found.append(backend)
    return ", ".join(dict.fromkeys(found))


def past_gate(
    chosen: Sizes, grid: tuple[int, int], dtype: torch.dtype, device: torch.device, arms: Sequence[str]
) -> tuple[list[str] | None, bool]:
    """(arms that may be timed, whether one failed). Those are the arms that are not ours, and ours that are exact enough.
    One that raises in the gate is left out, with a line; too little memory is not a failure. (None, True), with a line,
    where one is not exact enough: then nothing is timed."""
    groups, failed = [[arm for arm in arms if arm.startswith("ours")]], False
    found: dict[str, list[numerics.Error]] = {}
    while groups:
        if group := groups.pop(0):
            try:
                found |= numerics.gate(chosen, grid, dtype, device, group)
            except Exception as error:
                if len(group) > 1:
                    groups = [[arm] for arm in group]  # each by itself, to see whose error it is
                else:
                    problem, wrong = _why(error)
                    print(
                        f"{'error: ' * wrong}numerics gate: {pixels(grid)} {group[0]}: {problem}; no row",
                        file=sys.stderr,
                        flush=True,
                    )
                    failed |= wrong
            _free(device)
    for arm, errors in found.items():
        worst = errors[0]
        line = (
            f"{pixels(grid)} {arm}: {len(errors)} results, worst {worst.name} {worst.ours:.2e} "
            f"(diffusers' {worst.eager:.2e})"
        )
        if not worst.passes:
            print(f"error: numerics gate: {line}: more than twice; nothing was timed", file=sys.stderr)
            return None, True
        print(f"numerics gate: {line}")
    return [arm for arm in arms if arm in found or not arm.startswith("ours")], failed


def measure(report: Report, chosen: Sizes, todo: Sequence[Todo], dtype: torch.dtype, timing: Timing) -> bool:
    """Build one FLUX and measure all of todo. Returns whether something failed; too little memory is not a failure."""
    config, device = chosen.flux_config(), timing.device
    try:
        arms = Arms(random_flux(config, dtype, device))
    except Exception as error:
        return _no_rows(dict.fromkeys(name for at in todo for name in at.arms), error)
    trainable = trainable_flux(config, chosen.train_blocks, chosen.components)
    freeze(arms.transformer, trainable)
    failed = False
    for at in todo:
        failed |= measure_shape(report, chosen, arms, trainable, at, timing)
    if device.type == "cuda":
        total = sum(p.numel() for p in arms.transformer.parameters() if p.requires_grad)
        del arms
        _free(device)
        try:
            row = optimizer_row(total // 8, todo[-1].shape, timing)
        except Exception as error:
            failed |= _no_rows(["optimizer"], error)
        else:
            report.add(row)
    return failed


def measure_shape(report: Report, chosen: Sizes, arms: Arms, trainable: set[str], todo: Todo, timing: Timing) -> bool:
    """Measure the limit and the arms at one grid; rows are added as they come. Returns whether something failed."""
    tokens, dtype, device = todo.grid[0] * todo.grid[1], arms.transformer.dtype, arms.transformer.device
    counted = limits.products(chosen, tokens, trainable)
    flops = limits.step_flops(chosen, tokens, counted)
    parts = {
        "gemm_ms": partial(limits.run_products, counted, dtype, device),
        "attention_ms": partial(limits.run_attention, chosen, tokens, dtype, device),
    }
    limit: dict[str, float] = {}

    def done(name: str, measured: Measured) -> None:
        ms = median(measured.times)
        if name in parts:
            limit[name] = ms
            report.add(Row(BENCH, LIMIT, todo.shape, name, ms, "ms", timing.samples))
            return
        known = sum(limit.values()) if len(limit) == len(parts) else None
        peak = peak_tflops_for(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if dtype == torch.float32:  # whose peak this is not
            peak = None
        report.add(*rows(name, todo.shape, measured, known, flops, peak))
        print(f"  {name}: {ms:.2f} ms", flush=True)

    try:
        print(f"\n{pixels(todo.grid)} px: {todo.shape}. {clocks(device)}".rstrip(), flush=True)
        given = random_inputs(arms.transformer, chosen.batch, todo.grid, chosen.text, device)
    except RuntimeError as error:  # no memory, or an arm of an earlier grid has left the GPU unusable
        return _no_rows(todo.arms, error)
    failed = take_turns(arms, todo.arms, given, parts, replace(timing, device=device), done)
    arms.forget_compiled()
    _free(device)
    return failed


def take_turns(
    arms: Arms,
    names: Sequence[str],
    given: dict[str, Any],
    parts: Mapping[str, Callable[[], Callable[[], Any]]],
    timing: Timing,
    done: Callable[[str, Measured], None],
) -> bool:
    """Measure parts and arms, there and back, until all samples are taken. Returns whether one failed.

    done is called for each after its last sample, parts before arms. One that fails is left out, with a line that says
    why; too little memory, and an arm that cannot be compiled here, are not failures. After an error that leaves the GPU
    unusable, each arm still to come gets its own line.
    """
    measured: dict[str, Measured] = defaultdict(Measured)
    left_out: set[str] = set()
    failed, device, samples = False, timing.device, timing.samples
    rounds = min(ROUNDS, samples) if device.type == "cuda" else -(-samples // 2)
    for turn in range(rounds):
        share = samples * (turn + 1) // rounds - samples * turn // rounds
        now = Timing(device, share, timing.warmup if turn == 0 else 1)
        for name in (*parts, *(names if turn % 2 == 0 else names[::-1])):
            if name in left_out:
                continue
            stopped = False
            try:
                if name in parts:
                    # Its tensors live for its turn only: they must not count as an arm's memory.
                    measured[name].times += samples_ms(parts[name](), device, now.samples, now.warmup)
                else:
                    _sample_arm(arms, name, given, now, measured[name])
            except Exception as error:
                failed |= _no_rows([name], error, is_compiled(name))
                stopped = True
                left_out.add(name)
            if not stopped and turn == rounds - 1:
                done(name, measured[name])
            if stopped or name in parts:
                _free(device)
    return failed


def _sample_arm(arms: Arms, name: str, given: dict[str, Any], timing: Timing, measured: Measured) -> None:
    """Add an arm's samples, its peak and what it saves."""
    clear, step = partial(arms.clear, given), partial(arms.step, given)
    device, warmup, extra = timing.device, timing.warmup, measured.extra
    try:
        arms.set(name)
        if device.type == "cuda":
            samples_ms(step, device, 0, warmup, clear)
            torch.cuda.reset_peak_memory_stats(device)
            warmup = 0
        measured.times += samples_ms(step, device, timing.samples, warmup, clear)
        if device.type == "cuda":
            extra["peak_bytes"] = max(extra.get("peak_bytes", 0), torch.cuda.max_memory_allocated(device))
        clear()
        if not is_compiled(name) and "saved_bytes" not in extra:
            extra["saved_bytes"] = arms.saved_bytes(name, given)
    finally:
        clear()


def _no_rows(names: Iterable[str], error: Exception, compiled: bool = False) -> bool:
    """Print why arms or parts have no row, a line each. Returns whether that is a failure."""
    problem, wrong = _why(error, compiled)
    print("\n".join(f"  {name}: {problem}; no row" for name in names), flush=True)
    return wrong


def _why(error: Exception, compiled: bool = False) -> tuple[str, bool]:
    """(why an arm or a part has no row, whether that is a failure). compiled: torch.compile was used."""
    if is_out_of_memory(error):
        return "out of memory", False
    if compiled and isinstance(error, RuntimeError) and not isinstance(error, torch.AcceleratorError):
        return f"cannot be compiled here ({first_line(error)})", False
    return first_line(error), True


def rows(
    arm: str, shape: str, measured: Measured, limit_ms: float | None, flops: int, peak_tflops: float | None
) -> list[Row]:
    """What is known of one arm at one shape. limit_ms: None where the limit could not be measured; peak_tflops: of the
    GPU in this dtype, None if unknown."""
    times = measured.times
    value, n = median(times), len(times)
    found = [
        Row(BENCH, arm, shape, "step_ms", value, "ms", n),
        Row(BENCH, arm, shape, "step_ms_p10", quantile(times, 0.1), "ms", n),
        Row(BENCH, arm, shape, "step_ms_p90", quantile(times, 0.9), "ms", n),
        Row(BENCH, arm, shape, "tflop_per_s", flops / value / 1e9, "TFLOP/s", n),
    ]
    if limit_ms is not None:
        found.insert(3, Row(BENCH, arm, shape, "fraction_of_limit", limit_ms / value, "1", n))
    if peak_tflops:
        found.append(Row(BENCH, arm, shape, "mfu", flops / value / 1e9 / peak_tflops, "1", n))
    return found + [Row(BENCH, arm, shape, name, float(size), "bytes") for name, size in measured.extra.items()]


def optimizer_row(numel: int, shape: str, timing: Timing) -> Row:
    """AdamW in float32 on an eighth of what is trained, the share of one of 8 ranks under ZeRO-2: simulated, without
    communication."""
    device, samples, warmup = timing.device, timing.samples, timing.warmup
    parameter = torch.zeros(numel, device=device, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-5, weight_decay=0.1, fused=True)
    times = samples_ms(optimizer.step, device, samples, warmup)
    return Row(BENCH, "optimizer-simulated-1-of-8", shape, "optimizer_ms", median(times), "ms", samples)


def ratios(found: Sequence[Row]) -> list[str]:
    """How many times as fast ours is, by shape, in human-readable lines."""
    times = {(row.shape, row.arm): row.value for row in found if (row.bench, row.metric) == (BENCH, "step_ms")}
    lines = []
    for shape in dict.fromkeys(shape for shape, _ in times):
        pairs = [(a, b) for a, b in RATIOS if (shape, a) in times and (shape, b) in times]
        if pairs:
            texts = (f"{a} {times[shape, b] / times[shape, a]:.2f}x {b}" for a, b in pairs)
            lines.append(f"{shape}: " + ", ".join(texts))
    return lines


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # a GPU left unusable by an arm: that arm's line has reported it
            torch.cuda.empty_cache()
