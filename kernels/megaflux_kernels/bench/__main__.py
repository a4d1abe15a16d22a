"""python -m megaflux_kernels.bench [--op NAME]: each op against its eager and its compiled reference.

First a gate: outputs and every gradient against float64, with at most twice the eager reference's error. An op that fails
it, or raises in it, gets no row; the others continue, and the exit code is 1. Then the times of forward, and of forward
and backward, and the fraction of the limit measured in the same run: a large copy's bytes per second, or a large product's
FLOPs. An arm that cannot run gets a line and no row; if it is ours, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from megaflux_kernels import OPS
from megaflux_kernels.bench import cases, timing, trials
from megaflux_kernels.bench.machine import attention_backend, default_device, facts, first_line
from megaflux_kernels.bench.report import Parser, Report, Row, add_report_arguments, open_report, positive, table
from megaflux_kernels.dispatch import describe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    device = default_device()
    on_gpu = device.type == "cuda"
    parser = Parser(prog="python -m megaflux_kernels.bench", description=__doc__)
    parser.add_argument("--op", choices=OPS, help="one op (default: all)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16" if on_gpu else "float32",
        help="default bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="default 1")
    parser.add_argument("--image", type=positive, metavar="N", help="image tokens (default 4096, on a CPU 256)")
    parser.add_argument("--samples", type=positive, default=20, metavar="N", help="timed calls (default 20)")
    parser.add_argument(
        "--threads",
        type=positive,
        default=None if on_gpu else 1,
        metavar="N",
        help="of torch on the CPU (default 1 on a CPU)",
    )
    parser.add_argument("--no-compile", action="store_true", help="without the compiled reference")
    add_report_arguments(parser)
    args = parser.parse_args(argv)

    dtype, sizes = DTYPES[args.dtype], cases.Sizes() if on_gpu else cases.SMALL
    sizes = replace(sizes, batch=args.batch, image=args.image or sizes.image)
    torch.set_float32_matmul_precision("highest")
    if args.threads:
        torch.set_num_threads(args.threads)
    backend = attention_backend(device, dtype, sizes.heads, sizes.head_dim, sizes.tokens)
    report = open_report(parser, args, facts(device, backend))
    copy, product = timing.copy_gb_per_s(device), timing.matmul_tflop_per_s(device, dtype)
    print(
        f"{report.facts['device']}, kernels {describe(device)}, {args.dtype}: a large copy moves {copy:.0f} GB/s, "
        f"a large product {product:.2f} TFLOP/s"
    )
    failed = False
    for op in [args.op] if args.op else OPS:
        try:
            for case in cases.make(op, sizes, dtype, device):
                failed |= not bench(case, report, dtype, device, args, copy, product)
        except Exception as error:  # no memory for its inputs, or a GPU that an earlier op's error has left unusable
            print(f"error: {op} {args.dtype}: {first_line(error)}; not timed", file=sys.stderr, flush=True)
            failed = True
    print()
    print(table(row for row in report.rows if row.bench in OPS))
    return int(failed)


def bench(
    case: cases.Case,
    report: Report,
    dtype: torch.dtype,
    device: torch.device,
    args: argparse.Namespace,
    copy: float,
    product: float,
) -> bool:
    """Measure the arms of a case that the report lacks. False where the gate refuses the op or our arm cannot run."""
    shape = f"{case.shape} {args.dtype}"
    arms = {"ours": case.ours, "eager": case.reference} | case.others
    if not args.no_compile:
        arms["compile"] = torch.compile(case.reference, dynamic=False)
    arms = {name: run for name, run in arms.items() if not report.has(case.op, name, shape)}
    if not arms:
        return True
    try:
        problem = refusal(case, dtype)
    except Exception as error:  # of any kind: only this op may be lost to it
        problem = f"stopped at the gate: {first_line(error)}"
    if problem:
        print(f"error: {case.op} {shape}: {problem}; not timed", file=sys.stderr, flush=True)
        return False
    ran = True
    for name, run in arms.items():
        try:
            forward, both = trials.times(case, run, device, args.samples)
        except Exception as error:  # no compiler, no memory, no backend that takes a mask
            print(f"{case.op} {shape}: {name}: {first_line(error)}; no row", flush=True)
            ran &= name != "ours"
            continue
        found = [
            Row(case.op, name, shape, "forward_ms", forward, "ms", args.samples),
            Row(case.op, name, shape, "forward_backward_ms", both, "ms", args.samples),
        ]
        amounts, metric, unit, limit = (
            (case.bytes, "gb_per_s", "GB/s", copy) if case.bytes else (case.flops, "tflop_per_s", "TFLOP/s", product)
        )
        scale = 1e6 if case.bytes else 1e9
        for part, amount, ms in zip(("forward_", ""), amounts, (forward, both), strict=True):
            rate = amount / ms / scale
            found += [
                Row(case.op, name, shape, f"{part}{metric}", rate, unit, args.samples),
                Row(case.op, name, shape, f"{part}fraction_of_limit", rate / limit, "1", args.samples),
            ]
        report.add(*found)
        print(f"{case.op} {shape}: {name}: {forward:.4f} ms, with backward {both:.4f} ms", flush=True)
    torch.compiler.reset()
    return ran


def refusal(case: cases.Case, dtype: torch.dtype) -> str | None:
    """What is wrong with an op's results, or None."""
    return next((str(error) for error in trials.errors(case, dtype) if not error.of_allowed <= 1), None)  # NaN fails


if __name__ == "__main__":
    sys.exit(main())
