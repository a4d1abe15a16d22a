"""ICC profiles: the pixels of a picture, converted to sRGB, which is what the models were trained on."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms, features

CONVERTED = "icc_profile"  # a note: the pixels were converted
INVALID = "icc_invalid"  # a note: the profile was ignored

# The colour space that a profile describes (ICC.1:2022, table 19) -> the mode in which its pixels are handed over.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_SAME = 2  # levels of 255; a profile that moves no colour further is sRGB itself, and leaves the pixels as they are


def to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """A picture of 8 bits a channel in sRGB, by the ICC profile in its `info`.

    Returns the picture itself without a profile and where the profile is sRGB or cannot be used, else a picture of mode
    RGB, or RGBA if it has transparency. Adds "icc_profile" to `notes` for converted pixels, "icc_invalid" for a profile
    that cannot be used: unreadable, or of another colour space than the pixels. Relative colorimetric with black point
    compensation.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    base = "L" if grey else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    found = _transform(bytes(profile), base)
    if found == "invalid":
        notes.append(INVALID)
    if isinstance(found, str):
        return image
    transform, mode = found
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        converted = transform.apply(layer.convert(mode))
        converted.putalpha(layer.getchannel("A"))
    else:
        converted = transform.apply(image.convert(mode))
    notes.append(CONVERTED)
    return converted


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, base: str) -> str | tuple[ImageCms.ImageCmsTransform, str]:
    """(the transform to sRGB, the mode that it reads) for pixels of mode `base`; "same" if it is sRGB's, "invalid" if it
    cannot be used."""
    if not features.check("littlecms2"):  # a Pillow built without it
        return "invalid"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(opened.profile.xcolor_space.strip(), "")
        # Grey pixels may be described as red, green and blue alike; no other space stands for another.
        if mode != base and not (base == "L" and mode == "RGB"):
            return "invalid"
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        probe = _probe(mode)
        after = np.asarray(transform.apply(probe), int)
    except Exception:  # damaged profiles raise whatever Pillow or LittleCMS meet
        return "invalid"
    if mode in ("RGB", "L") and np.abs(after - np.asarray(probe.convert("RGB"), int)).max() <= _SAME:
        return "same"
    return transform, mode


def _probe(mode: str) -> Image.Image:
    """A picture of colours that are spread over the space."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    picture = Image.fromarray(colours)
    return picture if mode == "RGB" else picture.convert("CMYK") if mode == "CMYK" else Image.new(mode, (1, 1))
