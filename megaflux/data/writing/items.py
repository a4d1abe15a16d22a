"""What a source of images provides: a list of items, cheap and in a fixed order, and their contents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from megaflux.data.images import BadImage

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".ppm",
    ".tga",
)
CAPTION_SUFFIXES = (".txt", ".json")  # the first one found wins
CAPTION_FIELDS = ("caption", "text")  # in a .json file and in parquet; the first one found wins


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet read.

    key: its name, unique in the source. split_key: decides between training and held-out; items that share it stay
    together. where: the source's own address of the bytes. size: bytes, part of the source's fingerprint. problem: a
    reason of images.REASONS that is known without reading, or None.
    """

    key: str
    split_key: str
    where: tuple
    size: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """One image as read: the bytes of an image file, or a picture that a source drew itself (mode RGB)."""

    image: bytes | Image.Image
    caption: str


class Source(Protocol):
    """Where images come from. kind: its name. attribution: the credit that its pictures ask for, if any."""

    @property
    def kind(self) -> str: ...

    @property
    def attribution(self) -> str | None: ...

    def list_items(self) -> list[Item]:
        """All items in an order that depends on the source's contents only. Decodes nothing."""
        ...

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The contents of consecutive items, one result for each, in order."""
        ...


def parse_caption(data: bytes, suffix: str) -> str:
    """The caption in the bytes of a .txt or .json file beside an image ("" if the JSON has none).

    Raises BadImage("bad_caption") if it is not UTF-8 text or not a JSON object.
    """
    try:
        text = data.decode("utf-8-sig")
        if suffix == ".json":
            fields = json.loads(text)
            text = next((fields[name] for name in CAPTION_FIELDS if fields.get(name) is not None), "")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadImage("bad_caption", str(error)[:200]) from None
    return check_caption(text)


def check_caption(caption: object) -> str:
    """A caption without surrounding white space. Raises BadImage if it is not text that UTF-8 can encode."""
    if not isinstance(caption, str):
        raise BadImage("bad_caption", f"a {type(caption).__name__}, not text")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise BadImage("bad_caption", str(error)) from None
    return caption.strip()
