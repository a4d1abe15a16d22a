"""Signals that ask a run to leave, and a thread that ends a rank which no longer moves.

SIGTERM and SIGUSR1 (Slurm's warning) ask: the ranks agree at the next update's end, save, and leave with exit code 10.
Before the first update, and between stages, there is nothing to save, and a rank leaves at once. A launcher that is gone asks too: who kills
`deepspeed` means the run, and DeepSpeed's runner dies of SIGTERM without a word to its ranks.

A rank is given up, its threads' stacks on stderr, exit code 11, where
- nothing moved for `hang_timeout` seconds after training began (a peer hangs in a collective, a file system does not
  answer), or
- it was asked to leave and the update that it was in did not end within `leave_within` seconds, or
- it was asked to leave because another rank of this machine is gone: what a launcher does then, and no save can be.

The thread hears signals itself, by a pipe: Python's handlers wait while the main thread is in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import psutil

from megaflux.errors import STOPPED, STUCK

LOOK = 0.5  # s between looks
RANKED = ("RANK", "SLURM_PROCID")  # what launchers give a rank
ASKING = (signal.SIGTERM, signal.SIGUSR1)


class Watch:
    """Install it first thing; `moved()` at every sign of life, `ready()` where updates begin."""

    def __init__(self, hang_timeout: float, leave_within: float = 25.0):
        self.hang_timeout, self.leave_within = hang_timeout, leave_within
        self.signal: str | None = None
        """Name of the signal that asked."""
        self.on_hang: Callable[[str], object] = lambda why: None
        """Called with the reason when a rank is given up for not moving."""
        self._asked = 0.0
        self._saveable = False
        self._unhurried = 0
        self._moved = time.monotonic()
        self._parent = os.getppid()
        # A person's python has no launcher, and its shell may leave before it.
        self._launched = any(name in os.environ for name in RANKED)
        self._launchers = _launchers(self._parent) if self._launched else []
        self._orphan = _was_orphaned(self._launchers)
        self._siblings = self._count_siblings()
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in ASKING:
            signal.signal(number, self._on_signal)
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def moved(self) -> None:
        self._moved = time.monotonic()

    def ready(self) -> None:
        """From now on a signal waits for the end of an update, which is saved."""
        self._siblings = max(self._siblings, self._count_siblings())
        self._saveable = True
        self.moved()

    def pause(self) -> None:
        """All is saved, and until `ready` nothing is to be: a signal leaves at once, one that came before as well."""
        self._saveable = False
        if self.signal is not None:
            self._on_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def unhurried(self, waiting: bool = False) -> Iterator[None]:
        """A part that may take longer than `leave_within`: a save, a validation, a new stage.

        waiting: for another rank's work, of which this one sees no sign; it is not held to `hang_timeout` either."""
        self._unhurried += 1
        before, self.hang_timeout = self.hang_timeout, float("inf") if waiting else self.hang_timeout
        try:
            yield
        finally:
            self._unhurried -= 1
            self.moved()
            self.hang_timeout = before
            self._asked = time.monotonic()

    def close(self) -> None:
        """Training is over: signals end the process as they used to."""
        self._ended.set()
        signal.set_wakeup_fd(-1)
        for number in ASKING:
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object = None) -> None:
        if self.signal is None:
            self._asked, self.signal = time.monotonic(), signal.Signals(number).name
        if not self._saveable:
            leave(f"{self.signal} while no update is under way: there is nothing to save", STOPPED)

    def _look(self) -> None:
        while not self._ended.is_set():
            if select.select([self._pipe], [], [], LOOK)[0]:
                for number in os.read(self._pipe, 64):
                    if number in ASKING and not self._ended.is_set():
                        self._on_signal(number)
            if self._ended.is_set():
                return
            now = time.monotonic()
            orphaned = self._launched and (
                self._orphan or os.getppid() != self._parent or not all(map(_lives, self._launchers))
            )
            if orphaned and self.signal is None:
                self._on_signal(signal.SIGTERM)
            if self.signal is not None and not orphaned and self._count_siblings() < self._siblings:
                leave(f"{self.signal}, and another rank of this machine is gone: no save is possible", STUCK)
            if self.signal is not None and not self._unhurried and now - self._asked > self.leave_within:
                self._give_up(
                    f"{self.signal}, and no update ended within {self.leave_within:.0f} s (train.leave_within)"
                )
            if self._saveable and now - self._moved > self.hang_timeout:
                self._give_up(f"nothing moved for {now - self._moved:.0f} s (train.hang_timeout)")

    def _give_up(self, why: str) -> None:
        # On its own, for it may hang as well: the run's file system may be what does not answer.
        telling = threading.Thread(target=self.on_hang, args=(why,), daemon=True)
        telling.start()
        telling.join(2.0)
        leave(why, STUCK, stacks=True)

    def _count_siblings(self) -> int:
        """Living ranks of this process' launcher, this one included; 0: there is no launcher."""
        if not self._launched:
            return 0
        try:
            return sum(_is_rank(child) for child in psutil.Process(self._parent).children())
        except psutil.Error:
            return 0


def _is_rank(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and any(name in process.environ() for name in RANKED)
    except psutil.Error:
        return False


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


def leave(why: str, code: int, stacks: bool = False) -> NoReturn:
    """End this process at once: a line on stderr, every thread's stack where asked for, the exit code."""
    rank = os.environ.get("RANK", "0")
    print(f"rank {rank}: {why}", file=sys.stderr, flush=True)
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stdout.flush()
    os._exit(code)  # Python's way out would wait for the very thing that hangs
