"""A job's way to its pictures: `read_inputs` opens its files, `run` makes the pictures with a loaded pipeline.

A job comes here after `job.check`. Files are known by the SHA-256 of their bytes, so that a replay uses the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from megaflux.common.errors import UserError
from megaflux.generation.job import Input, Job
from megaflux.generation.request import Reference, matched_size, output_size, pictures_at_once

if TYPE_CHECKING:  # torch and PIL take seconds to import, and a command line has to answer at once
    from PIL import Image

    from megaflux.generation.control.detectors import Detectors
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline, Qwen2VLFluxPipelineOutput


@dataclass(frozen=True)
class Opened:
    """The contents of a job's files, by SHA-256."""

    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Upright, RGB, on white."""
    data: dict[str, bytes] = field(default_factory=dict)
    """The files' bytes."""
    notes: list[str] = field(default_factory=list)
    """What was done to the pictures, human-readable."""
    masks: dict[str, Image.Image] = field(default_factory=dict)
    """Upright, in their own mode: `read_mask` treats transparency differently."""
    maps: dict[str, Image.Image] = field(default_factory=dict)
    """Control maps: as pictures, but their values are kept, because a colour profile says nothing of depth or edges."""

    def __getitem__(self, item: Input) -> Image.Image:
        return self.pictures[item.sha256]


@dataclass
class Result:
    """What a job made."""

    job: Job
    """As it ran: sizes, guidance and hashes filled in."""
    pictures: list[Image.Image]
    """One per seed."""
    output: Qwen2VLFluxPipelineOutput
    references: list[Image.Image]
    image: Image.Image | None = None
    mask: Image.Image | None = None
    control_maps: dict[str, Image.Image] = field(default_factory=dict)
    """By kind."""
    notes: list[str] = field(default_factory=list)
    """What was done to the inputs, human-readable."""


# --- read_inputs ---


def read_inputs(job: Job, embedded: Mapping[str, bytes] | None = None) -> tuple[Job, Opened]:
    """(the job with every file's hash, the files' contents).

    embedded: bytes of files by SHA-256, used instead of the files on disk. UserError naming a file that cannot be read,
    is not a picture, or does not have the hash that the job names.
    """
    opened = Opened()

    def read(item: Input, option: str, use: Literal["picture", "mask", "map"] = "picture") -> Input:
        data = _file_bytes(item, option, embedded or {})
        digest = hashlib.sha256(data).hexdigest()
        if item.sha256 and digest != item.sha256:
            raise UserError(
                f"{option} {item.file}: has changed since (SHA-256 {digest[:12]}, not {item.sha256[:12]}); "
                "restore it, or give another file by the option"
            )
        pictures = {"picture": opened.pictures, "mask": opened.masks, "map": opened.maps}[use]
        if digest not in pictures:
            pictures[digest], notes = _decoded(data, f"{option} {item.file}", use)
            opened.data[digest] = data
            opened.notes.extend(f"{option.removeprefix('--')}: {note}" for note in notes)
        return item.model_copy(update={"sha256": digest})

    changes: dict[str, Any] = {"references": tuple(read(item, "--reference") for item in job.references)}
    if job.image is not None:
        changes["image"] = read(job.image, "--image")
    if job.mask is not None:
        changes["mask"] = read(job.mask, "--mask", "mask")
    changes["controls"] = tuple(
        c if c.image is None else c.model_copy(update={"image": read(c.image, f"--control-image {c.kind}", "map")})
        for c in job.controls
    )
    return job.model_copy(update=changes), opened


