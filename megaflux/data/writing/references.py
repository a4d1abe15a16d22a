"""References as a source gives them -> as a dataset stores them."""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from dataclasses import dataclass, field

from PIL import Image

from megaflux.config.data import MOST_REFERENCES
from megaflux.data.images import MIN_SIDE, BadImage, decode, encode
from megaflux.data.reference_size import MAX_ASPECT, reference_size
from megaflux.data.references import StoredReference
from megaflux.data.tensors import STORED
from megaflux.data.writing import pairing
from megaflux.data.writing.items import Loaded, Reference
from megaflux.data.writing.options import Options


@dataclass
class Kept:
    """The references of an image that can be used. bad: name and detail of each that cannot."""

    references: list[StoredReference] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)


def kept_references(loaded: Loaded, options: Options) -> Kept:
    """The references of an image, as a dataset stores them.

    Raises BadImage("bad_reference") where one cannot be used, or, with options.min_references, where fewer than so many can:
    the image is skipped then, rather than trained with a reference that it was not meant for.
    """
    kept = Kept()
    if len(loaded.references) > MOST_REFERENCES:
        raise BadImage("bad_reference", f"{len(loaded.references)} references, at most {MOST_REFERENCES} are taken")
    for number, reference in enumerate(loaded.references):
        name = reference.name or f"reference {number}"
        try:
            kept.references.append(stored(reference, options))
        except BadImage as error:
            kept.bad.append({"reference": name, "detail": str(error)})
    needed = len(loaded.references) if options.min_references is None else options.min_references
    if len(kept.references) < needed:
        what = "; ".join(f"{bad['reference']}: {bad['detail']}" for bad in kept.bad[:3])
        raise BadImage("bad_reference", what or f"{len(kept.references)} references, --min-references is {needed}")
    return kept


def stored(reference: Reference, options: Options) -> StoredReference:
    """A reference at the size at which generation would read it: at most the longest side, never enlarged, its own shape.

    Its file stays byte for byte as it is where there is nothing to do to it. Raises BadImage.
    """
    image = reference.image
    if isinstance(image, BadImage):
        raise image
    if not pairing.is_strength(reference.strength):
        raise pairing.bad_strength(reference.strength)
    data = _file(image, options) if isinstance(image, Image.Image) else _known.get(image, options)
    return StoredReference(reference.name, data, reference.strength)


def _file(image: bytes | Image.Image, options: Options) -> bytes:
    """The file that is stored of a picture, or of a file: the same bytes where there is nothing to do to it. Raises BadImage."""
    data, notes = None, list[str]()
    if isinstance(image, bytes):
        data = image
        image, notes = decode(image, options.max_pixels, MAX_ASPECT)
    if min(image.size) < 1 or max(image.size) < MIN_SIDE:
        raise BadImage("too_small", f"{image.width}x{image.height}")
    size = reference_size(image.size, options.longest_side)
    if data is None or notes or size != image.size or not _plain(data):
        if size != image.size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        data = encode(image, options.encoding, options.quality)
    return data


class _Known:
    """What became of the last files, since one picture may be a reference of thousands."""

    MOST, BYTES = 4096, 32 << 20  # kept at a time: files, and bytes of those that are stored otherwise than they came

    def __init__(self) -> None:
        self._files: OrderedDict[tuple, bytes | BadImage | None] = OrderedDict()  # None: stored as it is
        self._bytes = 0

    def get(self, data: bytes, options: Options) -> bytes:
        """_file(data, options)."""
        digest = hashlib.blake2b(data, digest_size=16).digest()
        key = (digest, options.longest_side, options.max_pixels, options.encoding, options.quality)
        if key in self._files:
            self._files.move_to_end(key)
            known = self._files[key]
        else:
            known = self._add(key, data, options)
        if isinstance(known, BadImage):
            raise BadImage(known.reason, known.detail)
        return data if known is None else known

    def _add(self, key: tuple, data: bytes, options: Options) -> bytes | BadImage | None:
        kept: bytes | BadImage | None
        try:
            kept = _file(data, options)
        except BadImage as error:
            kept = BadImage(error.reason, error.detail)  # without the frames and pictures of its traceback
        if kept is data:
            kept = None
        self._files[key] = kept
        self._bytes += _size(kept)
        while len(self._files) > self.MOST or self._bytes > self.BYTES:
            _, oldest = self._files.popitem(last=False)
            self._bytes -= _size(oldest)
        return kept


def _size(kept: bytes | BadImage | None) -> int:
    return len(kept) if isinstance(kept, bytes) else 0


_known = _Known()  # of this process


def _plain(data: bytes) -> bool:
    """Whether training reads the file just as `decode` does: of a stored format, RGB of 8 bits, without frames."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format in STORED and image.mode == "RGB" and "icc_profile" not in image.info
