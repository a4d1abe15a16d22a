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
    if "trunk" in data.cache and info.has_references and data.references.max:
        yield (
            f"data.cache: a cached trunk holds each picture as its own reference, but {data.path} has references; set "
            "data.cache latents, or data.references.max and min 0"
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
    if not drawn and data.caption_weights is not None:
        yield "data.caption_weights: has no effect, because data.condition draws no captions"
    if drawn and (note := _weights_note(data, info)):
        yield note
    if data.references.max > max(1, info.most_references):
        yield (
            f"data.references.max: {data.references.max}, but no sample in {data.path} has more than {info.most_references} references; "
            "memory is planned for what never comes"
        )
    bucket = validation_bucket(info, "held_out")
    held_out = info.counts["held_out"][bucket.name] if bucket else 0
    if 0 < held_out < HELD_OUT:
        yield (
            f"data.path: {data.path} has {held_out} held-out pictures of the shape that validation uses"
            + (": no gap can be measured" if held_out < 2 else "; its figures depend on them")
            + f"; better {HELD_OUT} or more (prepare the data again with a larger --held-out)"
        )


def _weights_note(data: Data, info: DatasetInfo) -> str | None:
    """Where data.caption_weights does not fit the images' numbers of captions (objective.shares_of says what is drawn then)."""
    stats, weights = info.caption_stats, data.caption_weights
    if stats is None or weights is None:
        return None
    several = {number: count for number, count in stats.images.items() if number > 1}
    if not several:
        return f"data.caption_weights: no image in {data.path} has several captions, so the weights change nothing"
    faults = []
    if beyond := sum(count for number, count in several.items() if number > len(weights)):
        faults.append(
            f"{beyond} images in {data.path} have more than {len(weights)} captions (up to {max(several)}), of which those "
            "without a weight are never drawn"
        )
    if alike := sum(count for number, count in several.items() if not any(weights[:number])):
        faults.append(f"{alike} images have only captions of weight 0, which are drawn alike")
    return f"data.caption_weights: {'; '.join(faults)}; give a weight for each caption" if faults else None


def _share_of_captions(data: Data) -> float:
    return data.condition.image_text + data.condition.text
