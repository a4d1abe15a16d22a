"""A dataset that is computed from another one, in the making: a part for each shard of the other.

    ROOT/train/<bucket>/part-00012/                     what was computed from shard 12 of that bucket: shards, index.json
    ROOT/.unfinished/<machine>-<process>-<random>/      what a process is writing
    ROOT/dataset.json                                   written last, when all parts are there

A part gets its name when it is whole and on disk, so what is there stays, whoever is killed. Ranks, runs and machines that
compute the same dataset at once share nothing but those names: who finds a part, or is second with it, goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import DatasetInfo, read_shard, write_dataset, write_shards
from megaflux.data.storage.index import INDEX, inspect_index, raise_problems, with_prefix, write_index

SPLIT = "train"  # the only one that is computed ahead
UNFINISHED = ".unfinished"
ABANDONED = 3600.0  # s in which a process of another machine, that lives, has touched its folder many times
APPEARING = 60.0  # s for which a network file system may not show what another machine has renamed


@dataclass(frozen=True)
class Part:
    """One shard of the original, and what is computed from it. shard: its index entry."""

    bucket: Bucket
    number: int
    shard: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder of its shards, in its bucket's."""
        return f"part-{self.number:05}"

    def folder(self, root: Path) -> Path:
        """Where it is in the dataset that is made."""
        return root / SPLIT / self.bucket.folder / self.name

    def is_there(self, root: Path) -> bool:
        """Whether it is whole."""
        return (self.folder(root) / INDEX).is_file()

    def samples(self, original: Path) -> Iterator[dict[str, Any]]:
        """Those of the original, as `read_split` gives them. UserError where the shard is damaged."""
        return read_shard(original / SPLIT / self.bucket.folder, self.shard)


def all_parts(original: Path, info: DatasetInfo) -> list[Part]:
    """The parts of a dataset, bucket by bucket in stored order. UserError with all that is wrong with its files."""
    parts, problems = [], []
    for bucket in info.buckets:
        if count := info.counts.get(SPLIT, {}).get(bucket.name, 0):
            shards, found = inspect_index(original / SPLIT / bucket.folder, expected_samples=count)
            problems += found
            parts += [Part(bucket, number, shard) for number, shard in enumerate(shards)]
    raise_problems(problems)
    return parts


def missing(root: Path, parts: Iterable[Part]) -> list[Part]:
    """Those that are not there yet, the largest first. A part whose files are not as its index says is removed."""
    wanted = []
    for part in parts:
        folder = part.folder(root)
        if folder.exists():
            if not inspect_index(folder, expected_samples=part.shard["samples"])[1]:
                continue
            shutil.rmtree(folder)
        wanted.append(part)
    return sorted(wanted, key=lambda part: -part.shard["samples"] * part.bucket.width * part.bucket.height)


def remove_leftovers(root: Path) -> None:
    """Remove what processes that are gone were writing: those of this machine at once, those of others when nothing of
    theirs has moved for an hour. Also what earlier versions left of a dataset that they did not complete."""
    with contextlib.suppress(OSError):  # of a finished one, which may lie where nothing can be written
        for folder in (root / UNFINISHED).iterdir():
            if not _lives(folder):
                shutil.rmtree(folder, ignore_errors=True)
        (root / UNFINISHED).rmdir()  # empty; else somebody is at work
    if not (root / "dataset.json").exists():
        for path in (root / SPLIT).glob(".*.unfinished"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (root / SPLIT).glob("*/shard.*"):
            path.unlink(missing_ok=True)  # another run may be at it too


class Writing:
    """A process at work on a dataset's parts; a context, at whose end nothing unfinished of it stays."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = root / UNFINISHED / f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> Writing:
        for attempt in range(9):
            try:
                self.folder.mkdir(parents=True)
                break
            except FileNotFoundError:  # another process that is done has just removed the folder above
                if attempt == 8:
                    raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def touch(self) -> None:
        """A sign of life for other machines."""
        os.utime(self.folder)

    def in_turn(self, parts: Sequence[Part]) -> Iterator[Part]:
        """All of them, as they come to be wanted: those last that others are writing now."""
        left = list(parts)
        while left:
            busy = self._busy()
            part = next((part for part in left if _written_as(part) not in busy), left[0])
            left.remove(part)
            yield part

    def write(self, part: Part, samples: Iterable[dict[str, Any]]) -> None:
        """Write a part; where another process was faster, its is kept. OSError where the disk refuses."""
        claim, final = self.folder / _written_as(part), part.folder(self.root)
        claim.mkdir()  # before anything is computed, for others to take another part
        folder = claim / part.name
        # zstd leaves 0.8 of bf16 arrays, but every reader would unpack them beside it, where both forms then stay.
        count, _ = write_shards(folder, samples, compression=None)
        if count != part.shard["samples"]:
            raise RuntimeError(f"{final}: {count} samples of {part.shard['samples']}")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(final)
        except OSError:  # which error says that it is there differs by file system
            if not part.is_there(self.root):
                raise
        shutil.rmtree(claim)

    def _busy(self) -> Collection[str]:
        folders = [f for f in self.folder.parent.iterdir() if f != self.folder and _lives(f)]
        busy = set()
        for folder in folders:
            with contextlib.suppress(OSError):  # it is gone since
                busy |= {path.name for path in folder.iterdir()}
        return busy


def complete(root: Path, info: DatasetInfo, parts: Sequence[Part]) -> None:
    """The buckets' indexes, and dataset.json, over parts that are all there. info: the original's, of one split.

    UserError where a part does not come to be seen, or is not what its index says."""
    for bucket in info.buckets:
        shards = []
        for part in parts:
            if part.bucket == bucket:
                _await(part, root)
                found, problems = inspect_index(part.folder(root), expected_samples=part.shard["samples"])
                raise_problems(problems, mend=f"Delete {part.folder(root)}, and the same command computes it again")
                shards += [with_prefix(shard, part.name) for shard in found]
        if shards:
            write_index(root / SPLIT / bucket.folder, shards)
            # They differ by bucket in their arrays' shapes; the dataset's description names their kinds.
            kinds = {n: e.split(":")[0] for n, e in zip(shards[0]["column_names"], shards[0]["column_encodings"])}
            info = dataclasses.replace(info, columns=kinds)
    write_dataset(root, info)


def _await(part: Part, root: Path) -> None:
    until = time.monotonic() + APPEARING
    while not part.is_there(root):
        if time.monotonic() > until:
            raise UserError(f"{part.folder(root)}: missing, though it was written; do all machines see this folder?")
        os.listdir(root / SPLIT)  # network file systems look again
        time.sleep(0.5)


def _written_as(part: Part) -> str:
    return f"{part.bucket.folder}-{part.name}"


def _machine() -> str:
    """The same for exactly those processes that know each other's numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _lives(folder: Path) -> bool:
    """Whether the process that writes here may still be at it."""
    machine, _, rest = folder.name.partition("-")
    number = rest.partition("-")[0]
    if machine == _machine() and number.isdecimal() and not psutil.pid_exists(int(number)):
        return False
    try:
        return time.time() - folder.stat().st_mtime < ABANDONED
    except FileNotFoundError:
        return False
