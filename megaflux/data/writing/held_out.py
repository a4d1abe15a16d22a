"""Enough held-out pictures of one shape: validation compares pictures with each other."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import HELD_OUT
from megaflux.data.writing.chunks import Report, Target, exclusive, hold_out
from megaflux.data.writing.split import DRAWS

ENOUGH = 100  # images; with fewer, pictures are only held out as --held-out says


@dataclass(frozen=True)
class Shape:
    """The bucket whose held-out pictures validation shows. samples: its pictures; held: those of them that are held out.
    candidates: the training samples that a larger share takes first, (draw, key, number of the chunk)."""

    bucket: Bucket
    samples: int
    held: int
    candidates: list[tuple[int, str, int]]


def validation_shape(buckets: Sequence[Bucket], reports: Sequence[Report]) -> Shape | None:
    """The squarest bucket of which HELD_OUT pictures are less than half, else the fullest one; None without samples."""

    def count(bucket: Bucket, *splits: str) -> int:
        return sum(report.counts[split].get(bucket.name, 0) for report in reports for split in splits)

    sizes = {bucket: size for bucket in buckets if (size := count(bucket, "train", "held_out"))}
    if not sizes:
        return None
    large = [bucket for bucket, size in sizes.items() if size > 2 * HELD_OUT]
    bucket = min(large, key=_oblong) if large else max(sizes, key=lambda bucket: (sizes[bucket], -_oblong(bucket)))
    drawn = [
        (number, key, chunk)
        for chunk, report in enumerate(reports)
        for number, key in (report.candidates or {}).get(bucket.name, [])
    ]
    return Shape(bucket, sizes[bucket], count(bucket, "held_out"), heapq.nsmallest(HELD_OUT, drawn))


def top_up(target: Target, shape: Shape) -> set[int]:
    """Hold out training samples of the shape until there are HELD_OUT. Returns the numbers of the chunks that changed."""
    chosen: dict[int, set[str]] = {}
    for _, key, chunk in shape.candidates[: max(0, HELD_OUT - shape.held)]:
        chosen.setdefault(chunk, set()).add(key)
    if chosen:
        with exclusive(target.out, "held-out"):
            for chunk, keys in chosen.items():
                hold_out(target, chunk, keys)
    return set(chosen)


def advice(shape: Shape) -> str:
    """One line for a dataset with too few held-out pictures, with a share that would hold out more."""
    most = min(HELD_OUT, shape.samples // 2)  # at least as many are left to train on
    wanted = shape.candidates[: max(0, most - shape.held)]
    what = f"{shape.held} held-out pictures of the shape {shape.bucket.name}: validation compares at least 2, better {HELD_OUT}"
    if not wanted:
        return f"{what}; there are {shape.samples} of it in all, so add more"
    share = min(math.floor(wanted[-1][0] / DRAWS * 1000 + 1) / 1000, 0.999)  # --held-out is below 1
    return f"{what}; --held-out {share:g} would give {shape.held + len(wanted)} (prepare again, into a new folder)"


def _oblong(bucket: Bucket) -> float:
    return abs(bucket.width / bucket.height - 1)
