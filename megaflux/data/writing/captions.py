"""Captions as people store them: text files, JSON files, tables."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaflux.data.captions import SEPARATOR, join

SUFFIXES = (".txt", ".caption", ".json")  # of a file beside an image; the first one found wins
FIELDS = ("caption", "text", "prompt", "description", "txt", "captions", "texts")  # in JSON and tables; likewise
EDIT_FIELDS = ("instruction", "instructions", "edit_instruction", "edit_prompt", "edited_prompt_list", "edit")
"""Fields, after FIELDS, of pictures that have references."""
ALL, LINES, FIRST = "all", "lines", "first"
WAYS = (ALL, LINES, FIRST)
"""How captions are read: all; all, and each line of a text file is one; or as earlier versions did, only the first of a
list and none of numbered fields, which is how a dataset that they began is finished."""

DEPTH = 4  # of lists and objects in each other: no caption is nested deeper
_NUMBER = re.compile(r"[_-]?(\d{1,3})", re.ASCII)  # behind a field's name: caption_0, caption-0, caption0
_LINE_ENDS = re.compile(r"\r\n|\n|\r")  # not splitlines, which also cuts at form feeds and U+2028
_BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, with which it begins
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True, slots=True)
class Caption:
    """The captions of an image. texts: in order, each without surrounding white space, none of them empty; one that is
    there twice stays, so that places and weights keep their meaning. problem: why one that is there was not used."""

    texts: tuple[str, ...] = ()
    problem: str = ""

    @property
    def stored(self) -> str:
        """As the column `caption` holds them."""
        return join(self.texts)


@dataclass(frozen=True, slots=True)
class CaptionReader:
    """How captions are read. field: of JSON objects and tables, instead of FIELDS. captions: one of WAYS. edits: whether they are of
    pictures with references, which may have EDIT_FIELDS instead."""

    field: str | None = None
    captions: str = ALL
    edits: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """Where `field` names none, those that are looked for, the first one first."""
        return (*FIELDS, *EDIT_FIELDS) if self.edits else FIELDS

    def of_file(self, data: bytes, suffix: str) -> Caption:
        """The captions in the bytes of a file of one of SUFFIXES.

        Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. JSON is an object with one of the fields, a text, or a
        list of these.
        """
        try:
            text = decoded(data)
            if suffix == ".json":
                return self.of_value(json.loads(text))
            if self.captions == LINES:
                return gathered(_of_text(line) for line in _LINE_ENDS.split(text))
            return _of_text(text)
        except (ValueError, RecursionError) as error:
            return Caption(problem=str(error)[:200])

    def of_value(self, value: Any, depth: int = DEPTH) -> Caption:
        """The captions in a value from JSON or a table: text (or its bytes), nothing, an object's field or numbered fields,
        a list of these. Of a map, as tables have for languages, the first value."""
        if depth and isinstance(value, Mapping):
            return self.of_values(self.of_fields(value), depth - 1)
        if depth and isinstance(value, list) and value and isinstance(value[0], tuple):  # a map: (name, value) pairs
            return self.of_value(value[0][1], depth - 1)
        if depth and isinstance(value, list | tuple):
            return self.of_values(value[:1] if self.captions == FIRST else value, depth - 1)
        return _of_text(value)

    def of_values(self, values: Sequence[Any], depth: int = DEPTH) -> Caption:
        """The captions in several values, as of_value reads each."""
        return gathered(self.of_value(value, depth) for value in values)

    def of_fields(self, fields: Mapping[str, Any]) -> list[Any]:
        """The values of the first caption field that has one which is not blank, or of its numbered fields."""
        return [
            fields[name] for name in self.fields_of([n for n, value in fields.items() if not self._is_blank(value)])
        ]

    def fields_of(self, names: Sequence[str]) -> list[str]:
        """Which of these names are the captions', in order: of the first of `fields` that is there, in capitals or not, the
        name itself and then those with a number behind it. `field` instead of FIELDS means that name as it is written, and
        its numbered ones only where it is not there. []: none."""
        texts = [name for name in names if isinstance(name, str)]
        if self.field is not None:
            return [self.field] if self.field in texts else self._numbered(texts, self.field)
        for field in self.fields:
            plain = [field] if field in texts else [name for name in texts if name.lower() == field][:1]
            if found := plain + self._numbered(texts, field):
                return found
        return []

    def _is_blank(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return not value or (self.captions != FIRST and all(self._is_blank(one) for one in value))
        return value is None or (isinstance(value, str) and not value.strip())

    def _numbered(self, names: Sequence[str], field: str) -> list[str]:
        """The field's numbered names in the order of their numbers."""
        found = []
        for name in names if self.captions != FIRST else ():
            start, rest = name[: len(field)], name[len(field) :]
            number = _NUMBER.fullmatch(rest)
            if number and (start == field or (self.field is None and start.lower() == field)):
                found.append((int(number[1]), name))
        return [name for _, name in sorted(found)]


def gathered(found: Iterable[Caption]) -> Caption:
    """All the texts of these; the problem is the first one's that has any."""
    every = list(found)
    problem = next((caption.problem for caption in every if caption.problem), "")
    return Caption(tuple(itertools.chain.from_iterable(caption.texts for caption in every)), problem)


def first(found: Iterable[Caption]) -> Caption:
    """The first of these that has text; else the first that could not be used, which says why."""
    unusable = Caption()
    for caption in found:
        if caption.texts:
            return caption
        if not unusable.problem:
            unusable = caption
    return unusable


def _of_text(value: Any) -> Caption:
    """The one caption that is a value: text or its bytes; none if it is nothing or blank."""
    if value is None:
        return Caption()
    try:
        if isinstance(value, bytes):
            value = decoded(value)
        if not isinstance(value, str):
            return Caption(problem=f"a {type(value).__name__}, not text")
        if SEPARATOR in value:
            return Caption(problem="holds NUL characters; UTF-16 without a byte order mark?")
        value.encode()  # half of a surrogate pair cannot be stored
        text = value.strip()
        return Caption((text,)) if text else Caption()
    except ValueError as error:
        return Caption(problem=str(error)[:200])


def decoded(data: bytes, errors: str = "strict") -> str:
    """Text of bytes. errors: as in bytes.decode, for UTF-8 without a mark. Raises ValueError for an unknown encoding."""
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode(errors=errors)
