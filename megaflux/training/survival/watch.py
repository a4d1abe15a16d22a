"""Signals that ask a run to leave, and a thread that ends a rank which no longer moves.

SIGTERM, SIGUSR1 (Slurm's warning), SIGINT (Ctrl-C) and SIGHUP (the terminal is closed, or ssh drops) ask: the ranks agree at
the next update's end, save, and leave with exit code 10. Before the first update, and between stages, there is nothing to
save, and a rank leaves at once. A second Ctrl-C leaves at once with 130 and saves nothing; SIGQUIT (Ctrl-\\) does that the first
time, with 131 and every thread's stack. A signal that was ignored at the start (nohup, `&` in a script) stays ignored. A
launcher that is gone asks too: who kills `deepspeed` means the run, and DeepSpeed's runner dies of SIGTERM without a word to
its ranks.

A rank is given up, its threads' stacks on stderr, exit code 11, where
- nothing moved for `hang_timeout` seconds after training began (a peer hangs in a collective, a file system does not
  answer), or
- it was asked to leave and the update that it was in did not end in time: `leave_within` seconds, by default 25, or three
  times the longest update of this process where that is more, or
- it was asked to leave because another rank of this machine is gone: what a launcher does then, and no save can be.

The thread hears signals itself, by a pipe: Python's handlers wait while the main thread is in a collective.
"""

from __future__ import annotations

import _thread
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

from megaflux.common.errors import INTERRUPTED, STOPPED, STUCK
from megaflux.training.survival import output

LOOK = 0.5  # s between looks
RANKED = ("RANK", "SLURM_PROCID")  # what launchers give a rank
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
HEARD = (*ASKING, signal.SIGQUIT)
LEAST = 25.0  # s that an update has to end
LONGEST_TIMES = 3
SPEAKING = 2.0  # s for last words: whoever should read them may not
ONE_HAND = (
    0.25  # s within which two SIGINT are one Ctrl-C: some wrappers (timeout, uv) pass on what the rank got anyway
)


