"""One chunk of a dataset being prepared: items -> shards by split and bucket, published in one step.

    OUT/.unfinished/chunk-00012-<process>/     a chunk being written; `exclusive` keeps other starts of its part away
    OUT/<split>/<bucket>/chunk-00012/          its shards, moved here when all are written
    OUT/chunks/chunk-00012.json                its report, a Report; written last, so it marks completeness

A chunk without a report is unfinished, whatever else is there, and is written again. Unlike the folders of
storage.unpack and storage.parts, those here need no owner of their own: one lock covers a part with all its workers.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TextIO

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import MDSWriter

from megaflux.common.errors import UserError
from megaflux.common.files import Lock, sync_file, sync_folder, try_lock, write_json
from megaflux.data.buckets import Bucket, nearest_bucket
from megaflux.data.images import BadImage, decode, encode, fit
from megaflux.data.reference_size import COLUMN
from megaflux.data.references import pack
from megaflux.data.storage.dataset import HELD_OUT, IMAGE_COLUMNS, SPLITS
from megaflux.data.storage.index import INDEX, with_prefix
from megaflux.data.storage.shards import open_writer, read_shard
from megaflux.data.writing.items import Item, Loaded, Source
from megaflux.data.writing.options import Options
from megaflux.data.writing.references import kept_references
from megaflux.data.writing.split import draw, is_held_out
from megaflux.data.writing.tokens import TokenCounter, write_counted

UNFINISHED = ".unfinished"
PROGRESS_STEP = 16  # images between two calls of `progress`
LOCK_SECONDS = 5  # to wait for a killed run's workers, which leave within a second


@dataclass(frozen=True)
class Target:
    """Where and how chunks are written. out: the dataset's folder. compression: of its shards, "zstd" or None. references:
    whether samples have a column of them."""

    out: Path
    buckets: tuple[Bucket, ...]
    options: Options
    compression: str | None
    references: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """Name -> MDS encoding of the shards' columns."""
        return {**IMAGE_COLUMNS, COLUMN: "bytes"} if self.references else IMAGE_COLUMNS


@dataclass(frozen=True)
class Job:
    """What all chunks of a dataset share."""

    source: Source
    target: Target
    counter: TokenCounter | None = None
    """Counts the tokens of captions, which changes nothing that is stored."""


@dataclass
class Report:
    """What became of a chunk's items. items: their number. bad: key, reason and detail of each that was skipped. counts:
    split -> bucket name -> samples; shards: the same -> index entries. notes: what was done to images -> how many.
    captioned: samples with a caption, None in reports of earlier versions; bad_captions: key and detail of captions that
    were not used. images_by_captions: number of captions -> images; characters: length of a caption -> captions; the
    keys are digits, and both None in reports of earlier versions. bad_references: key, reference and detail of each that was
    left out of an image that is stored; images_by_references: number of references -> images. candidates: bucket name -> the training samples that
    a larger held-out share takes first, as (draw, key); items that must stay with others are none; None in reports of
    earlier versions."""

    items: int
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)
    notes: Mapping[str, int] = field(default_factory=dict)
    shards: dict[str, dict[str, list]] = field(default_factory=dict)
    captioned: int | None = 0
    bad_captions: list[dict[str, str]] = field(default_factory=list)
    bad_references: list[dict[str, str]] = field(default_factory=list)
    images_by_references: Mapping[str, int] = field(default_factory=dict)
    images_by_captions: Mapping[str, int] | None = None
    characters: Mapping[str, int] | None = None
    candidates: dict[str, list[tuple[int, str]]] | None = None


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
    report = Report(len(items))
    candidates: dict[str, list[tuple[int, str]]] = {}
    notes: Counter[str] = Counter()
    captioned = since = 0
    images, characters, tokens, references = Counter[str](), Counter[str](), Counter[int](), Counter[str]()
    target = job.target
    with _Shards(target, number) as shards:
        for item, loaded in _read(job.source, items):
            try:
                if isinstance(loaded, BadImage):
                    raise loaded
                bucket, image, found = make_sample(loaded, target.buckets, target.options)
                held_out = item.held_out
                if held_out is None:
                    held_out = is_held_out(item.split_key, target.options.held_out)
                split = "held_out" if held_out else "train"
                caption = loaded.caption
                sample = {"key": item.key, "caption": caption.stored, "image": image}
                if target.references:
                    kept = kept_references(loaded, target.options)
                    sample[COLUMN] = pack(kept.references)
                    references[str(len(kept.references))] += 1
                    report.bad_references += [{"key": item.key, **bad} for bad in kept.bad]
                shards.write(split, bucket, sample)
                notes.update(found)
                captioned += bool(caption.texts)
                images[str(len(caption.texts))] += 1
                characters.update(str(len(text)) for text in caption.texts)
                if job.counter:
                    tokens.update(job.counter.lengths(caption.texts))
                if caption.problem:
                    report.bad_captions.append({"key": item.key, "detail": caption.problem})
                if split == "train" and item.key == item.split_key and item.held_out is None:
                    candidates.setdefault(bucket.name, []).append((draw(item.key), item.key))
            except BadImage as error:
                report.bad.append({"key": item.key, "reason": error.reason, "detail": error.detail})
            since += 1
            if since == PROGRESS_STEP:
                progress(since)
                since = 0
        report.notes, report.captioned = notes, captioned
        report.images_by_captions, report.characters, report.images_by_references = images, characters, references
        if job.counter:
            write_counted(target.out, name_of(number), job.counter, tokens)
        report.candidates = {name: heapq.nsmallest(HELD_OUT, drawn) for name, drawn in candidates.items()}
        shards.publish(report)
    progress(since)


