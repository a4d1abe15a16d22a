"""Streaming's shared memory: what a killed run left behind, and what a finished dataset still holds.

Every StreamingDataset takes a prefix (000000_, 000001_, ...) for a handful of blocks in /dev/shm and two
lock files in the temporary folder. A run that was killed leaves them, and a new run that reads through
the same cache folder is then refused ("Reused local directory"). Streaming's own
clean_stale_shared_memory() stops at the first prefix that is clean, and asks nobody whether the blocks
are in use.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from megaflux import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset
from streaming.base.shared import SharedMemory

from megaflux.data.ranks import World, barrier

SHM = Path("/dev/shm")


def remove_leftovers(folders: Iterable[str]) -> list[str]:
    """Remove the blocks and locks of killed runs on any of these stream folders; their prefixes.

    A prefix is removed if it names one of `folders` (absolute paths), belongs to this user, and its
    owner is gone (see claim). Call it on one rank per node, before the dataset is built.
    """
    wanted, removed = set(folders), []
    for block in sorted(SHM.glob("[0-9]*_locals")):
        prefix = block.name.removesuffix("_locals")
        try:
            ours = block.stat().st_uid == os.getuid() and wanted & set(_folders_in(block.read_bytes()))
        except OSError:  # gone meanwhile
            continue
        if ours and _is_orphaned(prefix):
            _remove_prefix(prefix)
            removed.append(prefix)
    return removed


def claim(dataset: StreamingDataset) -> TextIO:
    """Mark this process, and workers that it forks, as owners of a dataset's prefix while they live.

    Returns the open file whose lock says so; `release` takes it. That a process has the blocks mapped
    says little: streaming maps those of other runs too, looking for a free prefix.
    """
    file = open(_claim_path(f"{dataset._shm_prefix_int:06}"), "a")  # noqa: SIM115  open until release
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextlib.contextmanager
def exclusive_set_up(world: World) -> Iterator[None]:
    """Let no other run on this machine set up a dataset meanwhile: streaming takes the first free prefix,
    and two runs that look at the same moment take the same one, of which one dies.

    Only for runs on one node, which cannot wait for each other in a circle. Enter it on every rank.
    """
    with contextlib.ExitStack() as stack:
        if world.local_rank == 0 and world.nodes == 1:
            stack.enter_context(_set_up_lock())
        barrier()
        yield


def release(dataset: StreamingDataset, claimed: TextIO) -> None:
    """Stop a dataset's threads and give back its shared memory and lock files now, not at exit.

    Reaches into streaming's attributes, since it offers no close(): whatever is absent in another
    version is left to its exit handlers.
    """
    iterator = getattr(dataset, "_iterator", None)
    if iterator is not None:
        iterator.non_blocking_exit()
        dataset._event.set()  # a thread that waits for a shard looks at nothing else
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
        if _is_orphaned(prefix):  # the last of this machine's ranks removes what is left
            _remove_prefix(prefix)


@contextlib.contextmanager
def _set_up_lock() -> Iterator[None]:
    with open(Path(tempfile.gettempdir()) / f"megaflux-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _blocks(dataset: StreamingDataset) -> list[SharedMemory]:
    """Every shared block of a dataset: some are held directly, some inside arrays and scalars."""
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
    """The stream folders in a `locals` block: int32 length, then NUL-separated paths and the prefix."""
    length = int.from_bytes(block[:4], "little")
    return block[4:length].decode("utf-8", "replace").split("\0")[:-1]


def _is_orphaned(prefix: str) -> bool:
    """Whether no living process has claimed the prefix. What nobody ever claimed is not ours to judge."""
    try:
        with open(_claim_path(prefix)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _claim_path(prefix: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{prefix}_megaflux_owner"


def _remove_prefix(prefix: str) -> None:
    locks = (Path(tempfile.gettempdir()) / f"{prefix}_{name}_filelock" for name in ("barrier", "cache"))
    for path in (*SHM.glob(f"{prefix}_*"), *locks, _claim_path(prefix)):
        with contextlib.suppress(OSError):
            path.unlink()