class Watch:
    """Install it first thing; `moved()` at the end of every update and at every other sign of life, `ready()` where updates
    begin.

    hang_timeout: s. leave_within: s that an update has to end in once a signal asked; None: `LEAST`, or `LONGEST_TIMES` times
    the longest update seen where that is more."""

    def __init__(self, hang_timeout: float, leave_within: float | None = None):
        self.hang_timeout, self._leave_within, self._longest = hang_timeout, leave_within, 0.0
        self.signal: str | None = None
        """Name of the signal that asked."""
        self.on_hang: Callable[[str], object] = lambda why: None
        """Called with the reason when a rank is given up for not moving."""
        self._asked = self._interrupted = 0.0
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
        output.survive_terminal()
        self._heard = [number for number in HEARD if _is_for_us(number)]
        for number in self._heard:
            signal.signal(number, self._on_signal)
        self._ended = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def moved(self) -> None:
        """An update ended, or, within `unhurried`, a part of what may take longer."""
        now = time.monotonic()
        if self._saveable and not self._unhurried:
            self._longest = max(self._longest, now - self._moved)
        self._moved = now

    @property
    def leave_within(self) -> float:
        """Seconds that an update has to end in once a signal asked."""
        return self._leave_within or max(LEAST, LONGEST_TIMES * self._longest)

    def ready(self) -> None:
        """From now on a signal waits for the end of an update, which is saved."""
        self._siblings = max(self._siblings, self._count_siblings())
        self._moved, self._saveable = time.monotonic(), True

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
            self._moved = self._asked = time.monotonic()
            self.hang_timeout = before
            self._unhurried -= 1

    def close(self) -> None:
        """Training is over: signals end the process as they used to."""
        self._ended.set()
        signal.set_wakeup_fd(-1)
        for number in self._heard:
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object = None) -> None:
        if number not in ASKING:  # the thread hears it
            return
        if self.signal is None:
            self._asked, self.signal = time.monotonic(), signal.Signals(number).name
        if not self._saveable:
            speaks = os.environ.get("RANK", "0") == "0"
            leave(f"{self.signal} while no update is under way: there is nothing to save" if speaks else None, STOPPED)

    def _hear(self, number: int) -> None:
        """A signal, once for each time that it was sent: of the thread, and not of Python's handlers as well."""
        if number == signal.SIGQUIT:
            leave("SIGQUIT: leaving at once, nothing is saved", 128 + number, stacks=True)
        if number in ASKING:
            self._on_signal(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted and now - self._interrupted > ONE_HAND:
            leave("a second Ctrl-C: leaving at once, nothing is saved", INTERRUPTED)
        if not self._interrupted and os.environ.get("RANK", "0") == "0":
            _say("Ctrl-C: saving once this update has ended; a second one leaves at once and saves nothing\n")
        self._interrupted = self._interrupted or now

    def _look(self) -> None:
        while not self._ended.is_set():
            if select.select([self._pipe], [], [], LOOK)[0]:
                for number in os.read(self._pipe, 64):
                    if number in self._heard and not self._ended.is_set():
                        self._hear(number)
            if self._ended.is_set():
                return
            now = time.monotonic()
            orphaned = self._launched and (
                self._orphan or os.getppid() != self._parent or not all(map(_lives, self._launchers))
            )
            if orphaned and self.signal is None:
                self._on_signal(signal.SIGTERM)
            if orphaned and self.signal in ("SIGINT", "SIGHUP"):
                self._outlive_the_launcher()
            if self.signal is not None and not orphaned and self._count_siblings() < self._siblings:
                leave(f"{self.signal}, and another rank of this machine is gone: no save is possible", STUCK)
            if self.signal is not None and not self._unhurried and now - self._asked > self.leave_within:
                self._give_up(
                    f"{self.signal}, and no update ended within {self.leave_within:.0f} s (train.leave_within)"
                )
            if self._saveable and now - self._moved > self.hang_timeout:
                self._give_up(f"nothing moved for {now - self._moved:.0f} s (train.hang_timeout)")

    def _outlive_the_launcher(self) -> None:
        """End deepspeed's launcher: Ctrl-C has ended the runner above it, nobody waits for its exit code, and it would send
        SIGKILL to ranks that are not gone after 30 s, in the middle of their save."""
        if len(self._launchers) == 2 and os.getppid() == self._parent and not _lives(self._launchers[1]):
            with contextlib.suppress(OSError):
                os.kill(self._parent, signal.SIGKILL)

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


def _is_for_us(number: int) -> bool:
    """Whether nobody asked to have this signal of the terminal ignored. torchrun's ranks are in sessions of their own, where
    none arrives that torchrun did not send; it does so under nohup too, and then sends SIGKILL."""
    of_terminal = number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    ignored = of_terminal and signal.getsignal(number) == signal.SIG_IGN
    return not ignored or "TORCHELASTIC_RUN_ID" in os.environ


def _was_orphaned(launchers: list[int]) -> bool:
    """Whether deepspeed's runner died before it had started us: init then has its child, and its job no leader."""
    return len(launchers) == 2 and launchers[1] == 1 and not _lives(os.getpgid(launchers[0]))


def leave(why: str | None, code: int, stacks: bool = False) -> NoReturn:
    """End this process at once: a line on stderr (None: silently), every thread's stack where asked for, the exit code."""
    line = "" if why is None else f"rank {os.environ.get('RANK', '0')}: {why}\n"
    _say(line + (_stacks() if stacks else ""), SPEAKING)
    os._exit(code)  # Python's way out would wait for the very thing that hangs


def _stacks() -> str:
    """Every thread's stack. By way of memory, for faulthandler writes with the GIL held, and a pipe may be full."""
    try:
        with open(os.memfd_create("stacks"), "w+", errors="replace") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:  # no descriptor left, say
        return f"no stacks: {error.strerror}\n"


def _say(text: str, wait: float = 0.0) -> None:
    """To stderr, past Python's buffer, whose lock another thread may hold in a write that blocks: a pipe is full where `less`
    shows its first page or a reader is stopped. wait: s until it goes on without having been heard."""
    said = _thread.allocate_lock()
    said.acquire()

    def speak() -> None:
        try:
            os.write(2, text.encode())
            if wait:
                sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # closed, or there is none
            pass
        said.release()

    _thread.start_new_thread(speak, ())
    if wait:
        said.acquire(timeout=wait)
