"""What a person has on the panel's page, as plain data, and what each of their acts makes of it. No Gradio, no model.

Session: pictures and dots. Form: the values of the other inputs. `job_of` makes a Job of both, so that the panel and the
command line run, store and replay the same thing.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.generation.dots.dots import Dot, Weighting, check_weighting, make_dot
from megaflux.generation.job import Input, Job, JobControl, JobReference, check
from megaflux.generation.outputs import safe_stem
from megaflux.generation.request import MAX_SEED, check_prompt
from megaflux.infer.options import check_values

GRAB = 0.03  # of the shorter side: a click this near a dot's centre is meant for the dot
MAX_COUNT = 64  # pictures of one press of the button
AUTO, MATCH = "auto", "as the reference"  # choices of the size besides WIDTH:HEIGHT
GROUPS = ("reference", "start", "mask", "strength", "control")
"""Parts of the page that not every mode uses."""
RUNTIME_OPTIONS = (
    "controlnet",
    "depth-model",
    "line-model",
    "sam-model",
    "kernels",
    "checkpoint",
    "offload",
    "quantize",
)


@dataclass(frozen=True)
class Stored:
    """A picture that a job can name: kept under the output folder, so that a replay finds it."""

    file: str
    sha256: str
    size: tuple[int, int]
    """Width and height, px, upright."""

    @property
    def name(self) -> str:
        return Path(self.file).name


@dataclass(frozen=True)
class Session:
    """The pictures and dots of one page."""

    reference: Stored | None = None
    start: Stored | None = None
    """Where img2img, inpaint and control begin; None: the reference."""
    mask: Stored | None = None
    points: tuple[tuple[float, float, int], ...] = ()
    """In the place of a mask: x, y in 0..1, and 1, for SAM 2."""
    discs: tuple[tuple[float, float, float], ...] = ()
    """In the place of a mask: centre x, y in 0..1, radius as a fraction of the start image's shorter side."""
    maps: Mapping[str, Stored] = field(default_factory=dict)
    """Ready control maps by kind."""
    dots: tuple[Dot, ...] = ()
    current: int | None = None
    """The dot that the sliders move."""
    history: tuple[tuple[Dot, ...], ...] = ()
    """What `undone` goes back to, the newest last."""
    sliding: bool = False
    """The last act moved a slider: one drag is one step of the history."""

    @property
    def begin(self) -> Stored | None:
        return self.start or self.reference


@dataclass(frozen=True)
class Form:
    """The values of the page's other inputs, as they stand there: a number that was emptied is None."""

    mode: str = "variation"
    prompt: str = ""
    text_encoder: str | None = None
    reference_strength: float | None = 1.0
    background: float | None = 1.0
    preserve_mass: bool = False
    variety: float | None = 0.0
    downsample: int | None = 1
    strength: float | None = 0.8
    aspect: str = AUTO
    steps: int | None = 28
    guidance: float | None = None
    count: int | None = 4
    seed: int | None = 0
    batch_size: int | None = 1
    attention_map: bool = False
    mask_by: str = "file"
    """discs, file or points."""
    controls: tuple[tuple[str, float | None], ...] = ()
    """Kind and scale of each control that is ticked."""


def shown(mode: str) -> dict[str, bool]:
    """Which of GROUPS a mode uses."""
    begins = mode not in ("variation", "text")
    return {
        "reference": mode != "text",
        "start": begins,
        "mask": "inpaint" in mode,
        "strength": begins,
        "control": "controlnet" in mode,
    }


def store(upload: str | Path, out: Path) -> Stored:
    """Copy a picture's file to out/inputs/<hash>/<its name>, unless it lies in `out` already. UserError, naming the file
    and what is wrong with it, for one that is no usable picture."""
    from megaflux.data.images import REASONS, BadImage, decode

    upload = Path(upload)
    try:
        data = upload.read_bytes()
    except OSError as error:
        raise UserError(f"{upload.name}: {error.strerror}; give it again") from None
    try:
        picture, _ = decode(data)
    except BadImage as error:
        # what a file starts with says something to a programmer, not on a page
        detail = f" ({error.detail})" if error.detail and error.reason != "not_an_image" else ""
        raise UserError(f"{upload.name}: {REASONS[error.reason]}{detail}; give another picture") from None
    return keep(upload, data, picture.size, out)


