"""Whether a dataset has what a run asks of it: captions, held-out pictures, and enough of each shape."""

from __future__ import annotations

from collections.abc import Iterator

from megaflux.config.data import Data
from megaflux.data.storage.dataset import HELD_OUT, SPLITS, DatasetInfo, validation_bucket

FEW_CAPTIONS = 0.9  # below this share of images with a caption, a run that draws captions is warned


def dataset_problems(data: Data, info: DatasetInfo) -> Iterator[str]:
    """What the dataset at data.path lacks that the run cannot do without, one line each."""
    drawn = _share_of_captions(data)
    if drawn and info.captioned == 0:
        yield (
            f"data.condition: draws captions for {drawn:.0%} of the batches, but no image in {data.path} has one; prepare "
            "the data again with captions (docs/data.md says where they are found), or set data.condition.image to 1"
        )
    if not info.samples("held_out"):
        share = info.settings.get("held_out")
        because = f" (--held-out {share:g})" if isinstance(share, float | int) else ""
        yield (
            f"data.path: {data.path} has no held-out pictures{because}, which validation needs; prepare the data again with "
            "a larger --held-out, of which prepare says what it gives"
        )


def dataset_notes(data: Data, info: DatasetInfo) -> Iterator[str]:
    """What the dataset has so little of that the run is worse for it, one line each."""
    drawn, captioned = _share_of_captions(data), info.captioned
    samples = sum(info.samples(split) for split in SPLITS)
    if drawn and captioned and captioned < FEW_CAPTIONS * samples:
        yield (
            f"data.condition: draws captions for {drawn:.0%} of the batches, but only {captioned} of the {samples} images in "
            f"{data.path} have one; the others are trained on an empty caption"
        )
    bucket = validation_bucket(info, "held_out")
    held_out = info.counts["held_out"][bucket.name] if bucket else 0
    if 0 < held_out < HELD_OUT:
        yield (
            f"data.path: {data.path} has {held_out} held-out pictures of the shape that validation uses"
            + (": no gap can be measured" if held_out < 2 else "; its figures depend on them")
            + f"; better {HELD_OUT} or more (prepare the data again with a larger --held-out)"
        )


def _share_of_captions(data: Data) -> float:
    return data.condition.image_text + data.condition.text
