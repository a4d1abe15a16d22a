"""`--cache latents,trunk`: precompute the frozen networks' outputs for each picture.

Writes a derived dataset (same layout, other columns) beside the images. Its name is a fingerprint of everything it depends
on: the images, the VAE's and the trunk's weights, sizes and dtype. A complete cache is used as it is; of an incomplete one
the ranks compute the missing parts (data/storage/parts.py).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from tqdm import tqdm

from megaflux.common.errors import STUCK, UserError, one_line
from megaflux.common.ranks import World, exchanged_until_done
from megaflux.config.schema import Config
from megaflux.data.reference_size import COLUMN
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.data.storage.index import stored_file
from megaflux.data.storage.parts import Part, Writing, all_parts, complete, missing, remove_leftovers
from megaflux.data.tensors import from_stored_image
from megaflux.models import latents as latent_ops
from megaflux.models.parameters import weights_fingerprint
from megaflux.models.pretrained import Models
from megaflux.training.distributed import from_main
from megaflux.training.planning.cache_size import CacheSize, check_room, size_of_run
from megaflux.training.survival.watch import leave

log = logging.getLogger("megaflux")
BATCH = 32
LOG_EVERY = 60.0  # s between progress lines in a log file


def cached_dataset(config: Config, models: Models, world: World) -> str:
    """The folder to train from: `data.path` itself, or its cache, which is computed first if it is not complete.
    Collective.

    The ranks share the work, shard by shard of the images, and exchange signs of life meanwhile. Complete parts survive a
    kill, and the next call computes the rest; other runs may compute the same cache at the same time. Training from it
    draws the same samples in the same order as from `data.path` (build_loader's computed_from). Only local shards can be
    cached. The cache's size is logged, and room on the disk checked, before anything is computed.

    Raises UserError, the same on all ranks: no room, a damaged image shard or picture, or a disk that cannot be written. A
    rank that computes nothing for `train.hang_timeout` seconds leaves with its stacks and exit code 11.
    """
    kinds = config.data.cache
    if not kinds:
        return config.data.path
    original = Path(config.data.path)
    info = read_dataset_info(original)
    train = info.counts.get("train", {})  # validation encodes its few itself
    info = dataclasses.replace(info, counts={"train": train})
    root = from_main(original / "cache" / _fingerprint(config, models), world)
    size = size_of_run(config, models, info.buckets)
    plan = _on_main(lambda: _planned(root, original, info, size), root, world)
    if plan is None:
        return str(root)
    parts, todo = plan
    started, what = time.monotonic(), " and ".join(kinds)
    if world.is_main and len(todo) < len(parts):
        log.info("caching %s: %d of %d parts are there", what, len(parts) - len(todo), len(parts))
    share = _Share(config, models, root, todo[world.rank :: world.size], world.device)
    _compute(share, sum(part.shard["samples"] for part in todo), f"caching {what}", world)
    _on_main(lambda: complete(root, info, parts), root, world)
    if world.is_main:
        log.info("cached %s in %.0f s: %s", what, time.monotonic() - started, root)
    return str(root)


def _planned(root: Path, original: Path, info: DatasetInfo, size: CacheSize) -> tuple[list[Part], list[Part]] | None:
    """(all parts of the cache, the missing ones); None: it is complete. UserError if there is no room for the missing."""
    remove_leftovers(root)
    if (root / "dataset.json").exists():
        return None
    parts = all_parts(original, info)
    todo = missing(root, parts)
    log.info("%s", size.describe(parts))
    check_room(root, size, todo)
    return parts, todo


def _compute(share: _Share, total: int, what: str, world: World) -> None:
    """Compute this rank's share and wait for the others'. Collective. The slowest rank may take longer than a barrier's time
    limit, so the ranks exchange their progress instead. The first UserError of a rank is raised on all."""
    pool = ThreadPoolExecutor(1)
    # No bar in a log file.
    quiet = not world.is_main or not sys.stderr.isatty()
    with tqdm(total=total, desc=what, unit="img", disable=quiet) as bar:
        work = pool.submit(share.compute)
        try:
            _wait(work, share, what, bar, world)
        except BaseException:
            share.stop.set()
            concurrent.futures.wait([work], timeout=5.0)  # no longer: this process is about to end
            raise
        finally:
            pool.shutdown(wait=False)


def _wait(work: Future[None], share: _Share, what: str, bar: tqdm, world: World) -> None:
    last_logged = moved = time.monotonic()
    last, patience = share.done, share.config.train.hang_timeout

    def state() -> tuple[bool, tuple[int, str | None]]:
        """(whether this rank has finished, (its images so far, its problem))."""
        nonlocal last, moved
        if share.done != last or work.done():
            last, moved = share.done, time.monotonic()
        elif time.monotonic() - moved > patience:  # the thread that hangs cannot report it itself
            leave(f"{what}: no image in {patience:.0f} s (train.hang_timeout)", STUCK, stacks=True)
        finished, problem = work.done(), None
        if finished:
            try:
                work.result()  # other errors (a bug, out of memory) end this rank, and with it the others' wait
            except UserError as error:
                problem = f"rank {world.rank}: {error}" if world.rank else str(error)
        return finished, (share.done, problem)

    for found in exchanged_until_done(state, world):
        images = sum(done for _, (done, _) in found)
        bar.update(images - bar.n)
        first = next((problem for _, (_, problem) in found if problem), None)
        if first:
            raise UserError(first, agreed=True)
        waiting = not all(finished for finished, _ in found)
        if waiting and world.is_main and bar.disable and time.monotonic() - last_logged > LOG_EVERY:
            log.info("%s: %d of %d images", what, images, bar.total)
            last_logged = time.monotonic()


class _Share:
    """The parts that a rank computes. done: images computed so far. stop: set it to end the computing thread soon."""

    def __init__(self, config: Config, models: Models, root: Path, parts: list[Part], device: torch.device):
        self.config, self.models, self.root, self.parts, self.device = config, models, root, parts, device
        self.done, self.stop = 0, threading.Event()

    @torch.no_grad()
    def compute(self) -> None:
        """Compute all parts except those that another process has completed meanwhile. UserError as in cached_dataset."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with device 0
        if not self.parts:
            return
        try:
            with Writing(self.root) as writing:
                for part in writing.in_turn(self.parts):
                    before = self.done
                    if not self.stop.is_set() and not part.is_there(self.root):
                        writing.write(part, self._samples(part, writing))
                    self.done = before + part.shard["samples"]
        except OSError as error:
            raise UserError(_refused(self.root, error)) from None

    def _samples(self, part: Part, writing: Writing) -> Iterator[dict[str, Any]]:
        samples = part.samples(Path(self.config.data.path))
        while rows := list(itertools.islice(samples, BATCH)):
            if self.stop.is_set():
                raise UserError("another rank has failed")  # ends this thread; the other rank's error is shown
            yield from self._computed(part, rows)
            self.done += len(rows)
            writing.touch()

    def _computed(self, part: Part, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        kinds, models = self.config.data.cache, self.models
        pixel_values = torch.stack([self._picture(part, row) for row in rows]).to(models.trunk.device)
        columns: dict[str, torch.Tensor] = {}
        if "latents" in kinds:
            columns["latents"] = latent_ops.encode(models.vae, pixel_values)
        if "trunk" in kinds:
            columns["hidden_states"] = models.trunk.encode(pixel_values).hidden_states
        for i, row in enumerate(rows):
            kept = {name: row[name] for name in ("key", "caption", COLUMN) if name in row}
            if self.config.cache_keeps_pictures:
                kept["image"] = row["image"]
            yield kept | {name: values[i] for name, values in columns.items()}

    def _picture(self, part: Part, row: dict[str, Any]) -> torch.Tensor:
        """uint8 (3, H, W), as the loader decodes it."""
        try:
            return from_stored_image(row["image"], part.bucket, row["key"])
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise exceptions of all kinds
            file = Path(self.config.data.path) / "train" / part.bucket.folder / stored_file(part.shard)["basename"]
            raise UserError(
                f"{file}: the picture {row['key']!r} cannot be decoded ({one_line(error)}), so there is "
                "nothing to cache; prepare the dataset again, or train with --data.cache none, which replaces it"
            ) from None


T = TypeVar("T")


def _on_main(do: Callable[[], T], root: Path, world: World) -> T:
    """Call `do` on rank 0; all ranks return its value or raise its UserError. Collective."""
    value: T | None = None
    problem: str | None = None
    if world.is_main:
        try:
            value = do()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = _refused(root, error)
    value, problem = from_main((value, problem), world)
    if problem:
        raise UserError(problem, agreed=True)
    return cast(T, value)


def _refused(root: Path, error: OSError) -> str:
    return (
        f"{error.filename or root}: cannot be written ({error.strerror or error}), so the cache is not complete; make room "
        f"in {root}, or make it writable, and the same command resumes; or train with --data.cache none"
    )


def _fingerprint(config: Config, models: Models) -> str:
    file = Path(config.data.path) / "index.json"
    try:
        index = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); prepare the dataset again") from None
    parts: dict[str, Any] = {
        "index": index,
        "kinds": sorted(config.data.cache),
        "vae": weights_fingerprint(models.vae),
        "trunk": weights_fingerprint(models.trunk.vlm),
        "tokens": models.trunk.limits,
        "dtype": str(models.vae.dtype),
    }
    if config.cache_keeps_pictures and len(config.data.cache) > 1:  # else the kinds say so
        parts["pictures"] = True
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
