"""The order of an epoch: a function of the seed and of how many samples each shard holds.

Streaming mixes shards, and samples within blocks of shards, so the same samples cut into other shards come in another
order. A dataset that was computed from another one sample by sample (megaflux.training.cache) is therefore drawn as if
it were cut as that one is: the same samples in the same order, whether a run reads pictures or what was computed from
them, and however that is stored.

Order: bucket name -> samples of each shard, in the stored order of the samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.storage.index import fingerprint

Order = dict[str, list[int]]


class DrawnFrom:
    """The dataset whose samples are drawn: the one at `path`, or the one that it was computed from.

    path: the dataset that is read. stored: its checked index entries by bucket. original: those of the dataset that it
    was computed from, or its own. Raises UserError where the two have other numbers of samples.

    fingerprint: of the original, what a position is compared by. order: the original's.
    """

    def __init__(self, path: Path, stored: Mapping[Bucket, list[dict]], original: Mapping[Bucket, list[dict]]):
        mine, original = ({b.name: entries for b, entries in shards.items()} for shards in (stored, original))
        self.path, self.fingerprint, self.order = path, fingerprint(original), order_of(original)
        self._stored, self._stored_order = fingerprint(mine), order_of(mine)
        if _counts(self.order) != _counts(self._stored_order):
            raise UserError(
                f"{path}: holds other numbers of samples than the dataset that it was computed from; delete it, and the "
                "same command computes it again"
            )

    def order_in(self, state: dict[str, Any]) -> Order:
        """The order that a saved position goes on in. UserError where it is of another dataset.

        Earlier versions drew from a cache in an order of its own, and named it by its bytes: their positions are taken
        where those bytes are."""
        saved = state.get("dataset")
        if saved != self.fingerprint:
            if saved == self._stored:
                return self._stored_order
            raise UserError(
                f"the saved data position is of dataset {saved!r}, {self.path} is {self.fingerprint!r}; resume with what the "
                "run began with (where an earlier version began it with a cache, that very cache), or start a new run"
            )
        if "order" not in state:
            return self.order
        try:
            return unpacked(state["order"], _counts(self.order))
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f"the saved data position has an order that is not of {self.path}; start a new run"
            ) from None


def order_of(shards: Mapping[str, Iterable[dict[str, Any]]]) -> Order:
    """The order of a dataset as it is stored; shards: the checked index entries by bucket name."""
    return {bucket: [entry["samples"] for entry in entries] for bucket, entries in shards.items()}


def packed(order: Order) -> dict[str, list[list[int]]]:
    """An order as a saved position holds it, short: bucket name -> [[samples, shards in a row that have so many], ...]."""
    return {
        bucket: [[samples, len(list(group))] for samples, group in itertools.groupby(sizes)]
        for bucket, sizes in order.items()
    }


def unpacked(saved: Any, counts: Mapping[str, int]) -> Order:
    """The inverse of `packed`; counts: bucket name -> samples that it has in sum. Raises ValueError, TypeError or
    AttributeError for what is none."""
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
    """As `dataset.resample_streams`, with the streams cut into shards of other sizes; order: of each stream, samples of each
    shard, in sum those of the stream. The numbers of the samples are the dataset's own."""
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
    return StreamingDataset.resample_streams(cut, epoch, stream_id)
