"""What a source of images provides: a list of items, cheap and in a fixed order, and their contents."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from megaflux.data.images import BadImage
from megaflux.data.writing.captions import Caption

MOST_SUFFIXES = 20  # named of the files left aside; numbered files ("scan.0001") have one each


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet read.

    key: its name, unique in the source. split_key: decides between training and held-out; items that share it stay
    together. where: the source's own address of the bytes. size: bytes, part of the source's fingerprint. problem: a
    reason of images.REASONS that is known without reading, or None. held_out: whether it is, where the source decides; None: by
    hash of split_key.
    """

    key: str
    split_key: str
    where: tuple
    size: int
    problem: str | None = None
    held_out: bool | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference picture of an image, as read.

    image: the bytes of an image file, a picture that a source drew itself (mode RGB), or why it cannot be read. name: which
    picture it is, "" if unknown. strength: factor on its tokens' attention, 1 unless the source gives one.
    """

    image: bytes | Image.Image | BadImage
    name: str = ""
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """One image as read: the bytes of an image file, or a picture that a source drew itself (mode RGB)."""

    image: bytes | Image.Image
    caption: Caption = Caption()
    references: tuple[Reference, ...] = ()


class Source(Protocol):
    """Where images come from. kind: its name. attribution: the credit that its pictures ask for, if any."""

    @property
    def kind(self) -> str: ...

    @property
    def attribution(self) -> str | None: ...

    @property
    def has_references(self) -> bool:
        """After `list_items`: whether any item has references, so that the dataset gets a column of them."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """After `list_items`: what dataset.json says of the source beside its kind, as plain data."""
        ...

    def list_items(self) -> list[Item]:
        """All items in an order that depends on the source's contents only. Decodes nothing."""
        ...

    def remarks(self) -> list[str]:
        """After `list_items`: what the source has that is not an item, human-readable, one line each."""
        ...

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The contents of consecutive items, one result for each, in order."""
        ...

    def together(self, item: Item) -> object:
        """Consecutive items with equal values are read best by one process, in order."""
        ...


@dataclass
class LeftAside:
    """Files that are not read, by suffix, and those of them that look like captions, by name."""

    suffixes: Counter[str] = field(default_factory=Counter)
    caption_like: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Lines of another kind."""

    def add(self, name: str) -> None:
        """Count a file by its suffix; "hidden" for a name that begins with a dot."""
        file = name.rpartition("/")[2]
        suffix = os.path.splitext(file)[1].lower()
        self.suffixes["hidden" if file.startswith(".") else suffix or "without a suffix"] += 1

    def lines(self) -> list[str]:
        """Human-readable, one line for each kind of remark."""
        lines = list(self.others)
        if self.suffixes:
            common = self.suffixes.most_common(MOST_SUFFIXES)
            rest = self.suffixes.total() - sum(count for _, count in common)
            counts = [f"{count} {suffix}" for suffix, count in common] + [f"{rest} with other suffixes"] * bool(rest)
            lines.append(f"left aside: {', '.join(counts)}")
        if self.suffixes.keys() & {".heic", ".heif"}:
            lines.append("HEIC pictures are not read: convert them to JPEG, say with heif-convert or sips")
        if self.caption_like:
            some = ", ".join(self.caption_like[:5]) + (", ..." if len(self.caption_like) > 5 else "")
            lines.append(f"not used, though they may hold captions: {len(self.caption_like)} files ({some})")
        return lines


def printable(name: str) -> str:
    """A file name as a key: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def folded(name: str) -> str:
    """A name with letters and accents composed (Unicode's NFC), for comparison."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)
