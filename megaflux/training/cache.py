"""`--cache latents,trunk`: what the frozen networks say of each picture, computed once and trained from.

Writes a derived dataset (same layout, other columns) beside the images, under a name that is a fingerprint of all it
depends on: the images, the VAE's and the trunk's weights, sizes and dtype. A finished one is used as it is. One that is
not: the ranks share the parts that are missing (megaflux.data.storage.parts).
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
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from megaflux.common.errors import STUCK, UserError
from megaflux.common.ranks import World, gathered
from megaflux.config.parse import Config
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.data.storage.index import stored_file
from megaflux.data.storage.parts import Part, Writing, all_parts, complete, missing, remove_leftovers
from megaflux.data.tensors import from_stored_image
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models, weights_fingerprint
from megaflux.training.distributed import HEARTBEAT, from_main
from megaflux.training.planning.cache_size import CacheSize, check_room, size_of_run
from megaflux.training.survival.watch import leave

log = logging.getLogger("megaflux")
BATCH = 32
SAY_EVERY = 60.0  # s between two lines of a log file


def cached_dataset(config: Config, models: Models, world: World) -> str:
    """The folder to train from: `data.path` itself, or its cache, made now if need be. Collective.

    The ranks share the work, shard by shard of the images, and exchange a sign of life while it lasts. What is whole
    stays when they are killed, and the next call computes the rest; other runs may compute the same cache at once.
    Training from it draws the same samples in the same order as from `data.path` (build_loader's computed_from). Only
    local shards can be cached.

    What it will take is said, and the disk asked for room, before anything is computed.

    Raises UserError, alike on all ranks: no room, an image shard or picture that is damaged, or a disk that refuses. A
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
    """(all parts of the cache, those that are missing, for which there is room); None: it is complete."""
    remove_leftovers(root)
    if (root / "dataset.json").exists():
        return None
    parts = all_parts(original, info)
    todo = missing(root, parts)
    log.info("%s", size.told(parts))
    check_room(root, size, todo)
    return parts, todo


def _compute(share: _Share, total: int, what: str, world: World) -> None:
    """Every rank's share, to the last. Collective. Waiting takes as long as the slowest rank needs, which no barrier's
    time limit allows for: the ranks exchange how far they are instead. The first UserError of one ends all."""
    pool = ThreadPoolExecutor(1)
    # A log file is spared the bar.
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
    pause, said = 0.05, time.monotonic()
    last, moved, patience = share.done, time.monotonic(), share.config.train.hang_timeout
    while True:
        if share.done != last or work.done():
            last, moved = share.done, time.monotonic()
        elif time.monotonic() - moved > patience:  # the ranks' signs of life come from this thread, not from what hangs
            leave(f"{what}: no image in {patience:.0f} s (train.hang_timeout)", STUCK, stacks=True)
        finished, problem = work.done(), None
        if finished:
            try:
                work.result()  # what else is raised here is a bug or no memory, and this rank's end ends the others' wait
            except UserError as error:
                problem = f"rank {world.rank}: {error}" if world.rank else str(error)
        done, ready, problems = zip(*gathered((share.done, finished, problem), world), strict=True)
        bar.update(sum(done) - bar.n)
        if any(problems):
            raise UserError(next(filter(None, problems)), agreed=True)
        if all(ready):
            return
        if world.is_main and bar.disable and time.monotonic() - said > SAY_EVERY:
            log.info("%s: %d of %d images", what, sum(done), bar.total)
            said = time.monotonic()
        time.sleep(pause)
        pause = min(2 * pause, HEARTBEAT)


class _Share:
    """The parts that a rank computes. done: images so far; stop: set it to have the thread that computes leave soon."""

    def __init__(self, config: Config, models: Models, root: Path, parts: list[Part], device: torch.device):
        self.config, self.models, self.root, self.parts, self.device = config, models, root, parts, device
        self.done, self.stop = 0, threading.Event()

    @torch.no_grad()
    def compute(self) -> None:
        """All of them, but for those that another process has made meanwhile. UserError as cached_dataset's."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins with the first
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
                raise UserError("another rank has failed")  # nobody reads it
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
            kept = {"key": row["key"], "caption": row["caption"]}
            if len(columns) < 2:  # one of the two is still computed live, from the picture
                kept["image"] = row["image"]
            yield kept | {name: values[i] for name, values in columns.items()}

    def _picture(self, part: Part, row: dict[str, Any]) -> torch.Tensor:
        """uint8 (3, H, W), as the loader decodes it."""
        try:
            return from_stored_image(row["image"], part.bucket, row["key"])
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise what they meet
            file = Path(self.config.data.path) / "train" / part.bucket.folder / stored_file(part.shard)["basename"]
            raise UserError(
                f"{file}: the picture {row['key']!r} cannot be decoded ({' '.join(str(error).split())[:200]}), so there is "
                "nothing to cache; prepare the dataset again, or train with --data.cache none, which replaces it"
            ) from None


T = TypeVar("T")


def _on_main(do: Callable[[], T], root: Path, world: World) -> T:
    """What rank 0 makes of it, on every rank: its value, or its UserError. Collective."""
    value, problem = None, None
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
    return value


def _refused(root: Path, error: OSError) -> str:
    return (
        f"{error.filename or root}: cannot be written ({error.strerror or error}), so the cache is not complete; make room "
        f"in {root}, or let it be written, and the same command goes on; or train with --data.cache none"
    )


def _fingerprint(config: Config, models: Models) -> str:
    file = Path(config.data.path) / "index.json"
    try:
        index = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); prepare the dataset again") from None
    parts = {
        "index": index,
        "kinds": sorted(config.data.cache),
        "vae": weights_fingerprint(models.vae),
        "trunk": weights_fingerprint(models.trunk.vlm),
        "tokens": models.trunk.limits,
        "dtype": str(models.vae.dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
