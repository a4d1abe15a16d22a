"""A generation as plain data: what the command line and the panel ask for, what a PNG remembers, what a replay runs.

Job: what is to be made. Runtime: with which weights, on what. Both are JSON and both are stored with every picture.
`read_inputs` opens the files that a job names, `run` makes its pictures with a loaded pipeline.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from megaflux.common.errors import UserError
from megaflux.config.schema import Section
from megaflux.generation.dots.dots import Dot, Weighting
from megaflux.generation.prompt import check_prompt

if TYPE_CHECKING:  # torch takes seconds to import, and a command line wants to answer at once
    from PIL import Image

    from megaflux.generation.control.detectors import Detectors
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline, Qwen2VLFluxPipelineOutput

Mode = Literal["text", "variation", "img2img", "inpaint", "controlnet", "controlnet-inpaint"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_SIDE = 8192  # px of a picture: four times what FLUX was trained up to, and no slip of the finger
MAX_COUNT = 100_000  # pictures of a job
DETECTED = ("depth", "line", "canny")  # maps that control.Detectors makes; other kinds come ready-made


class Input(Section):
    """A picture file."""

    file: str
    sha256: str = ""
    """Of its bytes; empty: not read yet."""


class JobReference(Input):
    """A reference: its file, how much it counts, its dots."""

    strength: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    dots: tuple[Dot, ...] = ()


class JobControl(Section):
    """One control map."""

    kind: str
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    image: Input | None = None
    """A ready map; None: made from the job's image."""


class Job(Section):
    """What is to be made."""

    mode: Mode = "variation"
    references: tuple[JobReference, ...] = ()
    prompt: str = ""
    text_encoder: Literal["qwen", "t5"] | None = None
    """Who reads the prompt; None: the weights' default."""
    reference_tokens: int | None = Field(default=None, ge=4)
    """Most image tokens of a reference; None: as trained."""
    image: Input | None = None
    """Where img2img, inpaint and control begin."""
    mask: Input | None = None
    """White is painted anew."""
    mask_points: tuple[tuple[float, float, int], ...] = ()
    """(x, y, 1 in / 0 out), for a segmenter in the place of a mask."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """Share of the steps taken from the image; 1 begins at noise."""
    controls: tuple[JobControl, ...] = ()
    control_start: float = Field(default=0.0, ge=0, le=1)
    control_end: float = Field(default=1.0, ge=0, le=1)
    background: float = 1.0
    preserve_mass: bool = False
    variety: float = 0.0
    downsample: int = 1
    aspect: str | None = None
    """WIDTH:HEIGHT; None: the image's own size, else square."""
    sizes: Literal["training", "release"] | None = None
    """What an aspect means; None: the weights' default."""
    match_input_size: bool = False
    """The image's size, or the first reference's."""
    width: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)
    """px; goes before the aspect."""
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)
    steps: int = Field(default=28, ge=1, le=100_000)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """None: that of training."""
    shift: float | None = None
    """Fixed timestep shift; None: the scheduler's own."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(default=(0,), min_length=1, max_length=MAX_COUNT)
    batch_size: int = Field(default=1, ge=1)
    """Pictures made at a time."""
    attention_map: bool = False

    @property
    def weighting(self) -> Weighting:
        return Weighting(self.background, self.preserve_mass, self.variety, self.downsample)

    def inputs(self) -> list[Input]:
        """Every file that it reads."""
        maps = [control.image for control in self.controls]
        return [item for item in (*self.references, self.image, self.mask, *maps) if item is not None]


class Runtime(Section):
    """With which weights, on what."""

    checkpoint: str
    update: int | None = None
    controlnet: dict[str, str] = Field(default_factory=dict)
    """Folder or hub name by kind of map; the kind "": any map."""
    depth_model: str | None = None
    line_model: str | None = None
    sam_model: str | None = None
    kernels: Literal["on", "off"] = "on"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str | None = None
    offload: Literal["model", "sequential"] | None = None
    quantize: Literal["fp8"] | None = None
    compile: bool = False


@dataclass(frozen=True)
class Opened:
    """The pictures of a job's files, by SHA-256, and what was done to them."""

    pictures: dict[str, Image.Image]
    data: dict[str, bytes]
    """The files themselves."""
    notes: list[str]
    masks: dict[str, Image.Image] = field(default_factory=dict)
    """The mask's picture in its own mode, by SHA-256: `read_mask` judges transparency otherwise than a photo's reader."""

    def __getitem__(self, item: Input) -> Image.Image:
        return self.pictures[item.sha256]


