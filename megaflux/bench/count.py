"""python -m megaflux.bench activations: what autograd keeps of one forward pass of FLUX, by arm.

Counted under FakeTensorMode, so that FLUX.1-dev's 57 blocks need neither memory nor a GPU; also the FLOPs that an arm
computes a second time, over all of its step's. The step bench gives the same bytes of real tensors.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from megaflux.bench.activations import ARMS, count, trainable_flux
from megaflux.bench.sizes import add_size_arguments, sizes
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, table

BENCH = "activations"
BASE = "diffusers-eager"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--arms", type=partial(one_of, known=ARMS, what="arm"), default=list(ARMS), metavar="A,B",
                        help=f"of {', '.join(ARMS)} (default: all)")  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    add_size_arguments(parser, full=True, components="block")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    chosen = sizes(parser, args)
    # attention is counted as a fused kernel's, whichever runs here
    report = open_report(parser, args, facts(default_device(), "flash"))
    config = chosen.flux_config()
    trainable = trainable_flux(config, chosen.train_blocks, chosen.components)
    for grid in args.grids:
        shape = chosen.shape(grid, args.dtype)
        if all(report.has(BENCH, arm, shape) for arm in args.arms):
            continue
        found = {
            arm: count(config, trainable, arm, grid[0] * grid[1], chosen.text, chosen.batch, DTYPES[args.dtype])
            for arm in dict.fromkeys([BASE, *args.arms])
        }
        for arm in args.arms:
            saved, flops = found[arm]["saved_bytes"], found[arm]["flops"]
            report.add(
                Row(BENCH, arm, shape, "saved_bytes", float(saved), "bytes"),
                Row(BENCH, arm, shape, f"fraction_of_{BASE}", saved / found[BASE]["saved_bytes"], "1"),
                Row(BENCH, arm, shape, "step_tflop", flops / 1e12, "TFLOP"),
                Row(BENCH, arm, shape, "recompute_fraction", max(0.0, 1 - found[BASE]["flops"] / flops), "1"),
            )
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0
