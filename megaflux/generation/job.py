"""A job: a request for pictures as plain data, from the command line, the panel or a replayed PNG.

`Job` says what to make and `Runtime` with which weights, on which device; both are stored as JSON in every PNG. `check`
completes a job and rejects one whose parts do not fit each other. run.py then opens its files and makes its pictures.

Imports nothing heavy: a command line answers bad input at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from megaflux.common.errors import UserError
from megaflux.config.schema import Section
from megaflux.generation.dots.dots import Dot, Weighting
from megaflux.generation.limits import LIMITS, MAX_COUNT, Names, check_numbers, plain_name
from megaflux.generation.request import DETECTED, check_aspect, check_background, check_negative, check_prompt

Mode = Literal["text", "variation", "img2img", "inpaint", "controlnet", "controlnet-inpaint"]
MODES: tuple[Mode, ...] = get_args(Mode)


# --- Job and Runtime ---


def _within(name: str) -> AfterValidator:
    """Rejects, where a job is read from a file, what LIMITS excludes."""

    def check_one(value: float) -> float:
        if not LIMITS[name].allow(value):
            raise ValueError(f"{value}; use {LIMITS[name]}")
        return value

    return AfterValidator(check_one)


class Input(Section):
    """A picture file."""

    file: str
    sha256: str = ""
    """SHA-256 of the file's bytes; empty: not read yet."""


class JobReference(Input):
    """A reference picture and how its tokens are weighted."""

    strength: Annotated[float, _within("reference_strength")] = 1.0
    """Factor on the weights of all its tokens; 1: as trained."""
    dots: tuple[Dot, ...] = ()


class JobControl(Section):
    """One control map."""

    kind: str
    """A name of control.detectors.UNION_MODES."""
    scale: Annotated[float, _within("control_scale")] = 1.0
    """Factor on what the ControlNet adds."""
    image: Input | None = None
    """A ready map; None: a detector makes it from the job's image."""


class Job(Section):
    """Which pictures to make."""

    mode: Mode = "variation"
    references: tuple[JobReference, ...] = ()
    prompt: str = ""
    negative: str = ""
    """With cfg: what the pictures are led away from, read as the prompt is; empty: the empty condition."""
    text_encoder: Literal["qwen", "t5"] | None = None
    """Which model reads the prompts; None: the weights' default."""
    reference_tokens: Annotated[int, _within("reference_tokens")] | None = None
    """Most image tokens of a reference; None: as trained."""
    image: Input | None = None
    """The picture that img2img, inpaint and control start from."""
    mask: Input | None = None
    """White is repainted."""
    mask_points: tuple[tuple[float, float, int], ...] = ()
    """(x, y, 1 in / 0 out) in [0, 1], from which SAM 2 makes the mask; instead of `mask`."""
    strength: Annotated[float, _within("strength")] = 0.8
    """Fraction of the steps taken from the image; 1 starts from noise."""
    controls: tuple[JobControl, ...] = ()
    control_start: Annotated[float, _within("control_start")] = 0.0
    """Control acts from here to control_end, as fractions of all steps."""
    control_end: Annotated[float, _within("control_end")] = 1.0
    background: float = 1.0
    """This and the next three: see Weighting."""
    preserve_mass: bool = False
    variety: float = 0.0
    downsample: int = 1
    aspect: str | None = None
    """WIDTH:HEIGHT; None: the image's size, or else square."""
    sizes: Literal["training", "release"] | None = None
    """Which sizes an aspect means (request.output_size); None: the weights' default."""
    match_input_size: bool = False
    """Take the image's size, or else the first reference's."""
    width: Annotated[int, _within("width")] | None = None
    """px; width and height override the aspect."""
    height: Annotated[int, _within("height")] | None = None
    """px"""
    steps: Annotated[int, _within("steps")] = 28
    guidance: Annotated[float, _within("guidance")] | None = None
    """None: the weights' default."""
    cfg: Annotated[float, _within("cfg")] = 1.0
    """Scale of true classifier-free guidance (true_cfg.py), which runs FLUX twice a step; 1: off."""
    shift: float | None = None
    """Fixed timestep shift; None: the scheduler's own."""
    seeds: tuple[Annotated[int, _within("seed")], ...] = Field(default=(0,), min_length=1, max_length=MAX_COUNT)
    """One picture per seed."""
    batch_size: Annotated[int, _within("batch_size")] = 1
    """Pictures made at once."""
    attention_map: bool = False
    """Also show where each picture attended in each reference."""
    release_compatible: bool = False
    """Prepare pictures, and a ControlNet's tokens, as the released tool of Qwen2VL-Flux does (release.py)."""

    @property
    def weighting(self) -> Weighting:
        return Weighting(self.background, self.preserve_mass, self.variety, self.downsample)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in px. ValueError if the job has none yet (`run.resolve_size`)."""
        if self.height is None or self.width is None:
            raise ValueError("the job has no size yet")
        return self.height, self.width

    def inputs(self) -> list[Input]:
        """Every file that the job reads."""
        maps = [control.image for control in self.controls]
        return [item for item in (*self.references, self.image, self.mask, *maps) if item is not None]


class Runtime(Section):
    """Which weights to load, and how they run."""

    checkpoint: str
    """Folder of a run or an export."""
    update: int | None = None
    """Number of a run's checkpoint; None: the newest."""
    ema: bool = False
    """The averages of a run's weights instead of the weights."""
    flux: str | None = None
    """Where a run's FLUX.1 folder is now; None: where it was when the run was trained. The next two likewise."""
    vlm: str | None = None
    vae: str | None = None
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