def hold_out(target: Target, number: int, keys: Collection[str]) -> None:
    """Move these training samples of a finished chunk to the held-out ones. Killed on the way it leaves a chunk without a
    report, which the same command writes again."""
    report = read_report(target.out, number)
    with _Shards(target, number) as shards:
        for split in SPLITS:
            for bucket in target.buckets:
                folder = target.out / split / bucket.folder
                for shard in report.shards[split].get(bucket.name, []):
                    for sample in read_shard(folder, shard):
                        shards.write("held_out" if sample["key"] in keys else split, bucket, sample)
        report_path(target.out, number).unlink()
        for folder in target.out.glob(f"*/*/{name_of(number)}"):
            shutil.rmtree(folder)
        kept = {
            name: [entry for entry in drawn if entry[1] not in keys]
            for name, drawn in (report.candidates or {}).items()
        }
        shards.publish(replace(report, candidates=kept))


class _Shards:
    """The writers of one chunk's shards, in a folder of its own until `publish`."""

    def __init__(self, target: Target, number: int) -> None:
        self._target, self._number = target, number
        self._folder = target.out / UNFINISHED / f"{name_of(number)}-{os.getpid()}"
        self._writers: dict[tuple[str, Bucket], MDSWriter] = {}
        self._counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}

    def __enter__(self) -> _Shards:
        shutil.rmtree(self._folder, ignore_errors=True)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # else writers may still be at work; remove_unfinished follows
            shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, split: str, bucket: Bucket, sample: dict[str, Any]) -> None:
        """Add a sample, with the target's columns."""
        target = self._target
        if (split, bucket) not in self._writers:
            folder = self._folder / split / bucket.folder
            folder.parent.mkdir(parents=True, exist_ok=True)
            writer = open_writer(folder, target.columns, target.options.shard_size, target.compression)
            self._writers[split, bucket] = writer
        self._writers[split, bucket].write(sample)
        self._counts[split][bucket.name] += 1

    def publish(self, report: Report) -> None:
        """Make the shards durable, move them to their places and write the report, completed by `counts` and `shards`."""
        name, out = name_of(self._number), self._target.out
        shards: dict[str, dict[str, list]] = {split: {} for split in SPLITS}
        for (split, bucket), writer in self._writers.items():
            writer.finish()
            shards[split][bucket.name] = [with_prefix(shard, name) for shard in writer.shards]
            folder = out / split / bucket.folder / name
            written = self._folder / split / bucket.folder
            (written / INDEX).unlink()  # the report has its contents; the bucket gets one index over all chunks
            for file in written.iterdir():  # the report below says that they are whole, also after a power cut
                with open(file, "rb") as shard:
                    sync_file(shard)
            folder.parent.mkdir(parents=True, exist_ok=True)
            written.rename(folder)
            sync_folder(folder)
            sync_folder(folder.parent)
        path = report_path(out, self._number)
        path.parent.mkdir(exist_ok=True)
        write_json(path, vars(replace(report, counts=self._counts, shards=shards)))


def report_path(out: Path, number: int) -> Path:
    """The file of a finished chunk's report."""
    return out / "chunks" / f"{name_of(number)}.json"


def read_report(out: Path, number: int) -> Report:
    """A finished chunk's report. Raises UserError if it cannot be read."""
    path = report_path(out, number)
    try:
        content = json.loads(path.read_text())
        known = {field.name for field in fields(Report)}
        absent = {"captioned": None, "candidates": None}
        report = Report(**absent | {k: v for k, v in content.items() if k in known})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it, and the same command writes it again") from None
    return report


def remove_unfinished(out: Path, numbers: Sequence[int]) -> None:
    """Remove what a killed run left of these chunks: unfinished folders, and shards without a report."""
    ours = {name_of(number) for number in numbers}
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


def name_of(number: int) -> str:
    """The name of a chunk, in its files and folders."""
    return f"chunk-{number:05}"
