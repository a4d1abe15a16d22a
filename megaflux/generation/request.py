"""A request for pictures: its parts in one form, and the checks that all callers share.

`job.check` uses them for the command line, the panel and replays; `Qwen2VLFluxPipeline.__call__` for Python. Every
failed check is a UserError that names the argument.

PIL and torch are imported inside the functions that need them: a command line rejects bad input without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

from megaflux.common.errors import UserError
from megaflux.data import reference_size as sizes
from megaflux.data.buckets import MULTIPLE, make_buckets
from megaflux.generation.dots.dots import NEUTRAL, Dot, Weighting
from megaflux.generation.limits import LIMITS, MAX_SEED, Limits, Names, check_numbers, plain_name

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    import torch
    from PIL import Image

DETECTED = ("depth", "line", "canny")
"""Kinds of control map that a detector makes from a picture; maps of other kinds are given as pictures."""

EMPTY_UNSEEN = (
    "true CFG: these weights never saw an empty condition (data.condition.none), so it may do little or harm; a negative prompt "
    "may do better"
)
"""The note where true guidance leads away from the empty condition and training never drew it."""

# width, height in px of the released tool, for a longest trained side of 1024 px
RELEASE_SIZES = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "2.4:1": (1536, 640),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
}


# --- Parts of a request ---


@dataclass(frozen=True)
class Reference:
    """A reference picture and how its tokens are weighted."""

    image: Image.Image
    """Of any size and mode."""
    strength: float = 1.0
    """Factor on the weights of all its tokens, above 0. 1: as trained."""
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class ConditionRequest:
    """What FLUX is to be conditioned on."""

    references: Sequence[Reference] = ()
    prompt: str = ""
    """Empty: no prompt."""
    weighting: Weighting = NEUTRAL
    text_encoder: str = "qwen"
    """Which model reads the prompt: qwen or t5."""
    reference_tokens: int | None = None
    """Most image tokens of each reference. None: as trained."""
    as_released: bool = False
    """Prepare pictures, and a ControlNet's tokens, as the released tool does (release.py)."""
    control_reads: Image.Image | None = None
    """With as_released: the picture whose tokens a ControlNet is given instead of the references'; None: it is given
    the references'."""


@dataclass(frozen=True)
class ControlMaps:
    """Control maps with the kind and scale of each, and the span of steps in which they act."""

    images: list[Image.Image]
    kinds: list[str | int | None]
    """Per map: a name of UNION_MODES, a number of a union's own, or None where the net takes any map."""
    scales: list[float]
    """Per map: the factor on what the net adds, at least 0."""
    start: float = 0.0
    end: float = 1.0
    """The maps act from `start` to `end`, as fractions of all steps."""


@dataclass(frozen=True)
class Draws:
    """The sources of randomness of the pictures: one generator and one seed each."""

    generators: Sequence[torch.Generator]
    """They draw the starting noise."""
    seeds: Sequence[int]
    """They choose the tokens that `variety` leaves out."""

    def batches(self, size: int) -> Iterator[Draws]:
        """The same in batches of at most `size` pictures."""
        for first in range(0, len(self.seeds), size):
            part = slice(first, first + size)
            yield Draws(self.generators[part], self.seeds[part])


# --- From a caller's arguments ---


def as_references(given: Any) -> list[Reference]:
    """References from None, a picture, a Reference, or a list or tuple of these. UserError for anything else."""
    if given is None:
        return []
    items = list(given) if isinstance(given, list | tuple) else [given]
    references = [item if isinstance(item, Reference) else Reference(item) for item in items]
    check_pictures(reference=[item.image for item in references])
    return references


