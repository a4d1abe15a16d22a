"""Signals that ask a run to leave, and a thread that ends a rank which makes no progress.

SIGTERM, SIGUSR1 (Slurm's warning), SIGINT (Ctrl-C) and SIGHUP (the terminal was closed, or ssh disconnected) ask the run to
leave: at the end of the current update the ranks agree, save, and exit with code 10. Before the first update and between
stages there is nothing to save, and a rank exits at once. A second Ctrl-C exits at once with 130 and saves nothing; SIGQUIT
(Ctrl-\\) does so the first time, with 131 and every thread's stack. A signal that was ignored at the start (nohup, `&` in a
script) stays ignored. The death of the launcher counts as SIGTERM: whoever kills `deepspeed` means the run, and DeepSpeed's
runner dies of SIGTERM without notifying its ranks.

A rank gives up, with its threads' stacks on stderr and exit code 11, where
- there was no progress for `hang_timeout` seconds after training began (a peer hangs in a collective, a file system does
  not answer), or
- it was asked to leave and the current update did not end in time: within `leave_within` seconds, by default 25, or three
  times the longest update of this process if that is more, or
- it was asked to leave because another rank of this machine died: launchers then stop all others, and no save is possible.

The thread receives signals itself, through a pipe: Python's handlers do not run while the main thread is in a collective.
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

LOOK = 0.5  # s between checks
RANKED = ("RANK", "SLURM_PROCID")  # variables that launchers set for a rank
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
HANDLED = (*ASKING, signal.SIGQUIT)
LEAST = 25.0  # s that an update has to end
LONGEST_TIMES = 3
SPEAKING = 2.0  # s for the last message: its reader may have stopped reading
# s within which two SIGINT are one Ctrl-C: some wrappers (timeout, uv) forward a signal that the rank also got itself
ONE_CTRL_C = 0.25


class Watch:
    """Handles signals and detects hangs. Create it before anything else; call `ready()` when a stage's updates begin, and
    `moved()` at the end of every update and at any other progress.

    hang_timeout: s. leave_within: s in which an update must end after a signal; None: `LEAST`, or `LONGEST_TIMES` times the
    longest update seen if that is more."""

    def __init__(self, hang_timeout: float, leave_within: float | None = None):
        self.hang_timeout, self._leave_within, self._longest = hang_timeout, leave_within, 0.0
        self.signal: str | None = None
        """Name of the first signal that asked the run to leave; None: none did."""
        self.on_hang: Callable[[str], object] = lambda why: None
        """Called with the reason before a rank gives up."""
        self._asked = self._interrupted = 0.0
        self._saveable = False
        self._slow_sections = 0
        self._moved = time.monotonic()
        self._parent = os.getppid()
        # Started from a shell there is no launcher, and the shell may exit first.
        self._launched = any(name in os.environ for name in RANKED)
        self._launchers = _launchers(self._parent) if self._launched else []
        self._orphan = _was_orphaned(self._launchers)
        self._siblings = self._count_siblings()
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        output.survive_terminal()
        self._handled = [number for number in HANDLED if _is_for_us(number)]
        for number in self._handled:
            signal.signal(number, self._on_signal)
        self._ended = threading.Event()
        threading.Thread(target=self._loop, name="watch", daemon=True).start()

    def moved(self) -> None:
        """Report progress: an update ended, or a part of a `slow_section`."""
        now = time.monotonic()
        if self._saveable and not self._slow_sections:
            self._longest = max(self._longest, now - self._moved)
        self._moved = now

    @property
    def leave_within(self) -> float:
        """Seconds in which an update must end after a signal."""
        return self._leave_within or max(LEAST, LONGEST_TIMES * self._longest)

    def ready(self) -> None:
        """Updates begin: from now on a signal waits for the end of the update, which is then saved."""
        self._siblings = max(self._siblings, self._count_siblings())
        self._moved, self._saveable = time.monotonic(), True

    def pause(self) -> None:
        """Nothing to save yet: until `ready()`, a signal exits at once. So does one that has come already."""
        self._saveable = False
        if self.signal is not None:
            self._on_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def slow_section(self, waiting: bool = False) -> Iterator[None]:
        """Exempt from `leave_within`: a save, a validation, a new stage.

        waiting: for another rank's work, whose progress this rank does not see; exempt from `hang_timeout` too."""
        self._slow_sections += 1
        before, self.hang_timeout = self.hang_timeout, float("inf") if waiting else self.hang_timeout
        try:
            yield
        finally:
            self._moved = self._asked = time.monotonic()
            self.hang_timeout = before
            self._slow_sections -= 1

    def close(self) -> None:
        """Training is over: restore the default action of every signal."""
        self._ended.set()
        signal.set_wakeup_fd(-1)
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object = None) -> None:
        if number not in ASKING:  # handled in the thread
            return
        if self.signal is None:
            self._asked, self.signal = time.monotonic(), signal.Signals(number).name
        if not self._saveable:
            speaks = os.environ.get("RANK", "0") == "0"
            leave(f"{self.signal} while no update is under way: there is nothing to save" if speaks else None, STOPPED)

    def _handle(self, number: int) -> None:
        """Handle one received signal. Called by the thread only, so that each signal sent counts once."""
        if number == signal.SIGQUIT:
            leave("SIGQUIT: leaving at once, nothing is saved", 128 + number, stacks=True)
        if number in ASKING:
            self._on_signal(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted and now - self._interrupted > ONE_CTRL_C:
            leave("a second Ctrl-C: leaving at once, nothing is saved", INTERRUPTED)
        if not self._interrupted and os.environ.get("RANK", "0") == "0":
            _say("Ctrl-C: saving once this update has ended; a second one leaves at once and saves nothing\n")
        self._interrupted = self._interrupted or now

    def _loop(self) -> None:
        while not self._ended.is_set():
            if select.select([self._pipe], [], [], LOOK)[0]:
                for number in os.read(self._pipe, 64):
                    if number in self._handled and not self._ended.is_set():
                        self._handle(number)
            if self._ended.is_set():
                return
            now = time.monotonic()
            orphaned = self._launched and (
                self._orphan or os.getppid() != self._parent or not all(map(_is_alive, self._launchers))
            )
            if orphaned and self.signal is None:
                self._on_signal(signal.SIGTERM)
            if orphaned and self.signal in ("SIGINT", "SIGHUP"):
                self._outlive_the_launcher()
            if self.signal is not None and not orphaned and self._count_siblings() < self._siblings:
                leave(f"{self.signal}, and another rank of this machine is gone: no save is possible", STUCK)
            if self.signal is not None and not self._slow_sections and now - self._asked > self.leave_within:
                self._give_up(
                    f"{self.signal}, and no update ended within {self.leave_within:.0f} s (train.leave_within)"
                )
            if self._saveable and now - self._moved > self.hang_timeout:
                self._give_up(f"nothing moved for {now - self._moved:.0f} s (train.hang_timeout)")

    def _outlive_the_launcher(self) -> None:
        """Kill deepspeed's launcher: Ctrl-C has ended its parent, the runner, so nobody waits for its exit code, and it would
        send SIGKILL to ranks that have not exited after 30 s, in the middle of their save."""
        if len(self._launchers) == 2 and os.getppid() == self._parent and not _is_alive(self._launchers[1]):
            with contextlib.suppress(OSError):
                os.kill(self._parent, signal.SIGKILL)

    def _give_up(self, why: str) -> None:
        # In a thread of its own, as it may hang too: the run's file system may be the cause.
        reporter = threading.Thread(target=self.on_hang, args=(why,), daemon=True)
        reporter.start()
        reporter.join(2.0)
        leave(why, STUCK, stacks=True)

    def _count_siblings(self) -> int:
        """Living ranks of this process's launcher, including this one; 0 without a launcher."""
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


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launchers(parent: int) -> list[int]:
    """Process ids of the launcher and, if it is deepspeed's, of its parent, the runner."""
    try:
        process = psutil.Process(parent)
        below_runner = any("deepspeed.launcher" in part for part in process.cmdline())
        return [parent, process.ppid()] if below_runner else [parent]
    except psutil.Error:
        return []


def _is_for_us(number: int) -> bool:
    """Whether to handle a signal: False for a terminal's signal that was ignored at the start. Not under torchrun, whose ranks
    have sessions of their own and get only what torchrun sends; it sends them under nohup too, and SIGKILL afterwards."""
    of_terminal = number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    ignored = of_terminal and signal.getsignal(number) == signal.SIG_IGN
    return not ignored or "TORCHELASTIC_RUN_ID" in os.environ


def _was_orphaned(launchers: list[int]) -> bool:
    """Whether deepspeed's runner died before this process started: init has adopted the launcher, and the leader of its
    process group is dead."""
    return len(launchers) == 2 and launchers[1] == 1 and not _is_alive(os.getpgid(launchers[0]))


def leave(why: str | None, code: int, stacks: bool = False) -> NoReturn:
    """Exit at once with this code, after one line on stderr (None: silently) and, with stacks, every thread's stack."""
    line = "" if why is None else f"rank {os.environ.get('RANK', '0')}: {why}\n"
    _say(line + (_stacks() if stacks else ""), SPEAKING)
    os._exit(code)  # Python's own exit would wait for what hangs


def _stacks() -> str:
    """Every thread's stack as text. Written to memory first: faulthandler holds the GIL, and a full pipe would block it."""
    try:
        with open(os.memfd_create("stacks"), "w+", errors="replace") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
            file.seek(0)
            return file.read()
    except OSError as error:  # for example, no descriptor is left
        return f"no stacks: {error.strerror}\n"


def _say(text: str, wait: float = 0.0) -> None:
    """Write to stderr without Python's buffer, whose lock a thread may hold in a blocked write: a pipe fills up while `less`
    shows its first page or its reader is stopped. wait: s to wait for the write."""
    written = _thread.allocate_lock()
    written.acquire()

    def speak() -> None:
        try:
            os.write(2, text.encode())
            if wait:
                sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # closed or missing
            pass
        written.release()

    _thread.start_new_thread(speak, ())
    if wait:
        written.acquire(timeout=wait)
