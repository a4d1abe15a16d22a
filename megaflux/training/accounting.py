"""Where the wall time of a run went, from its events: productive updates, waits, saves, restarts.

goodput = productive time / wall time. Productive are updates that were not undone, without their wait for data. The wall time
runs from the first event to the last, whatever lies between. Every second of it is in exactly one row of SHARES.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from megaflux.training.survival.events import Fault, Kind, number

SHARES = {
    "productive": "updates, but for their wait for data",
    "data_wait": "updates waiting for data",
    "start_up": "start-up, and anew after a rollback",
    "saves": "saving checkpoints",
    "validation": "validation",
    "lost": "updates that were to be done again",
    "down": "down between attempts",
    "unaccounted": "unaccounted",
}
"""Row -> what it counts. The command prints the text."""
RECENT = 900.0  # s: a run on another machine counts as still going if its last event is younger than this
KILLED, STILL_GOING = "killed (no stop)", "still going"
CLAIMS = {Kind.SAVE: "saves", Kind.VALIDATION: "validation"}
"""Events that claim time by their `seconds`, and the row that gets it."""
OF_UPDATES = (Kind.READY, Kind.PROGRESS, Kind.SAVE, Kind.VALIDATION, Kind.STOP)
"""Events whose `update` is the newest one done."""


@dataclass
class Attempt:
    """One start of the run."""

    begin: float
    """Time of its first event, s since 1970, by the clock of that moment."""
    end: float
    """Time of its last event."""
    first: int | None
    """Update it resumed from; None: not recorded."""
    last: int | None
    """Newest update recorded."""
    world_size: int | None
    pid: int | None
    host: str | None
    seconds: float = 0.0
    """From its first event to its last."""
    ended: str = KILLED


@dataclass
class Report:
    """How the wall time was spent; all durations in seconds."""

    attempts: list[Attempt]
    seconds: dict[str, float]
    """Row of SHARES -> seconds; their sum is the wall time."""
    kept: float
    """Updates done and not undone by a restart or rollback."""
    done: float
    """Updates done, repeated ones counted each time."""
    faults: list[dict[str, Any]]
    backwards: float
    """Seconds by which the clock was set back in total; they do not count as time."""

    @property
    def wall(self) -> float:
        """Wall time in seconds."""
        return sum(self.seconds.values())

    def share(self, name: str) -> float:
        """A row's fraction of the wall time; 0 while that is 0."""
        return self.seconds[name] / self.wall if self.wall else 0.0

    def counts(self) -> dict[str, int]:
        """Kind of fault -> how many, the most frequent first."""
        return dict(Counter(str(fault.get("what", "?")) for fault in self.faults).most_common())


@dataclass
class _Work:
    """The updates (first, last] of one progress event; they took `seconds`, `wait` of them for data."""

    first: int
    last: int
    seconds: float
    wait: float
    kept: float = 1.0
    """Fraction of the updates that was not undone."""


