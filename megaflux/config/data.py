"""Where the training images are, and what of each conditions a batch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from megaflux.config.fields import (
    COMMAS,
    MOST,
    NUMBER,
    CountOrZero,
    Fraction,
    HomePath,
    HomePathOrNone,
    Named,
    NonNegative,
    Section,
)

ChatMode = Literal["image", "image_text", "text"]
Kind = Literal[ChatMode, "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of condition, in the order in which they are drawn: a new one goes to the end, or old runs would draw others."""


MOST_REFERENCES = 16
"""References of a sample."""


class ConditionModes(Section):
    """Probability of each kind of condition; drawn once for all ranks per global micro-batch."""

    image: Fraction = 1.0
    """Reference image only."""
    image_text: Fraction = 0.0
    """Reference image with its caption before it in the chat turn, caption tokens appended."""
    text: Fraction = 0.0
    """Caption only."""
    none: Fraction = 0.0
    """Empty: mode text with the caption "", which is one token, the end of the turn. What --cfg subtracts in generation."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> ConditionModes:
        total = math.fsum(self.probabilities.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"{' + '.join(KINDS)} is {total:g}; make the four add up to 1")
        return self

    @property
    def probabilities(self) -> dict[Kind, float]:
        """The probability of each kind, in the order in which they are drawn."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def drawn(self) -> tuple[Kind, ...]:
        """The kinds of probability above 0."""
        return tuple(kind for kind, probability in self.probabilities.items() if probability > 0)

    @property
    def chat_modes(self) -> tuple[ChatMode, ...]:
        """The modes of the chat turns that these kinds need: an empty condition is a turn without image and caption."""
        return tuple(dict.fromkeys("text" if kind == "none" else kind for kind in self.drawn))


class References(Section):
    """How many of a sample's reference pictures condition it; one number drawn for all ranks per global micro-batch. Samples
    without references, and all where 0 is drawn, are their own reference."""

    min: Annotated[int, NUMBER, Field(ge=0, le=MOST_REFERENCES)] = 1
    """Fewest."""
    max: Annotated[int, NUMBER, Field(ge=0, le=MOST_REFERENCES)] = 1
    """Most; a sample with fewer has all of its own."""

    @model_validator(mode="after")
    def _in_order(self) -> References:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self

    @property
    def turns(self) -> int:
        """The most pictures that condition a sample."""
        return max(1, self.max)

    @property
    def mean_turns(self) -> float:
        """The mean number of pictures that condition a sample which has enough of them."""
        numbers = range(self.min, self.max + 1)
        return sum(max(1, number) for number in numbers) / len(numbers)


class Data(Named):
    path: HomePath
    """Folder of MDS shards as `python -m megaflux.data.prepare` writes them; with `remote`, the local
    cache."""
    remote: HomePathOrNone = None
    """Where the shards lie (s3://, gs://, ...; anything mosaicml-streaming reads). None: they are in
    `path`."""
    cache_limit: str | None = None
    """Most disk for shards fetched from `remote`, e.g. "500gb". None: no limit."""
    source: HomePathOrNone = None
    """What to prepare `path` from when it does not exist (an argument of megaflux.data.prepare). None: an
    error."""
    longest_side: Annotated[int, Field(ge=16, le=MOST)]
    """Longest side of a training image, px; must be what the shards were prepared with."""
    aspect_ratios: tuple[str, ...] = ("16:9", "2:1", "2.35:1", "1:1", "1:2")
    """Width : height of each bucket."""
    cache: tuple[Literal["latents", "trunk"], ...] = ()
    """Compute VAE latents and/or the frozen trunk's output for pictures alone once and train from those shards; e.g. latents,trunk.
    Conditions with words are computed in each update."""
    num_workers: CountOrZero = 0
    """Loader processes per rank; 0: the images are decoded in the training process."""
    condition: ConditionModes = ConditionModes()
    caption_weights: Annotated[tuple[NonNegative, ...] | None, COMMAS] = None
    """How often an image's first, second, ... caption is drawn, where images have several, relative to its others; fewer
    captions than weights: the first weights count. Captions without a weight are not drawn, and where all that an image has
    weigh 0, all alike. None: all captions alike."""
    references: References = References()
    reference_crop: Annotated[float, NUMBER, Field(gt=0, le=1)] = 1.0
    """Least share of its area that a random crop keeps of a reference, resized to what it was; against copying. 1: no crop. Not
    with a cached trunk."""
    reference_flip: Fraction = 0.0
    """How often a reference is mirrored; drawn for each. Not with a cached trunk."""
    sample_posterior: bool = False
    """Draw latents from the VAE's posterior instead of taking its mean; not with cached latents."""

    @field_validator("caption_weights")
    @classmethod
    def _one_above_zero(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and not sum(value) > 0:
            raise ValueError("holds no weight above 0; give one for each caption, or none for all alike")
        return value
