"""Processes that end with the one that started them, and locks that only one invocation holds."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

GRACE = 3.0  # seconds between asking a process to end and ending it


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process that the kernel ends when this one dies, however it dies (Linux; elsewhere it may live on)."""
    return subprocess.Popen(command, preexec_fn=_die_with_parent if sys.platform == "linux" else None, **options)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; not inherited, so each generation asks for it


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads its own session, and all processes in it: by SIGTERM, then by SIGKILL."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def lock(folder: Path) -> IO[bytes] | None:
    """A lock on a folder, held until the file is closed or this process dies; None: another invocation holds it.
    OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "wb")  # noqa: SIM115  (open while the lock is held)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
