"""python -m megaflux.training.checkpoint ls|verify|prune RUN: a run's checkpoints, for people.

exit codes: 0; 2 no such run, or (verify) a checkpoint that is not whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.common.paths import path_option
from megaflux.training.checkpoint import manifest


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m megaflux.training.checkpoint", description=__doc__.splitlines()[0], allow_abbrev=True
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "ls": "list them, without reading their files",
        "verify": "hold every file against its SHA-256",
        "prune": "delete all but the newest and the milestones of the run's configuration",
    }.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=True)
        command.add_argument("run", type=path_option, metavar="RUN", help="the run's folder")
        if name == "prune":
            command.add_argument("--keep", type=int, metavar="N", help="newest ones to keep (default: the run's own)")
            command.add_argument("--yes", action="store_true", help="delete; without it they are only named")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.run):
        raise UserError(f"{args.run}: no such folder; give a run's")
    found = manifest.listed(args.run)
    if not found:
        raise UserError(f"{manifest.folder(args.run)}: holds no checkpoint")
    if args.command == "prune":
        return prune(args.run, args.keep, args.yes)
    return (ls if args.command == "ls" else verify)(found)


def ls(found: dict[int, Path]) -> int:
    """One line each: update, stage, ranks, size, when."""
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


def verify(found: dict[int, Path]) -> int:
    """2 where one is not whole; the newest that is whole is what a run goes on from."""
    whole = []
    for path in found.values():
        try:
            manifest.verify(path)
        except UserError as error:
            print(f"{path.name}: {error}")
        else:
            whole.append(path)
            print(f"{path.name}: whole")
    print(f"a run goes on from {whole[-1].name}" if whole else "no checkpoint is whole: a run stops with the reason")
    return 0 if len(whole) == len(found) else 2


def prune(run: str, keep: int | None, sure: bool) -> int:
    """Delete what the run's own configuration would; never the newest that is whole."""
    from megaflux.training.checkpoint import saved
    from megaflux.training.checkpoint.state import milestones

    config = saved.load(run)
    keep = config.train.keep_checkpoints if keep is None else keep
    if keep < 1:
        raise UserError(f"--keep {keep}: at least 1")
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
