"""One chunk of a dataset being prepared: items -> shards by split and bucket, published in one step.

    OUT/.unfinished/chunk-00012-<process>/     a chunk being written; `exclusive` keeps other starts of its part away
    OUT/<split>/<bucket>/chunk-00012/          its shards, moved here when all are written
    OUT/chunks/chunk-00012.json                its report; written last, so it marks completeness

A chunk without a report is unfinished, whatever else is there, and is written again. Unlike the folders of
storage.unpack and storage.parts, those here need no owner of their own: one lock covers a part with all its workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megaflux.common.errors import UserError
from megaflux.common.files import Lock, sync_file, sync_folder, try_lock, write_json
from megaflux.data.buckets import Bucket, nearest_bucket
from megaflux.data.images import BadImage, decode, encode, fit
from megaflux.data.storage.dataset import IMAGE_COLUMNS, SPLITS
from megaflux.data.storage.index import INDEX, with_prefix
from megaflux.data.storage.shards import open_writer
from megaflux.data.writing.items import Item, Loaded, Source
from megaflux.data.writing.options import Options

UNFINISHED = ".unfinished"
PROGRESS_STEP = 16  # images between two calls of `progress`
LOCK_SECONDS = 5  # to wait for a killed run's workers, which leave within a second


@dataclass(frozen=True)
class Job:
    """What all chunks of a dataset share. out: its folder. compression: of its shards, "zstd" or None."""

    source: Source
    out: Path
    buckets: tuple[Bucket, ...]
    options: Options
    compression: str | None


def is_held_out(split_key: str, fraction: float) -> bool:
    """Whether items with this split key are kept from training: a fixed draw by SHA-256 of the key.

    A larger fraction holds out the items of a smaller one, and more.
    """
    drawn = int.from_bytes(hashlib.sha256(split_key.encode()).digest()[:8], "big")
    return drawn < fraction * 2**64


def make_sample(loaded: Loaded, buckets: Sequence[Bucket], options: Options) -> tuple[Bucket, bytes, list[str]]:
    """An image as read -> its bucket, its file bytes at the bucket's size, and notes on what was done to it.

    Raises BadImage if it cannot be used.
    """
    image = loaded.image
    notes: list[str] = []
    if isinstance(image, bytes):
        image, notes = decode(image, options.max_pixels)
    bucket = nearest_bucket(*image.size, buckets)
    image, more = fit(image, bucket, options.allow_upscale)
    return bucket, encode(image, options.encoding, options.quality), notes + more


def write_chunk(job: Job, number: int, items: Sequence[Item], progress: Callable[[int], Any]) -> None:
    """Write the shards and then the report of chunk `number`. progress: called with the number of images done since the
    last call."""
    name = _name(number)
    unfinished = job.out / UNFINISHED / f"{name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    writers: dict[tuple[str, Bucket], Any] = {}
    bad: list[dict[str, str]] = []
    notes: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    since = 0
    for item, loaded in _read(job.source, items):
        try:
            if isinstance(loaded, BadImage):
                raise loaded
            bucket, image, found = make_sample(loaded, job.buckets, job.options)
            split = "held_out" if is_held_out(item.split_key, job.options.held_out) else "train"
            if (split, bucket) not in writers:
                folder = unfinished / split / bucket.folder
                folder.parent.mkdir(parents=True, exist_ok=True)
                writers[split, bucket] = open_writer(folder, IMAGE_COLUMNS, job.options.shard_size, job.compression)
            writers[split, bucket].write({"key": item.key, "caption": loaded.caption, "image": image})
            counts[split][bucket.name] += 1
            notes.update(found)
        except BadImage as error:
            bad.append({"key": item.key, "reason": error.reason, "detail": error.detail})
        since += 1
        if since == PROGRESS_STEP:
            progress(since)
            since = 0
    shards: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
    for (split, bucket), writer in writers.items():
        writer.finish()
        shards[split][bucket.name] = [with_prefix(shard, name) for shard in writer.shards]
        folder = job.out / split / bucket.folder / name
        written = unfinished / split / bucket.folder
        (written / INDEX).unlink()  # the report has its contents; the bucket gets one index over all chunks
        for file in written.iterdir():  # the report below says that they are whole, also after a power cut
            with open(file, "rb") as shard:
                sync_file(shard)
        folder.parent.mkdir(parents=True, exist_ok=True)
        written.rename(folder)
        sync_folder(folder)
        sync_folder(folder.parent)
    shutil.rmtree(unfinished, ignore_errors=True)
    report = {"items": len(items), "counts": counts, "bad": bad, "notes": notes, "shards": shards}
    report_path(job.out, number).parent.mkdir(exist_ok=True)
    write_json(report_path(job.out, number), report)
    progress(since)


def report_path(out: Path, number: int) -> Path:
    """The file of a finished chunk's report."""
    return out / "chunks" / f"{_name(number)}.json"


def read_report(out: Path, number: int) -> dict[str, Any]:
    """A finished chunk's report: items, counts, bad, notes, shards."""
    path = report_path(out, number)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and the same command writes it again") from None


def remove_unfinished(out: Path, numbers: Sequence[int]) -> None:
    """Remove what a killed run left of these chunks: unfinished folders, and shards without a report."""
    ours = {_name(number) for number in numbers}
    for folder in (out / UNFINISHED).glob("chunk-*"):
        if folder.name.rpartition("-")[0] in ours:
            shutil.rmtree(folder, ignore_errors=True)
    for split in SPLITS:
        for folder in (out / split).glob("*/chunk-*"):
            if folder.name in ours and not (out / "chunks" / f"{folder.name}.json").exists():
                shutil.rmtree(folder)


@contextlib.contextmanager
def exclusive(out: Path, part: str) -> Iterator[None]:
    """Hold the lock of one part of `out`. Raises UserError if another process on this machine keeps it; warns where the
    file system has no locks.

    Worker processes inherit the lock, so a new run waits until those of a killed one have ended.
    """
    folder = out / UNFINISHED
    folder.mkdir(exist_ok=True)
    path = folder / f"{part}.lock"
    deadline = time.monotonic() + LOCK_SECONDS
    while (lock := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{out}: another process is writing this part; wait for it or end it")
        time.sleep(0.05)
    with lock:
        yield
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()  # not empty while other parts are being written


def _try_lock(path: Path) -> TextIO | None:
    lock = open(path, "w")  # noqa: SIM115  held until its caller closes it
    with contextlib.suppress(FileNotFoundError):  # just removed by the one who held it
        if try_lock(lock) is not Lock.TAKEN and os.stat(path).st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
    lock.close()
    return None


def _read(source: Source, items: Sequence[Item]) -> Iterator[tuple[Item, Loaded | BadImage]]:
    """Each item with its contents, or with its known problem, unread."""
    contents = source.read([item for item in items if item.problem is None])
    for item in items:
        yield item, BadImage(item.problem) if item.problem else next(contents)


def _name(number: int) -> str:
    return f"chunk-{number:05}"
