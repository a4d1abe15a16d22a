"""RUN/events.jsonl: what happened to a run over all its attempts, one JSON object a line. `training.report` reads it.

kind        facts beside {"time": seconds since 1970, "kind": ...}; all durations in seconds
start       update (the attempt resumes from it), world_size, pid, host
ready       update, plan (what is recomputed), limit (bytes to plan with, after out_of_memory; else null): the first update
            begins
progress    update, seconds (spent in updates since the last progress), data_wait (part of them)
save        update, seconds
validation  update, seconds
fault       what (a Fault), update (of a rollback: the update it returns to), detail
stop        update, why (done, stop_after, signal SIGTERM, SIGUSR1, SIGINT or SIGHUP, or error); a killed process leaves none
"""

from __future__ import annotations

import json
import logging
import math
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from megaflux.common.files import append_line

log = logging.getLogger("megaflux")
NAME = "events.jsonl"
LATEST = 1e11  # s since 1970: the year 5138


class Kind(StrEnum):
    """What an event tells, as written in the file."""

    START = "start"
    READY = "ready"
    PROGRESS = "progress"
    SAVE = "save"
    VALIDATION = "validation"
    FAULT = "fault"
    STOP = "stop"


class Fault(StrEnum):
    """What went wrong, as written in the file: the fact `what` of a fault."""

    SKIPPED_UPDATE = "skipped_update"
    SPIKE = "spike"
    ROLLBACK = "rollback"
    CHECKPOINT_REFUSED = "checkpoint_refused"
    REPLACED_SAMPLE = "replaced_sample"
    STALE_SHARED_MEMORY = "stale_shared_memory"
    HANG = "hang"
    DISK = "disk"
    OUT_OF_MEMORY = "out_of_memory"


class Events:
    """Appends to a run's events. Never raises: a logging failure must not stop training."""

    def __init__(self, run_dir: str | Path, enabled: bool):
        """run_dir must exist by the first `record`. enabled: False on all ranks but the first; they write nothing."""
        self.path = Path(run_dir) / NAME
        self.enabled = enabled
        self.warned = False

    def record(self, kind: Kind, /, **facts: Any) -> None:
        """Append one line. A fact `time` replaces the current time: a `start` may give the time the process began.

        Values that JSON has no type for are written as text. If the line cannot be written (a full disk, a read-only
        folder), one warning is logged.
        """
        if not self.enabled:
            return
        try:
            line = json.dumps({"time": time.time(), "kind": kind, **facts}, default=str)
            append_line(self.path, line.encode())
        except (OSError, TypeError, ValueError, RecursionError) as error:
            if not self.warned:
                log.warning("%s: %s; events are lost until it can be written", self.path, error)
            self.warned = True

    def fault(self, what: Fault, update: int, detail: str, **facts: Any) -> None:
        """Append one `fault`. update: updates done; -1: not known."""
        self.record(Kind.FAULT, what=what, update=update, detail=detail, **facts)


def read(run_dir: str | Path) -> list[dict[str, Any]]:
    """The events of a run in the order written; torn and foreign lines are skipped.

    Each has `time`, a plausible number, and `kind`, a string; other facts are not checked. Raises OSError.
    """
    return parse((Path(run_dir) / NAME).read_bytes())[0]


def parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The events in the bytes of an events.jsonl, and how many lines were skipped."""
    events, skipped = [], 0
    for line in content.split(b"\n"):
        if line.strip():
            event = _event(line)
            if event is None:
                skipped += 1
            else:
                events.append(event)
    return events, skipped


def number(value: Any) -> float | None:
    """A finite number of JSON as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON's integers are unbounded
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
