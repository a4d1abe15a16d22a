"""Images -> training shards: python -m megaflux.data.prepare SOURCE OUT

SOURCE is a folder of images (captions in .txt or .json files of the same name), of WebDataset .tar files
or of .parquet files (columns image, caption or text, key), or the word openmoji. OUT becomes the dataset
described in megaflux.data.storage.dataset. The list of images is cut into chunks of fixed size; each is written
by one process and appears in one step, so the result does not depend on the number of processes, and a
killed run continues when the same command is given again.

Several machines: give each the same command and --part 1/4, --part 2/4, ...; with separate disks copy
their OUT folders into one. Then the same command with --merge.

exit codes: 0 done; 2 bad input, nothing done; 3 more images could not be used than --max-bad allows (the
finished chunks are kept: the same command with a higher --max-bad accepts them).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.files import sync_folder
from megaflux.common.paths import path_option
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.images import ENCODINGS, MAX_PIXELS
from megaflux.data.storage.dataset import COMPRESSION, FORMAT_VERSION, SHARD_SIZE, DatasetInfo, compression_for
from megaflux.data.storage.index import write_json
from megaflux.data.writing import chunks
from megaflux.data.writing.items import Item
from megaflux.data.writing.merge import TooManyBad, judge, merge, read_plan
from megaflux.data.writing.sources import open_source

OPENMOJI_DEFAULTS = {"longest_side": 128, "held_out": 0.05, "encoding": "png", "canvases": 1.25}


@dataclass(frozen=True)
class Options:
    """What the dataset's bytes depend on. A rerun or another part must give the same."""

    longest_side: int = 1024  # px, of every canvas
    aspect_ratios: tuple[str, ...] = ASPECT_RATIOS
    held_out: float = 0.01  # fraction of the keys, by hash, kept from training
    encoding: str = "jpeg"  # of the stored images: png, jpeg or webp
    quality: int = 95  # of jpeg and webp
    allow_upscale: bool = False  # False: images that would have to be enlarged are skipped
    shard_size: int = SHARD_SIZE  # bytes before compression
    chunk: int = 1024  # images per chunk
    canvases: float = 2  # openmoji: canvases on which each emoji is drawn, on average
    max_pixels: int = MAX_PIXELS  # larger images are skipped before decoding

    def check(self) -> None:
        """Raise UserError for a value that makes no sense."""
        make_buckets(self.aspect_ratios, self.longest_side)
        checks = {
            "--held-out must be at least 0 and below 1": 0 <= self.held_out < 1,
            f"--format must be one of {', '.join(ENCODINGS)}": self.encoding in ENCODINGS,
            "--quality must be 1 to 100": 1 <= self.quality <= 100,
            "--shard-size must be between 64 KiB and 2 GiB": 1 << 16 <= self.shard_size <= 1 << 31,
            "--chunk must be at least 1": self.chunk >= 1,
            "--max-pixels must be at least 1": self.max_pixels >= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)


