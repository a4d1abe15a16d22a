"""PNG files whose metadata stop Pillow, although their pixels are whole."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PROFILE_LIMIT = 1 << 20  # bytes of a profile, unpacked; what Pillow allows

_KEPT = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf"}  # pixels, transparency, orientation


def without_metadata(data: bytes) -> bytes:
    """A PNG file with no other chunks than those of its (first) picture: no text, no animation, and a colour profile
    only if it is not too large. Chunks are copied as they are, damaged ones too. Anything but a PNG is returned as it is.

    Source: W3C, Portable Network Graphics, third edition, sections 5.3 and 11.
    """
    if not data.startswith(SIGNATURE):
        return data
    return SIGNATURE + b"".join(chunk for kind, chunk in _chunks(data) if kind in _KEPT or _small_profile(kind, chunk))


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, the whole chunk) of each chunk; the last one may be cut short."""
    start = len(SIGNATURE)
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4].rjust(4, b"\0"))
        end = start + 12 + length
        yield data[start + 4 : start + 8], data[start:end]
        start = end


def _small_profile(kind: bytes, chunk: bytes) -> bool:
    if kind != b"iCCP":
        return False
    body = chunk[8:-4]
    name = bytes(itertools.takewhile(bool, body[:80]))
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(body[len(name) + 2 :], PROFILE_LIMIT)  # after the name: its end and the method of compression
    except zlib.error:
        return False
    return unpack.eof
