"""A source of images -> a dataset, in chunks that any number of processes and machines may write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaflux.common.errors import UserError
from megaflux.common.files import sync_folder, write_json
from megaflux.data.buckets import make_buckets
from megaflux.data.storage.dataset import DatasetInfo
from megaflux.data.storage.shards import COMPRESSION, compression_for
from megaflux.data.writing import captions, chunks
from megaflux.data.writing.items import Item, Source, printable
from megaflux.data.writing.merge import judge, merge, read_plan
from megaflux.data.writing.options import NONE, Options
from megaflux.data.writing.sources import open_source
from megaflux.data.writing.tokens import TokenCounter
from megaflux.data.writing.workers import write_chunks

log = logging.getLogger("megaflux")
PLAN_VERSION = 1  # of prepare.json


def prepare(
    source: str,
    out: str | Path,
    options: Options,
    *,
    workers: int | None = None,
    max_bad: float = 0.05,
    part: tuple[int, int] | None = None,
    progress: bool = True,
    counter: TokenCounter | None = None,
) -> DatasetInfo | None:
    """Write the dataset `out` from `source`, continuing where an earlier call was interrupted.

    workers: processes; None: one per available core. max_bad: how many images may be unusable, a fraction of all if
    below 1, else a count. part: (i, n) writes every n-th chunk, beginning with the i-th, does not merge and returns
    None. progress: show a bar and print what was done. counter: of the captions' tokens, None for their characters; nothing else
    depends on it. Raises UserError for bad input, or where `out` holds something
    else, and TooManyBad where more images are unusable than max_bad allows.
    """
    options.check()
    out = Path(out)
    options = _as_begun(out, options)
    buckets = make_buckets(options.aspect_ratios, options.longest_side)
    opened, remarks = open_source(str(source), buckets, options)
    items = _mark_duplicates(opened.list_items())
    if not items:
        raise UserError(f"source {source}: no items")
    if progress:
        lines = [f"{len(items)} items in {source}, read as {opened.kind}", *opened.remarks(), *remarks]
        # Names of files may have line breaks, and bytes that are not UTF-8, which print refuses.
        print("\n".join(printable(" ".join(line.splitlines())) for line in lines))
    parts = [items[start : start + options.chunk] for start in range(0, len(items), options.chunk)]
    compression = _claim(out, _plan(opened, items, options, len(parts)))
    index, count = part or (1, 1)
    mine = [number for number in range(len(parts)) if number % count == index - 1]
    with _one_line(out), chunks.exclusive(out, f"{index}-of-{count}"):
        sync_folder(out)  # warns here, not in each worker, of a file system that has none
        chunks.remove_unfinished(out, mine)
        todo = [number for number in mine if not chunks.report_path(out, number).exists()]
        done_before = sum(len(parts[number]) for number in mine) - sum(len(parts[number]) for number in todo)
        job = chunks.Job(opened, chunks.Target(out, buckets, options, compression, opened.has_references), counter)
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
            write_chunks(job, jobs, workers or _cores(), bar)
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
    return finish(out, max_bad, progress, counter)


def finish(
    out: str | Path, max_bad: float = 0.05, progress: bool = True, counter: TokenCounter | None = None
) -> DatasetInfo:
    """Merge all parts of `out` into a dataset. Raises UserError and TooManyBad as merge, UserError also for OSErrors."""
    with _one_line(out):
        return merge(out, max_bad=max_bad, progress=progress, counter=counter)


@contextlib.contextmanager
def _one_line(out: str | Path) -> Iterator[None]:
    """Turn an OSError (disk full, read-only, a source that has gone) into a UserError."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise UserError(f"{what}; once that is fixed, the same command continues") from error


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mark_duplicates(items: Iterable[Item]) -> list[Item]:
    """The items, with a problem noted for those whose key an earlier one has: keys name samples everywhere."""
    seen: set[str] = set()
    marked = []
    for item in items:
        if item.key in seen and item.problem is None:
            item = Item(item.key, item.split_key, item.where, item.size, "duplicate_key")
        seen.add(item.key)
        marked.append(item)
    return marked


