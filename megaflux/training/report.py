"""Where the wall time of a run went: goodput, attempts and faults, from RUN/events.jsonl.

goodput = productive time / wall time; productive are updates that still count, without their wait for data. The wall
time goes from the first event to the last, whatever lies between. Every second of it is in exactly one row.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.config.parse import load_yaml
from megaflux.training.survival import events as diary
from megaflux.training.survival.events import number

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
RECENT = 900.0  # s: with its last event younger than this, a run on another machine is taken to be going
FAULTS_SHOWN, ATTEMPTS_SHOWN = 5, 20
KILLED = "killed (no stop)"
CLAIMS = {"save": "saves", "validation": "validation"}


@dataclass
class Attempt:
    """One start of the run."""

    begin: float
    """Of its first event, s since 1970, as the clock then said."""
    end: float
    """Of its last event."""
    first: int | None
    """Update it went on from; None: not recorded."""
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
    """What became of the wall time; all durations in seconds."""

    attempts: list[Attempt]
    seconds: dict[str, float]
    """By the names of SHARES; their sum is the wall time."""
    kept: float
    """Updates done that no restart undid."""
    done: float
    """Updates done, those done again counted again."""
    faults: list[dict[str, Any]]
    backwards: float
    """By how much the clock was put back, all in all; that counts as no time."""

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    def share(self, name: str) -> float:
        """Of the wall time; 0 while there is none."""
        return self.seconds[name] / self.wall if self.wall else 0.0

    def counts(self) -> dict[str, int]:
        """Of the faults by what they were, the most frequent first."""
        return dict(Counter(str(fault.get("what", "?")) for fault in self.faults).most_common())


@dataclass
class _Work:
    """The updates (first, last] that one progress event tells of, taking `seconds` of which `wait` for data."""

    first: int
    last: int
    seconds: float
    wait: float
    kept: float = 1.0
    """Fraction that nothing undid."""


@dataclass
class _Ledger:
    """Takes the events one by one. `open` is the time since that nobody has claimed yet."""

    report: Report = field(default_factory=lambda: Report([], dict.fromkeys(SHARES, 0.0), 0.0, 0.0, [], 0.0))
    work: list[_Work] = field(default_factory=list)
    position: int | None = None
    phase: str = "updates"
    open: float = 0.0
    before: float | None = None

    def take(self, event: dict[str, Any]) -> None:
        now, kind, update = float(event["time"]), event["kind"], _whole(event.get("update"))
        passed = 0.0 if self.before is None else now - self.before
        if passed < 0:
            self.report.backwards -= passed
            passed = 0.0
        self.before = now
        if kind == "start" or not self.report.attempts:
            self._begin(event, now, passed, update if kind == "start" else None)
        else:
            self.open += passed
            self.report.attempts[-1].seconds += passed
        attempt = self.report.attempts[-1]
        attempt.end = now
        if update is not None and kind in ("ready", "progress", "save", "validation", "stop"):
            attempt.last = update

        if kind == "ready" and self.phase == "start":  # a later one is a new stage's
            self._leave()
            self.phase, self.position = "updates", self.position if update is None else update
        elif kind == "progress":
            self._progress(event, update)
        elif kind in CLAIMS:
            self.report.seconds[CLAIMS[kind]] += self._claim(event.get("seconds"))
        elif kind == "fault":
            self.report.faults.append(event)
            if event.get("what") == "rollback":
                self._roll_back(update)
        elif kind == "stop":
            attempt.ended = str(event.get("why", "stopped"))

    def finish(self) -> Report:
        self._leave()
        seconds = self.report.seconds
        for work in self.work:
            seconds["lost"] += work.seconds * (1 - work.kept)
            seconds["data_wait"] += work.wait * work.kept
            seconds["productive"] += (work.seconds - work.wait) * work.kept
            self.report.kept += (work.last - work.first) * work.kept
            self.report.done += work.last - work.first
        return self.report

    def _begin(self, event: dict[str, Any], now: float, passed: float, update: int | None) -> None:
        self._leave()
        self.report.seconds["down"] += passed
        self._undo(update)
        size, pid = (_whole(event.get(key)) for key in ("world_size", "pid"))
        host = event["host"] if isinstance(event.get("host"), str) else None
        self.report.attempts.append(Attempt(now, now, update, update, size, pid, host))
        self.position, self.phase = update, "start" if event["kind"] == "start" else "updates"

    def _progress(self, event: dict[str, Any], update: int | None) -> None:
        seconds = self._claim(event.get("seconds"))
        self._leave()
        self.phase = "updates"
        if update is not None and self.position is not None and update < self.position:
            self._undo(update)  # a rollback that nothing told of
        wait = min(max(number(event.get("data_wait")) or 0.0, 0.0), seconds)
        last = -1 if update is None else update  # without one nothing says what undoes it: as if before all others
        first = last if self.position is None else min(self.position, last)
        self.work.append(_Work(first, last, seconds, wait))
        self.position = self.position if update is None else update

    def _roll_back(self, update: int | None) -> None:
        """To this update, within an attempt: the run is built anew from a checkpoint."""
        self._leave()
        self._undo(update)
        self.position, self.phase = update, "start"

    def _claim(self, seconds: Any) -> float:
        """Up to `seconds` of the open time, so that no second is counted twice."""
        claimed = min(max(number(seconds) or 0.0, 0.0), self.open)
        self.open -= claimed
        return claimed

    def _leave(self) -> None:
        """What nobody claimed goes to the phase that it was in."""
        self.report.seconds["start_up" if self.phase == "start" else "unaccounted"] += self.open
        self.open = 0.0

    def _undo(self, update: int | None) -> None:
        """All updates after this one are to be done again."""
        for work in self.work if update is not None else []:
            if work.last > update:
                whole = work.last - work.first
                work.kept = min(work.kept, max(0, update - work.first) / whole if whole else 0.0)


def account(events: list[dict[str, Any]], now: float | None = None) -> Report:
    """The report of a run's events, in the order written (`events.read`).

    now: s since 1970, to tell a run that is going from one that was killed; None: the clock's.
    """
    ledger = _Ledger()
    for event in events:
        ledger.take(event)
    report = ledger.finish()
    newest = report.attempts[-1] if report.attempts else None
    if newest and newest.ended == KILLED and _is_going(newest, time.time() if now is None else now):
        newest.ended = "still going"
    return report


def main() -> None:
    parser = Parser(prog="python -m megaflux.training.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--json", type=path_option, metavar="FILE", help="write the same as JSON, and every attempt and fault"
    )
    args = parser.parse_args()
    events, passed_over = _read(Path(args.run))
    report = account(events)
    batch, trouble = _batch_size(Path(args.run))
    _print(args.run, report, batch)
    if report.backwards:
        print(f"note: the clock was put back, by {_duration(report.backwards)} in all; that counts as no time")
    if passed_over:
        print(f"note: {passed_over} lines of {diary.NAME} are torn or foreign and were passed over")
    if trouble:
        print(f"note: no images/s: {trouble}")
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(_as_json(args.run, report, batch, passed_over), indent=1) + "\n")
        except OSError as error:
            raise UserError(
                f"--json {args.json}: {error.strerror}; give a file in a folder that can be written"
            ) from None


def _read(run: Path) -> tuple[list[dict[str, Any]], int]:
    mend = "give the folder of a run (its run.dir) that has started at least once"
    if not run.is_dir():
        raise UserError(f"{run}: {'not a folder' if run.exists() else 'no such folder'}; {mend}")
    try:
        events, passed_over = diary.parse((run / diary.NAME).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run}: holds no {diary.NAME}; {mend}") from None
    except OSError as error:
        raise UserError(f"{run / diary.NAME}: {error.strerror}; make it a file that can be read") from None
    if not events:
        raise UserError(f"{run / diary.NAME}: holds no event; {mend}")
    return events, passed_over


def _batch_size(run: Path) -> tuple[int | None, str | None]:
    """train.global_batch_size of the run's config.yaml, or None and why."""
    try:
        section = load_yaml(str(run / "config.yaml")).get("train")
    except UserError as error:
        return None, str(error).removeprefix("--config ")
    size = _whole(section.get("global_batch_size")) if isinstance(section, dict) else None
    return (size, None) if size and size > 0 else (None, f"{run}/config.yaml gives no train.global_batch_size")