def as_control_maps(images: Any, kinds: Any, scales: Any, start: float, end: float) -> ControlMaps | None:
    """Control maps from one value, or a list of values, for each of images, kinds and scales. None: no images given.

    A single kind or scale holds for all maps. UserError for invalid numbers and lists of unequal length.
    """
    if images is None:
        return None
    images = list(images) if isinstance(images, list | tuple) else [images]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [kinds] * len(images)
    scales = list(scales) if isinstance(scales, list | tuple) else [scales] * len(images)
    if not images or not len(images) == len(kinds) == len(scales):
        raise UserError(f"control: {len(images)} maps, {len(kinds)} modes, {len(scales)} scales; give one of each")
    check_numbers({"control_start": start, "control_end": end})
    for scale in scales:
        check_numbers({"control_scale": scale})
    return ControlMaps(images, kinds, scales, start, end)


def as_draws(seed: Any, generator: Any, count: int) -> Draws:
    """One CPU generator and one seed per picture.

    seed: a whole number, the first of `count` consecutive seeds (None: 0), or a list with the seed of each picture.
    generator: used instead of seed; one for all `count` pictures (it then draws their seeds), or a list with one for
    each. UserError for an invalid seed, and for a list of generators that is not as long as `count`.
    """
    import torch

    if generator is None:
        seeds = _as_seeds(seed, count)
        return Draws([torch.Generator().manual_seed(s) for s in seeds], seeds)
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not generators or (len(generators) > 1 and count not in (1, len(generators))):
        raise UserError(f"generator: {len(generators)} for {count} pictures; give one, or one for each")
    if len(generators) == 1 and count > 1:
        seeds = torch.randint(2**62, (count,), generator=generators[0], device=generators[0].device).tolist()
        return Draws([torch.Generator().manual_seed(s) for s in seeds], seeds)
    return Draws(generators, [g.initial_seed() for g in generators])


def _as_seeds(seed: Any, count: int) -> list[int]:
    LIMITS["count"].check("num_images_per_prompt", count)
    first = 0 if seed is None else seed
    try:  # index() accepts numpy's integers, too
        if isinstance(first, list | tuple | range):
            seeds = [index(s) for s in first]
        else:
            seeds = [index(first) + i for i in range(count)]
    except TypeError:
        raise UserError(f"seed: {seed!r}; use whole numbers from 0 to {MAX_SEED}") from None
    if not seeds:
        raise UserError("seed: an empty list; give at least one")
    for s in seeds:
        check_numbers({"seed": s})
    return seeds


# --- Sizes ---


def output_size(aspect: str, longest_side: int, sizes: str = "training") -> tuple[int, int]:
    """(height, width) in px of an aspect ratio WIDTH:HEIGHT.

    sizes "training": the longest side is the trained one and the other is rounded as a training bucket's is.
    "release": the released tool's table, of roughly equal areas, scaled to the longest trained side. UserError for an
    invalid ratio, and for one that is not in the table.
    """
    bucket = make_buckets([aspect], longest_side)[0]
    if sizes == "training":
        return bucket.height, bucket.width
    if aspect not in RELEASE_SIZES:
        raise UserError(
            f"aspect {aspect}: the released sizes are {', '.join(RELEASE_SIZES)}; use one or --sizes training"
        )
    width, height = (_to_multiple(side * longest_side / 1024) for side in RELEASE_SIZES[aspect])
    return height, width


def matched_size(picture: Image.Image, longest_side: int) -> tuple[int, int]:
    """(height, width) in px: the multiples of 16 nearest to a picture's size, scaled down to the longest side."""
    scale = min(1.0, longest_side / max(picture.size))
    width, height = (_to_multiple(side * scale) for side in picture.size)
    return height, width


def reference_size(size: tuple[int, int], longest_side: int, as_released: bool = False) -> tuple[int, int]:
    """(width, height) in px at which a reference goes to Qwen2-VL's processor, as references of training. as_released: as it
    is."""
    return size if as_released else sizes.reference_size(size, longest_side)


def _to_multiple(length: float) -> int:
    """The nearest positive multiple of 16."""
    return max(MULTIPLE, MULTIPLE * int(length / MULTIPLE + 0.5))


