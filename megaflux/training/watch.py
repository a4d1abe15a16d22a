"""Signals that ask a run to leave, and a thread that ends a rank which no longer moves.

SIGTERM and SIGUSR1 (Slurm's warning) ask: the ranks agree at the next update's end, save, and leave with exit code 10.
Before the first update there is nothing to save, and a rank leaves at once. A launcher that is gone asks too: who kills
`deepspeed` means the run, and DeepSpeed's runner dies of SIGTERM without a word to its ranks.

A rank is given up, its threads' stacks on stderr, exit code 11, where
- nothing moved for `hang_timeout` seconds (a peer hangs in a collective, a file system does not answer), or
- it was asked to leave and did not within GRACE seconds (the launcher kills what is left after 30), or
- it was asked to leave because another rank of this machine is gone: what the launcher does then, and no save can be.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

from megaflux.errors import STOPPED, STUCK

GRACE = 25.0  # s
LOOK = 1.0  # s between looks


class Watch:
    """Install it first thing; `moved()` at every sign of life, `ready()` where the first update begins."""

    def __init__(self, hang_timeout: float):
        self.hang_timeout = hang_timeout
        self.signal: str | None = None
        """Name of the signal that asked."""
        self.on_hang: Callable[[str], object] = lambda why: None
        """Called with the reason before a rank is given up for not moving; must not wait for anything."""
        self._asked = 0.0
        self._saveable = False
        self._moved = time.monotonic()
        self._parent = os.getppid()
        self._launchers = _launchers(self._parent)
        self._orphan = _was_orphaned(self._launchers)
        self._siblings = _siblings(self._parent)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def moved(self) -> None:
        self._moved = time.monotonic()

    def ready(self) -> None:
        """From now on a signal waits for the end of an update, which is saved."""
        self._siblings = max(self._siblings, _siblings(self._parent))
        self._saveable = True
        self.moved()

    def close(self) -> None:
        """Training is over: signals end the process as they used to."""
        self._ended.set()
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object) -> None:
        if self.signal is None:
            self.signal, self._asked = signal.Signals(number).name, time.monotonic()
        if not self._saveable:
            _leave(f"{self.signal} before the first update: there is nothing to save", STOPPED)

    def _look(self) -> None:
        while not self._ended.wait(LOOK):
            now = time.monotonic()
            orphaned = self._orphan or os.getppid() != self._parent or not all(map(_lives, self._launchers))
            if orphaned and self.signal is None:
                self._on_signal(signal.SIGTERM, None)
            if self.signal is not None and not orphaned and _siblings(self._parent) < self._siblings:
                _leave(f"{self.signal}, and another rank of this machine is gone: no save is possible", STUCK)
            if self.signal is not None and now - self._asked > GRACE:
                self._give_up(f"{self.signal}, and no update ended within {GRACE:.0f} s")
            if now - self._moved > self.hang_timeout:
                self._give_up(f"nothing moved for {now - self._moved:.0f} s (train.hang_timeout)")

    def _give_up(self, why: str) -> None:
        self.on_hang(why)
        _leave(why, STUCK, stacks=True)


def _siblings(parent: int) -> int:
    """Living ranks that this process' launcher has started, this one included."""
    try:
        children = psutil.Process(parent).children()
        return sum(child.status() != psutil.STATUS_ZOMBIE for child in children)
    except psutil.Error:
        return 0


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launchers(parent: int) -> list[int]:
    """The launcher's process, and deepspeed's runner above it."""
    try:
        process = psutil.Process(parent)
        below_runner = any("deepspeed.launcher" in part for part in process.cmdline())
        return [parent, process.ppid()] if below_runner else [parent]
    except psutil.Error:
        return []


def _was_orphaned(launchers: list[int]) -> bool:
    """Whether deepspeed's runner died before it had started us: init then has its child, and its job no leader."""
    return len(launchers) == 2 and launchers[1] == 1 and not _lives(os.getpgid(launchers[0]))


def _leave(why: str, code: int, stacks: bool = False) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: {why}", file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stdout.flush()
    os._exit(code)  # Python's way out would wait for the very thing that hangs
