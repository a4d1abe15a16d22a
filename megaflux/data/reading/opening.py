"""Open a dataset for reading: fetch its indexes, check them, verify the shards, clean up after killed runs."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, raise_first
from megaflux.data.buckets import Bucket
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.order import DrawnFrom
from megaflux.data.reading.shared_memory import remove_leftovers
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.data.storage.index import RESTORE, Problem, column_encodings, inspect_index, raise_problems
from megaflux.data.storage.remote import fetch_indexes
from megaflux.data.storage.unpack import remove_abandoned, unwritable
from megaflux.data.storage.verdict import verify_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A dataset that can be read. shards: the checked index entries of every bucket that has samples. drawn_from: the
    dataset whose order is drawn. damaged: the files whose samples are to be replaced."""

    path: Path
    shards: dict[Bucket, list[dict[str, Any]]]
    drawn_from: DrawnFrom
    damaged: list[Problem]

    def samples_per_epoch(self, multiple: int) -> dict[Bucket, int]:
        """Samples of each bucket that an epoch draws: all of them, rounded up to whole multiples."""
        counts = {bucket: sum(entry["samples"] for entry in entries) for bucket, entries in self.shards.items()}
        return {bucket: -(-count // multiple) * multiple for bucket, count in counts.items()}


def open_dataset(path: Path, options: LoaderOptions, world: World) -> Opened:
    """Check a dataset and make it ready to be read. Collective. Raises UserError as build_loader does."""
    if options.remote:
        _fetch_indexes(options.remote, path, options.split, world)
    remedy = f"Delete {path}, and the same command computes it again" if options.computed_from else RESTORE
    damaged: list[Problem] = []
    if options.verify and not options.remote:
        run_folder = Path(options.run_folder) if options.run_folder else None
        damaged = verify_shards(path, sorted({options.split, "held_out"}), run_folder, world)
        if not options.replace_damaged:
            raise_problems(damaged, agreed=True, remedy=remedy)
        for problem in damaged:
            logger.warning("resuming with damaged data, whose samples are replaced: %s", problem)
    check_files = options.remote is None and not options.replace_damaged
    info = read_dataset_info(path)
    filled = {bucket for bucket, _ in info.filled(options.split)}
    for bucket in info.buckets:
        if bucket not in filled:
            logger.info("bucket %s has no %s samples and is left out", bucket, options.split)
    shards = original = _read_shards(path, info, options.split, check_files, remedy)
    if options.computed_from:
        source = Path(options.computed_from)
        original = _read_shards(source, read_dataset_info(source), options.split, check_files=False)
    folders = {path / options.split / bucket.folder: entries for bucket, entries in shards.items()}
    drawn_from = DrawnFrom(path, shards, original)
    if world.local_rank == 0 and (removed := remove_abandoned([path, *folders])):
        logger.info("removed what killed runs were unpacking: %s", ", ".join(map(str, removed)))
    raise_first(unwritable(path, folders) if world.local_rank == 0 and not options.remote else None, world)
    return Opened(path, shards, drawn_from, damaged)


def remove_stale_memory(opened: Opened, split: str, world: World) -> list[str]:
    """On each node's first rank, remove the shared memory of killed runs that read this dataset; what was removed."""
    if world.local_rank:
        return []
    stale = remove_leftovers(os.path.abspath(opened.path / split / bucket.folder) for bucket in opened.shards)
    if stale:
        logger.info("removed shared memory that killed runs had left: %s", ", ".join(stale))
    return stale


def _fetch_indexes(remote: str, path: Path, split: str, world: World) -> None:
    problem = None
    if world.local_rank == 0:
        try:
            fetch_indexes(remote, path, split)
        except UserError as error:
            problem = str(error)
    raise_first(problem, world)


def _read_shards(
    path: Path, info: DatasetInfo, split: str, check_files: bool, remedy: str = RESTORE
) -> dict[Bucket, list[dict[str, Any]]]:
    """The checked index entries of every bucket that has samples. Raises UserError with every problem."""
    shards: dict[Bucket, list[dict[str, Any]]] = {}
    problems: list[Problem] = []
    for bucket, count in info.filled(split):
        shards[bucket], found = inspect_index(path / split / bucket.folder, check_files, count)
        problems += found
    raise_problems(problems, remedy=remedy)
    if not shards:
        raise UserError(f"{path}: no samples in the split {split!r}, which has {info.samples(split)}")
    columns = [set(column_encodings(entries)) for entries in shards.values()]
    for names in columns:
        if not {"key", "caption"} <= names or not {"image", "latents"} & names:
            raise UserError(f"{path}: columns {', '.join(sorted(names))}; key, caption and image or latents are needed")
        if names != columns[0]:
            raise UserError(f"{path}: the buckets have different columns; build the dataset again")
    return shards