def pictures_at_once(batch_size: int, has_control: bool, has_image: bool) -> int:
    """How many pictures are sampled at once. 1 for a ControlNet run that starts from a picture: diffusers' pipelines
    for it take no batches."""
    return 1 if has_control and has_image else batch_size


# --- Checks ---


def check_prompt(prompt: str | None, name: str = "prompt") -> str:
    """The prompt as text, "" for None. UserError, with the name to show, for anything but text, for NUL, and for invalid
    Unicode."""
    if not isinstance(prompt, str | None):
        raise UserError(f"{name}: a {type(prompt).__name__}; use one text, and num_images_per_prompt for more pictures")
    if bad := re.search("[\0\ud800-\udfff]", prompt or ""):
        what = "NUL" if bad[0] == "\0" else "half a surrogate pair, so not valid UTF-8"
        raise UserError(f"{name}: character {bad.start() + 1} is {what}; take it out")
    return prompt or ""


def check_pictures(**given: Any) -> None:
    """UserError, naming the argument, unless each value is a PIL picture, None, or a list or tuple of these."""
    from PIL import Image

    for name, value in given.items():
        for picture in value if isinstance(value, list | tuple) else [value]:
            if picture is not None and not isinstance(picture, Image.Image):
                raise UserError(f"{name}: a {type(picture).__name__}; use a PIL picture, as PIL.Image.open gives it")


def check_seeds(first: int, count: int, name_of: Names = plain_name) -> None:
    """UserError for an invalid number of pictures, or for one of their consecutive seeds."""
    check_numbers({"count": count}, name_of)
    Limits(0, MAX_SEED + 1 - count).check(name_of("seed"), first)


def check_aspect(aspect: str, name_of: Names = plain_name) -> None:
    """UserError for anything but WIDTH:HEIGHT."""
    try:
        make_buckets([aspect], 1024)
    except UserError as error:
        raise UserError(f"{name_of('aspect')}: {error}") from None


def check_weighting(weighting: Weighting, name_of: Names = plain_name) -> None:
    """UserError for an invalid number."""
    check_numbers(vars(weighting), name_of)


def check_background(background: float, has_dots: bool, name_of: Names = plain_name) -> None:
    """UserError for a background weight without any dot: it is the weight outside of the dots."""
    if background != 1 and not has_dots:
        raise UserError(
            f"{name_of('background')}: {background:g} without a dot; give a reference a dot, or a strength for the "
            "whole picture"
        )


def check_negative(negative: str | None, cfg: float, name_of: Names = plain_name) -> str:
    """The negative prompt as text, "" for None. UserError as for `check_prompt`, and for one beside a true guidance that is
    off."""
    negative = check_prompt(negative, name_of("negative"))
    if negative.strip() and cfg == 1:
        raise UserError(
            f"{name_of('negative')}: without effect at {name_of('cfg')} 1; give {name_of('cfg')} another value, such as 3, or "
            f"leave {name_of('negative')} out"
        )
    return negative


def check_condition(request: ConditionRequest) -> None:
    """UserError for an invalid text encoder, weighting, number of tokens or strength, and a background without dots."""
    if request.text_encoder not in ("qwen", "t5"):
        raise UserError(f"text encoder: {request.text_encoder}; use qwen or t5")
    references = request.references
    check_weighting(request.weighting)
    check_numbers({"reference_tokens": request.reference_tokens})
    if references:
        check_background(request.weighting.background, any(reference.dots for reference in references))
    for number, reference in enumerate(references, start=1):
        name = reference_name(number, len(references))
        LIMITS["reference_strength"].check(f"{name}: strength", reference.strength)


def reference_name(number: int, count: int) -> str:
    """What messages call the reference of that number, counted from 1."""
    return "reference" if count == 1 else f"reference {number}"


def check_output_type(output_type: str) -> None:
    """UserError for an unknown form of the pictures."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise UserError(f"output type: {output_type}; use pil, np, pt or latent")
