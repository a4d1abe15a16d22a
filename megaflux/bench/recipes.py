"""python -m megaflux.bench recipes --out DIR: a new connector before a trained FLUX, alone first or with everything at once.

base             the tiny preset's stage `base`, from nothing: FLUX, connector and Qwen's last layer. Its FLUX is written to
                 DIR/flux in FLUX.1's published layout; its connector and its Qwen are left behind
at-once          from DIR/flux, with a new connector and another Qwen (of --seed): connector, Qwen's last layer and the attention
                 of all blocks together, at one rate
at-once-by-part  the same, with connector-first's rates: what the rates alone do
connector-first  the connector alone for a quarter of the updates, then all of it; the connector at ten times the rate

The last three differ in nothing else: seed, order of the data, noise, trapezoid, number of updates, validation. The common
rate is a tenth of the one that base is trained with, as the published 1e-5 is to the 1e-4 that such models are trained with;
the connector's is base's own, as UniWorld-V1 trains its connector at a rate far above FLUX's. None was tuned.

The result is the number of updates after which the gap of validation (the loss with another picture's condition, divided by
the loss with its own, minus 1) first reaches a threshold. DIR/recipes.json holds it and the curves. Run again after a kill, the
same command goes on: a finished run is kept, an unfinished one resumes at its last checkpoint. Half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megaflux.bench import small_runs
from megaflux.bench.small_runs import train, validations
from megaflux.common.files import write_json
from megaflux.config.parse import build_config, load_yaml, merge
from megaflux.config.presets import tiny
from megaflux_kernels.bench.report import Parser, positive

GAPS = (0.25, 0.5)
BASE_RATE = 2e-3  # the tiny preset's
RATE = BASE_RATE / 10
BY_PART = {"flux": RATE, "connector": BASE_RATE, "vlm": RATE}
TOGETHER = {"name": "together", "share": 1.0, "blocks": "all", "components": "attention"}
ARMS: dict[str, dict[str, Any]] = {
    "at-once": {"stages": [TOGETHER], "optim": {"lr": RATE}},
    "at-once-by-part": {"stages": [TOGETHER], "optim": {"lr": BY_PART}},
    "connector-first": {
        "stages": [{"name": "connector", "share": 1.0, "blocks": "none", "vlm_layers": 0}, TOGETHER | {"share": 3.0}],
        "optim": {"lr": BY_PART},
    },
}


def add_arguments(parser: Parser) -> None:
    small_runs.add_arguments(parser, updates=320, every=20)
    parser.add_argument("--base-updates", type=positive, default=400, metavar="N", help="of base (default 400)")
    parser.add_argument("--seed", type=positive, default=1, metavar="N", help="of the new connector and Qwen (1)")


def run(parser: Parser, args: argparse.Namespace) -> int:
    return small_runs.run(parser, args, compare, table)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, and write DIR/recipes.json; returns its content. UserError where a run fails, or where
    the folder's runs are of other options."""
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    given = load_yaml(args.config) if args.config else {}
    base = merge(
        merge(tiny(), given),
        {
            "run": {"dir": str(out / "base")},
            "stages": [{"name": "base", "share": 1.0, "blocks": "all", "components": "model"}],
            "train": {"updates": args.base_updates, "checkpoint_every": 50},
            "validation": {"every": 0, "panel_every": 0},
        },
    )
    runs = {"base": base}
    for name, recipe in ARMS.items():
        values = {
            "run": {"dir": str(out / name), "seed": args.seed},
            "model": {"flux": str(out / "flux")},
            "train": {"updates": args.updates, "checkpoint_every": 50},
            "validation": {"every": args.every},
        }
        runs[name] = merge(merge(base, values), recipe)
    curves = {}
    for name, values in runs.items():
        if name != "base" and not (out / "flux").exists():
            write_flux(out / "base", out / "flux")
        train(name, build_config(values), out)
        curves[name] = [{key: at[key] for key in ("update", "loss", "gap")} for at in validations(out / name)]
    found = {
        "options": {name: value for name, value in vars(args).items() if name not in ("bench", "out")},
        "runs": {name: outcome(curve) | {"curve": curve} for name, curve in curves.items()},
    }
    write_json(out / "recipes.json", found, indent=1)
    return found


def outcome(curve: list[dict[str, float]]) -> dict[str, Any]:
    """{"until": {gap: the first update that has it, or None}, "loss", "gap": at the end}."""
    until = {str(gap): next((at["update"] for at in curve if at["gap"] >= gap), None) for gap in GAPS}
    return {"until": until, "loss": curve[-1]["loss"], "gap": curve[-1]["gap"]}


def write_flux(run: Path, folder: Path) -> None:
    """Write a run's FLUX, VAE and scheduler, and the CLIP of its seed, in the layout of a published FLUX.1."""
    from megaflux import runs
    from megaflux.generation.layout import whole_folder
    from megaflux.models.scratch import build_clip

    trained = runs.find(run)
    models, config = runs.load(trained), trained.config
    clip, tokenizer = build_clip(config.model.clip_config, config.run.seed, config.model.seeded)
    with whole_folder(folder) as partial:
        models.trainable.transformer.save_pretrained(partial / "transformer")
        models.vae.save_pretrained(partial / "vae")
        models.scheduler.save_pretrained(partial / "scheduler")
        clip.save_pretrained(partial / "text_encoder")
        tokenizer.save_pretrained(partial / "tokenizer")


def table(found: dict[str, Any]) -> str:
    """The result as Markdown, as docs/recipes.md has it."""
    heads = ["run", "updates", *(f"until gap {gap}" for gap in GAPS), "loss at the end", "gap at the end"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, run in found["runs"].items():
        until = (run["until"][str(gap)] for gap in GAPS)
        cells = [
            name,
            run["curve"][-1]["update"],
            *("not reached" if update is None else update for update in until),
            f"{run['loss']:.3f}",
            f"{run['gap']:.2f}",
        ]
        if name == "base":  # validated at its beginning and end only
            cells[2:4] = ["", ""]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
