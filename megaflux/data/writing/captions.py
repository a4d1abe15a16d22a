"""Captions as people store them: text files, JSON files, tables."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUFFIXES = (".txt", ".caption", ".json")  # of a file beside an image; the first one found wins
FIELDS = ("caption", "text", "prompt", "description", "txt", "captions", "texts")  # in JSON and tables; likewise

_BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, with which it begins
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class Caption:
    """text: without surrounding white space, "" if there is none. problem: why a caption that is there was not used."""

    text: str = ""
    problem: str = ""


def of_file(data: bytes, suffix: str, field: str | None = None) -> Caption:
    """The caption in the bytes of a file of one of SUFFIXES. field: of JSON objects, instead of FIELDS.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. JSON is an object with one of the fields, a text, or a list,
    whose first entry counts.
    """
    try:
        text = decoded(data)
        if suffix != ".json":
            return of_value(text)
        return of_value(json.loads(text), field)
    except (ValueError, RecursionError) as error:
        return Caption(problem=str(error)[:200])


def of_value(value: Any, field: str | None = None) -> Caption:
    """The caption in a value from JSON or a table: text (or its bytes), nothing, an object's field, a list's first entry."""
    for _ in range(4):  # a list in an object in a list: no caption is nested deeper
        if isinstance(value, Mapping):
            value = of_fields(value, field)
        elif isinstance(value, list) and value and isinstance(value[0], tuple):  # a table's map: (name, value) pairs
            value = value[0][1]
        elif isinstance(value, list | tuple):
            value = value[0] if value else None
    if value is None:
        return Caption()
    try:
        if isinstance(value, bytes):
            value = decoded(value)
        if not isinstance(value, str):
            return Caption(problem=f"a {type(value).__name__}, not text")
        if "\0" in value:
            return Caption(problem="holds NUL characters; UTF-16 without a byte order mark?")
        value.encode()  # half of a surrogate pair cannot be stored
        return Caption(value.strip())
    except ValueError as error:
        return Caption(problem=str(error)[:200])


def first(found: Iterable[Caption]) -> Caption:
    """The first of these captions that has text; else the first that could not be used, which says why."""
    unusable = Caption()
    for caption in found:
        if caption.text:
            return caption
        if not unusable.problem:
            unusable = caption
    return unusable


def of_fields(fields: Mapping[str, Any], field: str | None = None) -> Any:
    """The value of the first caption field that has one which is not blank: of `field` alone if given, else of FIELDS."""
    name = field_of([name for name, value in fields.items() if not _is_blank(value)], field)
    return None if name is None else fields[name]


def field_of(names: Sequence[str], field: str | None = None) -> str | None:
    """Which of these names is the captions': `field` if given, else the first of FIELDS, in capitals or not. None: none."""
    if field is not None:
        return field if field in names else None
    lowered = {name.lower(): name for name in reversed(names) if isinstance(name, str)}
    lowered |= {name: name for name in names if name in FIELDS}
    return next((lowered[name] for name in FIELDS if name in lowered), None)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], ())


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text of bytes. errors: as in bytes.decode, for UTF-8 without a mark. Raises ValueError for an unknown encoding."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode(errors=errors)