@dataclass
class _Ledger:
    """Takes the events one by one and assigns every second to a row."""

    report: Report = field(default_factory=lambda: Report([], dict.fromkeys(SHARES, 0.0), 0.0, 0.0, [], 0.0))
    work: list[_Work] = field(default_factory=list)
    position: int | None = None
    """Newest update done; None: unknown."""
    starting: bool = False
    """Whether the run is starting up, before its first update."""
    open: float = 0.0
    """Seconds since the last assignment that no event has claimed yet."""
    before: float | None = None
    """Time of the event before."""

    def take(self, event: dict[str, Any]) -> None:
        now, kind, update = float(event["time"]), event["kind"], whole(event.get("update"))
        passed = 0.0 if self.before is None else now - self.before
        if passed < 0:
            self.report.backwards -= passed
            passed = 0.0
        self.before = now
        if kind == Kind.START or not self.report.attempts:
            self._begin(event, now, passed, update if kind == Kind.START else None)
        else:
            self.open += passed
            self.report.attempts[-1].seconds += passed
        attempt = self.report.attempts[-1]
        attempt.end = now
        if update is not None and kind in OF_UPDATES:
            attempt.last = update

        if kind == Kind.READY and self.starting:  # a later one is a new stage's
            self._close()
            self.starting, self.position = False, self.position if update is None else update
        elif kind == Kind.PROGRESS:
            self._progress(event, update)
        elif kind in CLAIMS:
            self.report.seconds[CLAIMS[kind]] += self._claim(event.get("seconds"))
        elif kind == Kind.FAULT:
            self.report.faults.append(event)
            if event.get("what") == Fault.ROLLBACK:
                self._roll_back(update)
        elif kind == Kind.STOP:
            attempt.ended = str(event.get("why", "stopped"))

    def finish(self) -> Report:
        self._close()
        seconds = self.report.seconds
        for work in self.work:
            seconds["lost"] += work.seconds * (1 - work.kept)
            seconds["data_wait"] += work.wait * work.kept
            seconds["productive"] += (work.seconds - work.wait) * work.kept
            self.report.kept += (work.last - work.first) * work.kept
            self.report.done += work.last - work.first
        return self.report

    def _begin(self, event: dict[str, Any], now: float, passed: float, update: int | None) -> None:
        self._close()
        self.report.seconds["down"] += passed
        self._undo(update)
        size, pid = (whole(event.get(key)) for key in ("world_size", "pid"))
        host = event["host"] if isinstance(event.get("host"), str) else None
        self.report.attempts.append(Attempt(now, now, update, update, size, pid, host))
        self.position, self.starting = update, event["kind"] == Kind.START

    def _progress(self, event: dict[str, Any], update: int | None) -> None:
        seconds = self._claim(event.get("seconds"))
        self._close()
        self.starting = False
        if update is not None and self.position is not None and update < self.position:
            self._undo(update)  # a rollback that was not recorded
        wait = min(max(number(event.get("data_wait")) or 0.0, 0.0), seconds)
        last = -1 if update is None else update  # without one it counts as before all others, so that nothing undoes it
        first = last if self.position is None else min(self.position, last)
        self.work.append(_Work(first, last, seconds, wait))
        self.position = self.position if update is None else update

    def _roll_back(self, update: int | None) -> None:
        """Back to this update within an attempt: the run is rebuilt from a checkpoint."""
        self._close()
        self._undo(update)
        self.position, self.starting = update, True

    def _claim(self, seconds: Any) -> float:
        """Take up to `seconds` of the open time, so that no second counts twice; returns how many."""
        claimed = min(max(number(seconds) or 0.0, 0.0), self.open)
        self.open -= claimed
        return claimed

    def _close(self) -> None:
        """Assign the open time to start-up or, between updates, to no cause."""
        self.report.seconds["start_up" if self.starting else "unaccounted"] += self.open
        self.open = 0.0

    def _undo(self, update: int | None) -> None:
        """All updates after this one have to be done again; None: it is not known which."""
        if update is None:
            return
        for work in self.work:
            if work.last > update:
                whole = work.last - work.first
                work.kept = min(work.kept, max(0, update - work.first) / whole if whole else 0.0)


def account(events: list[dict[str, Any]], now: float | None = None) -> Report:
    """The report of a run's events, in the order written (`events.read`).

    now: s since 1970, which tells a run that is still going from one that was killed; None: the clock's time.
    """
    ledger = _Ledger()
    for event in events:
        ledger.take(event)
    report = ledger.finish()
    newest = report.attempts[-1] if report.attempts else None
    if newest and newest.ended == KILLED and _is_going(newest, time.time() if now is None else now):
        newest.ended = STILL_GOING
    return report


def _is_going(attempt: Attempt, now: float) -> bool:
    """Whether an attempt still runs: by its process on this machine, elsewhere by the age of its last event."""
    if attempt.pid is None or attempt.host != socket.gethostname():
        return now - attempt.end < RECENT
    import psutil

    try:
        process = psutil.Process(attempt.pid)
        # A process that started later only reuses the number.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= attempt.begin + 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def whole(value: Any) -> int | None:
    """A count in JSON, as of updates; None for anything that is not one."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 1e15 else None
