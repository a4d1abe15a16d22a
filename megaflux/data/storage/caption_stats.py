"""How many captions the images of a dataset have, and how long they are: part of dataset.json's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

MOST_NUMBERS = 12  # of captions an image, named on one line


@dataclass(frozen=True)
class Lengths:
    """Lengths of captions. median, most95: half, and 95%, of the captions are so long or shorter (nearest rank)."""

    unit: str
    """"tokens" or "characters"."""
    captions: int
    """How many were counted: all, or those of a sample of the dataset's chunks."""
    least: int
    median: int
    most95: int
    most: int
    tokenizer: str | None = None
    """Of tokens: the folder or hub name that was given."""
    limit: int | None = None
    """Of tokens: how many of a caption training keeps, by default or as given."""
    longer: int | None = None
    """Captions longer than the limit."""

    def describe(self) -> str:
        """One line."""
        unit = f"{self.unit} of {self.tokenizer}" if self.tokenizer else self.unit
        line = (
            f"lengths of captions in {unit}: {self.least} to {self.most}, median {self.median}, 95% have at most "
            f"{self.most95}"
        )
        if self.limit is None:
            return line
        return f"{line}; {self.longer} of {self.captions} are longer than {self.limit} and would be cut in training"


@dataclass(frozen=True)
class CaptionStats:
    """images: number of captions -> how many images have so many. lengths: None where no image has a caption."""

    images: Mapping[int, int]
    lengths: Lengths | None

    @property
    def several(self) -> int:
        """Images with more than one caption."""
        return sum(count for number, count in self.images.items() if number > 1)

    @property
    def captions(self) -> int:
        """Captions of all images."""
        return sum(number * count for number, count in self.images.items())

    def describe(self) -> list[str]:
        """Human-readable lines; none where there is no caption."""
        lines = []
        if self.several:
            numbers = sorted(self.images.items())
            shown = [f"{count} images have {number}" for number, count in numbers[:MOST_NUMBERS]]
            rest = sum(count for _, count in numbers[MOST_NUMBERS:])
            shown += [f"{rest} have {numbers[MOST_NUMBERS][0]} to {numbers[-1][0]}"] if rest else []
            lines.append(f"captions an image: {', '.join(shown)}")
        if self.lengths:
            sample = f" ({self.lengths.captions} of {self.captions} captions)"
            lines.append(self.lengths.describe() + sample * (self.lengths.captions < self.captions))
        return lines

    def to_json(self) -> dict[str, Any]:
        """As dataset.json holds it."""
        return {
            "images": {str(number): count for number, count in sorted(self.images.items())},
            "lengths": None if self.lengths is None else asdict(self.lengths),
        }

    @classmethod
    def from_json(cls, content: Any) -> CaptionStats:
        """Raises TypeError for anything that to_json does not give."""
        if not isinstance(content, dict) or not isinstance(images := content.get("images"), dict):
            raise TypeError("caption_stats is not an object with images")
        lengths = content.get("lengths")
        if not isinstance(lengths, dict | None):
            raise TypeError("caption_stats has lengths that are not an object")
        found = None if lengths is None else Lengths(**lengths)
        numbers = [found.captions, found.least, found.median, found.most95, found.most] if found else []
        if not all(number.isascii() and number.isdigit() for number in images):
            raise TypeError("caption_stats has images that are not counted by their number of captions")
        if not all(isinstance(number, int) and 0 <= number < 2**63 for number in [*images.values(), *numbers]):
            raise TypeError("caption_stats has values that are not counts")
        return cls({int(number): count for number, count in images.items()}, found)


def measured(
    counts: Mapping[int, int], unit: str, tokenizer: str | None = None, limit: int | None = None
) -> Lengths | None:
    """The Lengths of captions, from length -> captions; None without any."""
    total = sum(counts.values())
    if not total:
        return None
    longer = None if limit is None else sum(count for length, count in counts.items() if length > limit)
    middle, high = _at(counts, 0.5), _at(counts, 0.95)
    return Lengths(unit, total, min(counts), middle, high, max(counts), tokenizer, limit, longer)


def _at(counts: Mapping[int, int], share: float) -> int:
    """The smallest length that at least this share of the captions do not exceed."""
    wanted = math.ceil(share * sum(counts.values()) - 1e-9)
    reached = 0
    for length in sorted(counts):
        reached += counts[length]
        if reached >= wanted:
            return length
    raise ValueError("no captions")
