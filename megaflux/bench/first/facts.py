"""Facts, one JSON line each, and the file that outlives the processes that add to it.

{"step", "fact", "value", "unit", "predicted", "seconds", "error"}: a fact has a value or an error. The later line counts:
a fact that failed and was tried again has two.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megaflux.bench.first import predicted as predictions
from megaflux.common.errors import one_line

FINISHED = "finished"
"""The last fact of a step: seconds of its process."""
AGAIN = "measured again"
"""Facts of a step before this line are out of date."""
FATAL = (
    "CUDA error",
    "Triton Error [CUDA]",
    "unspecified launch failure",
    "device-side assert",
    "CUBLAS_STATUS",
    "CUDNN_STATUS_EXECUTION",
    "an illegal memory access",
)
Value = float | int | str | bool


@dataclass(frozen=True)
class Fact:
    step: str
    fact: str
    value: Value | None = None
    unit: str = ""
    predicted: Value | None = None
    seconds: float | None = None
    """How long the measurement took."""
    error: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.step, self.fact


class GpuLost(Exception):
    """An error after which this process cannot use the GPU any more."""


class Facts:
    """The lines of a file. Several processes may add to it at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def rows(self) -> list[Fact]:
        """All lines, oldest first. A line that a dying process cut off is skipped."""
        found = []
        text = self.path.read_text(errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                found.append(Fact(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return found

    def latest(self) -> dict[tuple[str, str], Fact]:
        """What is known now, in the order in which it was first recorded."""
        known: dict[tuple[str, str], Fact] = {}
        for row in self.rows():
            if row.fact == AGAIN:
                known = {key: fact for key, fact in known.items() if key[0] != row.step}
            else:
                known[row.key] = row
        return known

    def add(self, fact: Fact) -> None:
        """Append a line, on disk when this returns, unless the newest of its name has the same value."""
        if isinstance(fact.value, float) and not math.isfinite(fact.value):
            fact = Fact(
                fact.step, fact.fact, None, fact.unit, fact.predicted, fact.seconds, f"came out as {fact.value}"
            )
        known = self.latest().get(fact.key)
        if known is not None and known.error is None and fact.error is None and known.value == fact.value:
            return
        line = json.dumps(asdict(fact)) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process died in the middle of a line
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def numbers(self, *steps: str) -> dict[str, float]:
        """Fact -> value of what is known of these steps, where it is a number."""
        return {
            row.fact: row.value
            for row in self.latest().values()
            if row.step in steps and row.error is None and isinstance(row.value, int | float)
        }


class Recorder:
    """Records a step's facts, and tells which are still to be measured."""

    def __init__(self, facts: Facts, step: str, small: bool, since: int = 0):
        """since: rows at the start of this invocation; what failed after that is not tried again in it."""
        self.facts, self.step, self.small = facts, step, small
        tried = {row.fact for row in facts.rows()[since:] if row.step == step}
        latest = {row.fact: row for row in facts.latest().values() if row.step == step}
        self.done = {name for name, row in latest.items() if row.error is None or name in tried}
        self.current = current_file(facts.path, step)

    def missing(self, *names: str) -> list[str]:
        """The facts that are not known yet."""
        return [name for name in names if name not in self.done]

    def add(
        self, fact: str, value: Value, unit: str = "", predicted: Value | None = None, seconds: float | None = None
    ) -> None:
        """Record a fact that is not known yet. predicted: None: as in `predicted.py`."""
        if fact in self.done:
            return
        if predicted is None and not self.small:
            predicted = predictions.of(self.step, fact)
        seconds = None if seconds is None else round(seconds, 2)
        self._keep(Fact(self.step, fact, value, unit, predicted, seconds))

    @contextmanager
    def measuring(self, *names: str) -> Iterator[None]:
        """Around the measurement of these facts: whatever it raises becomes the error of those not known by then; one that
        is not known at its end is an error as well.

        An exception where all are known is raised on, and so is an error after which the GPU cannot be used: the runner
        then restarts the step without these facts.
        """
        outer = self.current.read_text() if self.current.exists() else None
        self.current.write_text(json.dumps(list(names)))
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            if not (missing := self.missing(*names)):
                raise
            traceback.print_exc()
            for name in missing:
                took = round(time.perf_counter() - started, 2)
                self._keep(Fact(self.step, name, seconds=took, error=in_a_line(error)))
            if any(word in str(error) for word in FATAL):
                raise GpuLost(str(error)) from error
        else:
            for name in self.missing(*names):
                self._keep(Fact(self.step, name, error="the step ended without measuring it"))
        finally:
            if outer is None:
                self.current.unlink(missing_ok=True)
            else:
                self.current.write_text(outer)

    def _keep(self, fact: Fact) -> None:
        self.facts.add(fact)
        self.done.add(fact.fact)
        print(describe(fact), flush=True)


def current_file(facts: Path, step: str) -> Path:
    """Where a step notes what it is measuring, for the runner, should the step's process die."""
    return facts.parent / f".measuring-{step}"


def describe(fact: Fact) -> str:
    """A human-readable line."""
    text = f"error: {fact.error}" if fact.error is not None else number(fact.value, fact.unit)
    expected = "" if fact.predicted is None else f" (predicted {number(fact.predicted, fact.unit)})"
    return f"{fact.step}: {fact.fact}: {text}{expected}"


def number(value: Value | None, unit: str = "") -> str:
    """A value as text, with at most four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, float) and 1000 <= abs(value) < 1e7:
        text = f"{value:.0f}"
    return f"{text} {unit}".strip()


def in_a_line(error: BaseException) -> str:
    """An exception in one line of at most 300 characters."""
    return f"{type(error).__name__}: {one_line(error, None)}"[:300].rstrip(": ")
