"""Whether a dataset has what a run asks of it: captions and held-out pictures. Reads its description only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megaflux.config.schema import Data

FEW_CAPTIONS = 0.9  # below this share of images with a caption, a run that draws captions is warned
FEW_HELD_OUT = 8  # references of one shape; below, losses and the gap of two validations differ by chance


def dataset_problems(data: Data, description: dict[str, Any]) -> Iterator[str]:
    """What a dataset lacks that the run cannot do without, one line each. description: the content of its dataset.json."""
    drawn, captioned = _share_of_captions(data), _captioned(description)
    if drawn and captioned == 0:
        yield (
            f"data.condition: draws captions for {drawn:.0%} of the batches, but no image in {data.path} has one; prepare "
            "the data again with captions (docs/data.md says where they are found), or set data.condition.image to 1"
        )
    if _held_out(description) == 0:
        share = _settings(description).get("held_out")
        because = f" (--held-out {share:g})" if isinstance(share, float | int) else ""
        yield (
            f"data.path: {data.path} has no held-out pictures{because}, which validation needs; prepare the data again with "
            "a larger --held-out, of which prepare says what it gives"
        )


def dataset_notes(data: Data, description: dict[str, Any]) -> Iterator[str]:
    """What a dataset has so little of that a run is worse for it, one line each."""
    drawn, captioned, samples = _share_of_captions(data), _captioned(description), _samples(description)
    if drawn and captioned and samples and captioned < FEW_CAPTIONS * samples:
        yield (
            f"data.condition: draws captions for {drawn:.0%} of the batches, but only {captioned} of the {samples} images in "
            f"{data.path} have one; the others are trained on an empty caption"
        )
    held_out = _held_out(description)
    if held_out and held_out < FEW_HELD_OUT:
        yield (
            f"data.path: {data.path} has {held_out} held-out pictures of the shape that validation uses"
            + (": no gap can be measured" if held_out < 2 else "; its figures depend on them")
            + f"; better {FEW_HELD_OUT} or more (prepare the data again with a larger --held-out)"
        )


def _share_of_captions(data: Data) -> float:
    return data.condition.image_text + data.condition.text


def _captioned(description: dict[str, Any]) -> int | None:
    """Samples with a caption, or None where they were not counted."""
    notes = description.get("notes")
    return notes.get("captioned") if isinstance(notes, dict) else None


def _settings(description: dict[str, Any]) -> dict[str, Any]:
    settings = description.get("settings")
    return settings if isinstance(settings, dict) else {}


def _counts(description: dict[str, Any], split: str) -> dict[str, int] | None:
    counts = description.get("counts")
    found = counts.get(split, {}) if isinstance(counts, dict) else None
    return found if isinstance(found, dict) else None


def _samples(description: dict[str, Any]) -> int:
    return sum(sum((_counts(description, split) or {}).values()) for split in ("train", "held_out"))


def _held_out(description: dict[str, Any]) -> int | None:
    """Held-out pictures of the shape that validation uses (as storage.dataset.squarest_bucket chooses it)."""
    counts = _counts(description, "held_out")
    if counts is None:
        return None
    sizes = {bucket["name"]: bucket["width"] / bucket["height"] for bucket in description["buckets"]}
    filled = [name for name in sizes if counts.get(name)]
    if not filled:
        return 0
    chosen = [name for name in filled if name == _settings(description).get("validation_bucket")]
    return counts[min(chosen or filled, key=lambda name: abs(sizes[name] - 1))]
