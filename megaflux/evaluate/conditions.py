"""What a sample is conditioned by: its own references and words, and what stands in their place to see whether they matter.

    matched             the sample's first references and its words, as far as the kind of condition has them
    shuffled            both of another sample
    shuffled_references another sample's references beside the own words
    shuffled_words      another sample's words beside the own references
    reference_1, ...    the own ones, but for this one, which is another sample's
    empty               neither: the empty condition of training
    words               the words alone

The other sample is the next one of the same bucket in the order of the samples' hashes, the first one after the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megaflux.common.errors import UserError
from megaflux.data.references import ReferencePicture
from megaflux.evaluate.samples import HeldOut, Sample, cell_of
from megaflux.models.vlm import Condition, Trunk

Kind = Literal["image", "image_text", "text"]
KINDS: tuple[Kind, ...] = ("image", "image_text", "text")


@dataclass(frozen=True)
class Given:
    """References and words; neither: the empty condition."""

    references: tuple[ReferencePicture, ...] = ()
    words: str = ""

    @property
    def empty(self) -> bool:
        return not self.references and not self.words


EMPTY = Given()


@dataclass(frozen=True)
class Conditions:
    """How samples are conditioned."""

    kind: Kind
    references: int = 1
    """The most references that a sample is given, from its first on."""

    def matched(self, sample: Sample) -> Given:
        """A sample's own condition."""
        references = sample.references[: self.references] if self.kind != "text" else ()
        return Given(references, sample.caption if self.kind != "image" else "")

    def instead(self, sample: Sample, other: Sample) -> dict[str, Given]:
        """The conditions other than the matched one by which its loss is taken, by name."""
        own, others = self.matched(sample), self.matched(other)
        found = {"shuffled": others}
        if self.kind == "image_text":
            found["shuffled_references"] = replace(own, references=others.references)
            found["shuffled_words"] = replace(own, words=others.words)
        if len(own.references) > 1 and not sample.own:
            for place in range(len(own.references)):
                swapped = list(own.references)
                swapped[place] = others.references[min(place, len(others.references) - 1)]
                found[f"reference_{place + 1}"] = replace(own, references=tuple(swapped))
        return found


def choose(given: str | None, modes: Sequence[str], held_out: HeldOut) -> Kind:
    """The kind of condition to evaluate by. given: as the user says it, None: image_text where samples have references that are not
    themselves, and words, and the weights were trained so; else what they were trained by, pictures first.

    modes: the kinds of condition of training. UserError for words where the data have none."""
    captioned = any(sample.caption for sample in held_out.samples)
    if given is not None:
        if given != "image" and not captioned:
            raise UserError(f"--condition {given}: no held-out sample has a caption; give image")
        return next(kind for kind in KINDS if kind == given)
    paired = any(not sample.own for sample in held_out.samples)
    if captioned and "image_text" in modes and (paired or "image" not in modes):
        return "image_text"
    return "image" if "image" in modes or not captioned else "text"


def others(samples: Sequence[Sample]) -> list[int]:
    """For each sample the place of the one whose condition it is given in its stead; its own place where there is no other."""
    by_bucket: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_bucket.setdefault(sample.bucket.name, []).append(i)
    found = [(i + 1) % len(samples) for i in range(len(samples))]
    for places in by_bucket.values():
        if len(places) > 1:
            for this, following in zip(places, [*places[1:], places[0]], strict=True):
                found[this] = following
    return found


def other_styles(samples: Sequence[Sample]) -> list[int | None]:
    """For each cell of a grid the place of the next cell, in the order of the samples, that has another style; None: there is none."""
    styles = [cell_of(sample.key).style for sample in samples]
    n = len(samples)
    found: list[int | None] = []
    for i, style in enumerate(styles):
        after = ((i + step) % n for step in range(1, n))
        found.append(next((j for j in after if styles[j] != style), None))
    return found


def encode(trunk: Trunk, given: Sequence[Given], kind: str) -> Condition:
    """Conditions of one kind as the trunk's output, as training encodes them. kind: image, image_text, text or empty."""
    device = trunk.device
    words = [one.words for one in given]
    if kind == "empty":
        return trunk.empty(len(given))
    if kind == "text":
        return trunk.encode(None, words, "text")
    pictures = [[one.pixel_values.to(device) for one in each.references] for each in given]
    strengths = [[one.strength for one in each.references] for each in given]
    mode: Literal["image", "image_text"] = "image" if kind == "image" else "image_text"
    return trunk.encode_references(pictures, words, mode, strengths)
