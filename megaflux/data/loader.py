"""MDS shards -> an endless sequence of micro-batches, each of one bucket, resumable to the batch.

One stream per bucket, drawn from with streaming's `per_stream` method: at every step all ranks get
batches of the same bucket. That method drops what does not fill a global micro-batch (micro-batch x
ranks), so each bucket is filled up with repeats of its own samples; how many is logged and in `repeats`.
Everything else is seen exactly once an epoch, but for what goes bad meanwhile (megaflux.data.reading.quarantine).

    global micro-batch b of an epoch: samples b*G .. b*G + G-1 of the epoch's order, G = micro-batch x ranks
    on one node, rank r gets those at positions r, r + ranks, r + 2*ranks, ...
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, as_streaming_sees, detect_world, raise_first
from megaflux.data.batches import Batch, collate
from megaflux.data.buckets import Bucket
from megaflux.data.reading import shm_room
from megaflux.data.reading.order import DrawnFrom, Order, packed
from megaflux.data.reading.quarantine import BucketDataset, QuarantiningStream
from megaflux.data.reading.shared_memory import claim, exclusive_set_up, release, remove_leftovers
from megaflux.data.storage import remote as remote_data
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.data.storage.index import RESTORE, column_encodings, inspect_index, raise_problems
from megaflux.data.storage.unpack import remove_abandoned, unwritable
from megaflux.data.storage.verdict import verify_on_all_ranks

logger = logging.getLogger(__name__)

# Streaming warns of dropped samples where it only fills up the last round of workers with nothing. What
# is drawn divides evenly here, and a short epoch is an error below.
logging.getLogger("streaming.base.batching.per_stream").setLevel(logging.ERROR)

MIN_REPLACED = 100  # samples; fewer are replaced whatever share of the first batches they are
SHUFFLE_BLOCK = 4_000_000  # samples over which a shard's samples are spread, streaming's own default


def build_loader(
    path: str | Path,
    *,
    micro_batch_size: int,
    seed: int,
    num_workers: int = 0,
    remote: str | None = None,
    cache_limit: str | None = None,
    split: str = "train",
    prefetch_factor: int = shm_room.PREFETCH_FACTOR,
    shuffle: bool = True,
    verify: bool = False,
    run_folder: str | Path | None = None,
    max_replaced: float = 0.01,
    damaged: Literal["refuse", "replace"] = "refuse",
    computed_from: str | Path | None = None,
) -> BucketLoader:
    """Open a dataset of megaflux.data.prepare (or one derived from it) for training.

    path: the dataset's folder; with `remote`, the local folder that caches it. micro_batch_size: samples
    per rank and batch. seed: of the order, which it and the world size determine. num_workers: loading
    processes per rank, 0: load in this process. remote: where the dataset is, anything that
    mosaicml-streaming reads (s3://, gs://, a path, ...). cache_limit: of the cache, as "100gb"; None: no
    limit. prefetch_factor: batches each worker loads ahead. shuffle: False for the stored order. verify: first hold
    every local shard of this split and the held-out one against its hash (megaflux.data.storage.verdict). run_folder:
    keeps that verdict where `path` cannot be written; None: it is then not kept. max_replaced: share of an epoch's
    samples that may go bad while it is read and be replaced (megaflux.data.reading.quarantine). damaged: replace, for a run
    that goes on: local shards that are missing or damaged at the start are warned of, and treated as those that go bad
    later. computed_from: the dataset that `path` was computed from, sample by sample in the same order
    (megaflux.training.cache); both are then drawn from in the same order, and a position of one is a position of the
    other. Only its indexes are read.

    Call it after torch.distributed is initialised, on every rank. Raises UserError if the dataset is
    missing, incomplete, damaged (every problem at once), has no samples in this split, or has shards to unpack where this
    process cannot write, and where /dev/shm is too small: alike on all ranks where only some machines see it.
    """
    path = Path(path)
    if micro_batch_size < 1:
        raise UserError(f"micro-batch size {micro_batch_size}: at least 1 sample")
    if cache_limit and not remote:
        # Streaming makes room by deleting shards, and without a remote there is nowhere to get them back.
        raise UserError(f"a cache limit ({cache_limit}) needs a remote; it would delete the only copy in {path}")
    world = detect_world()
    if remote:
        problem = None
        if world.local_rank == 0:
            try:
                remote_data.fetch_indexes(remote, path, split)
            except UserError as error:
                problem = str(error)
        raise_first(problem, world)
    problems = []
    if verify and not remote:
        problems = verify_on_all_ranks(path, sorted({split, "held_out"}), run_folder, world)
        if damaged == "refuse":
            raise_problems(problems, agreed=True, mend=_mend(path, computed_from))
        for problem in problems:
            logger.warning("going on with damaged data, whose samples are replaced: %s", problem)
    info = read_dataset_info(path)
    check_files = remote is None and damaged == "refuse"
    shards = _read_streams(path, info, split, check_files, _mend(path, computed_from))
    original = computed_from and _read_streams(
        Path(computed_from), read_dataset_info(computed_from), split, check_files=False, quiet=True
    )
    drawn_from = DrawnFrom(path, shards, original or shards)
    folders = {path / split / bucket.folder: entries for bucket, entries in shards.items()}
    if world.local_rank == 0 and (left := remove_abandoned([path, *folders])):
        logger.info("removed what killed runs were unpacking: %s", ", ".join(map(str, left)))
    raise_first(unwritable(path, folders) if world.local_rank == 0 and not remote else None, world)
    with exclusive_set_up(world), as_streaming_sees(world):
        stale = []
        if world.local_rank == 0:
            stale = remove_leftovers(os.path.abspath(folder) for folder in folders)
            if stale:
                logger.info("removed shared memory that killed runs had left: %s", ", ".join(stale))
        small = (
            shm_room.problem(
                shards,
                micro_batch_size=micro_batch_size,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                local_ranks=world.local_size,
                samples_per_epoch=sum(_drawn(shards, micro_batch_size * world.size).values()),
                gpus=torch.cuda.is_available(),
            )
            if world.local_rank == 0
            else None
        )
        raise_first(small, world)
        return BucketLoader(
            path,
            split,
            shards,
            world,
            micro_batch_size=micro_batch_size,
            seed=seed,
            num_workers=num_workers,
            remote=remote,
            cache_limit=cache_limit,
            prefetch_factor=prefetch_factor,
            shuffle=shuffle,
            max_replaced=max_replaced,
            stale=stale,
            damaged=problems,
            drawn_from=drawn_from,
        )


def _leave_signals_to_the_rank(_: int) -> None:
    """Launchers ask a rank's workers to leave as well, and Ctrl-C and a closing terminal reach them too; the rank still needs
    them for the update it is in, and ends them."""
    signal.set_wakeup_fd(-1)  # the rank's, which would hear this process' signals as its own
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _drawn(shards: dict[Bucket, list[dict]], global_batch: int) -> dict[Bucket, int]:
    """Samples of each bucket that an epoch draws: all of them, filled up to whole global batches."""
    counts = {bucket: sum(entry["samples"] for entry in entries) for bucket, entries in shards.items()}
    return {bucket: -(-n // global_batch) * global_batch for bucket, n in counts.items()}


def _mend(path: Path, computed_from: str | Path | None) -> str:
    return f"Delete {path}, and the same command computes it again" if computed_from else RESTORE


def _read_streams(
    path: Path, info: DatasetInfo, split: str, check_files: bool, mend: str = RESTORE, quiet: bool = False
) -> dict[Bucket, list[dict]]:
    """The checked shard entries of every bucket that has samples; UserError with all problems."""
    streams, problems = {}, []
    for bucket in info.buckets:
        count = info.counts.get(split, {}).get(bucket.name, 0)
        if not count:
            quiet or logger.info("bucket %s has no %s samples and is left out", bucket, split)
            continue
        streams[bucket], found = inspect_index(path / split / bucket.folder, check_files, count)
        problems += found
    raise_problems(problems, mend=mend)
    if not streams:
        raise UserError(f"{path}: no samples in the split {split!r}, which has {info.samples(split)}")
    columns = [set(column_encodings(shards)) for shards in streams.values()]
    for found in columns:
        if not {"key", "caption"} <= found or not {"image", "latents"} & found:
            raise UserError(f"{path}: columns {', '.join(sorted(found))}; key, caption and image or latents are needed")
        if found != columns[0]:
            raise UserError(f"{path}: the buckets have different columns; build the dataset again")
    return streams


class BucketLoader:
    """Micro-batches without end, epoch after epoch; made by build_loader.

    buckets: those that have samples. samples_per_epoch: drawn in an epoch over all ranks, the repeats
    included. repeats: bucket name -> samples that are drawn once more than the others in an epoch.
    batches_per_epoch: micro-batches of each rank. stale: shared memory of killed runs that this rank removed.
    """

    def __init__(
        self,
        path: Path,
        split: str,
        shards: dict[Bucket, list[dict]],
        world: World,
        *,
        micro_batch_size: int,
        seed: int,
        num_workers: int,
        remote: str | None,
        cache_limit: str | None,
        prefetch_factor: int,
        shuffle: bool,
        max_replaced: float,
        stale: list[str],
        damaged: list[str],
        drawn_from: DrawnFrom,
    ) -> None:
        self.buckets, self.stale = tuple(shards), stale
        self.global_batch = micro_batch_size * world.size  # G
        counts, drawn = _drawn(shards, 1), _drawn(shards, self.global_batch)
        self.repeats = {bucket.name: drawn[bucket] - counts[bucket] for bucket in self.buckets}
        self.samples_per_epoch = sum(drawn.values())
        self.batches_per_epoch = self.samples_per_epoch // self.global_batch
        if world.rank == 0:
            for bucket, n in counts.items():
                logger.info("bucket %s: %d samples, %d repeats an epoch", bucket, n, self.repeats[bucket.name])
        # Canonical nodes fix which shards a node needs. One, where all nodes see all shards anyway, makes
        # the order independent of how ranks are spread over nodes.
        self._canonical_nodes = world.nodes if remote else 1
        self._nodes = world.nodes
        self._drawn_from = drawn_from
        self._identity = {
            "dataset": drawn_from.fingerprint,
            "split": split,
            "seed": seed,
            "shuffle": shuffle,
            "micro_batch_size": micro_batch_size,
            "world_size": world.size,
        }
        self._epoch, self._batches, self._started, self._closed = 0, 0, False, False
        self._max_replaced, self._seen, self._replaced = max_replaced, 0, []
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._dataset = BucketDataset(
            buckets=self.buckets,
            streams=[
                QuarantiningStream(
                    name=f"{split}/{bucket.folder}",
                    remote=f"{remote.rstrip('/')}/{split}/{bucket.folder}" if remote else None,
                    local=str(path / split / bucket.folder),
                    choose=drawn[bucket],
                )
                for bucket in self.buckets
            ],
            validate_hash="xxh64",
            download_retry=5 if remote else 1,  # attempts, 1, 2, 4 and 8 s apart
            batch_size=micro_batch_size,
            batching_method="per_stream",
            shuffle=shuffle,
            shuffle_seed=seed,
            # Streaming scales the block by each stream's share, and dies where that is less than one sample.
            shuffle_block_size=max(SHUFFLE_BLOCK, self.samples_per_epoch // min(drawn.values()) + 1),
            num_canonical_nodes=self._canonical_nodes,
            cache_limit=cache_limit,
        )
        self._dataset.set_aside(damaged)
        self._draw_by(drawn_from.order)
        self._claimed = claim(self._dataset)
        atexit.register(self.close)  # streaming's own handlers leave lock files that block the prefix for good
        self._loader = DataLoader(
            self._dataset,
            batch_size=micro_batch_size,
            num_workers=num_workers,
            collate_fn=partial(collate, buckets=self.buckets),
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=torch.cuda.is_available(),
            # Each epoch draws its workers' seed; from the global generator, that would make resuming differ.
            generator=torch.Generator().manual_seed(seed),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, without end. Only one iteration per loader.

        What is missing or damaged is replaced, and named in Batch.replaced. Raises UserError when more than
        max_replaced of this rank's samples of an epoch are (counted since the start or resumption, from MIN_REPLACED
        of them on), when nothing can stand in, and when an epoch ends before its last batch.
        """
        if self._started or self._closed:
            raise RuntimeError("a loader is iterated once; build a new one and load the state")
        self._started = True
        return self._iterate()

    def _iterate(self) -> Iterator[Batch]:
        while True:
            self._iterator = iter(self._loader)
            while not self._closed and (fields := self._next()) is not None:
                if "failure" in fields:
                    raise self._cut_short(fields["failure"])
                self._count_replaced(fields)
                self._batches += 1  # before the yield: whoever holds the batch may ask for the state
                fields["bucket"] = self.buckets[fields["bucket"]]
                yield Batch(**fields)
            if self._closed:
                return
            if self._batches != self.batches_per_epoch:
                raise self._cut_short(self._dataset.failure)
            self._epoch, self._batches = self._epoch + 1, 0
            self._seen, self._replaced = 0, []

    def _count_replaced(self, fields: dict[str, Any]) -> None:
        self._seen += len(fields["keys"])
        self._replaced += fields["replaced"]
        bad = len(self._replaced)
        if bad >= MIN_REPLACED and bad > self._max_replaced * self._seen:
            raise UserError(
                f"epoch {self._epoch}: {bad} of {self._seen} samples could not be read and were replaced, more than "
                f"{self._max_replaced:.2%}: {'; '.join(self._replaced[:3])}; ...; python -m megaflux.data.verify "
                "names all damage"
            )

    def _next(self) -> dict[str, Any] | None:
        try:
            return next(self._iterator, None)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # it died, having said why on stderr
                for worker in getattr(self._iterator, "_workers", ()):
                    worker.kill()  # or the others, waiting for the same shard, get 5 s each to leave
                raise self._cut_short(str(error).partition("\n")[0]) from error
            raise

    def _cut_short(self, reason: str | None) -> UserError:
        return UserError(
            f"epoch {self._epoch} ended after {self._batches} of {self.batches_per_epoch} batches: "
            f"{reason or 'a shard is missing or damaged; python -m megaflux.data.verify names all damage'}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches yielded so far, whatever workers have loaded ahead.

        JSON-able; the same on all ranks that have taken equally many batches.
        """
        epoch, batches = self._epoch, self._batches
        if batches == self.batches_per_epoch:
            epoch, batches = epoch + 1, 0
        position = {**self._identity, "epoch": epoch, "batches": batches}
        return position if self._order == self._drawn_from.order else {**position, "order": packed(self._order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; call it on every rank, before the iteration.

        The state may be of this dataset, of the one that it was computed from, or of another one that was computed from
        that. Earlier versions drew from a cache in an order of its own, and named it by its bytes: such a state is taken
        where those bytes are, and the order stays for this run, whatever it reads later.

        Raises UserError if the state is of other data, another seed, micro-batch or world size.
        """
        if self._started:
            raise RuntimeError("load the state before the iteration; streaming ignores it afterwards")
        for name, mine in self._identity.items():
            if name != "dataset" and state.get(name) != mine:
                raise UserError(
                    f"the saved data position is of {name} {state.get(name)!r}, this run has {mine!r}; "
                    "resume with the same, or start a new run"
                )
        self._draw_by(self._drawn_from.order_in(state))
        self._epoch, self._batches = int(state["epoch"]), int(state["batches"])
        self._dataset.load_state_dict(
            {
                "epoch": self._epoch,
                "sample_in_epoch": self._batches * self.global_batch,
                "num_canonical_nodes": self._canonical_nodes,
                "shuffle_seed": self._identity["seed"],
                "initial_physical_nodes": self._nodes,
            }
        )

    def _draw_by(self, order: Order) -> None:
        self._order = order
        self._dataset.order = [order[bucket.name] for bucket in self.buckets]

    def close(self) -> None:
        """End the workers and give the shared memory back: on every rank, after its last batch."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._iterator = None
        self._loader = None  # with its iterator, which ends the workers as it goes
        release(self._dataset, self._claimed)