@dataclass
class Result:
    """What a job made."""

    job: Job
    """As it ran: sizes, guidance and hashes filled in."""
    pictures: list[Image.Image]
    output: Qwen2VLFluxPipelineOutput
    references: list[Image.Image]
    image: Image.Image | None = None
    mask: Image.Image | None = None
    control_maps: dict[str, Image.Image] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check(job: Job) -> Job:
    """A job whose parts fit each other, with the image and the reference that the mode implies. UserError: they don't.

    No file is opened. img2img, inpaint and control begin at the image; without one, at the first reference. Where
    nothing else is given, the image is the reference, too.
    """
    check_prompt(job.prompt)  # a replay's comes from a file
    mode, needs_image = job.mode, job.mode in ("img2img", "inpaint", "controlnet-inpaint")
    if mode == "text" and job.references:
        raise UserError("mode text takes no reference; leave --reference out, or --mode")
    if mode == "text" and not job.prompt.strip():
        raise UserError("mode text needs a prompt; give --prompt TEXT")
    if mode == "text" and (job.variety or job.downsample > 1 or job.preserve_mass):
        raise UserError(
            "variety, downsample and preserve mass work on a reference's tokens, and mode text has none; leave them out"
        )
    if mode == "variation" and not job.references:
        raise UserError("mode variation needs a picture; give --reference IMG, or --prompt TEXT alone for mode text")
    ready = {control.kind: control.image for control in job.controls if control.image is not None}
    control_from_image = "controlnet" in mode and any(control.image is None for control in job.controls)
    if (needs_image or control_from_image) and job.image is None:
        if not job.references:
            raise UserError(f"mode {mode} needs a picture to begin with; give --image IMG or --reference IMG")
        first = job.references[0]
        job = job.model_copy(update={"image": Input(file=first.file, sha256=first.sha256)})
    if not needs_image and "controlnet" not in mode and job.image is not None:
        raise UserError(f"mode {mode} begins at noise; leave --image out, or use --mode img2img")
    masked = job.mask is not None or bool(job.mask_points)
    if "inpaint" in mode and not masked:
        raise UserError(f"mode {mode} needs a mask; give --mask FILE or --mask-point X,Y")
    if "inpaint" not in mode and masked:
        raise UserError(f"mode {mode} paints everywhere; leave the mask out, or use --mode inpaint")
    if job.mask is not None and job.mask_points:
        raise UserError("--mask and --mask-point: give one of them")
    if "controlnet" in mode and not job.controls:
        raise UserError(f"mode {mode} needs a control; give --control KIND or --control-image KIND=FILE")
    if "controlnet" not in mode and job.controls:
        raise UserError(f"mode {mode} takes no control; leave it out, or use --mode controlnet")
    for control in job.controls:
        if control.kind not in DETECTED and control.kind not in ready:
            raise UserError(
                f"control {control.kind}: no detector makes such a map; give --control-image {control.kind}=FILE"
            )
    kinds = [control.kind for control in job.controls]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UserError(f"control {twice}: given twice; once is enough")
    if not job.references and not job.prompt.strip():
        source = job.image
        if source is None:
            raise UserError(f"mode {mode} needs a reference or a prompt; give --reference IMG or --prompt TEXT")
        job = job.model_copy(update={"references": (JobReference(file=source.file, sha256=source.sha256),)})
    if (job.width is None) != (job.height is None):
        raise UserError("--width and --height: give both or neither")
    return job


def check_background(job: Job) -> None:
    """UserError for a background that nothing stands before: it is the weight where no dot is, on a picture with dots."""
    if job.background != 1 and not any(reference.dots for reference in job.references):
        raise UserError(
            f"--background {job.background:g}: there is no dot; give --dot X,Y,R,W, or the whole picture a "
            "strength: --reference IMG:STRENGTH"
        )


