"""The reference pictures of a sample: one column of bytes holds them all, since their number differs from sample to sample.

    uint32, little endian: length of the header
    header: JSON, a list of {"name", "strength", "bytes"}, one for each reference, in order
    the files of the references (png, jpeg or webp), one after the other

A sample without references has an empty column. Its target is then its own reference.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megaflux.data.tensors import from_reference

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class StoredReference:
    """A reference as a shard holds it."""

    name: str
    """Which picture it is: a file's name, or the key of another sample. "": unknown."""
    data: bytes
    """A png, jpeg or webp file, at most the dataset's longest side on each side."""
    strength: float = 1.0
    """Factor on the attention that its tokens get, as in generation."""


class ReferencePicture(NamedTuple):
    """A reference as training reads it."""

    pixel_values: Tensor
    """uint8 (3, H, W), RGB."""
    strength: float
    name: str


def pack(references: Sequence[StoredReference]) -> bytes:
    """References -> the column's bytes; b"" for none."""
    if not references:
        return b""
    header = [{"name": one.name, "strength": one.strength, "bytes": len(one.data)} for one in references]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(encoded)), encoded, *(one.data for one in references)])


def unpack(column: bytes) -> list[StoredReference]:
    """The inverse of pack. ValueError for bytes that are not such a column."""
    if not column:
        return []
    try:
        (length,) = _LENGTH.unpack_from(column)
        start = _LENGTH.size + length
        found = []
        for entry in json.loads(column[_LENGTH.size : start]):
            name, strength, size = entry["name"], float(entry["strength"]), entry["bytes"]
            if not (isinstance(name, str) and 0 < strength < math.inf and size > 0):
                raise ValueError(f"a reference {entry}")
            found.append(StoredReference(name, column[start : start + size], strength))
            start += size
    except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a column of references ({type(error).__name__}: {error})") from None
    if start != len(column):
        raise ValueError(f"references of {start} bytes in a column of {len(column)}")
    return found


def decoded(column: bytes) -> list[ReferencePicture]:
    """The references of a sample as pictures. Raises ValueError as unpack, and whatever Pillow raises for a file that it cannot
    decode."""
    return [ReferencePicture(from_reference(one.data), one.strength, one.name) for one in unpack(column)]
