"""MDS shards -> an endless sequence of batches, each of one bucket, resumable to the batch.

These are the drawn batches: training may cut one into several micro-batches (batches.pieces).

How a batch is drawn: each bucket is a stream of its own, and streaming's `per_stream` method gives all ranks batches of
the same bucket at every step. It drops what does not fill a batch on every rank (G = batch size x ranks samples), so each
bucket is filled up with repeats of its own samples; their number is logged and in `repeats`. All remaining samples are
drawn exactly once per epoch.

    step b of an epoch: samples b*G .. b*G + G-1 of the epoch's order
    on one node, rank r gets those at positions r, r + ranks, r + 2*ranks, ...

A position is (epoch, batches): every rank has yielded `batches` batches of the epoch, so `batches` * G samples of
its order are drawn (megaflux.data.reading.position).

Damaged samples are replaced where they are read, in the loading process (BucketDataset.get_item in
megaflux.data.reading.quarantine). The loader counts them, and ends the run when they are too many.
"""

from __future__ import annotations

import atexit
import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, as_streaming_sees, raise_first
from megaflux.data.batches import Batch, collate
from megaflux.data.buckets import overdrawn
from megaflux.data.reading import shm_room
from megaflux.data.reading.opening import Opened, open_dataset, remove_stale_memory
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.order import Order, packed
from megaflux.data.reading.position import Position
from megaflux.data.reading.quarantine import BucketDataset, QuarantiningStream
from megaflux.data.reading.shared_memory import claim, exclusive_set_up, release

logger = logging.getLogger(__name__)

# Streaming warns of dropped samples where it only fills up the last round of workers with nothing. What
# is drawn divides evenly here, and a short epoch is an error below.
logging.getLogger("streaming.base.batching.per_stream").setLevel(logging.ERROR)

MIN_REPLACED = 100  # samples; fewer never end the run, whatever share of the epoch so far they are
SHUFFLE_BLOCK = 4_000_000  # samples over which a shard's samples are spread, streaming's own default


def build_loader(dataset: str | Path, options: LoaderOptions, world: World) -> BucketLoader:
    """Open a dataset of megaflux.data.prepare, or one derived from it, for training. Collective.

    dataset: its folder; with options.remote, the local folder that caches it.

    Raises UserError where the dataset is missing, incomplete, damaged (every problem at once) or has no samples in this
    split; where it has shards to unpack in a folder that is read-only; and where /dev/shm is too small. All ranks raise
    the same, also where only some nodes see the problem.
    """
    path = Path(dataset)
    if options.batch_size < 1:
        raise UserError(f"batch size {options.batch_size}: at least 1 sample")
    if options.cache_limit and not options.remote:
        # Streaming makes room by deleting shards, and without a remote they could not be fetched again.
        raise UserError(
            f"a cache limit ({options.cache_limit}) needs a remote; it would delete the only copy in {path}"
        )
    opened = open_dataset(path, options, world)
    with exclusive_set_up(world), as_streaming_sees(world):
        stale = remove_stale_memory(opened, options.split, world)
        problem = None
        if world.local_rank == 0:
            samples = sum(opened.samples_per_epoch(options.batch_size * world.size).values())
            problem = shm_room.problem(opened.shards, options, world, samples, gpus=torch.cuda.is_available())
        raise_first(problem, world)
        return BucketLoader(opened, options, world, stale)