def read_inputs(job: Job, embedded: Mapping[str, bytes] | None = None) -> tuple[Job, Opened]:
    """(the job with every file's hash, its pictures). embedded: files by hash, taken before those on disk.

    UserError naming a file that is missing, no picture, or not the one whose hash the job holds.
    """
    from megaflux.data.images import REASONS, BadImage, decode, decode_raw, upright

    opened = Opened({}, {}, [])
    said = {
        "first_frame": "several frames, the first is used",
        "rotated": "turned upright as its EXIF says",
        "transparent": "transparent, put on white",
        "rescaled": "more than 8 bits a channel, rescaled",
    }

    def read(item: Input, name: str) -> Input:
        data = (embedded or {}).get(item.sha256)
        if data is None:
            try:
                data = Path(item.file).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a NUL in the name
                raise UserError(f"{name} {item.file}: {getattr(error, 'strerror', None) or error}") from None
        digest = hashlib.sha256(data).hexdigest()
        if item.sha256 and digest != item.sha256:
            raise UserError(
                f"{name} {item.file}: has changed since (SHA-256 {digest[:12]}, not {item.sha256[:12]}); "
                "restore it, or give another file by the option"
            )
        seen = opened.masks if name == "--mask" else opened.pictures
        if digest not in seen:
            try:
                picture, notes = (upright(decode_raw(data)), []) if name == "--mask" else decode(data)
            except BadImage as error:
                detail = f" ({error.detail})" if error.detail else ""
                raise UserError(f"{name} {item.file}: {REASONS[error.reason]}{detail}; give another picture") from None
            opened.notes.extend(f"{name.removeprefix('--')}: {said[note]}" for note in notes if note in said)
            seen[digest], opened.data[digest] = picture, data
        return item.model_copy(update={"sha256": digest})

    changes: dict[str, Any] = {"references": tuple(read(item, "--reference") for item in job.references)}
    for name in ("image", "mask"):
        item = getattr(job, name)
        if item is not None:
            changes[name] = read(item, f"--{name}")
    changes["controls"] = tuple(
        c if c.image is None else c.model_copy(update={"image": read(c.image, f"--control-image {c.kind}")})
        for c in job.controls
    )
    return job.model_copy(update=changes), opened


def resolve_size(job: Job, opened: Opened, longest_side: int, sizes: str) -> Job:
    """The job with width and height in px."""
    from megaflux.generation.inputs import matched_size, output_size

    if job.width is not None:
        return job
    source = job.image or (job.references[0] if job.references else None)
    if job.match_input_size and source is None:
        raise UserError("--match-input-size: there is no picture to match; use --aspect")
    if job.match_input_size or (job.image is not None and job.aspect is None):
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
    """Make a checked job's pictures. on_step: called after each step of each batch. UserError for what cannot be."""
    from megaflux.generation.condition import Reference
    from megaflux.generation.control.detectors import Detectors, Sources, read_mask
    from megaflux.generation.inputs import canvas

    settings = pipeline.settings
    job = resolve_size(job, opened, settings.longest_side, settings.sizes)
    if job.guidance is None:
        job = job.model_copy(update={"guidance": settings.guidance})
    detectors = detectors or Detectors(Sources(), pipeline.device)
    detectors.notes.clear()  # it may have served another job
    image = opened[job.image] if job.image is not None else None
    mask = read_mask(opened.masks[job.mask.sha256], image.size) if job.mask is not None else None
    if job.mask_points:
        mask = detectors.mask(image, job.mask_points)
    # maps of the picture as it will be painted: a map resized afterwards has lost its lines' sharpness
    seen = None if image is None else canvas(image, job.height, job.width)[0]
    maps = {c.kind: opened[c.image] if c.image is not None else detectors.map(c.kind, seen) for c in job.controls}

    def after_step(*_: Any) -> dict[str, Any]:
        if on_step is not None:
            on_step()
        return {}

    output = pipeline(
        [Reference(opened[r], r.strength, r.dots) for r in job.references],
        job.prompt,
        job.height,
        job.width,
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
    )
    notes = [*opened.notes, *detectors.notes, *output.notes]
    return Result(job, output.images, output, [opened[r] for r in job.references], image, mask, maps, notes)


def steps_taken(job: Job) -> int:
    """Calls of on_step that `run` makes."""
    together = 1 if job.controls and job.image is not None else job.batch_size  # as Qwen2VLFluxPipeline does
    batches = -(-len(job.seeds) // together)
    if job.image is None:
        return batches * job.steps
    return batches * (job.steps - int(max(job.steps - job.steps * job.strength, 0)))  # as diffusers counts
