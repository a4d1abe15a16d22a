"""Dots and other token weighting as a user gives them: types, parsing and checks. griddot.py defines what they mean.

Imports nothing heavy: a command line checks them before it loads anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from megaflux.common.errors import UserError
from megaflux.config.schema import Section

MAX_DOTS = 1000


class Dot(Section):
    """One dot on a reference."""

    x: float = Field(ge=0, le=1)
    """Its centre: 0 left, 1 right."""
    y: float = Field(ge=0, le=1)
    """Its centre: 0 top, 1 bottom."""
    radius: float = Field(gt=0, allow_inf_nan=False)
    """Distance at which its effect ends, as a fraction of the picture's shorter side."""
    weight: float = Field(ge=0, allow_inf_nan=False)
    """Weight of a token at its centre: 0 leaves it out, 1 changes nothing, 2 equals giving it twice."""


@dataclass(frozen=True)
class Weighting:
    """How the tokens of all references are weighted, apart from dots and strength."""

    background: float = 1.0
    """Weight outside of all dots: 1 changes nothing there, 0 leaves only what the dots mark."""
    preserve_mass: bool = False
    """Rescale a reference's weights to a mean of 1, so that as a whole it counts as before."""
    variety: float = 0.0
    """Fraction of the tokens left out, others for each seed: variations that differ more."""
    downsample: int = 1
    """Average tokens over this many rows and columns of the grid: a vaguer reference."""


NEUTRAL = Weighting()


def parse_dot(text: str) -> tuple[int, Dot]:
    """`x,y,radius,weight` or `2:x,y,radius,weight` -> (index of the reference from 0, Dot). UserError for other text."""
    which, colon, rest = text.rpartition(":")
    parts = rest.split(",")
    try:
        number = int(which) if colon else 1
        values = [float(part) for part in parts]
    except ValueError:
        values, number = [], 0
    if len(values) != 4 or number < 1:
        raise UserError(f"dot {text!r}: use X,Y,RADIUS,WEIGHT as in 0.5,0.4,0.2,2, or N:X,Y,RADIUS,WEIGHT")
    return number - 1, make_dot(dict(zip(("x", "y", "radius", "weight"), values)), f"dot {text!r}")


def make_dot(values: object, where: str) -> Dot:
    """A Dot from a mapping of its fields. UserError naming `where` and the invalid field."""
    meaning = {
        "x": "inside the picture, 0 to 1",
        "y": "inside the picture, 0 to 1",
        "radius": "above 0",
        "weight": "at least 0",
    }
    try:
        return Dot.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "dot"
        value = first["input"] if first["type"] != "missing" else "missing"
        remedy = f"must be {meaning[name]}" if name in meaning else first["msg"]
        raise UserError(f"{where}: {name}: {value}; {remedy}") from None


def read_dots(path: str) -> tuple[dict[int, list[Dot]], dict[str, float | bool]]:
    """Read a JSON file of dots: ({index of the reference from 0: its dots}, the background and preserve_mass given).

    The file holds {"dots": [{"x", "y", "radius", "weight", "reference": 1}, ...], "background": 1, "preserve_mass":
    false}, or the list alone; all but the dots' four numbers is optional. UserError naming the file and the entry.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"dots {path}: {getattr(error, 'strerror', None) or error}") from None
    content = {"dots": content} if isinstance(content, list) else content
    known = {"dots", "background", "preserve_mass"}
    if not isinstance(content, dict) or not isinstance(content.get("dots"), list) or not set(content) <= known:
        raise UserError(f"dots {path}: must be a list of dots, or an object with dots, background, preserve_mass")
    if len(content["dots"]) > MAX_DOTS:
        raise UserError(f"dots {path}: {len(content['dots'])} dots; use at most {MAX_DOTS}")
    found: dict[int, list[Dot]] = {}
    for index, values in enumerate(content["dots"], start=1):
        where = f"dots {path}: dot {index}"
        if not isinstance(values, dict):
            raise UserError(f"{where}: must be an object with x, y, radius, weight")
        number = values.get("reference", 1)
        if not isinstance(number, int) or number < 1:
            raise UserError(f"{where}: reference: {number}; counts from 1")
        dot = make_dot({key: value for key, value in values.items() if key != "reference"}, where)
        found.setdefault(number - 1, []).append(dot)
    rest = {key: content[key] for key in ("background", "preserve_mass") if key in content}
    if not isinstance(rest.get("background", 1.0), int | float) or not isinstance(
        rest.get("preserve_mass", True), bool
    ):
        raise UserError(f"dots {path}: background must be a number and preserve_mass true or false")
    return found, rest
