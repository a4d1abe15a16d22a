"""Runs of the tiny preset that a bench compares: trained by launch/train.py, resumed after a kill, kept when they are finished."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import path_option
from megaflux.config.schema import Config
from megaflux_kernels.bench.report import Parser, positive

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
Compare = Callable[[argparse.Namespace], dict[str, Any]]
"""The options -> what was found."""


def add_arguments(parser: Parser, updates: int, every: int) -> None:
    """The options that all of them have. updates, every: the defaults."""
    add = parser.add_argument
    add("--out", type=path_option, required=True, metavar="DIR", help="where everything is written")
    add("--updates", type=positive, default=updates, metavar="N", help=f"of each compared run (default {updates})")
    add("--every", type=positive, default=every, metavar="N", help=f"updates between validations ({every})")
    add("--config", type=path_option, metavar="FILE", help="YAML over the tiny preset, for all runs")


def run(parser: Parser, args: argparse.Namespace, compare: Compare, table: Callable[[dict[str, Any]], str]) -> int:
    """Compare and print the table; a UserError is an error of the command line."""
    try:
        found = compare(args)
    except UserError as error:
        parser.error(str(error))
    print(table(found))
    return 0


def train(name: str, config: Config, out: Path) -> bool:
    """Run launch/train.py until the configuration's last update, unless that is done; returns whether it was run. UserError where
    it fails."""
    file, log = out / f"{name}.yaml", out / f"{name}.log"
    text = config.to_yaml()
    if file.exists() and file.read_text() != text:
        raise UserError(f"--out {out}: {name} was begun with other options; give another folder, or delete this one")
    unfinished = file.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.replace(file)  # a kill leaves the old one or the new one
    if finished(Path(config.run.dir), config.train.updates):
        print(f"{name}: done before", flush=True)
        return False
    print(f"{name}: {config.train.updates} updates; {log} says how far it is", flush=True)
    with log.open("a") as stream:
        command = [sys.executable, TRAIN, "--preset", "tiny", "--config", str(file)]
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise UserError(f"{name}: training ended with exit code {code}; see {log}")
    return True


def finished(run: Path, updates: int) -> bool:
    """Whether a run has done all its updates: its last validation is recorded and its last checkpoint is whole."""
    from megaflux.training.checkpoint import manifest

    if not manifest.folder(run).is_dir():
        return False
    return updates in manifest.listed(run) and any(line["update"] == updates for line in validations(run))


def validations(run: Path) -> list[dict[str, float]]:
    """The values of each validation of a run (RUN/validation.jsonl), the last ones of each update."""
    found = {}
    file = run / "validation.jsonl"
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        found[values["update"]] = values
    return [found[update] for update in sorted(found)]