def _speeds(report: Report, batch: int | None) -> dict[str, float] | None:
    """Images/s: over the wall time, of updates that count; and inside updates, of all."""
    inside = sum(report.seconds[name] for name in ("productive", "data_wait", "lost"))
    if not batch or not inside:
        return None
    return {"wall": report.kept * batch / report.wall, "updating": report.done * batch / inside}


def _print(run: str, report: Report, batch: int | None) -> None:
    attempts = report.attempts
    print(
        f"{run}: {_when(attempts[0].begin)} to {_when(attempts[-1].end)}, {_duration(report.wall)}; "
        f"{len(attempts)} attempt{'s' * (len(attempts) > 1)}, the last: {attempts[-1].ended}"
    )
    print(f"\n{'where the wall time went':<40}{'share':>8}{'time':>16}")
    for name, text in SHARES.items():
        print(f"  {text:<38}{report.share(name):>8.2%}{_duration(report.seconds[name]):>16}")
    print(f"  {'total':<38}{float(report.wall > 0):>8.2%}{_duration(report.wall):>16}")
    print(
        f"\ngoodput {report.share('productive'):.2%}; {report.kept:.0f} updates, {report.done - report.kept:.0f} more done again"
    )
    if speeds := _speeds(report, batch):
        print(
            f"{speeds['wall']:.3g} images/s over the wall time, {speeds['updating']:.3g} while updating "
            f"({batch} images an update)"
        )

    print(f"\n{'attempt':>7}  {'started':<21}{'lasted':>14}{'from':>10}{'to':>10}{'ranks':>7}  ended")
    if len(attempts) > ATTEMPTS_SHOWN:
        print(f"{'...':>7}  {len(attempts) - ATTEMPTS_SHOWN} earlier: --json FILE lists them")
    for i, a in list(enumerate(attempts, 1))[-ATTEMPTS_SHOWN:]:
        first, last, size = ("?" if value is None else value for value in (a.first, a.last, a.world_size))
        print(f"{i:>7}  {_when(a.begin):<21}{_duration(a.seconds):>14}{first:>10}{last:>10}{size:>7}  {a.ended}")

    print("\nfaults: " + (", ".join(f"{what} {n}" for what, n in report.counts().items()) or "none"))
    for fault in report.faults[-FAULTS_SHOWN:]:
        words = str(fault.get("detail", ""))
        print(
            f"  {_when(fault['time'])}  update {fault.get('update', '?')}: {fault.get('what', '?')}"
            + (f": {' '.join(words.split())[:200]}" if words else "")
        )


