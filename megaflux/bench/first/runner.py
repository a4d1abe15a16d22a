"""Starts the steps one after the other, each in its own process; watches its time, and restarts a step that dies.

A step that dies loses what it was measuring and continues with the rest in a new process; one that takes too long is
ended, and what it has not reached is left for the next invocation. In any case the next step follows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from megaflux.bench.first.facts import FINISHED, Fact, Facts, current_file, describe
from megaflux.bench.first.processes import end_group, start

POLL = 0.05  # seconds
SINCE = "MEGAFLUX_FIRST_SINCE"  # rows that there were when this invocation began


@dataclass(frozen=True)
class Step:
    """A process that measures facts. Consecutive steps of one group run at the same time."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds."""
    group: str | None = None
    needs: tuple[str, ...] = ()
    """Modules without which it cannot run here."""


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    began: float
    """Of the step's first process."""
    started: float
    rows: int
    """Of its facts, when this process began."""


@dataclass
class Outcome:
    """What an invocation did not run."""

    left_out: dict[str, str] = field(default_factory=dict)
    """Step -> why it was not run."""


def run(steps: Sequence[Step], facts: Facts, log: Path, seconds: float, outcome: Outcome) -> None:
    """Run what is not finished, for at most so many seconds. Facts go to `facts`, all output to `log`, and what is not run
    to `outcome`."""
    deadline = time.monotonic() + seconds
    environment = os.environ | {SINCE: str(len(facts.rows())), "PYTHONUNBUFFERED": "1"}
    shown = len(facts.rows())
    with open(log, "ab", buffering=0) as output:
        for group in _groups(steps):
            waiting = []
            for step in group:
                if lacking := [name for name in step.needs if find_spec(name) is None]:
                    outcome.left_out[step.name] = f"no {', '.join(lacking)} here"
                elif not is_finished(facts, step.name):
                    waiting.append(step)
            if waiting and time.monotonic() >= deadline:
                outcome.left_out |= {step.name: "no time left" for step in waiting}
                continue
            running = [_start(step, facts, output, environment) for step in waiting]
            try:
                while running:
                    time.sleep(POLL)
                    running = [now for one in running if (now := _watch(one, facts, output, environment, deadline))]
                    shown = _show(facts, shown)
            finally:
                for one in running:
                    end_group(one.process)
    _show(facts, shown)


def is_finished(facts: Facts, step: str) -> bool:
    """Whether a step ended, and none of its facts is an error."""
    mine = [row for row in facts.latest().values() if row.step == step]
    return any(row.fact == FINISHED and row.error is None for row in mine) and not any(row.error for row in mine)


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.group is not None and groups[-1][-1].group == step.group:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _start(
    step: Step, facts: Facts, output: IO[bytes], environment: dict[str, str], began: float | None = None
) -> _Running:
    current_file(facts.path, step.name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        output.write(f"\n--- {step.name}: {' '.join(step.command)}\n".encode())
    process = start(
        list(step.command),
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    now = time.monotonic()
    return _Running(step, process, began or now, now, len(facts.rows()))


def _watch(
    one: _Running, facts: Facts, output: IO[bytes], environment: dict[str, str], deadline: float
) -> _Running | None:
    """What runs after a check of a step's process: the same one, a new one in its place, or None."""
    code, now, name = one.process.poll(), time.monotonic(), one.step.name
    if code is None:
        limit = min(one.began + one.step.limit, deadline)
        if now < limit:
            return one
        end_group(one.process)
        _lost(one, facts, f"ended after {now - one.began:.0f} s, its limit")
        _keep(
            facts, Fact(name, FINISHED, error=f"ended after {now - one.began:.0f} s, its limit; the next run goes on")
        )
        return None
    if code == 0:
        if not any(row.key == (name, FINISHED) for row in facts.rows()[one.rows :]):
            _keep(facts, Fact(name, FINISHED, round(now - one.began, 1), "s"))
        return None
    why = (
        f"its process was ended by signal {signal.Signals(-code).name}"
        if code < 0
        else f"its process ended with code {code}"
    )
    _lost(one, facts, why)
    new = [row for row in facts.rows()[one.rows :] if row.step == name]
    if any(row.fact == FINISHED for row in new):  # it recorded itself what stopped it
        return None
    if new:  # it made progress, so the rest is worth another process
        return _start(one.step, facts, output, environment, one.began)
    _keep(facts, Fact(name, FINISHED, error=f"{why}; see the log"))
    return None


def _lost(one: _Running, facts: Facts, why: str) -> None:
    """Record an error for each fact that a dead process was measuring."""
    current = current_file(facts.path, one.step.name)
    try:
        names = json.loads(current.read_text())
    except (OSError, ValueError):
        return
    current.unlink(missing_ok=True)
    known = {row.fact for row in facts.rows()[one.rows :] if row.step == one.step.name}
    for name in names:
        if name not in known:
            _keep(facts, Fact(one.step.name, name, seconds=round(time.monotonic() - one.started, 1), error=why))


def _keep(facts: Facts, fact: Fact) -> None:
    """Add a fact; a full disk must not stop the next steps, whose facts are printed all the same."""
    try:
        facts.add(fact)
    except OSError as error:
        print(f"error: {facts.path}: {error.strerror}; not written: {describe(fact)}", file=sys.stderr, flush=True)


def _show(facts: Facts, shown: int) -> int:
    rows = facts.rows()
    for row in rows[shown:]:
        print(describe(row), flush=True)
    return len(rows)
