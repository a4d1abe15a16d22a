"""The run's folder: locked by one run at a time, and holding its configuration."""

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
from megaflux.common.ranks import World
from megaflux.config.located import located
from megaflux.config.schema import Config
from megaflux.training.checkpoint.manifest import write_durably
from megaflux.training.distributed import from_main

log = logging.getLogger("megaflux")
LOCK_PATIENCE = 20.0  # s to wait for a run that is about to leave
_held: list[IO[str]] = []


def lock_run_folder(config: Config, world: World) -> None:
    """Create the run's folder and lock it for the life of this process. UserError, the same on all ranks, if it cannot be
    created or another run holds it: two runs would delete each other's unfinished checkpoints. Collective."""
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
    """Take a lock that ends with this process. Returns None, or the problem: who holds it."""
    stream = file.open("a+")
    _held.append(stream)  # closing it would release the lock
    until = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning(
                    "%s: this storage has no locks (%s); make sure that only one run writes there", file, error.strerror
                )
                return None
        if time.monotonic() > until:
            stream.seek(0)
            return f"run.dir: {file.parent} is in use by {stream.read().strip() or 'another process'}; stop that run, or give another --run.dir"
        time.sleep(0.2)
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    stream.flush()
    return None


def write_configuration(config: Config, ds_config: dict[str, Any], world: World) -> None:
    """Save the resolved configuration, its paths absolute, in the run's folder. UserError, the same on all ranks, if it
    cannot be written. Collective."""
    root, problem = Path(config.run.dir), None
    if world.is_main:
        try:
            for name, text in (
                ("config.yaml", located(config).to_yaml()),
                ("ds_config.json", json.dumps(ds_config, indent=2)),
            ):
                write_durably(root / f".{name}", text)
                (root / f".{name}").replace(root / name)  # a kill leaves the old one or the new one
        except OSError as error:
            problem = f"run.dir: {root}: {error.strerror}; give a folder that can be written"
    problem = from_main(problem, world)
    if problem:
        raise UserError(problem, agreed=True)
