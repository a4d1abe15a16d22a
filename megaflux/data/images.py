"""Image bytes of unknown origin -> an RGB picture at a bucket's size, or a reason why they cannot be used."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from megaflux.common.errors import one_line
from megaflux.data import icc, png
from megaflux.data.buckets import Bucket

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns up to twice as many; more are refused here
MAX_ASPECT = 4.0  # of training pictures; beyond it a crop to the widest usual canvas would keep less than half
MIN_SIDE = 16  # px; below it there is nothing to learn from, whatever the upscaling
ENCODINGS = ("png", "jpeg", "webp")

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # what matters is raised as well

# Raster formats that Pillow decodes itself. Left out on purpose: EPS (runs Ghostscript), WMF, FITS, PDF.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1")  # how phones' pictures begin

REASONS = {
    "empty": "the file has no bytes",
    "not_an_image": "not an image in a known format",
    "damaged": "cut short or corrupted",
    "too_many_pixels": "more pixels than the limit",
    "extreme_ratio": "too long and narrow",
    "too_small": "would have to be enlarged",
    "missing_image": "a caption without an image",
    "extra_image": "another image of the same sample is used",
    "duplicate_key": "an earlier item has the same key",
    "unreadable": "the file or folder cannot be opened",
    "bad_reference": "one of its reference pictures cannot be used",
}

NOTES = {
    "first_frame": "several frames, the first is used",
    "rotated": "turned upright as its EXIF says",
    "transparent": "transparent, put on white",
    "rescaled": "more than 8 bits a channel, rescaled",
    "icc_profile": "converted to sRGB by its colour profile",
    "icc_invalid": "its colour profile cannot be used and is ignored",
    "metadata_dropped": "its metadata are damaged or too large and are ignored",
}


class BadImage(Exception):
    """An image that cannot be used. `reason` is one of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:
        return type(self), (self.reason, self.detail)


def decode(data: bytes, max_pixels: int = MAX_PIXELS, max_aspect: float = MAX_ASPECT) -> tuple[Image.Image, list[str]]:
    """Decode image bytes to an upright picture in sRGB on white.

    EXIF orientation is applied, an ICC profile too, CMYK converted, 16 bits rescaled to 8, transparency composited on
    white, and of several frames the first is taken. Returns the picture (mode RGB) and notes on what was done, each a key
    of NOTES.

    max_aspect: most times that one side may be the other. Raises BadImage, with a reason of REASONS, when there is no
    usable picture in `data`. The header's number of pixels is checked before anything of that size is allocated.
    """
    notes: list[str] = []
    image = decode_raw(data, max_pixels, notes, max_aspect)
    return to_rgb(image, notes), notes


def decode_raw(
    data: bytes, max_pixels: int = MAX_PIXELS, notes: list[str] | None = None, max_aspect: float = MAX_ASPECT
) -> Image.Image:
    """Decode image bytes to a picture as it is stored, in its own mode and not turned. Of several frames the first is
    taken, and noted in `notes`, as is that metadata were dropped. Raises BadImage as `decode` does."""
    if not data:
        raise BadImage("empty")
    notes = [] if notes is None else notes
    try:
        return _decode_raw(data, max_pixels, max_aspect, notes)
    except BadImage as bad:
        # Pillow refuses a PNG for its text (over 1 MB, or a wrong checksum), its profile or its animation, whose pixels are
        # good; before the pixels begin, as a file that it does not know.
        if bad.reason not in ("damaged", "not_an_image") or (plain := png.without_metadata(data)) == data:
            raise
    image = _decode_raw(plain, max_pixels, max_aspect, [])
    notes[:] = ["metadata_dropped"]
    return image


def _decode_raw(data: bytes, max_pixels: int, max_aspect: float, notes: list[str]) -> Image.Image:
    with strict_pillow(max_pixels):
        image = _open(data, max_pixels, max_aspect)
        try:
            if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a still and its preview
                notes.append("first_frame")
            # open() reads the header only: a file that was cut short shows here.
            if "first_frame" in notes:
                image.seek(0)
            image.load()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage("too_many_pixels", str(error)) from None
        except Exception as error:
            raise BadImage("damaged", _short(error)) from None
        return image


def upright(image: Image.Image) -> Image.Image:
    """A picture turned by its EXIF orientation, in its own mode."""
    return _upright(image, [])


def without_profile(image: Image.Image) -> Image.Image:
    """A copy without its ICC profile: of a control map, whose values are depths or edges, not colours."""
    image = image.copy()
    image.info.pop("icc_profile", None)
    return image