def _as_json(run: str, report: Report, batch: int | None, passed_over: int) -> dict[str, Any]:
    return {
        "run": run,
        "wall_seconds": report.wall,
        "goodput": report.share("productive"),
        "seconds": report.seconds,
        "shares": {name: report.share(name) for name in SHARES},
        "updates": {"kept": report.kept, "done_again": report.done - report.kept},
        "images_per_second": _speeds(report, batch),
        "attempts": [asdict(attempt) for attempt in report.attempts],
        "faults": {"counts": report.counts(), "all": report.faults},
        "clock_put_back_seconds": report.backwards,
        "lines_passed_over": passed_over,
    }


def _is_going(attempt: Attempt, now: float) -> bool:
    """On this machine its process tells; elsewhere the age of its last event does."""
    if attempt.pid is None or attempt.host != socket.gethostname():
        return now - attempt.end < RECENT
    import psutil

    try:
        process = psutil.Process(attempt.pid)
        # A younger process has its number by chance.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= attempt.begin + 1
    except (psutil.Error, ValueError, OverflowError):
        return False


def _whole(value: Any) -> int | None:
    """A count in JSON, as of updates; None for anything else."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 1e15 else None


def _when(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # a clock that says the year 60000
        return "?"


def _duration(seconds: float) -> str:
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    unit = next((unit for unit, size in units.items() if seconds >= size), "seconds")
    return f"{seconds / units[unit]:.3g} {unit}"


if __name__ == "__main__":
    exit_on_user_error(main)
