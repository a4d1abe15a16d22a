"""Before the first update: the run's folder and the data it trains on."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

from megaflux.common.errors import UserError
from megaflux.config.parse import Config
from megaflux.training.checkpoint.manifest import write_durably
from megaflux.training.distributed import World, from_main, work_while_others_wait

log = logging.getLogger("megaflux")
LOCK_PATIENCE = 20.0  # s for a run that is about to leave
_held: list[IO[str]] = []


def lock_run_folder(config: Config, world: World) -> None:
    """Make the run's folder and hold it for this process and its life. UserError, alike on all ranks, where it cannot be
    made, or another run has it: two would delete each other's half-written checkpoints."""
    root, problem = Path(config.run.dir), None
    if world.is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
            problem = _lock(root / ".lock")
        except OSError as error:
            problem = f"run.dir: {root}: {error.strerror}; give a folder that can be written"
    problem = from_main(problem, world)
    if problem:
        raise UserError(problem, agreed=True)


def _lock(file: Path) -> str | None:
    """None: held from now on, by a lock that ends with the process; or who has it."""
    stream = file.open("a+")
    _held.append(stream)  # closing it would give the lock up
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: no locks on this storage (%s); see to it that only one run writes there", file, error.strerror
                )
                return None
        if time.monotonic() > until:
            stream.seek(0)
            return f"run.dir: {file.parent} is in use by {stream.read().strip() or 'another process'}; stop that run, or give another --run.dir"
        time.sleep(0.2)  # it may be about to leave
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return None


def prepare_run_folder(config: Config, ds_config: dict[str, Any], world: World) -> None:
    """Save the resolved configuration in the run's folder. UserError, alike on all ranks, where it cannot be written."""
    root, problem = Path(config.run.dir), None
    if world.is_main:
        try:
            for name, text in (("config.yaml", config.to_yaml()), ("ds_config.json", json.dumps(ds_config, indent=2))):
                write_durably(root / f".{name}", text)
                (root / f".{name}").replace(root / name)  # a kill leaves the old one or the new one
        except OSError as error:
            problem = f"run.dir: {root}: {error.strerror}; give a folder that can be written"
    problem = from_main(problem, world)
    if problem:
        raise UserError(problem, agreed=True)


def prepare_data(config: Config, world: World) -> None:
    """Have `data.path` ready on every rank: made from `data.source` if it is not there yet, or, with `data.remote`,
    its description and the held-out pictures fetched. UserError, alike on all ranks, if that fails or does not fit.
    Collective."""
    from megaflux.data.storage import remote
    from megaflux.data.storage.dataset import read_dataset_info
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.merge import TooManyBad
    from megaflux.data.writing.options import OPENMOJI_DEFAULTS, Options

    data = config.data

    def fetch() -> None:
        remote.fetch_split(data.remote, Path(data.path), "held_out")

    def make() -> None:
        log.info("preparing %s from %s", data.path, data.source)
        defaults = OPENMOJI_DEFAULTS if data.source == "openmoji" else {}
        sizes = {"longest_side": data.longest_side, "aspect_ratios": data.aspect_ratios}
        try:
            prepare(data.source, data.path, Options(**(defaults | sizes)))
        except TooManyBad as error:
            raise UserError(f"data.source: {error}") from None

    work = None
    if data.remote:
        work = fetch if int(os.environ.get("LOCAL_RANK", 0)) == 0 else None
    elif data.source and world.is_main and not (Path(data.path) / "dataset.json").exists():
        work = make
    work_while_others_wait(work, world)
    info = read_dataset_info(data.path)
    if info.longest_side != data.longest_side:
        raise UserError(
            f"data.longest_side: {data.longest_side}, but {data.path} was prepared with {info.longest_side}; "
            "use that or prepare the data again"
        )
