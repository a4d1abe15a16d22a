"""What a user has on the page, as plain data, and how each act changes it. No Gradio, no model, no files.

Session: pictures and dots. Form: the values of the other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megaflux.common.errors import UserError
from megaflux.generation.dots.dots import Dot, make_dot
from megaflux.generation.job import Mode

GRAB = 0.03  # of the shorter side: a click this near a dot's centre selects the dot
UNDO_STEPS = 100
AUTO, MATCH = "auto", "as the reference"  # choices of the size besides WIDTH:HEIGHT


@dataclass(frozen=True)
class Stored:
    """A picture under the output folder, where a replay of the job that names it finds it."""

    file: str
    sha256: str
    size: tuple[int, int]
    """(width, height), px, upright."""

    @property
    def name(self) -> str:
        return Path(self.file).name


@dataclass(frozen=True)
class Session:
    """The pictures and dots of one page."""

    reference: Stored | None = None
    start: Stored | None = None
    """The start image of img2img, inpaint and control; None: the reference."""
    mask: Stored | None = None
    points: tuple[tuple[float, float, int], ...] = ()
    """Points for SAM 2 instead of a mask: x, y in 0..1, and 1."""
    discs: tuple[tuple[float, float, float], ...] = ()
    """Discs instead of a mask: centre x, y in 0..1, radius as a fraction of the start image's shorter side."""
    maps: Mapping[str, Stored] = field(default_factory=dict)
    """Ready control maps by kind."""
    dots: tuple[Dot, ...] = ()
    current: int | None = None
    """The dot that the sliders move."""
    history: tuple[tuple[Dot, ...], ...] = ()
    """Earlier dots, for `undone`; the newest last."""
    sliding: bool = False
    """Whether the last act moved a slider: one drag is one step of the history."""

    @property
    def begin(self) -> Stored | None:
        """The start image that is used."""
        return self.start or self.reference


@dataclass(frozen=True)
class Made:
    """The pictures of one press of Generate."""

    files: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    """Of each file."""
    maps: tuple[tuple[str, str], ...] = ()
    """(file, caption) of each attention map."""
    line: str = ""
    """What was made, in how long, and where it was saved."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """The values of the page's other inputs, unchecked. A number is None where its input is empty."""

    mode: Mode = "variation"
    prompt: str = ""
    text_encoder: Literal["qwen", "t5"] | None = None
    reference_strength: float | None = 1.0
    background: float | None = 1.0
    preserve_mass: bool = False
    variety: float | None = 0.0
    downsample: int | None = 1
    strength: float | None = 0.8
    aspect: str = AUTO
    steps: int | None = 28
    guidance: float | None = None
    cfg: float | None = 1.0
    negative: str = ""
    count: int | None = 4
    seed: int | None = 0
    batch_size: int | None = 1
    attention_map: bool = False
    release_compatible: bool = False
    mask_by: str = "file"
    """How a mask is given: discs, file or points."""
    controls: tuple[tuple[str, float | None], ...] = ()
    """(kind, scale) of each control that is ticked."""


def parts_used(mode: str) -> dict[str, bool]:
    """Whether a mode uses each of the page's parts that some mode does not use."""
    begins = mode not in ("variation", "text")
    return {
        "reference": mode != "text",
        "start": begins,
        "mask": "inpaint" in mode,
        "strength": begins,
        "control": "controlnet" in mode,
    }


def place(index: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """The centre (x, y) of a clicked pixel, in 0..1 from the left and the top. index: the pixel; size: (width, height)."""
    x, y = (round(min(max((i + 0.5) / side, 0.0), 1.0), 4) for i, side in zip(index, size))
    return x, y


def clicked(session: Session, x: float, y: float, radius: float, weight: float) -> Session:
    """After a click at (x, y) in 0..1, which selects the dot whose centre is there, or else adds a dot."""
    if session.reference is None:
        return session
    width, height = session.reference.size
    shorter = min(width, height)
    distances = [math.hypot((x - d.x) * width, (y - d.y) * height) / shorter for d in session.dots]
    nearest = min(range(len(distances)), key=distances.__getitem__, default=None)
    if nearest is not None and distances[nearest] <= GRAB:
        return replace(session, current=nearest, sliding=False)
    dot = make_dot({"x": x, "y": y, "radius": radius, "weight": weight}, "dot")
    return _with_dots(session, (*session.dots, dot), len(session.dots))


def slid(session: Session, name: str, value: float) -> Session:
    """With the slider's value as the current dot's `name` (radius or weight); unchanged if there is no current dot."""
    if session.current is None:
        return session
    dots = list(session.dots)
    dots[session.current] = make_dot(dots[session.current].model_dump() | {name: value}, f"dot {session.current + 1}")
    history = session.history if session.sliding else (*session.history, session.dots)[-UNDO_STEPS:]
    return replace(session, dots=tuple(dots), history=history, sliding=True)


def edited(session: Session, rows: Sequence[Sequence[Any]], radius: float, weight: float) -> Session:
    """With the dots of the edited table: rows of x, y, radius, weight.

    Empty rows are left out. In other rows an empty cell means 0.5 for x and y, and the sliders' radius and weight. UserError
    naming the dot whose value is invalid.
    """
    dots: list[Dot] = []
    otherwise = {"x": 0.5, "y": 0.5, "radius": radius, "weight": weight}
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


def selected(session: Session, index: int) -> Session:
    """With that dot as the one which the sliders move."""
    return replace(session, current=index, sliding=False) if index < len(session.dots) else session


def with_mask_by(session: Session, way: str) -> Session:
    """With only the mask that was given in this way: "discs", "file" or "points"; with no mask for any other `way`."""
    return replace(
        session,
        mask=session.mask if way == "file" else None,
        points=session.points if way == "points" else (),
        discs=session.discs if way == "discs" else (),
    )


def masked_at(session: Session, way: str, x: float, y: float, radius: float) -> Session:
    """After a click on the start image at (x, y) in 0..1, which adds a disc or a point."""
    if way == "discs":
        return replace(session, discs=(*session.discs, (x, y, radius)))
    return replace(session, points=(*session.points, (x, y, 1))) if way == "points" else session


def unmasked(session: Session, way: str) -> Session:
    """Without the last disc, the last point, or the mask's file."""
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
    """Without dots."""
    return _with_dots(session, (), None) if session.dots else session


def undone(session: Session) -> Session:
    """With the dots as they were before the last change."""
    if not session.history:
        return session
    *history, dots = session.history
    return replace(session, dots=dots, current=len(dots) - 1 if dots else None, history=tuple(history), sliding=False)


def _with_dots(session: Session, dots: tuple[Dot, ...], current: int | None) -> Session:
    history = (*session.history, session.dots)[-UNDO_STEPS:]
    return replace(session, dots=dots, current=current, history=history, sliding=False)


def with_reference(session: Session, reference: Stored | None) -> Session:
    """With another reference, and without the dots, and the mask, of the one before."""
    session = session if session.start else with_start(session, None)
    return replace(session, reference=reference, dots=(), current=None, history=(), sliding=False)


def with_start(session: Session, start: Stored | None) -> Session:
    """With another start image, and without the mask of the one before."""
    return replace(session, start=start, mask=None, points=(), discs=())
