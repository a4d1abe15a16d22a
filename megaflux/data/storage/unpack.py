"""Fetching and unpacking shards into a folder that other processes use too: other runs, other machines, other ranks.

    FOLDER/.unpacking/<machine>-<process>-<random>/    what one process is writing now; `lock` in it is held meanwhile

Streaming writes every shard under one temporary name (`shard.mds.tmp`), over which two processes collide. Here each
process writes into a folder of its own and renames complete files, so no process sees half a file, and the second one
replaces the file with an equal one. The next start on the same machine removes what a killed process left. A held lock
marks a folder as alive; storage.parts cannot use one, because it also asks for folders of other machines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo
from streaming.base.hashing import get_hash
from streaming.base.util import retry

from megaflux.common.files import Lock, sync_file, try_lock

logger = logging.getLogger(__name__)

UNPACKING = ".unpacking"
LOCK = "lock"
ABANDONED = 86400.0  # s, after which a folder of another machine, or one without locks, is abandoned


class MachineFault(RuntimeError):
    """A fault of the machine, which no other sample would avoid: a folder that cannot be written, no room in the cache, or
    a streaming thread that has ended."""


class UnpackingStream(Stream):
    """A Stream that any number of processes on any number of machines may read from one folder."""

    def _prepare_shard_part(
        self, raw_info: FileInfo, zip_info: FileInfo | None = None, compression: str | None = None
    ) -> int:
        """Fetch and unpack a shard into the folder. Returns the change of the cache's size in bytes, as streaming counts.

        Raises ValueError for a wrong hash, MachineFault where the folder cannot be written, and the errors of unpacking,
        reading and the remote.
        """
        folder = Path(self.local, self.split)
        raw, stored = folder / raw_info.basename, folder / (zip_info or raw_info).basename
        if raw.is_file() or (self.remote is None and not stored.is_file()):
            return super()._prepare_shard_part(raw_info, zip_info, compression)
        was_there, changed = stored.is_file(), raw_info.bytes
        with _own_folder_or_fault(folder) as own:
            if was_there:
                data = stored.read_bytes()
                self._check(zip_info or raw_info, data, stored)
            else:
                data = self._fetch(zip_info or raw_info, own / "fetched", stored)
                if zip_info is None or self.safe_keep_zip:
                    _publish(own / "fetched", stored)
            if zip_info is not None:
                _write(own / "unpacked", decompress(compression, data))
                _publish(own / "unpacked", raw)
        if zip_info is not None:
            changed += zip_info.bytes * (not was_there)
            if not self.safe_keep_zip:
                stored.unlink(missing_ok=True)
                changed -= zip_info.bytes
        return changed

    def _fetch(self, info: FileInfo, target: Path, name: Path) -> bytes:
        """The bytes of a remote file. Raises ValueError where its hash is wrong twice. name: its local path, for messages."""
        remote = os.path.join(self.remote or "", self.split, info.basename)
        for attempts_left in (1, 0):
            retry(clean_up_fn=self._downloader.clean_up, num_attempts=self.download_retry)(
                lambda: self._downloader.download(remote, str(target), self.download_timeout)
            )()
            data = target.read_bytes()
            try:
                self._check(info, data, name)
                return data
            except ValueError:
                if not attempts_left:
                    raise
                target.unlink()
        raise AssertionError

    def _check(self, info: FileInfo, data: bytes, name: Path) -> None:
        """Raises ValueError where the bytes do not have the hash that the index gives."""
        algorithm = self.validate_hash
        if not algorithm:
            return
        if algorithm not in info.hashes:
            raise ValueError(f"{name}: the index has no {algorithm} of it, only {', '.join(sorted(info.hashes))}")
        if get_hash(algorithm, data) != info.hashes[algorithm]:
            raise ValueError(f"Checksum failure: {name}")


def _write(path: Path, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
            sync_file(file)  # before the rename: a power cut must not leave a short shard under its final name
    except OSError as error:
        raise MachineFault(f"{path.parents[2]}: cannot be written ({error.strerror})") from error


def _publish(path: Path, target: Path) -> None:
    """Rename a complete file to its final name, replacing one that another process has written meanwhile."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    except OSError as error:
        raise MachineFault(f"{target.parent}: cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """A new folder for this process alone, within `folder` and so on the same disk; removed at the end.

    Raises OSError where it cannot be created.
    """
    while True:
        own = folder / UNPACKING / f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        own.mkdir(parents=True)
        try:
            with open(own / LOCK, "w") as lock:
                # Another start may be cleaning up: then it holds the lock, or has removed the file.
                if try_lock(lock) is not Lock.TAKEN and (own / LOCK).exists():
                    yield own
                    return
        except FileNotFoundError:
            if own.exists():
                raise
        finally:
            shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def _own_folder_or_fault(folder: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            own = stack.enter_context(own_folder(folder))
        except OSError as error:
            raise MachineFault(f"{folder}: cannot be written ({error.strerror})") from error
        yield own


def remove_abandoned(folders: Iterable[Path]) -> list[Path]:
    """Remove the own_folders that killed processes left in these folders, and return them.

    On this machine a folder goes if its lock is not held; on others, or without locks, after a day. Call it on one rank
    per node.
    """
    removed = []
    for folder in folders:
        for own in sorted((folder / UNPACKING).glob("*")):
            with contextlib.suppress(OSError):  # removed meanwhile, or not ours
                if _is_abandoned(own):
                    shutil.rmtree(own)
                    removed.append(own)
    return removed


def _is_abandoned(own: Path) -> bool:
    old = time.time() - own.stat().st_mtime > ABANDONED
    if own.name.partition("-")[0] != _machine() or not (own / LOCK).exists():
        return old
    with open(own / LOCK) as lock:
        found = try_lock(lock)
    return found is Lock.HELD or (found is Lock.REFUSED and old)


def unwritable(path: Path, shards: Mapping[Path, Sequence[dict[str, Any]]]) -> str | None:
    """Why a local dataset's shards cannot be unpacked in place, with the remedy, in one line. None where they can be, or
    already are.

    path: the dataset's folder. shards: stream folder -> the entries of its checked index.
    """
    missing, size = 0, 0
    refused: str | None = None
    for folder, entries in shards.items():
        packed = [entry for entry in entries if entry["zip_data"]]
        todo = [entry for entry in packed if not (folder / entry["raw_data"]["basename"]).exists()]
        missing, size = missing + len(todo), size + sum(entry["raw_data"]["bytes"] for entry in todo)
        if not todo or refused:
            continue
        parents = sorted({(folder / entry["raw_data"]["basename"]).parent for entry in todo})
        refused = next((f"{parent} is read-only here" for parent in parents if not _may_write(parent)), None)
        if refused is None:
            try:
                with own_folder(folder):
                    pass
            except OSError as error:
                refused = f"{folder}: {error.strerror}"
    if refused is None:
        return None
    return (
        f"data.path: {path} cannot be written ({refused}), and {missing} of its shards are still to be unpacked there; "
        f"make it writable, or set data.remote to {path} and data.path to a new folder with {size / 1e9:.1f} GB free"
    )


def _may_write(folder: Path) -> bool:
    return not folder.exists() or os.access(folder, os.W_OK | os.X_OK)  # absent: inspect_index reports its shards


def _machine() -> str:
    """A name of this boot of this machine. Host names are not unique (containers, localhost)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip().replace("-", "") if boot.exists() else os.uname().nodename.replace("-", "_")