def prepare(
    source: str,
    out: str | Path,
    options: Options,
    *,
    workers: int | None = None,
    max_bad: float = 0.05,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> DatasetInfo | None:
    """Write the dataset `out` from `source`, continuing where an earlier call was interrupted.

    workers: processes; None: one per available core. max_bad: how many images may be unusable, a
    fraction of all if below 1, else a count. part: (i, n) writes every n-th chunk only and does not
    merge; then None is returned. Raises UserError (bad input, or `out` holds something else) and
    TooManyBad (see the exit codes above).
    """
    options.check()
    out = Path(out)
    buckets = make_buckets(options.aspect_ratios, options.longest_side)
    opened = open_source(str(source), buckets, options.canvases)
    items = _mark_duplicates(opened.list_items())
    if not items:
        raise UserError(f"source {source}: no items")
    parts = [items[start : start + options.chunk] for start in range(0, len(items), options.chunk)]
    plan = {
        "format_version": FORMAT_VERSION,
        "settings": json.loads(json.dumps(asdict(options))),
        "source": {"kind": opened.kind, "items": len(items), "fingerprint": _fingerprint(items)},
        "attribution": opened.attribution,
        "chunks": len(parts),
        "compression": compression_for(options.encoding),
    }
    compression = _claim(out, plan)
    index, count = part or (1, 1)
    mine = [number for number in range(len(parts)) if number % count == index - 1]
    with _one_line(out), chunks.exclusive(out, f"{index}-of-{count}"):
        sync_folder(out)  # so that a file system without is warned of here, not by each worker
        chunks.remove_unfinished(out, mine)
        todo = [number for number in mine if not chunks.report_path(out, number).exists()]
        done_before = sum(len(parts[number]) for number in mine) - sum(len(parts[number]) for number in todo)
        job = chunks.Job(opened, out, buckets, options, compression)
        jobs = [(number, parts[number]) for number in todo]
        started = time.monotonic()
        bar = tqdm(
            total=done_before + sum(len(chunk) for _, chunk in jobs),
            initial=done_before,
            unit="img",
            desc=f"prepare {out.name}",
            smoothing=0.05,
            disable=None if progress else True,  # None: shown on a terminal, not in a log file
        )
        with bar:
            _run(job, jobs, workers or _cores(), bar)
        seconds = time.monotonic() - started
    written = sum(len(chunk) for _, chunk in jobs)
    if progress:
        print(
            f"{written} images in {seconds:.1f} s: {written / max(seconds, 1e-9):.0f} images/s"
            + (f", {done_before} were there already" if done_before else "")
        )
    if part:  # whether too many are bad is judged over all parts, by the merge
        judge([chunks.read_report(out, n) for n in mine], math.inf, f"{out}/chunks/*.json", progress)
        return None
    with _one_line(out):
        return merge(out, max_bad=max_bad, progress=progress)


@contextlib.contextmanager
def _one_line(out: str | Path) -> Iterator[None]:
    """An OSError as a UserError: disk full, read-only, a source that went away."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise UserError(f"{what}; once that is mended, the same command continues") from error


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark_duplicates(items: Iterable[Item]) -> list[Item]:
    """The items, those whose key was there before marked as a problem: keys name samples everywhere."""
    seen: set[str] = set()
    marked = []
    for item in items:
        if item.key in seen and item.problem is None:
            item = Item(item.key, item.split_key, item.where, item.size, "duplicate_key")
        seen.add(item.key)
        marked.append(item)
    return marked


def _fingerprint(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.key}\0{item.size}\0{item.problem}\n".encode())
    return digest.hexdigest()


def _claim(out: Path, plan: dict[str, Any]) -> str | None:
    """Write prepare.json into a new folder, or refuse a folder that holds something else; how its shards are compressed.

    A dataset goes on as it was begun: earlier versions compressed all shards, and did not write that down.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out}: is a file, not a folder to write the dataset into")
    before = read_plan(out)
    if before is None:
        if os.path.exists(out) and any(entry.name != chunks.UNFINISHED for entry in out.iterdir()):
            raise UserError(f"{out}: not empty and not begun by this command; give a new folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "prepare.json", plan)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        return plan["compression"]
    begun = {"compression": COMPRESSION, **before}
    if begun | {"compression": plan["compression"]} != plan:
        old, new = {**before["settings"], **before["source"]}, {**plan["settings"], **plan["source"]}
        changes = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
        raise UserError(
            f"{out}: was begun from other images or settings ({'; '.join(changes)[:400]}); "
            "give the same ones, or a new folder"
        )
    return begun["compression"]


def _run(job: chunks.Job, jobs: list[tuple[int, list[Item]]], workers: int, bar: tqdm) -> None:
    """Write all chunks, in `workers` processes if that is more than one, keeping the bar up to date."""
    if workers <= 1 or len(jobs) <= 1:
        for number, items in jobs:
            chunks.write_chunk(job, number, items, bar.update)
        return
    context = multiprocessing.get_context("fork")  # importing torch anew would take seconds each
    counter, stop = context.Value("q", 0), context.Event()
    shown = 0
    initial = (job, counter, stop, os.getpid())
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _start_worker, initial) as pool:
        pending = {pool.submit(_write_in_worker, number, items) for number, items in jobs}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(counter.value - shown)
                shown = counter.value
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory? try fewer --workers); "
                "the same command continues where this one stopped"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Stopped(Exception):
    """Leaves a chunk unfinished because another one failed, or the user interrupts."""