def to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """A decoded picture, upright and in sRGB (mode RGB) on white. Adds notes as `decode` returns them."""
    return _to_rgb(_upright(image, notes), notes)


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture, in its own mode, at exactly `size` (width, height): resized (Lanczos) to cover it and cropped around the
    centre, in one resampling. The same picture if it has that size."""
    if image.size == tuple(size):
        return image
    return image.resize(size, Image.Resampling.LANCZOS, box=crop_box(image.size, size))


def crop_box(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom), in px of a picture of `source` (width, height): the largest part of it, around its centre,
    that has the ratio of `size`. It lies within the picture, which Pillow demands, whatever the rounding."""
    (width, height), (wanted_width, wanted_height) = source, size
    scale = max(wanted_width / width, wanted_height / height)
    crop_width, crop_height = wanted_width / scale, wanted_height / scale
    left, top = (width - crop_width) / 2, (height - crop_height) / 2  # rounding can make it -1e-14
    return max(left, 0.0), max(top, 0.0), min(left + crop_width, width), min(top + crop_height, height)


def fit(image: Image.Image, bucket: Bucket, allow_upscale: bool = False) -> tuple[Image.Image, list[str]]:
    """Resize (Lanczos) to cover the bucket's canvas and crop around the centre.

    Returns the picture at exactly the bucket's size, and notes (["upscaled"] or []). Raises
    BadImage("too_small") if it would have to be enlarged and `allow_upscale` is false.
    """
    width, height = image.size
    scale = max(bucket.width / width, bucket.height / height)
    if min(width, height) < MIN_SIDE or (scale > 1 and not allow_upscale):
        raise BadImage("too_small", f"{width}x{height} for {bucket}")
    if (width, height) == bucket.size:
        return image, []
    return cover(image, bucket.size), ["upscaled"] if scale > 1 else []


def encode(image: Image.Image, encoding: str, quality: int) -> bytes:
    """RGB picture -> file bytes, the same bytes for the same picture.

    encoding: one of ENCODINGS. quality: 1 to 100, for jpeg and webp. PNG is written at the fastest level, because the
    shards are compressed as a whole.
    """
    buffer = io.BytesIO()
    if encoding == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif encoding == "jpeg":
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    elif encoding == "webp":
        image.save(buffer, "WEBP", quality=quality, method=4)
    else:
        raise ValueError(f"unknown image encoding {encoding!r}, one of {ENCODINGS}")
    return buffer.getvalue()


@contextlib.contextmanager
def strict_pillow(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Have Pillow raise an error above our pixel limit, and for truncated files instead of filling them with grey."""
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like: the picture decides
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def _open(data: bytes, max_pixels: int, max_aspect: float) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        known = "HEIC; convert it to JPEG" if data[4:12] in HEIC else f"starts with {data[:12]!r}"
        raise BadImage("not_an_image", known) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage("too_many_pixels", str(error)) from None
    except Exception as error:
        raise BadImage("damaged", _short(error)) from None
    if image.format == "TIFF":
        _silence_tiff()
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height}, the limit is {max_pixels} pixels")
    if min(width, height) < 1 or max(width, height) > max_aspect * min(width, height):
        raise BadImage("extreme_ratio", f"{width}x{height}, at most {max_aspect:g}:1 is taken")
    return image


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken EXIF
            turned = image.getexif().get(0x0112, 1) not in (0, 1)
            image = ImageOps.exif_transpose(image)
    except Exception:
        return image
    if turned:
        notes.append("rotated")
    return image


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        notes.append("rescaled")
        profile = image.info.get("icc_profile")
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
        image.info["icc_profile"] = profile
    image = icc.to_srgb(image, notes)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer)
    image = image.convert("RGB")
    image.info.pop("icc_profile", None)  # no longer, or never, that of these pixels; Pillow would write it into files
    return image


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits (uint16, int32 or float32) -> uint8 of the same shape.

    Pillow's own conversion clips: it saturates all but the lowest 256 of 65,536 grey levels. Integers
    are taken as 16-bit and divided by 257. Floats have no fixed range: 0..1, 0..255 and 0..65535 are
    recognised, and any other is stretched from its own minimum to its maximum.
    """
    integers = values.dtype.kind in "iu"
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise BadImage("damaged", "pixel values that are not finite")
    low, high = grey.min(), grey.max()
    if not integers and low >= 0 and high <= 1:
        scaled = grey * 255
    elif not integers and low >= 0 and high <= 255:
        scaled = grey
    elif low >= 0 and high <= 65535:
        scaled = grey / 257
    else:
        scaled = (grey - low) * (255 / (high - low)) if high > low else np.zeros_like(grey)
    return np.rint(scaled).astype(np.uint8)


def _short(error: Exception) -> str:
    return one_line(error) or type(error).__name__


@functools.cache
def _silence_tiff() -> None:
    """Keep libtiff from writing its warnings to stderr, between other lines; what matters is raised as an error.

    Pillow has no setting for it, so the handlers of the libtiff that it has loaded are removed (TIFFSetWarningHandler(3)).
    Nothing is done where the library is not found.
    """
    with contextlib.suppress(OSError, AttributeError, UnicodeError), open("/proc/self/maps") as maps:
        for path in {line.split(maxsplit=5)[-1].strip() for line in maps if "libtiff" in line}:
            library = ctypes.CDLL(path)
            for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
                remove = getattr(library, name)
                remove.argtypes, remove.restype = [ctypes.c_void_p], ctypes.c_void_p
                remove(None)
