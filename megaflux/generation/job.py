"""A job: a request for pictures as plain data, from the command line, the panel or a replayed PNG.

`Job` says what to make and `Runtime` with which weights, on which device; both are stored as JSON in every PNG. `check`
completes a job and rejects one whose parts do not fit each other. run.py then opens its files and makes its pictures.

Imports nothing heavy: a command line answers bad input at once.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from megaflux.common.errors import UserError
from megaflux.config.schema import Section
from megaflux.generation.dots.dots import Dot, Weighting, check_weighting
from megaflux.generation.request import (
    DETECTED,
    MAX_SEED,
    MIN_REFERENCE_TOKENS,
    check_control_span,
    check_prompt,
    check_shift,
)

Mode = Literal["text", "variation", "img2img", "inpaint", "controlnet", "controlnet-inpaint"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_SIDE = 8192  # px of a picture: four times FLUX's largest trained side; a larger number is a typing error
MAX_COUNT = 100_000  # pictures of a job


# --- Job and Runtime ---


class Input(Section):
    """A picture file."""

    file: str
    sha256: str = ""
    """SHA-256 of the file's bytes; empty: not read yet."""


class JobReference(Input):
    """A reference picture and how its tokens are weighted."""

    strength: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on the weights of all its tokens; 1: as trained."""
    dots: tuple[Dot, ...] = ()


class JobControl(Section):
    """One control map."""

    kind: str
    """A name of control.detectors.UNION_MODES."""
    scale: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Factor on what the ControlNet adds."""
    image: Input | None = None
    """A ready map; None: a detector makes it from the job's image."""


class Job(Section):
    """Which pictures to make."""

    mode: Mode = "variation"
    references: tuple[JobReference, ...] = ()
    prompt: str = ""
    text_encoder: Literal["qwen", "t5"] | None = None
    """Which model reads the prompt; None: the weights' default."""
    reference_tokens: int | None = Field(default=None, ge=MIN_REFERENCE_TOKENS)
    """Most image tokens of a reference; None: as trained."""
    image: Input | None = None
    """The picture that img2img, inpaint and control start from."""
    mask: Input | None = None
    """White is repainted."""
    mask_points: tuple[tuple[float, float, int], ...] = ()
    """(x, y, 1 in / 0 out) in [0, 1], from which SAM 2 makes the mask; instead of `mask`."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """Fraction of the steps taken from the image; 1 starts from noise."""
    controls: tuple[JobControl, ...] = ()
    control_start: float = Field(default=0.0, ge=0, le=1)
    """Control acts from here to control_end, as fractions of all steps."""
    control_end: float = Field(default=1.0, ge=0, le=1)
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
    width: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)
    """px; width and height override the aspect."""
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)
    """px"""
    steps: int = Field(default=28, ge=1, le=100_000)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """None: the value of training."""
    shift: float | None = None
    """Fixed timestep shift; None: the scheduler's own."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=MAX_SEED + 1)], ...] = Field(
        default=(0,), min_length=1, max_length=MAX_COUNT
    )
    """One picture per seed."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures made at once."""
    attention_map: bool = False
    """Also show where each picture attended in each reference."""

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


def check(job: Job) -> Job:
    """The job with the image and the reference that its mode implies. UserError if its parts do not fit each other.

    img2img, inpaint and control start from the image, or else from the first reference. Without reference and prompt,
    the image is the reference, too. No file is opened.
    """
    check_prompt(job.prompt)  # a replay's prompt comes from a file
    check_shift(job.shift)
    _check_mode(job)
    job = _with_image(job)
    _check_mask(job)
    _check_controls(job)
    job = _with_reference(job)
    if (job.width is None) != (job.height is None):
        raise UserError("--width and --height: give both or neither")
    check_weighting(job.weighting)
    return job


def _check_mode(job: Job) -> None:
    """UserError for inputs that modes text and variation lack or do not take."""
    if job.mode == "text" and job.references:
        raise UserError("mode text takes no reference; leave --reference out, or --mode")
    if job.mode == "text" and not job.prompt.strip():
        raise UserError("mode text needs a prompt; give --prompt TEXT")
    if job.mode == "text" and (job.variety or job.downsample > 1 or job.preserve_mass):
        raise UserError(
            "variety, downsample and preserve mass work on a reference's tokens, and mode text has none; leave them out"
        )
    if job.mode == "variation" and not job.references:
        raise UserError("mode variation needs a picture; give --reference IMG, or --prompt TEXT alone for mode text")


def _with_image(job: Job) -> Job:
    """The job with its first reference as its image, where the mode needs one that was not given."""
    mode, has_control = job.mode, "controlnet" in job.mode
    starts_from_image = mode in ("img2img", "inpaint", "controlnet-inpaint")
    if not starts_from_image and not has_control and job.image is not None:
        raise UserError(f"mode {mode} begins at noise; leave --image out, or use --mode img2img")
    detects = has_control and any(control.image is None for control in job.controls)
    if not (starts_from_image or detects) or job.image is not None:
        return job
    if not job.references:
        raise UserError(f"mode {mode} needs a picture to begin with; give --image IMG or --reference IMG")
    first = job.references[0]
    return job.model_copy(update={"image": Input(file=first.file, sha256=first.sha256)})


def _check_mask(job: Job) -> None:
    """UserError for a mask that is missing, not used, or given twice."""
    masked = job.mask is not None or bool(job.mask_points)
    if "inpaint" in job.mode and not masked:
        raise UserError(f"mode {job.mode} needs a mask; give --mask FILE or --mask-point X,Y")
    if "inpaint" not in job.mode and masked:
        raise UserError(f"mode {job.mode} paints everywhere; leave the mask out, or use --mode inpaint")
    if job.mask is not None and job.mask_points:
        raise UserError("--mask and --mask-point: give one of them")


def _check_controls(job: Job) -> None:
    """UserError for control maps that are missing, not used, given twice, or made by no detector."""
    if "controlnet" in job.mode and not job.controls:
        raise UserError(f"mode {job.mode} needs a control; give --control KIND or --control-image KIND=FILE")
    if "controlnet" not in job.mode and job.controls:
        raise UserError(f"mode {job.mode} takes no control; leave it out, or use --mode controlnet")
    ready = {control.kind for control in job.controls if control.image is not None}
    for control in job.controls:
        if control.kind not in DETECTED and control.kind not in ready:
            raise UserError(
                f"control {control.kind}: no detector makes such a map; give --control-image {control.kind}=FILE"
            )
    kinds = [control.kind for control in job.controls]
    if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
        raise UserError(f"control {twice}: given twice; once is enough")
    if job.controls:
        check_control_span(job.control_start, job.control_end)


def _with_reference(job: Job) -> Job:
    """The job with its image as its reference, where it has neither a reference nor a prompt."""
    if job.references or job.prompt.strip():
        return job
    if job.image is None:
        raise UserError(f"mode {job.mode} needs a reference or a prompt; give --reference IMG or --prompt TEXT")
    return job.model_copy(update={"references": (JobReference(file=job.image.file, sha256=job.image.sha256),)})


def check_background(job: Job) -> None:
    """UserError for a background weight without any dot: it is the weight outside of the dots."""
    if job.background != 1 and not any(reference.dots for reference in job.references):
        raise UserError(
            f"--background {job.background:g}: there is no dot; give --dot X,Y,R,W, or the whole picture a "
            "strength: --reference IMG:STRENGTH"
        )