def _file_bytes(item: Input, option: str, embedded: Mapping[str, bytes]) -> bytes:
    if item.sha256 in embedded:
        return embedded[item.sha256]
    try:
        return Path(item.file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{option} {item.file}: {getattr(error, 'strerror', None) or error}") from None


def _decoded(data: bytes, where: str, use: str) -> tuple[Image.Image, list[str]]:
    """(the picture as `Opened` keeps it, notes). UserError naming `where` if it is not a usable picture."""
    from megaflux.data.images import NOTES, REASONS, BadImage, decode_raw, to_rgb, upright, without_profile
    from megaflux.data.reference_size import MAX_ASPECT

    notes: list[str] = []
    try:
        picture = decode_raw(data, notes=notes, max_aspect=MAX_ASPECT)
        if use == "mask":
            return upright(picture), []
        if use == "map":
            picture = without_profile(picture)
        picture = to_rgb(picture, notes)
    except BadImage as error:
        detail = f" ({error.detail})" if error.detail else ""
        raise UserError(f"{where}: {REASONS[error.reason]}{detail}; give another picture") from None
    return picture, [NOTES[note] for note in notes]


# --- run ---


def resolve_size(job: Job, opened: Opened, longest_side: int, sizes: str) -> Job:
    """The job with width and height filled in. longest_side (px) and sizes: from the weights' Settings.

    UserError if there is no picture to match, and for an aspect that is not one of the sizes.
    """
    if job.width is not None:
        return job
    source = job.image or (job.references[0] if job.references else None)
    if job.match_input_size and source is None:
        raise UserError("--match-input-size: there is no picture to match; use --aspect")
    if source is not None and (job.match_input_size or (job.image is not None and job.aspect is None)):
        height, width = matched_size(opened[source], longest_side)
    else:
        height, width = output_size(job.aspect or "1:1", longest_side, job.sizes or sizes)
    return job.model_copy(update={"width": width, "height": height})


def run(
    pipeline: Qwen2VLFluxPipeline,
    job: Job,
    opened: Opened,
    detectors: Detectors | None = None,
    on_step: Callable[[], Any] | None = None,
) -> Result:
    """Make the pictures of a checked job.

    detectors: for control maps and masks by points. on_step: called after each step of each batch. UserError for what
    only the models can tell to be invalid.
    """
    from megaflux.generation.control.detectors import Detectors, Sources

    settings = pipeline.settings
    job = resolve_size(job, opened, settings.longest_side, settings.sizes)
    if job.guidance is None:
        job = job.model_copy(update={"guidance": settings.guidance})
    detectors = detectors or Detectors(Sources(), pipeline.device)
    detectors.notes.clear()  # of an earlier job
    image = opened[job.image] if job.image is not None else None
    notes = list(opened.notes)
    mask = _mask(job, opened, image, detectors, notes)
    maps = _control_maps(job, opened, image, detectors)

    def after_step(*_: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return {}

    output = cast(
        "Qwen2VLFluxPipelineOutput",
        pipeline(  # not a tuple, as return_dict is left True
            [Reference(opened[r], r.strength, r.dots) for r in job.references],
            job.prompt,
            *job.size,
            job.steps,
            job.guidance,
            list(job.seeds),
            image=image,
            mask_image=mask,
            strength=job.strength,
            control_image=list(maps.values()) or None,
            control_mode=list(maps) or None,
            controlnet_conditioning_scale=[c.scale for c in job.controls],
            control_guidance_start=job.control_start,
            control_guidance_end=job.control_end,
            weighting=job.weighting,
            reference_tokens=job.reference_tokens,
            text_encoder=job.text_encoder,
            shift=job.shift,
            batch_size=job.batch_size,
            callback_on_step_end=after_step,
            attention_map=job.attention_map,
            release_compatible=job.release_compatible,
            negative_prompt=job.negative,
            true_cfg_scale=job.cfg,
        ),
    )
    notes += [*detectors.notes, *output.notes]
    return Result(job, output.images, output, [opened[r] for r in job.references], image, mask, maps, notes)


def _mask(
    job: Job, opened: Opened, image: Image.Image | None, detectors: Detectors, notes: list[str]
) -> Image.Image | None:
    """The job's mask, of the image's size: mode L, 255 where it is repainted. Adds to `notes`."""
    from megaflux.generation.control.detectors import read_mask

    if image is None:
        return None
    if job.mask_points:
        return detectors.mask(image, job.mask_points)
    return read_mask(opened.masks[job.mask.sha256], image.size, notes) if job.mask is not None else None


def _control_maps(job: Job, opened: Opened, image: Image.Image | None, detectors: Detectors) -> dict[str, Image.Image]:
    """The job's control maps by kind. Detectors get the image at the output's size: resizing a map blurs its lines."""
    from megaflux.generation.inputs import canvas

    seen = canvas(image, *job.size)[0] if image is not None else None
    maps = {}
    for control in job.controls:
        if control.image is not None:
            maps[control.kind] = opened.maps[control.image.sha256]
        elif seen is not None:
            maps[control.kind] = detectors.map(control.kind, seen)
    return maps


def steps_taken(job: Job) -> int:
    """How often `run` calls on_step."""
    at_once = pictures_at_once(job.batch_size, bool(job.controls), job.image is not None)
    batches = -(-len(job.seeds) // at_once)
    if job.image is None:
        return batches * job.steps
    return batches * (job.steps - int(max(job.steps - job.steps * job.strength, 0)))  # as diffusers counts
