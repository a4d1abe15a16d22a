"""Aspect ratios -> canvas sizes, and which canvas an image belongs on.

A bucket is one canvas size in pixels. Every batch holds images of one bucket only, so nothing is padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megaflux.common.errors import UserError

ASPECT_RATIOS = ("16:9", "2:1", "2.35:1", "1:1", "1:2")  # width:height, the published recipe's five
MULTIPLE = 16  # px: the VAE halves three times and FLUX packs 2 x 2 latents


@dataclass(frozen=True)
class Bucket:
    """One canvas: its aspect ratio as written ("16:9") and its size in pixels."""

    name: str
    width: int
    height: int

    @property
    def folder(self) -> str:
        """The name of its folder: "16:9" -> "16x9", "2.35:1" -> "2.35x1"."""
        return self.name.replace(":", "x")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, Pillow's order."""
        return self.width, self.height

    def __str__(self) -> str:
        return f"{self.name} ({self.width}x{self.height})"


def check_ratio(name: Any) -> Fraction:
    """Width over height of an aspect ratio as it is written, "16:9". Raises UserError for anything else."""
    match = isinstance(name, str) and re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?):(\d{1,6}(?:\.\d{1,6})?)", name)
    if not match or not (Fraction(match[1]) and Fraction(match[2])):
        raise UserError(f"aspect ratio {str(name)[:80]!r} is not WIDTH:HEIGHT, as in 16:9 or 2.35:1")
    return Fraction(match[1]) / Fraction(match[2])


def _round_half_up(length: Fraction, multiple: int) -> int:
    return max(multiple, multiple * math.floor(length / multiple + Fraction(1, 2)))


def make_buckets(aspect_ratios: Sequence[str], longest_side: int, multiple: int = MULTIPLE) -> tuple[Bucket, ...]:
    """The canvas of each aspect ratio, in the order given.

    The longer side is `longest_side` pixels, the shorter one is rounded, half up, to a multiple of
    `multiple` pixels. At 1024: 1024x576, 1024x512, 1024x432, 1024x1024, 512x1024.

    Raises UserError for an invalid ratio, where `longest_side` is not a positive multiple of `multiple`, and where two
    ratios have the same size (naming both).
    """
    if longest_side < multiple or longest_side % multiple:
        raise UserError(f"longest side {longest_side} px is not a positive multiple of {multiple} px")
    if not aspect_ratios:
        raise UserError("no aspect ratios given; the default is " + ",".join(ASPECT_RATIOS))
    buckets: dict[tuple[int, int], Bucket] = {}
    for name in aspect_ratios:
        ratio = check_ratio(name)
        if ratio >= 1:
            bucket = Bucket(name, longest_side, _round_half_up(longest_side / ratio, multiple))
        else:
            bucket = Bucket(name, _round_half_up(longest_side * ratio, multiple), longest_side)
        if (other := buckets.setdefault(bucket.size, bucket)) is not bucket:
            raise UserError(
                f"aspect ratios {other.name} and {name} both become {bucket.width}x{bucket.height} at a "
                f"longest side of {longest_side} px; drop one or raise the longest side"
            )
    return tuple(buckets.values())


def nearest_bucket(width: float, height: float, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to width / height on a log scale; the earlier one on a tie."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - aspect))


def overdrawn(counts: Mapping[Bucket, int], drawn: int, ranks: int) -> Iterator[str]:
    """A line for each bucket of which an epoch draws more repeats than it has samples. counts: samples of each bucket;
    drawn: samples that each of the ranks draws at a time, of one bucket."""
    together = drawn * ranks
    for bucket, samples in counts.items():
        total = -(-samples // together) * together
        if total - samples > samples:
            own = "one sample fills" if samples == 1 else f"{samples} samples fill"
            smaller = ", or start the run with a smaller train.drawn_per_rank" if drawn > 1 else ""
            yield (
                f"bucket {bucket}: its {own} {total} places of an epoch, since all ranks together draw {together} of a bucket at "
                f"a time (train.drawn_per_rank {drawn}, ranks {ranks}); prepare the data with fewer --aspect-ratios{smaller}"
            )