def _fingerprint(items: Sequence[Item]) -> str:
    """SHA-256 over the items' keys, sizes and problems."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.key}\0{item.size}\0{item.problem}\n".encode())
    return digest.hexdigest()


def _plan(source: Source, items: Sequence[Item], options: Options, chunk_count: int) -> dict[str, Any]:
    """The content of prepare.json: all on which the chunks depend."""
    return {
        "format_version": PLAN_VERSION,
        "settings": json.loads(json.dumps(asdict(options))),
        "source": {
            "kind": source.kind,
            "items": len(items),
            "fingerprint": _fingerprint(items),
            **({"references": True} if source.has_references else {}),
            **source.settings,
        },
        "attribution": source.attribution,
        "chunks": chunk_count,
        "compression": compression_for(options.encoding),
    }


def _as_begun(out: Path, options: Options) -> Options:
    """The options under which a dataset is continued that an earlier version began, which stored one caption of an image, or no
    references.

    Half of its images would have one caption and half all of them, so it is finished as it was begun."""
    begun = read_plan(out) if os.path.isdir(out) else None
    if begun is None:
        return options
    settings = begun.get("settings", {})
    if "captions" not in settings and options.captions == captions.ALL:
        options = replace(options, captions=captions.FIRST)
    return options if "references" in settings else replace(options, references=NONE)


def _claim(out: Path, plan: dict[str, Any]) -> str | None:
    """Write prepare.json into a new folder, or refuse a folder that holds something else. Returns the compression of the
    dataset's shards.

    A dataset is continued with the compression it was begun with: earlier versions compressed all shards, and did not
    record that.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"{out}: is a file, not a folder to write the dataset into")
    begun = read_plan(out)
    if begun is None:
        if os.path.exists(out) and any(entry.name != chunks.UNFINISHED for entry in out.iterdir()):
            raise UserError(f"{out}: not empty and not begun by this command; give a new folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "prepare.json", plan)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from None
        return plan["compression"]
    begun = {"compression": COMPRESSION, **begun}
    missing = {name: value for name, value in asdict(Options()).items() if name not in begun["settings"]}
    begun["settings"] = begun["settings"] | json.loads(
        json.dumps(missing)
    )  # as they were before there were such options
    if missing.pop("references", None):
        begun["settings"]["references"] = NONE
        for name in (
            "min_references",
            "pairs",
            "pair_references",
            "sets",
            "contents",
            "most_contents",
            "hold_out_cells",
            "hold_out_contents",
        ):
            missing.pop(name, None)
        log.info("%s: was begun by an earlier version, which stored no references; it stays so", out)
    if missing.pop("captions", None):
        if plan["settings"]["captions"] != captions.FIRST:  # _as_begun leaves only what the user asked for
            raise UserError(
                f"{out}: was begun by an earlier version, which stored one caption an image; leave --captions out, or give a "
                "new folder"
            )
        begun["settings"]["captions"] = captions.FIRST
        log.warning(
            "%s: was begun by an earlier version, which stored only the first of several captions; it stays so (for all of them, "
            "give a new folder)",
            out,
        )
    if missing:
        log.warning(
            "%s: was begun by an earlier version, which ignored colour profiles and found fewer captions; chunks that are "
            "there stay so (for images treated alike, give a new folder)",
            out,
        )
    if begun | {"compression": plan["compression"]} != plan:
        old, new = {**begun["settings"], **begun["source"]}, {**plan["settings"], **plan["source"]}
        changes = [f"{name} {old.get(name)!r} -> {new[name]!r}" for name in new if old.get(name) != new[name]]
        raise UserError(
            f"{out}: was begun from other images or settings ({'; '.join(changes)[:400]}); "
            "give the same ones, or a new folder"
            + "; an earlier version listed fewer files and captions of the same source"
            * bool(missing)
        )
    return begun["compression"]