# --- check ---


def check(job: Job, name_of: Names = plain_name, dots: Mapping[int, Sequence[Dot]] | None = None) -> Job:
    """The job with the image and the reference that its mode implies. UserError if its parts do not fit each other.

    img2img, inpaint and control start from the image, or else from the first reference. Without reference and prompt,
    the image is the reference, too; with release_compatible, also beside a prompt. dots: by index of these
    references, instead of those that they had. No file is opened.
    """
    check_prompt(job.prompt)  # a replay's prompt comes from a file
    check_numbers(vars(job), name_of)
    check_negative(job.negative, job.cfg, name_of)
    if job.aspect is not None:
        check_aspect(job.aspect, name_of)
    if (job.width is None) != (job.height is None):
        raise UserError(f"{name_of('width')} and {name_of('height')}: give both or neither")
    _check_mode(job, name_of)
    job = _with_image(job, name_of)
    _check_mask(job, name_of)
    _check_controls(job, name_of)
    job = _with_reference(job, name_of)
    job = _with_dots(job, dots or {})
    check_background(job.background, any(reference.dots for reference in job.references), name_of)
    return job


def _check_mode(job: Job, name_of: Names) -> None:
    """UserError for inputs that modes text and variation lack or do not take."""
    if job.mode == "text" and job.references:
        raise UserError(f"mode text takes no reference; leave {name_of('reference')} out, or {name_of('mode')}")
    if job.mode == "text" and not job.prompt.strip():
        raise UserError(f"mode text needs a prompt; give {name_of('prompt')} TEXT")
    if job.mode == "text" and (job.variety or job.downsample > 1 or job.preserve_mass):
        raise UserError(
            "variety, downsample and preserve mass work on a reference's tokens, and mode text has none; leave them out"
        )
    if job.mode == "variation" and not job.references:
        raise UserError(
            f"mode variation needs a picture; give {name_of('reference')} IMG, or "
            f"{name_of('prompt')} TEXT alone for mode text"
        )


def _with_image(job: Job, name_of: Names) -> Job:
    """The job with its first reference as its image, where the mode needs one that was not given."""
    mode, has_control = job.mode, "controlnet" in job.mode
    starts_from_image = mode in ("img2img", "inpaint", "controlnet-inpaint")
    if not starts_from_image and not has_control and job.image is not None:
        raise UserError(f"mode {mode} begins at noise; leave {name_of('image')} out, or use {name_of('mode')} img2img")
    detects = has_control and any(control.image is None for control in job.controls)
    if not (starts_from_image or detects) or job.image is not None:
        return job
    if not job.references:
        raise UserError(
            f"mode {mode} needs a picture to begin with; give {name_of('image')} IMG or {name_of('reference')} IMG"
        )
    first = job.references[0]
    return job.model_copy(update={"image": Input(file=first.file, sha256=first.sha256)})


def _check_mask(job: Job, name_of: Names) -> None:
    """UserError for a mask that is missing, not used, or given twice."""
    masked = job.mask is not None or bool(job.mask_points)
    if "inpaint" in job.mode and not masked:
        raise UserError(f"mode {job.mode} needs a mask; give {name_of('mask')} FILE or {name_of('mask_point')} X,Y")
    if "inpaint" not in job.mode and masked:
        raise UserError(f"mode {job.mode} paints everywhere; leave the mask out, or use {name_of('mode')} inpaint")
    if job.mask is not None and job.mask_points:
        raise UserError(f"{name_of('mask')} and {name_of('mask_point')}: give one of them")


def _check_controls(job: Job, name_of: Names) -> None:
    """UserError for control maps that are missing, not used, given twice, or made by no detector."""
    if "controlnet" in job.mode and not job.controls:
        raise UserError(
            f"mode {job.mode} needs a control; give {name_of('control')} KIND or {name_of('control_image')} KIND=FILE"
        )
    if "controlnet" not in job.mode and job.controls:
        raise UserError(f"mode {job.mode} takes no control; leave it out, or use {name_of('mode')} controlnet")
    ready = {control.kind for control in job.controls if control.image is not None}
    for control in job.controls:
        if control.kind not in DETECTED and control.kind not in ready:
            raise UserError(
                f"control {control.kind}: no detector makes such a map; "
                f"give {name_of('control_image')} {control.kind}=FILE"
            )
    kinds = [control.kind for control in job.controls]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UserError(f"control {twice}: given twice; once is enough")


def _with_reference(job: Job, name_of: Names) -> Job:
    """The job with its image as its reference, where it has neither a reference nor a prompt; in the release, a prompt
    makes no difference."""
    alone = job.image is not None and job.release_compatible
    if job.references or (job.prompt.strip() and not alone):
        return job
    if job.image is None:
        raise UserError(
            f"mode {job.mode} needs a reference or a prompt; give {name_of('reference')} IMG or "
            f"{name_of('prompt')} TEXT"
        )
    return job.model_copy(update={"references": (JobReference(file=job.image.file, sha256=job.image.sha256),)})


def _with_dots(job: Job, dots: Mapping[int, Sequence[Dot]]) -> Job:
    """The job with these dots on its references. UserError for a missing reference."""
    if not dots:
        return job
    if max(dots) >= len(job.references):
        there = f"there are {len(job.references)}" if job.references else "there is none"
        raise UserError(f"dot on reference {max(dots) + 1}: {there}; dots count references from 1")
    references = [
        r.model_copy(update={"dots": tuple(dots[i])}) if i in dots else r for i, r in enumerate(job.references)
    ]
    return job.model_copy(update={"references": tuple(references)})