_worker: tuple[chunks.Job, Any, Any] | None = None  # of a worker process, set by _start_worker


def _start_worker(job: chunks.Job, counter: Any, stop: Any, parent: int) -> None:
    global _worker
    _worker = (job, counter, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the parent decides

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_in_worker(number: int, items: list[Item]) -> None:
    job, counter, stop = _worker

    def count(done: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += done

    chunks.write_chunk(job, number, items, count)


def _parse_part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, as in 2/4")
    return int(index), int(count)


def _parse_max_bad(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction below 1 nor a count")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `options` holds the Options that it amounts to."""
    usual = Options()
    parser = Parser(
        prog="python -m megaflux.data.prepare",
        description=__doc__,
        allow_abbrev=True,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=path_option, metavar="SOURCE", help="folder, .tar, .parquet, or openmoji")
    add("out", type=path_option, metavar="OUT", help="folder of the dataset, new or begun by the same command")
    add("--longest-side", type=int, metavar="PX", help="of every canvas, default 1024 (openmoji: 128)")
    add("--aspect-ratios", default=",".join(usual.aspect_ratios), help="canvases, default %(default)s")
    add("--held-out", type=float, metavar="FRACTION", help="kept from training, default 0.01 (openmoji: 0.05)")
    add("--format", dest="encoding", choices=ENCODINGS, help="of the stored images, default jpeg (openmoji: png)")
    add("--quality", type=int, default=usual.quality, help="of jpeg and webp, default %(default)s")
    add("--allow-upscale", action="store_true", help="enlarge small images (counted) instead of skipping them")
    add("--shard-size", type=int, default=usual.shard_size, metavar="BYTES", help="default %(default)s")
    add("--chunk", type=int, default=usual.chunk, metavar="IMAGES", help="unit of work, default %(default)s")
    add("--canvases", type=float, metavar="N", help="openmoji: per emoji on average, 1 to 5; default 1.25")
    add("--max-pixels", type=int, default=usual.max_pixels, help="skip larger images, default %(default)s")
    add(
        "--max-bad",
        type=_parse_max_bad,
        default=0.05,
        metavar="FRACTION_OR_COUNT",
        help="unusable images allowed: a fraction if below 1, else a count; default %(default)s",
    )
    add("--workers", type=int, metavar="N", help="processes, default one per core")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--part", type=_parse_part, metavar="I/N", help="only the I-th of N parts, without merging")
    how.add_argument("--merge", action="store_true", help="only merge the parts that are there")
    given = parser.parse_args(arguments)
    defaults = OPENMOJI_DEFAULTS if given.source == "openmoji" else {}
    chosen = {
        name: getattr(given, name) if getattr(given, name) is not None else defaults.get(name, value)
        for name, value in asdict(usual).items()
    }
    chosen["aspect_ratios"] = tuple(name.strip() for name in given.aspect_ratios.split(",") if name.strip())
    given.options = Options(**chosen)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, raises UserError for code 2."""
    given = parse_arguments(arguments)
    try:
        if given.merge:
            with _one_line(given.out):
                merge(given.out, max_bad=given.max_bad)
        else:
            prepare(
                given.source, given.out, given.options, workers=given.workers, max_bad=given.max_bad, part=given.part
            )
    except TooManyBad as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
