"""python -m megaflux.training.checkpoint ls|verify|prune RUN: list, verify and prune a run's checkpoints.

Exit codes: 0; 2 no such run, or (verify) a damaged checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.training.checkpoint import manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. argv: None: the process's own. UserError for bad input."""
    parser = Parser(
        prog="python -m megaflux.training.checkpoint", description=__doc__.splitlines()[0], allow_abbrev=True
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "ls": "list them, without reading their files",
        "verify": "compare every file with its SHA-256",
        "prune": "delete all but the newest and the milestones of the run's configuration",
    }.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=True)
        command.add_argument("run", type=path_option, metavar="RUN", help="the run's folder")
        if name == "prune":
            command.add_argument("--keep", type=int, metavar="N", help="newest ones to keep (default: the run's own)")
            command.add_argument("--yes", action="store_true", help="delete; without it they are only listed")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.run):
        raise UserError(f"{args.run}: no such folder; give the folder of a run")
    found = manifest.listed(args.run)
    if not found:
        raise UserError(f"{manifest.folder(args.run)}: holds no checkpoint")
    if args.command == "prune":
        return prune(args.run, args.keep, args.yes)
    return (ls if args.command == "ls" else verify)(found)


def ls(found: Mapping[int, Path]) -> int:
    """Print a line for each checkpoint: name, stage, ranks, size, time of writing. found: update -> folder."""
    print(f"{'checkpoint':<18}{'stage':<14}{'ranks':>6}{'size':>12}  written")
    for path in found.values():
        try:
            content = manifest.read(path)
        except UserError as error:
            print(f"{path.name:<18}{error}")
            continue
        size = sum(entry["bytes"] for entry in content["files"].values())
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / manifest.MANIFEST).stat().st_mtime))
        print(f"{path.name:<18}{content['stage_name']:<14}{content['world_size']:>6}{_size(size):>12}  {when}")
    return 0


def verify(found: Mapping[int, Path]) -> int:
    """Compare every file with its manifest, those of what the run began from (RUN/init) too, and print which checkpoint a run
    resumes from; returns 2 if one is damaged."""
    whole = []
    for path in found.values():
        try:
            manifest.verify(path)
        except UserError as error:
            print(f"{path.name}: {error}")
        else:
            whole.append(path)
            print(f"{path.name}: whole")
    if not whole:
        print("no checkpoint is whole: a run stops and says why")
        return 2
    if (began_from := manifest.read(whole[-1]).get("init")) is not None:
        from megaflux.training.checkpoint import init_folder  # here: `ls` need not wait for pydantic

        try:
            init_folder.verify(whole[-1].parent.parent, began_from)
        except UserError as error:
            print(f"init: {error}")
            return 2
        print("init: whole")
    print(f"a run resumes from {whole[-1].name}")
    return 0 if len(whole) == len(found) else 2


def prune(run: str, keep: int | None, sure: bool) -> int:
    """Delete old checkpoints as the run itself would, but never the newest whole one. keep: newest ones to keep; None: as
    configured. sure: False: only list them."""
    # Here: they import torch, which `ls` and `verify` do not need.
    from megaflux.training.checkpoint import saved
    from megaflux.training.checkpoint.retention import milestones

    config = saved.load(run)
    keep = config.train.keep_checkpoints if keep is None else keep
    if keep < 1:
        raise UserError(f"--keep {keep}: must be at least 1")
    good = max((update for update, path in manifest.listed(run).items() if _is_whole(path)), default=None)
    if good is None:
        raise UserError(f"{manifest.folder(run)}: no checkpoint is whole, so none is deleted; see verify")
    chosen = list(manifest.listed(run))[:-keep]
    if not sure:
        names = [manifest.name_of(u) for u in chosen if u not in milestones(config) and u != good]
        print("\n".join(f"would delete {name}" for name in names) or "nothing to delete")
        return 0
    for path in manifest.prune(run, keep, milestones(config), {good}):
        print(f"deleted {path.name}")
    return 0


def _is_whole(path: Path) -> bool:
    try:
        manifest.verify(path)
    except UserError:
        return False
    return True


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    exit_on_user_error(main)