def keep(name: str | Path, data: bytes, size: tuple[int, int], out: Path) -> Stored:
    """`store` for bytes that are known to be a picture of that size. UserError where nothing can be written."""
    name, digest = Path(name), hashlib.sha256(data).hexdigest()
    if name.is_file() and name.resolve().is_relative_to(out.resolve()):
        return Stored(str(name.absolute()), digest, size)
    suffix = name.suffix if re.fullmatch(r"\.\w{1,5}", name.suffix) else ""
    file = out.absolute() / "inputs" / digest[:16] / (safe_stem(name.name) + suffix)
    try:
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give another --out") from None
    return Stored(str(file), digest, size)


def place(index: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """A clicked pixel (x, y) of a picture of `size` px -> its middle in 0..1 from the left and the top."""
    return tuple(round(min(max((i + 0.5) / side, 0.0), 1.0), 4) for i, side in zip(index, size))


def clicked(session: Session, x: float, y: float, radius: float, weight: float) -> Session:
    """A click at (x, y) in 0..1: takes up the dot whose centre is there, or else puts a new one."""
    width, height = session.reference.size
    shorter = min(width, height)
    distances = [math.hypot((x - d.x) * width, (y - d.y) * height) / shorter for d in session.dots]
    nearest = min(range(len(distances)), key=distances.__getitem__, default=None)
    if nearest is not None and distances[nearest] <= GRAB:
        return replace(session, current=nearest, sliding=False)
    dot = make_dot({"x": x, "y": y, "radius": radius, "weight": weight}, "dot")
    return _with_dots(session, (*session.dots, dot), len(session.dots))


def slid(session: Session, name: str, value: float) -> Session:
    """A slider moved: the current dot's `name` (radius or weight) gets its value. Without a dot it is for the next one."""
    if session.current is None:
        return session
    dots = list(session.dots)
    dots[session.current] = make_dot(dots[session.current].model_dump() | {name: value}, f"dot {session.current + 1}")
    history = session.history if session.sliding else (*session.history, session.dots)[-100:]
    return replace(session, dots=tuple(dots), history=history, sliding=True)


def edited(session: Session, rows: Sequence[Sequence[Any]], radius: float, weight: float) -> Session:
    """The table of dots was edited: rows of x, y, radius, weight. Empty rows are left out; an empty cell of another row
    gets the middle, or the sliders' radius and weight. UserError naming the dot."""
    dots, otherwise = [], {"x": 0.5, "y": 0.5, "radius": radius, "weight": weight}
    for number, row in enumerate(rows, start=1):
        cells = ["" if cell is None or cell != cell else str(cell).strip() for cell in row]
        if not any(cells):
            continue
        values = dict(otherwise)
        for name, cell in zip(values, cells):
            try:
                values[name] = float(cell or values[name])
            except ValueError:
                raise UserError(f"dot {number}: {name}: {cell}; give a number") from None
        dots.append(make_dot(values, f"dot {number}"))
    if tuple(dots) == session.dots:
        return session
    current = session.current if session.current is not None and session.current < len(dots) else len(dots) - 1
    return _with_dots(session, tuple(dots), current if dots else None)


def taken_up(session: Session, number: int) -> Session:
    """The sliders move that dot from now on."""
    return replace(session, current=number, sliding=False) if number < len(session.dots) else session


def with_mask_by(session: Session, way: str) -> Session:
    """With the mask that was given in this way alone: "discs", "file" or "points"; anything else: with none."""
    return replace(
        session,
        mask=session.mask if way == "file" else None,
        points=session.points if way == "points" else (),
        discs=session.discs if way == "discs" else (),
    )


def masked_at(session: Session, way: str, x: float, y: float, radius: float) -> Session:
    """A click on the start image at (x, y) in 0..1: one more disc, or one more point."""
    if way == "discs":
        return replace(session, discs=(*session.discs, (x, y, radius)))
    return replace(session, points=(*session.points, (x, y, 1))) if way == "points" else session


def unmasked(session: Session, way: str) -> Session:
    """Without the last disc or point, or the mask's file."""
    return replace(
        session,
        discs=session.discs[:-1] if way == "discs" else session.discs,
        points=session.points[:-1] if way == "points" else session.points,
        mask=None if way == "file" else session.mask,
    )


def removed(session: Session) -> Session:
    """Without the current dot."""
    if session.current is None:
        return session
    dots = tuple(d for i, d in enumerate(session.dots) if i != session.current)
    return _with_dots(session, dots, len(dots) - 1 if dots else None)


def cleared(session: Session) -> Session:
    """Without any dot."""
    return _with_dots(session, (), None) if session.dots else session


def undone(session: Session) -> Session:
    """One step back."""
    if not session.history:
        return session
    *history, dots = session.history
    return replace(session, dots=dots, current=len(dots) - 1 if dots else None, history=tuple(history), sliding=False)


def _with_dots(session: Session, dots: tuple[Dot, ...], current: int | None) -> Session:
    history = (*session.history, session.dots)[-100:]
    return replace(session, dots=dots, current=current, history=history, sliding=False)


def referred(session: Session, reference: Stored | None) -> Session:
    """With another reference: the dots were for the one before."""
    session = session if session.start else unbegun(session)  # the mask was for it, too
    return replace(session, reference=reference, dots=(), current=None, history=(), sliding=False)


def unbegun(session: Session) -> Session:
    """Without a start image, and without the mask that was for it."""
    return replace(session, start=None, mask=None, points=(), discs=())


def job_of(session: Session, form: Form) -> Job:
    """The checked job that the page asks for. UserError in the page's words."""
    mode, uses = form.mode, shown(form.mode)
    session = with_mask_by(session, form.mask_by)
    prompt = check_prompt(form.prompt).strip()
    numbers = {
        "steps": form.steps,
        "pictures": form.count,
        "seed": form.seed,
        "batch size": form.batch_size,
        "strength": form.strength,
        "background": form.background,
        "variety": form.variety,
        "downsample": form.downsample,
        "reference strength": form.reference_strength,
    }
    if empty := next((name for name, value in numbers.items() if value is None), None):
        raise UserError(f"{empty}: empty; give a number")
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
    if not 0 < form.reference_strength < math.inf:
        raise UserError(f"reference strength: {form.reference_strength:g}; use a number above 0")
    if not 1 <= form.count <= MAX_COUNT:
        raise UserError(f"pictures: {form.count}; use 1 to {MAX_COUNT}")
    if not 0 <= form.seed <= MAX_SEED - form.count:
        raise UserError(f"seed: {form.seed}; use 0 to {MAX_SEED - form.count}")
    for kind, scale in form.controls if uses["control"] else ():
        if scale is None or not 0 <= scale < math.inf:
            raise UserError(f"{kind}: scale {scale}; use a number of at least 0")
    values = {
        "steps": form.steps,
        "batch_size": form.batch_size,
        "downsample": form.downsample,
        "strength": form.strength,
    }
    check_values(values | ({} if form.guidance is None else {"guidance": form.guidance}))
    references = ()
    if uses["reference"] and session.reference is not None:
        stored = session.reference
        references = (
            JobReference(file=stored.file, sha256=stored.sha256, strength=form.reference_strength, dots=session.dots),
        )
    weighs = uses["reference"]
    check_weighting(Weighting(form.background))  # without a dot it is not used
    job = Job(
        mode=mode,
        references=references,
        prompt=prompt,
        text_encoder=form.text_encoder,
        image=_input(session.start) if uses["start"] else None,
        mask=_input(session.mask) if uses["mask"] else None,
        mask_points=session.points if uses["mask"] and session.mask is None else (),
        strength=form.strength,
        controls=tuple(
            JobControl(kind=kind, scale=scale, image=_input(session.maps.get(kind))) for kind, scale in form.controls
        )
        if uses["control"]
        else (),
        background=form.background if weighs and session.dots else 1.0,
        preserve_mass=form.preserve_mass and weighs,
        variety=form.variety if weighs else 0.0,
        downsample=form.downsample if weighs else 1,
        aspect=None if form.aspect in (AUTO, MATCH) else form.aspect,
        match_input_size=form.aspect == MATCH,
        steps=form.steps,
        guidance=form.guidance,
        seeds=tuple(range(form.seed, form.seed + form.count)),
        batch_size=form.batch_size,
        attention_map=form.attention_map and bool(references),
    )
    job = check(job)
    check_weighting(job.weighting)
    return job


def _input(stored: Stored | None) -> Input | None:
    return None if stored is None else Input(file=stored.file, sha256=stored.sha256)


def plain(message: str) -> str:
    """A UserError's line in the page's words: options that are inputs of the page lose their dashes."""
    keep_dashes = "|".join(RUNTIME_OPTIONS)
    line = re.sub(rf"--(?!(?:{keep_dashes})\b)([a-z]+(?:-[a-z]+)*)", lambda m: m[1].replace("-", " "), message)
    return " ".join(line.split())
