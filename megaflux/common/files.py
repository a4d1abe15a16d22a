"""What network and container file systems may refuse: durability of a folder, and locks.

Some answer fsync of a folder with EINVAL (CIFS, FUSE, several object stores), and flock with ENOSYS, EOPNOTSUPP or ENOLCK
(Lustre without `-o flock`, NFS without its lock service). Neither says anything about the data, so the first refusal of
a kind is warned of and the work goes on. Real faults (EIO, ENOSPC, EROFS, ...) are raised as ever.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from enum import Enum
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

REFUSES_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY})
REFUSES_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL})
_warned: set[str] = set()


class Lock(Enum):
    """What try_lock got. HELD: until the file is closed. TAKEN: another process has it. REFUSED: no locks here."""

    HELD = "held"
    TAKEN = "taken"
    REFUSED = "refused"


def sync_file(file: IO) -> None:
    """Flush an open file and make it durable (fsync). A file system that has no fsync is warned of once; other OSErrors
    are raised."""
    file.flush()
    _sync(file.fileno(), file.name)


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable (fsync of the folder), after files were created, renamed or deleted there.

    A file system that refuses it is warned of once; other OSErrors (EIO, ENOSPC, a missing folder) are raised.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def try_lock(file: IO, shared: bool = False, wait: bool = False) -> Lock:
    """Lock an open file (flock), which ends when it is closed in all processes that inherited it, however they end.

    shared: together with other shared holders. wait: until it is free, instead of TAKEN. Where the file system has no
    locks, that is warned of once and REFUSED is returned: the caller goes on, and nothing may be concluded about other
    processes. Other OSErrors are raised.
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
