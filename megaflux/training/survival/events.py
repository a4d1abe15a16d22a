"""RUN/events.jsonl: what happened to a run over all its attempts, one line each. `training.report` reads it.

kind        facts beside {"time": seconds since 1970, "kind": ...}; all durations in seconds
start       update (that the attempt goes on from), world_size, pid, host
ready       update, plan (what is computed again), limit (bytes to plan with, after out_of_memory; else null); the first
            update begins
progress    update, seconds (spent in updates since the last progress), data_wait (of them)
save        update, seconds
validation  update, seconds
fault       what (one of FAULTS), update (of a rollback: where the run goes back to), detail
stop        update, why (done, stop_after, signal SIGTERM, SIGUSR1, SIGINT or SIGHUP, or error); a killed process leaves none
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("megaflux")
NAME = "events.jsonl"
LATEST = 1e11  # s since 1970: the year 5138
FAULTS = (
    "skipped_update",
    "spike",
    "rollback",
    "checkpoint_refused",
    "replaced_sample",
    "stale_shared_memory",
    "hang",
    "disk",
    "out_of_memory",
)


class Events:
    """Appends to a run's events. Never raises: a run must not die of its diary."""

    def __init__(self, run_dir: str | Path, enabled: bool):
        """run_dir must exist by the first `record`. enabled: False on all ranks but the first, which then write
        nothing."""
        self.path = Path(run_dir) / NAME
        self.enabled = enabled
        self.warned = False

    def record(self, kind: str, /, **facts: Any) -> None:
        """Append one line. A fact `time` replaces now: a `start` may name the moment the process began.

        What JSON doesn't know is written as text. A full disk or a folder that cannot be written is one warning.
        """
        if not self.enabled:
            return
        try:
            line = json.dumps({"time": time.time(), "kind": kind, **facts}, default=str)
            _append(self.path, line.encode() + b"\n")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            if not self.warned:
                log.warning("%s: %s; events are lost until it can be written", self.path, error)
            self.warned = True


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run in the order written; torn and foreign lines are passed over.

    Each has `time`, a number of this age, and `kind`, text; nothing is promised of other facts. Raises OSError.
    """
    return parse((Path(run_dir) / NAME).read_bytes())[0]


def parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The events in the bytes of an events.jsonl, and how many lines were passed over."""
    events, passed_over = [], 0
    for line in content.split(b"\n"):
        if line.strip():
            event = _event(line)
            if event is None:
                passed_over += 1
            else:
                events.append(event)
    return events, passed_over


def number(value: Any) -> float | None:
    """A finite number of JSON as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return value if math.isfinite(value) else None


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # bad UTF-8 is a ValueError as well
        return None
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        return None
    when = number(event.get("time"))
    return event if when is not None and 0 <= when < LATEST else None


def _append(path: Path, line: bytes) -> None:
    """One write at the end of the file, so that a kill tears at most this line."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # an earlier write was torn: it must not take this line with it
        if os.write(descriptor, line) != len(line):
            raise OSError("the disk is full: a line was cut short")
    finally:
        os.close(descriptor)
