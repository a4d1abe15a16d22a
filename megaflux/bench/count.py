"""python -m megaflux.bench activations: what autograd keeps of one forward pass of FLUX, by arm.

Counted under FakeTensorMode, so that FLUX.1-dev's 57 blocks need neither memory nor a GPU; also the share of a step's
FLOPs that an arm computes a second time. The step bench measures the same bytes on real tensors.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from megaflux.bench.activations import ARMS, count, trainable_flux
from megaflux.bench.sizes import add_size_arguments, sizes
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, path, table

BENCH = "activations"
BASE = "diffusers-eager"
LABELS = {
    "diffusers-eager": "diffusers",
    "ours-none": "megaflux, none",
    "ours-mlp": "megaflux, mlp",
    "diffusers-eager-full": "diffusers, checkpointing",
    "ours-full": "megaflux, full",
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--arms",
        type=partial(one_of, known=ARMS, what="arm"),
        default=list(ARMS),
        metavar="A,B",
        help=f"of {', '.join(ARMS)} (default: all)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument(
        "--plot", type=path, metavar="FILE.png", help="draw the bytes of the first of the grids (needs matplotlib)"
    )
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
    if args.plot:
        shape = chosen.shape(args.grids[0], args.dtype)
        try:
            plot([row for row in report.rows if row.bench == BENCH], shape, args.plot)
        except (ImportError, OSError, ValueError) as error:
            parser.error(f"--plot {args.plot}: {error}")
    return 0


def plot(rows: list[Row], shape: str, file: str) -> None:
    """Bars of saved gigabytes by arm at one shape, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    saved = {row.arm: row.value / 1e9 for row in rows if row.metric == "saved_bytes" and row.shape == shape}
    arms = [arm for arm in LABELS if arm in saved][::-1]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.55 * len(arms) + 1.1))
    colours = ["#2a78d6" if arm.startswith("ours") else "#9aa3ad" for arm in arms]
    axes.barh([LABELS[arm] for arm in arms], [saved[arm] for arm in arms], color=colours, height=0.62)
    for i, arm in enumerate(arms):
        share = f"   {saved[arm] / saved[BASE]:.0%}" if arm != BASE and BASE in saved else ""
        axes.text(saved[arm] + 0.15, i, f"{saved[arm]:.1f} GB{share}", va="center", fontsize=9, color="#333333")
    axes.set_title(f"Activations kept per image: {shape}", fontsize=10, loc="left", color="#333333")
    axes.set_xlim(0, 1.18 * max(saved.values()))
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0, labelcolor="#333333")
    for side in axes.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
