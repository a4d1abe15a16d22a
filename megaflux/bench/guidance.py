"""python -m megaflux.bench guidance --out DIR: the guidance value of training, and the average of the weights.

guidance-1     the tiny preset from nothing, flow.guidance 1.0, with an average of the weights
guidance-3.5   the same with 3.5

They differ in nothing else: seed, order of the data, noise, trapezoid, number of updates. Every so many updates both are validated
at their own guidance value and at 3.5, weights and average (RUN/validation.jsonl). At the end three sets of weights of each are
measured at 1.0 and at 3.5: the weights, their average, and the average of what the last stage trains beside the weights of what
stopped before, whose average is as old as that. Measured are loss and gap on held-out pictures (the loss with another picture's
condition, divided by the loss with its own, minus 1), and how many of one variation each lie nearest to their own reference.
DIR/guidance.json holds all of it.
Run again after a kill, the same command goes on. Twenty to thirty minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from megaflux.bench import small_runs
from megaflux.bench.small_runs import train, validations
from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.config.parse import build_config, load_yaml, merge
from megaflux.config.presets import tiny
from megaflux.config.schema import GENERATION_GUIDANCE
from megaflux_kernels.bench.report import Parser

VALUES = (1.0, GENERATION_GUIDANCE)
WEIGHTS = ("weights", "average", "average of the last stage")


def add_arguments(parser: Parser) -> None:
    small_runs.add_arguments(parser, updates=800, every=100)
    parser.add_argument("--ema-decay", type=float, default=0.99, metavar="D", help="of the average (default 0.99)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of both runs (0)")


def run(parser: Parser, args: argparse.Namespace) -> int:
    return small_runs.run(parser, args, compare, table)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure what is missing, and write DIR/guidance.json; returns its content. UserError where a run fails, or where
    the folder's runs are of other options."""
    if not 0 < args.ema_decay < 1:
        raise UserError(f"--ema-decay {args.ema_decay:g}: must be above 0 and below 1")
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    given = merge(tiny(), load_yaml(args.config) if args.config else {})
    if build_config(given).validation.samples < 2:
        raise UserError("validation.samples: 1, and a gap needs another picture's condition; give at least 2")
    file, runs = out / "guidance.json", {}
    measured = json.loads(file.read_text())["measured"] if file.exists() else {}
    options = {name: value for name, value in vars(args).items() if name not in ("bench", "out")}
    for value in VALUES:
        name = f"guidance-{value:g}"
        values = {
            "run": {"dir": str(out / name), "seed": args.seed},
            "train": {"updates": args.updates, "checkpoint_every": 50},
            "optim": {"ema_decay": args.ema_decay},
            "flow": {"guidance": value},
            "validation": {"every": args.every},
        }
        if train(name, build_config(merge(given, values)), out):
            measured = {row: found for row, found in measured.items() if not row.startswith(f"{name}, ")}
            write_json(file, {"measured": measured}, indent=1)  # before a kill could leave the earlier run's
        runs[name] = validations(out / name)
    found = {"options": options, "runs": runs, "measured": measured}
    for name, weights, value in itertools.product(runs, WEIGHTS, VALUES):
        row = f"{name}, {weights}, at {value:g}"
        if row not in measured:
            measured[row] = measure(out / name, weights, value)
            print(f"{row}: {measured[row]}", flush=True)
            write_json(file, found, indent=1)
    return found


def measure(run: Path, which: str, guidance: float) -> dict[str, float]:
    """Loss, gap and retrieval of a finished run's weights (which: of WEIGHTS) at a guidance value."""
    import torch

    from megaflux import runs
    from megaflux.common.ranks import World
    from megaflux.training import pictures, stages, validation
    from megaflux.training.checkpoint.weights import load_averages

    found = runs.find(run, ema=which == "average")
    config = found.config.for_world(1)
    config = config.model_copy(update={"flow": config.flow.model_copy(update={"guidance": guidance})})
    models = runs.load(found, dtype=torch.bfloat16)
    if which == "average of the last stage":
        last = set(stages.trainable_names(models.trainable, config.stages[-1]))
        load_averages(found.checkpoint, found.manifest, models, last)
    references = validation.load_references(config, models)
    values = validation.validation_loss(models.trainable, config, models, references, World(0, 1))
    index = range(len(references.keys))
    made = pictures.variations(config, models, references, index, per_reference=1, seed=7, guidance=guidance)
    retrieval = pictures.retrieval_top1(references, made[:, 0])
    return {"loss": values["loss"], "gap": values["gap"], "retrieval": retrieval}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown: at the end (docs/recipes.md has this table), and on the way."""
    lines = ["| run | of | guidance | loss | gap | retrieval |", "|---|---|---|---|---|---|"]
    for run, weights, value in itertools.product(found["runs"], WEIGHTS, VALUES):
        values = found["measured"][f"{run}, {weights}, at {value:g}"]
        shown = f"{values['loss']:.4f} | {values['gap']:.2f} | {values['retrieval']:.2f}"
        lines.append(f"| {run} | {weights} | {value:g} | {shown} |")
    at = f"loss_guidance_{GENERATION_GUIDANCE:g}"
    heads = [
        f"{name} {what}" for name in found["runs"] for what in ("loss", "at 3.5", "average's loss", "average's at 3.5")
    ]
    lines += ["", f"| update | {' | '.join(heads)} |", f"|{'---|' * (1 + len(heads))}"]
    for points in zip(*found["runs"].values(), strict=True):
        cells = [f"{point[key]:.4f}" for point in points for key in ("loss", at, "ema_loss", f"ema_{at}")]
        lines.append(f"| {points[0]['update']} | {' | '.join(cells)} |")
    return "\n".join(lines)
