"""make demo: train the tiny preset, generate from held-out pictures, measure, and say where to look.

    python launch/demo.py [--run runs/demo] [options of launch/train.py]

Training is a real `deepspeed launch/train.py` process; a finished run is not trained again unless its folder is deleted. (Runs of
earlier versions began from random weights: they are refused here in a line; give another --run.)
Ends with a table, also in RUN/summary.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option

ROOT = Path(__file__).parent.parent
WORDS_SHOWN = 3  # rows of the contact sheet whose pictures are made from words alone


def main() -> None:
    parser = Parser(allow_abbrev=True, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=path_option, default="runs/demo", help="folder of the run")
    args, train_options = parser.parse_known_args()
    run, started = Path(args.run), time.monotonic()

    _run(
        "deepspeed",
        "--num_accelerators",
        "1",
        str(ROOT / "launch" / "train.py"),
        "--deepspeed",
        str(ROOT / "ds_configs" / "zero2.json"),
        "--config",
        str(ROOT / "recipes" / "tiny" / "demo.yaml"),
        "--run.dir",
        str(run),
        *train_options,
    )
    print("generating variations of held-out pictures ...", flush=True)
    summary = evaluate(run)
    reference = run / "samples" / "reference.png"
    _run(
        sys.executable,
        "-m",
        "megaflux.infer",
        "--checkpoint",
        str(run),
        "--reference",
        str(reference),
        "--count",
        "4",
        "--seed",
        "7",
        "--out",
        str(run / "variations"),
    )
    if (found := words_top1(run)) is not None:
        summary["words_top1"] = round(found, 4)
    summary["seconds"] = round(time.monotonic() - started, 1)
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print()
    for name, value in summary.items():
        print(f"  {name:<22} {value}")
    print(
        f"\n  look at     {summary['contact_sheet']}  (each row: a picture it never trained on, then variations of it;"
    )
    print(
        f"              in the last {WORDS_SHOWN} rows pictures made from its name alone: {summary['made_from_words']})"
    )
    print(f"  and at      tensorboard --logdir {run.parent}")
    print(f"  next        python -m megaflux.infer --checkpoint {run} --reference YOUR.png --count 4 --seed 7")


def evaluate(run: Path) -> dict[str, Any]:
    """Loss, conditioning gap and retrieval of a finished run; writes its contact sheet. UserError where the loss of the
    checkpoint is not the one that the run recorded."""
    import torch

    from megaflux import runs
    from megaflux.common.ranks import World
    from megaflux.training import pictures, validation

    found = runs.find(run)
    config = found.config.for_world(found.manifest["world_size"])  # batches as the run computed them
    models = runs.load(found, dtype=torch.bfloat16)
    rows = {row["update"]: row for row in map(json.loads, (run / "validation.jsonl").read_text().splitlines())}
    references = validation.load_references(config, models)
    index = list(range(len(references.keys)))
    one_each = pictures.variations(config, models, references, index, per_reference=1, seed=7)[:, 0]
    shown = index[:8]
    made = pictures.variations(config, models, references, shown, per_reference=5, seed=7)
    from_words = index[-WORDS_SHOWN:]
    conditions = models.trunk.encode(None, references.captions, "text")
    told = pictures.variations(config, models, replace(references, conditions=conditions), from_words, 5, seed=7)
    sheet = pictures.contact_sheet(references, shown + from_words, torch.cat([made, told]))
    pictures.save_picture(sheet, run / "samples" / "contact_sheet.png")
    pictures.save_picture(references.pixel_values[0], run / "samples" / "reference.png")
    again = validation.validation_loss(models.trainable, config, models, references, World(0, 1, torch.device("cpu")))
    last = rows[max(rows)]
    if abs(again["loss"] - last["loss"]) > 0.02 * last["loss"]:
        raise UserError(f"{run}: the checkpoint's loss is {again['loss']:.4f}, the run's {last['loss']:.4f}; delete it")
    return {
        "updates": found.manifest["update"],
        "seconds": 0.0,
        "validation_loss_first": round(rows[0]["loss"], 4),
        "validation_loss_last": round(last["loss"], 4),
        "conditioning_gap": round(last["gap"], 4),
        "retrieval_top1": round(pictures.retrieval_top1(references, one_each), 4),
        "made_from_words": "; ".join(references.captions[i] for i in from_words),
        "contact_sheet": str(run / "samples" / "contact_sheet.png"),
        "tensorboard": str(run / "tensorboard"),
    }


def words_top1(run: Path) -> float | None:
    """The share of held-out captions whose picture, made from the caption alone, is nearest to the picture it is of: RUN/words/UPDATE
    has the report. None for a run that learns no words."""
    from megaflux import runs

    found = runs.find(run)
    data, out = found.config.data.path, run / "words" / str(found.manifest["update"])
    if "text" not in found.config.data.condition.drawn:
        return None
    options = ("--checkpoint", str(run), "--data", data, "--out", str(out), "--only", "words")
    _run(sys.executable, "-m", "megaflux.evaluate", *options)
    return json.loads((out / "report.json").read_text())["words"]["retrieval_target"]["value"]


def _run(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
