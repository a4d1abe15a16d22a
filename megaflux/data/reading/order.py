"""The order of an epoch: a function of the seed and of how many samples each shard holds.

Streaming shuffles shards, and samples within blocks of shards, so the same samples cut into other shards come in another
order. A dataset that was computed from another one sample by sample (megaflux.training.cache) is therefore drawn as if it
were cut into the other one's shards: a run sees the same samples in the same order, whether it reads images or what was
computed from them.

Order: bucket name -> samples of each shard, in the stored order of the samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.reading.position import Position
from megaflux.data.storage.index import fingerprint

Order = dict[str, list[int]]


class DrawnFrom:
    """The dataset whose order is drawn: the one that is read, or the one from which it was computed.

    path: the dataset that is read. stored: its checked index entries by bucket. original: those of the dataset from
    which it was computed, or again its own. Raises UserError where the two have different numbers of samples.

    fingerprint: of the original; positions are compared by it. order: the original's.
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[Bucket, Sequence[dict[str, Any]]],
        original: Mapping[Bucket, Sequence[dict[str, Any]]],
    ) -> None:
        mine, theirs = ({b.name: entries for b, entries in shards.items()} for shards in (stored, original))
        self.path, self.fingerprint, self.order = path, fingerprint(theirs), order_of(theirs)
        self._stored, self._stored_order = fingerprint(mine), order_of(mine)
        if _counts(self.order) != _counts(self._stored_order):
            raise UserError(
                f"{path}: has other numbers of samples than the dataset it was computed from; delete it, and the "
                "same command computes it again"
            )

    def order_at(self, position: Position) -> Order:
        """The order in which a run continues from a saved position. Raises UserError for one of another dataset.

        Earlier versions drew from a cache in an order of its own and named it by the cache's fingerprint: their positions
        are accepted if that cache is being read."""
        saved = position.dataset
        if saved != self.fingerprint:
            if saved == self._stored:
                return self._stored_order
            raise UserError(
                f"the saved data position is of dataset {saved!r}, {self.path} is {self.fingerprint!r}; give "
                "--data.path with what the run began with, wherever it is now (where an earlier version began it with a cache, that "
                "very cache), or start a new run"
            )
        if position.order is None:
            return self.order
        try:
            return unpacked(position.order, _counts(self.order))
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f"the saved data position has an order that is not of {self.path}; start a new run"
            ) from None


def order_of(shards: Mapping[str, Iterable[dict[str, Any]]]) -> Order:
    """The order of a dataset as it is stored; shards: the checked index entries by bucket name."""
    return {bucket: [entry["samples"] for entry in entries] for bucket, entries in shards.items()}


def packed(order: Order) -> dict[str, list[list[int]]]:
    """An order as a saved position stores it: bucket name -> [[samples, shards in a row of that many], ...]."""
    return {
        bucket: [[samples, len(list(group))] for samples, group in itertools.groupby(sizes)]
        for bucket, sizes in order.items()
    }


def unpacked(saved: Any, counts: Mapping[str, int]) -> Order:
    """The inverse of `packed`. counts: bucket name -> its samples. Raises ValueError, TypeError or AttributeError where
    `saved` is not a packed order of these counts."""
    found = {bucket: sum(samples * shards for samples, shards in groups) for bucket, groups in saved.items()}
    numbers = [n for groups in saved.values() for group in groups for n in group]
    if found != counts or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError("other numbers of samples")
    return {bucket: [samples for samples, n in groups for _ in range(n)] for bucket, groups in saved.items()}


def _counts(order: Order) -> dict[str, int]:
    return {bucket: sum(sizes) for bucket, sizes in order.items()}


def resample(
    dataset: StreamingDataset, order: Sequence[Sequence[int]], epoch: int, stream_id: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`dataset.resample_streams` with the streams cut into shards of other sizes, in the dataset's own sample numbers.

    order: for each stream the samples of each shard, which add up to the stream's."""
    counts = np.array([len(sizes) for sizes in order])
    sizes = np.concatenate([np.asarray(sizes, np.int64) for sizes in order])
    cut = SimpleNamespace(
        shuffle_seed=dataset.shuffle_seed,
        sampling_method=dataset.sampling_method,
        sampling_granularity=dataset.sampling_granularity,
        epoch_seed_change=dataset.epoch_seed_change,
        streams=dataset.streams,
        num_streams=dataset.num_streams,
        shards_per_stream=counts,
        shard_offset_per_stream=counts.cumsum() - counts,
        samples_per_shard=sizes,
        sample_offset_per_shard=sizes.cumsum() - sizes,
    )
    # It reads nothing but these attributes of its self.
    return StreamingDataset.resample_streams(cast(StreamingDataset, cut), epoch, stream_id)
