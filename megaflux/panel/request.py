"""The page's state -> a checked Job: the panel and the command line run, store and replay the same thing."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from megaflux.common.errors import UserError
from megaflux.generation.job import Input, Job, JobControl, JobReference, check
from megaflux.generation.limits import LIMITS, Limits, check_numbers, plain_name
from megaflux.generation.request import check_prompt, check_seeds
from megaflux.panel.state import AUTO, MATCH, Form, Session, Stored, parts_used, with_mask_by

MAX_PER_PRESS = 64  # pictures of one press of the button
RUNTIME_OPTIONS = (
    "controlnet",
    "depth-model",
    "line-model",
    "sam-model",
    "kernels",
    "checkpoint",
    "ema",
    "flux",
    "vlm",
    "vae",
    "offload",
    "quantize",
)
"""Options of the panel's command line that an error may name."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of a Form, none of them empty."""

    steps: int
    count: int
    seed: int
    batch_size: int
    strength: float
    background: float
    variety: float
    downsample: int
    reference_strength: float
    cfg: float

    @classmethod
    def of(cls, form: Form) -> Numbers:
        """UserError naming the first input that is empty."""
        values = {field.name: getattr(form, field.name) for field in fields(cls)}
        if empty := next((name for name, value in values.items() if value is None), None):
            raise UserError(f"{page_name(empty)}: empty; give a number")
        return cls(**values)


def job_of(session: Session, form: Form) -> Job:
    """The checked job that the page asks for. UserError in the page's words."""
    uses = parts_used(form.mode)
    session = with_mask_by(session, form.mask_by)
    prompt = check_prompt(form.prompt).strip()
    numbers = Numbers.of(form)
    _check_parts(session, form, prompt)
    _check_numbers(numbers, form.guidance)
    controls = _controls(session, form) if uses["control"] else ()
    references: tuple[JobReference, ...] = ()
    if uses["reference"] and (stored := session.reference) is not None:
        references = (
            JobReference(
                file=stored.file, sha256=stored.sha256, strength=numbers.reference_strength, dots=session.dots
            ),
        )
    job = Job(
        mode=form.mode,
        references=references,
        prompt=prompt,
        negative=check_prompt(form.negative, page_name("negative")).strip(),
        text_encoder=form.text_encoder,
        image=_input(session.start) if uses["start"] else None,
        mask=_input(session.mask) if uses["mask"] else None,
        mask_points=session.points if uses["mask"] and session.mask is None else (),
        strength=numbers.strength,
        controls=controls,
        background=numbers.background if uses["reference"] and session.dots else 1.0,
        preserve_mass=form.preserve_mass and uses["reference"],
        variety=numbers.variety if uses["reference"] else 0.0,
        downsample=numbers.downsample if uses["reference"] else 1,
        aspect=None if form.aspect in (AUTO, MATCH) else form.aspect,
        match_input_size=form.aspect == MATCH,
        steps=numbers.steps,
        guidance=form.guidance,
        cfg=numbers.cfg,
        seeds=tuple(range(numbers.seed, numbers.seed + numbers.count)),
        batch_size=numbers.batch_size,
        attention_map=form.attention_map and bool(references),
        release_compatible=form.release_compatible,
    )
    return check(job, page_name)


def _check_parts(session: Session, form: Form, prompt: str) -> None:
    """UserError for the first thing that the mode needs and the page lacks."""
    mode, uses = form.mode, parts_used(form.mode)
    if mode == "text" and not prompt:
        raise UserError("mode text needs words; write a prompt")
    if mode == "variation" and session.reference is None:
        raise UserError("mode variation needs a reference; drop a picture on the left")
    if uses["start"] and session.begin is None and not all(kind in session.maps for kind, _ in form.controls):
        raise UserError(f"mode {mode} needs a picture to begin with; drop a start image or a reference")
    if uses["mask"] and session.mask is None and not session.points:
        raise UserError(f"mode {mode} needs a mask; click the start image, or drop one")
    if uses["control"] and not form.controls:
        raise UserError(f"mode {mode} needs a control; tick at least one kind of map")


def _check_numbers(numbers: Numbers, guidance: float | None) -> None:
    """UserError for a number out of range, even of an input that the mode does not use; variety only where it does."""
    Limits(1, MAX_PER_PRESS).check(page_name("count"), numbers.count)
    check_seeds(numbers.seed, numbers.count, page_name)
    check_numbers(vars(numbers) | {"variety": None, "guidance": guidance}, page_name)


def _controls(session: Session, form: Form) -> tuple[JobControl, ...]:
    """The ticked controls. UserError for an invalid scale."""
    controls = []
    for kind, scale in form.controls:
        if scale is None:
            raise UserError(f"{kind} scale: empty; give a number")
        LIMITS["control_scale"].check(f"{kind} scale", scale)
        controls.append(JobControl(kind=kind, scale=scale, image=_input(session.maps.get(kind))))
    return tuple(controls)


def _input(stored: Stored | None) -> Input | None:
    return None if stored is None else Input(file=stored.file, sha256=stored.sha256)


def page_name(name: str) -> str:
    """What the page calls a field of a Job."""
    return "pictures" if name == "count" else plain_name(name)


def in_page_words(message: str) -> str:
    """A UserError's line for the page: options that are inputs of the page lose their dashes.

    The checks of a form name its inputs themselves. This is for errors of the work that follows, which names options
    whoever asked for it: sizes (generation.run), detectors and files.
    """
    keep_dashes = "|".join(RUNTIME_OPTIONS)
    line = re.sub(rf"--(?!(?:{keep_dashes})\b)([a-z]+(?:-[a-z]+)*)", lambda m: m[1].replace("-", " "), message)
    return " ".join(line.split())
