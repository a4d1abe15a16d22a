"""A dataset while it is computed from another one: one part for each shard of the original.

    ROOT/train/<bucket>/part-00012/                     what was computed from shard 12 of that bucket: shards, index.json
    ROOT/.unfinished/<machine>-<process>-<random>/      what a process is writing
    ROOT/dataset.json                                   written last, when all parts are finished

A part is renamed to its final name when it is complete and durable, so finished parts survive any kill. Ranks, runs and
machines that compute the same dataset at once share nothing but those names: a process that finds a part finished, or
finishes second, moves on to the next.

A process's folder counts as alive while its process exists, or on another machine while it was touched within the last
hour. storage.unpack uses locks instead, which do not reach across machines.
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
from megaflux.data.storage.dataset import DatasetInfo, write_dataset
from megaflux.data.storage.index import INDEX, Problem, inspect_index, raise_problems, with_prefix, write_index
from megaflux.data.storage.shards import read_shard, write_shards

SPLIT = "train"  # the only split that is computed ahead
UNFINISHED = ".unfinished"
ABANDONED = 3600.0  # s without a touch, after which a folder of another machine is abandoned
APPEARING = 60.0  # s until a network file system shows what another machine has renamed


@dataclass(frozen=True)
class Part:
    """One shard of the original, and the shards computed from it. number: its place in its bucket. shard: its index entry."""

    bucket: Bucket
    number: int
    shard: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of its folder in the bucket's."""
        return f"part-{self.number:05}"

    def folder(self, root: Path) -> Path:
        """Its folder in the computed dataset."""
        return root / SPLIT / self.bucket.folder / self.name

    def is_there(self, root: Path) -> bool:
        """Whether it is finished."""
        return (self.folder(root) / INDEX).is_file()

    def is_sound(self, root: Path) -> bool:
        """Whether it is finished and its files agree with its index."""
        return not inspect_index(self.folder(root), expected_samples=self.shard["samples"])[1]

    def samples(self, original: Path) -> Iterator[dict[str, Any]]:
        """The original shard's samples, as read_split yields them. Raises UserError where it is damaged."""
        return read_shard(original / SPLIT / self.bucket.folder, self.shard)


def all_parts(original: Path, info: DatasetInfo) -> list[Part]:
    """The parts of a dataset, bucket by bucket in stored order. Raises UserError with every problem of its indexes."""
    parts: list[Part] = []
    problems: list[Problem] = []
    for bucket, count in info.filled(SPLIT):
        shards, found = inspect_index(original / SPLIT / bucket.folder, expected_samples=count)
        problems += found
        parts += [Part(bucket, number, shard) for number, shard in enumerate(shards)]
    raise_problems(problems)
    return parts


def missing(root: Path, parts: Iterable[Part]) -> list[Part]:
    """The unfinished parts, the largest first. Parts whose files contradict their index are removed."""
    wanted = [part for part in parts if not part.is_sound(root)]
    if damaged := [part for part in wanted if part.folder(root).exists()]:
        with Writing(root) as writing:
            for part in damaged:
                writing.remove_damaged(part)
    return sorted(wanted, key=lambda part: -part.shard["samples"] * part.bucket.width * part.bucket.height)


def remove_leftovers(root: Path) -> None:
    """Remove the folders of processes that have ended: on this machine at once, on others when untouched for an hour.
    Also what earlier versions left of a dataset that they did not complete."""
    with contextlib.suppress(OSError):  # a finished dataset may be read-only
        for folder in (root / UNFINISHED).iterdir():
            if not _lives(folder):
                shutil.rmtree(folder, ignore_errors=True)
        (root / UNFINISHED).rmdir()  # fails while another process is writing
    if not (root / "dataset.json").exists():
        for path in (root / SPLIT).glob(".*.unfinished"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (root / SPLIT).glob("*/shard.*"):
            path.unlink(missing_ok=True)  # another run may remove it too


class Writing:
    """The folder in which this process writes parts: a context manager, which removes what is unfinished at its end."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = root / UNFINISHED / f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> Writing:
        for attempt in range(9):
            try:
                self.folder.mkdir(parents=True)
                break
            except FileNotFoundError:  # another process has just removed the empty parent
                if attempt == 8:
                    raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()

    def touch(self) -> None:
        """Show other machines that this process is alive."""
        os.utime(self.folder)

    def in_turn(self, parts: Sequence[Part]) -> Iterator[Part]:
        """All parts, each chosen when it is asked for: those that others are writing now come last."""
        left = list(parts)
        while left:
            busy = self._busy()
            part = next((part for part in left if _written_as(part) not in busy), left[0])
            left.remove(part)
            yield part

    def write(self, part: Part, samples: Iterable[dict[str, Any]]) -> None:
        """Write a part. Where another process has finished it meanwhile, that one is kept. Raises OSError."""
        claim, final = self.folder / _written_as(part), part.folder(self.root)
        claim.mkdir()  # before anything is computed, so that others choose another part
        folder = claim / part.name
        # zstd saves a fifth of bf16 arrays, but every reader would unpack them beside it, where both forms then stay.
        count, _ = write_shards(folder, samples, compression=None)
        if count != part.shard["samples"]:
            raise RuntimeError(f"{final}: {count} samples of {part.shard['samples']}")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(final)
        except OSError:  # which error means that it exists differs by file system
            if not part.is_there(self.root):
                raise
        shutil.rmtree(claim)

    def remove_damaged(self, part: Part) -> None:
        """Remove a part that was found damaged. Another process may remove it too, or have written it anew meanwhile: then
        the new one stays. Raises OSError."""
        taken = self.folder / part.name
        if part.is_sound(self.root):
            return
        try:
            part.folder(self.root).rename(taken)  # in one step: a half-removed part would look finished to others
        except FileNotFoundError:
            return
        if not inspect_index(taken, expected_samples=part.shard["samples"])[1]:  # written anew at that very moment
            try:
                taken.rename(part.folder(self.root))
                return
            except OSError:
                if not part.is_there(self.root):  # a second time
                    raise
        shutil.rmtree(taken)

    def _busy(self) -> Collection[str]:
        """What other living processes are writing."""
        folders = [f for f in self.folder.parent.iterdir() if f != self.folder and _lives(f)]
        busy: set[str] = set()
        for folder in folders:
            with contextlib.suppress(OSError):  # removed meanwhile
                busy |= {path.name for path in folder.iterdir()}
        return busy


def complete(root: Path, info: DatasetInfo, parts: Sequence[Part]) -> None:
    """Write the buckets' indexes and dataset.json over finished parts. info: the original's, of one split.

    Raises UserError where a part stays invisible on this machine, or contradicts its index."""
    for bucket in info.buckets:
        shards = []
        for part in parts:
            if part.bucket == bucket:
                _await(part, root)
                found, problems = inspect_index(part.folder(root), expected_samples=part.shard["samples"])
                raise_problems(problems, remedy=f"Delete {part.folder(root)}, and the same command computes it again")
                shards += [with_prefix(shard, part.name) for shard in found]
        if shards:
            write_index(root / SPLIT / bucket.folder, shards)
            # Array shapes differ by bucket; the dataset's description names the kinds only.
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
    """A name that two processes share exactly if they see each other's process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _lives(folder: Path) -> bool:
    """Whether the process that writes in this folder may still be running."""
    machine, _, rest = folder.name.partition("-")
    number = rest.partition("-")[0]
    if machine == _machine() and number.isdecimal() and not psutil.pid_exists(int(number)):
        return False
    try:
        return time.time() - folder.stat().st_mtime < ABANDONED
    except FileNotFoundError:
        return False
