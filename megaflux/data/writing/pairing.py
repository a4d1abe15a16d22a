"""The names by which datasets tell a picture that is to be made from its references: of columns, fields and files."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from megaflux.data.images import BadImage

_ENDINGS = ("_images", "_image", "_imgs", "_img", "_file_names", "_file_name", "_paths", "_path")
REFERENCES = (
    *("references", "reference", "refs", "ref"),
    *(stem + ending for stem in ("reference", "ref") for ending in _ENDINGS),
)
"""Names of references, whatever else is there; the first one found wins, with its numbered ones."""
SOURCES = tuple(stem + ending for stem in ("source", "src", "input", "original") for ending in _ENDINGS)
"""Likewise, but references only where another picture is named as the target: alone, an `original_image` is one to make."""
TARGETS = ("target", *(stem + ending for stem in ("target", "edited", "output") for ending in _ENDINGS))

_NUMBER = re.compile(r"[_-]?(\d{1,3})", re.ASCII)
_FILE = re.compile(r"(.+)\.(?:reference|ref)(?:[_-]?(\d{1,4}))?", re.ASCII | re.IGNORECASE | re.DOTALL)


def reference_names(names: Sequence[str], targeted: bool) -> list[str]:
    """Which of these names are the references', in order: the first of REFERENCES that is there, in capitals or not, and those
    with a number behind it, by the number. targeted: whether another picture is known as the target, so that SOURCES count
    too. []: none."""
    return list(_reference_names(tuple(names), targeted))


def target_name(names: Sequence[str]) -> str | None:
    """The first of TARGETS that is among these names, in capitals or not."""
    lowered = {name.lower(): name for name in reversed(names)}
    return next((lowered[name] for name in TARGETS if name in lowered), None)


def is_reference_name(name: str) -> bool:
    """Whether a name is one of REFERENCES, perhaps with a number: never a target's."""
    return bool(_reference_names((name,), targeted=False))


def is_of_a_pair(name: str) -> bool:
    """Whether a name is one of REFERENCES or SOURCES, perhaps with a number, or of TARGETS."""
    return name.lower() in TARGETS or bool(_reference_names((name,), targeted=True))


@functools.lru_cache(maxsize=4096)  # tables ask for the same names in each of millions of rows
def names_of_pairs(names: tuple[Any, ...]) -> tuple[str, ...]:
    """Those of a row's names for which is_of_a_pair holds."""
    return tuple(name for name in names if isinstance(name, str) and is_of_a_pair(name))


@functools.lru_cache(maxsize=4096)
def _reference_names(names: tuple[str, ...], targeted: bool) -> tuple[str, ...]:
    for wanted in (*REFERENCES, *(SOURCES if targeted else ())):
        found = []
        for name in names:
            rest = name[len(wanted) :]
            number = _NUMBER.fullmatch(rest)
            if name.lower().startswith(wanted) and (not rest or number):
                found.append((int(number[1]) if number else -1, name))
        if found:
            return tuple(name for _, name in sorted(found))
    return ()


def reference_of(stem: str) -> tuple[str, int] | None:
    """(the stem of the target, the reference's number) for the stem of a file such as x.ref0, x.ref_0, x.reference_12 and x.ref
    (-1); else None."""
    match = _FILE.fullmatch(stem)
    return (match[1], int(match[2] or -1)) if match else None


def strength_of(value: Any) -> float | BadImage:
    """A reference's strength as people store it: nothing for 1, a number, or its text."""
    if value is None or value == "":
        return 1.0
    try:
        strength = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        strength = math.nan
    return strength if is_strength(strength) else bad_strength(value)


def is_strength(strength: float) -> bool:
    """Whether generation takes it: a finite number above 0."""
    return math.isfinite(strength) and strength > 0


def bad_strength(value: Any) -> BadImage:
    """Why a reference of that strength cannot be used."""
    return BadImage("bad_reference", f"strength {str(value)[:40]!r}: use a number above 0, or leave it out")


def listed(value: Any) -> list[Any]:
    """A value from a table -> its entries: those of a list, or of one written as text as in CSV, or the value itself. Nothing and
    blank text are none."""
    if isinstance(value, str):
        value = _parsed(value.strip())
    entries = value if isinstance(value, list | tuple) else [value]
    return [one for one in entries if one is not None and not (isinstance(one, str) and not one.strip())]


def _parsed(text: str) -> Any:
    """A list or object written as text; the text itself where it is none, as the name of a file that begins with "["."""
    if text[:1] + text[-1:] in ("[]", "{}"):
        for parse in (json.loads, ast.literal_eval):  # pandas writes lists as Python does
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                if isinstance(parsed := parse(text), list | dict):
                    return parsed
    return text
