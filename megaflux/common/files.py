"""Durable writes and locks, on file systems that may not support either.

Some network and container file systems answer fsync of a folder with EINVAL (CIFS, FUSE, several object stores), and flock
with ENOSYS, EOPNOTSUPP or ENOLCK (Lustre without `-o flock`, NFS without its lock service). Neither is a fault of the
data, so the first refusal of each kind is a warning. Real faults (EIO, ENOSPC, EROFS, ...) are raised.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
from enum import Enum
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

REFUSES_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
REFUSES_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
_warned: set[str] = set()


class Lock(Enum):
    """The result of try_lock. HELD: this process has the lock until the file is closed. TAKEN: another process has it.
    REFUSED: the file system has no locks."""

    HELD = "held"
    TAKEN = "taken"
    REFUSED = "refused"


def sync_file(file: IO) -> None:
    """Flush an open file and make it durable (fsync). Warns once where the file system has no fsync; raises other
    OSErrors."""
    file.flush()
    _sync(file.fileno(), file.name)


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable (fsync of the folder), after files were created, renamed or deleted there.

    Warns once where the file system does not support it; raises other OSErrors (EIO, ENOSPC, a missing folder).
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any, indent: int | None = 1, sort_keys: bool = True) -> None:
    """Write `content` and a newline as a JSON file. A kill or power cut at any moment leaves the old file or the new one.

    Raises OSError where it cannot be written.
    """
    # Machines that share a folder may have processes of the same number, in containers most of all.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n")
        sync_file(file)
    os.replace(temporary, path)
    sync_folder(path.parent)


def append_line(path: Path, line: bytes) -> None:
    """Append a line, without its newline, to a file in one write, so that a kill tears at most this line.

    After a torn line it begins on a line of its own. Raises OSError, also where the disk took only a part."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        written = (b"\n" if torn else b"") + line + b"\n"
        if os.write(descriptor, written) != len(written):
            raise OSError("the disk is full: a line was cut short")
    finally:
        os.close(descriptor)


def try_lock(file: IO, shared: bool = False, wait: bool = False) -> Lock:
    """Lock an open file (flock) until every process that inherited it has closed it or ended.

    shared: allow other shared holders. wait: until the lock is free, instead of returning TAKEN. Warns once and returns
    REFUSED where the file system has no locks; the caller continues, knowing nothing about other processes. Raises other
    OSErrors.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return Lock.TAKEN
    except OSError as error:
        if error.errno not in REFUSES_LOCKS:
            raise
        _warn_once(
            "locks",
            "%s: no locks on this file system (%s); see to it that no other process writes there",
            file.name,
            error.strerror,
        )
        return Lock.REFUSED
    return Lock.HELD


def _sync(descriptor: int, name: object) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSES_SYNC:
            raise
        _warn_once(
            "fsync",
            "%s: this file system does not take fsync (%s); what was just written may be lost in a power cut, "
            "not in a kill",
            name,
            error.strerror,
        )


def _warn_once(kind: str, *message: object) -> None:
    if kind not in _warned:
        _warned.add(kind)
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this machine's ranks, which see the same storage
        logger.log(logging.WARNING if first else logging.DEBUG, *message)
