"""PIL pictures of any size and mode -> what the models take, with notes of what was done to them."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.data import images
from megaflux.data.reference_size import MAX_ASPECT, reference_size
from megaflux.data.tensors import from_picture


def reference_tensor(picture: Image.Image, longest_side: int, name: str = "reference") -> tuple[Tensor, list[str]]:
    """(pixels: uint8 (1, 3, H, W), upright, on white; notes). Scaled down to the longest side in px, never up.

    The sides are those of the picture: the image processor rounds them to whole tokens. UserError for an extreme
    aspect ratio.
    """
    picture, notes = upright_rgb(picture, name)
    width, height = reference_size(picture.size, longest_side)
    if picture.size != (width, height):
        notes.append(f"{name}: {picture.width}x{picture.height} scaled down to {width}x{height}")
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return from_picture(picture)[None], notes


def canvas(picture: Image.Image, height: int, width: int, name: str = "image") -> tuple[Image.Image, list[str]]:
    """(picture: upright, RGB, width x height px; notes). Scaled to cover that size and cropped around the centre.

    UserError for an extreme aspect ratio.
    """
    picture, notes = upright_rgb(picture, name)
    if picture.size != (width, height):
        notes.append(f"{name}: {picture.width}x{picture.height} brought to {width}x{height}")
    return images.cover(picture, (width, height)), notes


def upright_rgb(picture: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    """(picture: upright, RGB, on white; notes). UserError for an extreme aspect ratio."""
    done: list[str] = []
    picture = images.to_rgb(picture, done)
    if max(picture.size) > MAX_ASPECT * min(picture.size):
        raise UserError(
            f"{name}: {picture.width}x{picture.height}: {images.REASONS['extreme_ratio']}, at most {MAX_ASPECT:g}:1 is "
            "taken; crop it"
        )
    return picture, [f"{name}: {images.NOTES[note]}" for note in done]
