"""Streaming's shared memory: remove what killed runs left, and release what a closed dataset still holds.

Every StreamingDataset takes a prefix (000000_, 000001_, ...) for a handful of blocks in /dev/shm and two lock files in the
temporary folder. A killed run leaves them: streaming never takes that prefix again, and refuses a new run that reads the
same cache folder ("Reused local directory"). Streaming's own clean_stale_shared_memory() stops at the first unused prefix,
and does not check whether blocks are in use.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset
from streaming.base.shared import SharedMemory

from megaflux.common.files import Lock, try_lock
from megaflux.common.ranks import World, barrier

SHM = Path("/dev/shm")
OWNER = "_megaflux_owner"
OTHERS = 3600.0  # s
FORGOTTEN = 86400.0  # s; streaming opens its lock files several times an epoch, which renews their time


def remove_leftovers(folders: Iterable[str]) -> list[str]:
    """Remove the shared memory and lock files of this user's killed runs. Returns the prefixes that were on `folders`.

    folders: absolute paths of this run's streams. Call it on one rank per node, before the dataset is opened.

    A claimed prefix is removed when no living process holds its claim: at once if it names one of `folders`, or has no
    blocks left (a killed run's resource tracker may have unlinked them but not the files, and streaming takes no prefix
    that has files); otherwise after an hour, because the next start on its own folders reports the removal. Of an
    unclaimed prefix (another program's, or of a run that was killed before it could claim it) only lock files are
    removed, if they are a day old, not held, and have no blocks left.
    """
    wanted, removed = set(folders), []
    for prefix in sorted(_prefixes_there()):
        blocks = list(SHM.glob(f"{prefix}_*"))
        if _is_orphaned(prefix):
            if wanted & _folders_of(prefix):
                removed.append(prefix)
            elif not all(_age(block) > OTHERS for block in blocks):
                continue
            _remove_prefix(prefix)
        elif not blocks and not _claim_path(prefix).exists():
            locks = [lock for lock in _lock_files(prefix) if lock.exists()]
            if all(_is_forgotten(lock) for lock in locks):
                _remove(locks)
    return removed


def _prefixes_there() -> set[str]:
    """The prefixes for which this user has blocks, lock files or a claim."""
    found = set()
    for folder, pattern in (
        (SHM, "[0-9]*_locals"),
        (_temporary(), "[0-9]*_*_filelock"),
        (_temporary(), f"[0-9]*{OWNER}"),
    ):
        for path in folder.glob(pattern):
            prefix = path.name.partition("_")[0]
            with contextlib.suppress(OSError):  # removed meanwhile
                if len(prefix) >= 6 and prefix.isdecimal() and path.stat().st_uid == os.getuid():
                    found.add(prefix)
    return found


def claim(dataset: StreamingDataset) -> TextIO:
    """Mark this process, and workers that it forks, as owners of a dataset's prefix while they live.

    Returns the open file whose lock is the mark, for `release`. Having the blocks mapped is no sign of ownership:
    streaming maps those of other runs too when it looks for a free prefix.
    """
    file = open(_claim_path(f"{dataset._shm_prefix_int:06}"), "a")  # noqa: SIM115  open until release
    try_lock(file, shared=True, wait=True)
    return file


@contextlib.contextmanager
def exclusive_set_up(world: World) -> Iterator[None]:
    """Keep other runs on this machine from opening a dataset meanwhile: streaming takes the first free prefix, and if
    two runs look at the same moment they take the same one, and one of them dies.

    Has an effect only for runs on one node; those on several could deadlock. Collective.
    """
    with contextlib.ExitStack() as stack:
        if world.local_rank == 0 and world.nodes == 1:
            stack.enter_context(_set_up_lock())
        barrier(world)
        yield


def release(dataset: StreamingDataset, claimed: TextIO) -> None:
    """Stop a dataset's threads and release its shared memory and lock files now, not at exit.

    Uses streaming's private attributes, because it has no close(). What is absent in another version is left to its exit
    handlers.
    """
    iterator = getattr(dataset, "_iterator", None)
    if iterator is not None:
        iterator.non_blocking_exit()
        dataset._event.set()  # the only thing that a thread waiting for a shard checks
    executor = getattr(dataset, "_executor", None)
    if executor is not None:
        executor.shutdown(wait=True)
    for block in _blocks(dataset):
        with contextlib.suppress(BufferError, FileNotFoundError):
            block.cleanup()
        atexit.unregister(block.cleanup)  # or it would unlink the next dataset's block of the same name
    claimed.close()
    prefix = Path(claimed.name).name.partition("_")[0]
    with _set_up_lock():
        # The last of this machine's ranks removes the files. Without locks that is the one that finds no blocks left.
        if _is_orphaned(prefix) or (_locks_refused(prefix) and not any(SHM.glob(f"{prefix}_*"))):
            _remove_prefix(prefix)


@contextlib.contextmanager
def _set_up_lock() -> Iterator[None]:
    with open(_temporary() / f"megaflux-{os.getuid()}.lock", "w") as lock:
        try_lock(lock, wait=True)
        yield


def _blocks(dataset: StreamingDataset) -> list[SharedMemory]:
    """Every shared memory block of a dataset: some are attributes, some inside shared arrays and scalars."""
    blocks = []
    for holder in vars(dataset).values():
        for value in (holder, *(vars(holder).values() if hasattr(holder, "__dict__") else ())):
            inner = getattr(value, "shm", None)
            if isinstance(value, SharedMemory):
                blocks.append(value)
            elif isinstance(inner, SharedMemory):
                blocks.append(inner)
    return list({id(block): block for block in blocks}.values())


def _folders_in(block: bytes) -> list[str]:
    """The stream folders in a `locals` block, which is an int32 length, then NUL-separated paths and the prefix."""
    length = int.from_bytes(block[:4], "little")
    return block[4:length].decode("utf-8", "replace").split("\0")[:-1]


def _folders_of(prefix: str) -> set[str]:
    try:
        return set(_folders_in((SHM / f"{prefix}_locals").read_bytes()))
    except OSError:
        return set()


def _age(path: Path) -> float:
    """Seconds since a path was last written; 0 where it is gone or not ours."""
    try:
        found = path.stat()
    except OSError:
        return 0.0
    return time.time() - found.st_mtime if found.st_uid == os.getuid() else 0.0


def _is_orphaned(prefix: str) -> bool:
    """Whether this user claimed the prefix and no living process holds the claim. False without a claim, and where the
    file system has no locks."""
    try:
        with open(_claim_path(prefix)) as file:
            return os.fstat(file.fileno()).st_uid == os.getuid() and try_lock(file) is Lock.HELD
    except OSError:
        return False


def _locks_refused(prefix: str) -> bool:
    try:
        with open(_claim_path(prefix)) as file:
            return try_lock(file) is Lock.REFUSED
    except OSError:
        return False


def _is_forgotten(lock: Path) -> bool:
    if _age(lock) < FORGOTTEN:
        return False
    try:
        with open(lock) as file:
            return try_lock(file) is Lock.HELD
    except OSError:
        return False


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def _claim_path(prefix: str) -> Path:
    return _temporary() / f"{prefix}{OWNER}"


def _lock_files(prefix: str) -> list[Path]:
    return [_temporary() / f"{prefix}_{name}_filelock" for name in ("barrier", "cache")]


def _remove_prefix(prefix: str) -> None:
    _remove([*SHM.glob(f"{prefix}_*"), *_lock_files(prefix), _claim_path(prefix)])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
