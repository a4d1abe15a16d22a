"""Several captions of an image in one column: shards, caches and batches hold them as one text.

They are joined by NUL, which no caption may hold (megaflux.data.writing.captions refuses it). So one caption is stored as it
is, and datasets that have no image with several are what they were before there could be.
"""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = "\0"


def join(texts: Sequence[str]) -> str:
    """The captions of an image, in order, as stored; "" for none. ValueError for one that is empty or holds NUL."""
    if not all(texts) or any(SEPARATOR in text for text in texts):
        raise ValueError("a caption that is empty or holds NUL cannot be stored with others")
    return SEPARATOR.join(texts)


def split(stored: str) -> tuple[str, ...]:
    """The captions of an image from the column `caption`, in order; () where it has none."""
    return tuple(stored.split(SEPARATOR)) if stored else ()