class BucketLoader:
    """Batches without end, epoch after epoch; made by build_loader.

    buckets: those that have samples. samples_per_epoch: drawn in an epoch over all ranks, repeats included. repeats:
    bucket name -> how many of its samples are drawn twice in an epoch. batches_per_epoch: batches of each rank.
    drawn_together: samples that all ranks draw at a time. stale: names of killed runs' shared memory that this rank removed.
    """

    def __init__(self, opened: Opened, options: LoaderOptions, world: World, stale: list[str]) -> None:
        self.buckets, self.stale = tuple(opened.shards), stale
        self.drawn_together = options.batch_size * world.size
        counts, drawn = opened.samples_per_epoch(1), opened.samples_per_epoch(self.drawn_together)
        self.repeats = {bucket.name: drawn[bucket] - counts[bucket] for bucket in self.buckets}
        self.samples_per_epoch = sum(drawn.values())
        self.batches_per_epoch = self.samples_per_epoch // self.drawn_together
        if world.is_main:
            for bucket, n in counts.items():
                logger.info("bucket %s: %d samples, %d repeats an epoch", bucket, n, self.repeats[bucket.name])
            for line in overdrawn(counts, options.batch_size, world.size):
                logger.warning("%s", line)
        self._begin = Position(
            opened.drawn_from.fingerprint, options.split, options.seed, options.shuffle, options.batch_size, world.size
        )
        self._drawn_from = opened.drawn_from
        # Canonical nodes fix which shards a node needs. With one (all nodes see all shards) the order does not depend on
        # how ranks are spread over nodes.
        self._canonical_nodes = world.nodes if options.remote else 1
        self._nodes = world.nodes
        self._max_replaced = options.max_replaced
        self._epoch, self._batches = 0, 0
        self._seen = 0  # samples of this rank in this epoch, since the start or resumption
        self._replaced: list[str] = []  # their lines of Batch.replaced
        self._started, self._closed = False, False
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._dataset = self._open_streams(opened, options)
        self._draw_by(opened.drawn_from.order)
        self._claimed = claim(self._dataset)
        atexit.register(self.close)  # streaming's own handlers leave lock files that block the prefix for good
        self._loader: DataLoader | None = DataLoader(
            self._dataset,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            collate_fn=partial(collate, buckets=self.buckets),
            persistent_workers=options.num_workers > 0,
            prefetch_factor=options.prefetch_factor if options.num_workers else None,
            worker_init_fn=_leave_signals_to_the_rank,
            pin_memory=torch.cuda.is_available(),
            # Each epoch draws its workers' seed; from the global generator, that would make resuming differ.
            generator=torch.Generator().manual_seed(options.seed),
        )

    def _open_streams(self, opened: Opened, options: LoaderOptions) -> BucketDataset:
        """Streaming's dataset over one stream per bucket."""
        drawn, remote = opened.samples_per_epoch(self.drawn_together), options.remote
        names = {bucket: f"{options.split}/{bucket.folder}" for bucket in self.buckets}
        dataset = BucketDataset(
            buckets=self.buckets,
            streams=[
                QuarantiningStream(
                    name=name,
                    remote=f"{remote.rstrip('/')}/{name}" if remote else None,
                    local=str(opened.path / name),
                    choose=drawn[bucket],
                )
                for bucket, name in names.items()
            ],
            validate_hash="xxh64",
            download_retry=5 if remote else 1,  # attempts, 1, 2, 4 and 8 s apart
            batch_size=options.batch_size,
            batching_method="per_stream",
            shuffle=options.shuffle,
            shuffle_seed=options.seed,
            # Streaming scales the block by each stream's share, and dies where that is less than one sample.
            shuffle_block_size=max(SHUFFLE_BLOCK, self.samples_per_epoch // min(drawn.values()) + 1),
            num_canonical_nodes=self._canonical_nodes,
            cache_limit=options.cache_limit,
        )
        dataset.references = options.references
        dataset.set_aside(opened.damaged)
        return dataset

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, without end. Only one iteration per loader.

        A missing or damaged sample is replaced, and named in Batch.replaced. Raises UserError when more than
        options.max_replaced of this rank's samples of an epoch were replaced (counted since the start or resumption,
        and never for fewer than MIN_REPLACED), when no other sample can be read either, and when an epoch ends early.
        """
        if self._started or self._closed:
            raise RuntimeError("a loader is iterated once; build a new one and load the state")
        self._started = True
        return self._iterate()

    def _iterate(self) -> Iterator[Batch]:
        while self._loader is not None:
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
        """The fields of the next Batch (see collate), or None at the end of the epoch."""
        if self._iterator is None:
            return None
        try:
            return next(self._iterator, None)
        except RuntimeError as error:
            # A loading process died, and printed why on stderr; torch has no error class for it.
            if "DataLoader worker" in str(error):
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
        """The position just past the batches yielded so far, however many workers have loaded ahead, as
        Position.state_dict. The same on all ranks that have taken equally many batches."""
        epoch, batches = self._epoch, self._batches
        if batches == self.batches_per_epoch:
            epoch, batches = epoch + 1, 0
        order = None if self._order == self._drawn_from.order else packed(self._order)
        return replace(self._begin, epoch=epoch, batches=batches, order=order).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position `state`. Call it on every rank, before the iteration.

        The position may be one in this dataset, in the one that it was computed from, or in another computed from that.
        Earlier versions drew from a cache in an order of its own and named it by the cache's fingerprint: such a position
        is accepted if that cache is being read, and this run keeps the order, whatever it reads later.

        Raises UserError if the position belongs to other data, or another seed, micro-batch or number of ranks.
        """
        if self._started:
            raise RuntimeError("load the state before the iteration; streaming ignores it afterwards")
        position = Position.from_state_dict(state)
        if name := position.difference(self._begin):
            raise UserError(
                f"the saved data position is of {name} {getattr(position, name)!r}, this run has "
                f"{getattr(self._begin, name)!r}; resume with the same, or start a new run"
            )
        if not isinstance(position.epoch, int) or not isinstance(position.batches, int):
            raise UserError("the saved data position has no epoch or batches; resume from another checkpoint")
        self._draw_by(self._drawn_from.order_at(position))
        self._epoch, self._batches = position.epoch, position.batches
        self._dataset.load_state_dict(
            {
                "epoch": self._epoch,
                "sample_in_epoch": self._batches * self.drawn_together,
                "num_canonical_nodes": self._canonical_nodes,
                "shuffle_seed": self._begin.seed,
                "initial_physical_nodes": self._nodes,
            }
        )

    def _draw_by(self, order: Order) -> None:
        self._order = order
        self._dataset.order = [order[bucket.name] for bucket in self.buckets]

    def close(self) -> None:
        """End the workers and release the shared memory now. Call it on every rank, after its last batch."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._iterator = None
        self._loader = None  # with its iterator, which ends the workers as it goes
        release(self._dataset, self._claimed)


def _leave_signals_to_the_rank(_: int) -> None:
    """Have a loading process ignore the signals that ask a run to stop. Launchers and terminals send them to it as well,
    but the rank needs its loading processes to finish the update, and ends them itself."""
    signal.set_wakeup_fd(-1)  # inherited from the rank, which would take this process's signals for its own
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
