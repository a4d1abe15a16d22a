"""Pictures and sizes that come from a person -> what the models take."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.data import images, tensors
from megaflux.data.buckets import MULTIPLE, make_buckets

# width, height of the released tool, px, at a longest trained side of 1024
RELEASE_SIZES = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "2.4:1": (1536, 640),
    "3:4": (896, 1152),
    "4:3": (1152, 896),
}


def output_size(aspect: str, longest_side: int, sizes: str = "training") -> tuple[int, int]:
    """(height, width) in px of an aspect WIDTH:HEIGHT.

    sizes training: the longest side is the trained one, as the training bucket of that ratio has it, and any other
    ratio rounded like it. release: the released tool's table, of about equal areas, scaled to the longest trained
    side. UserError for what is not a ratio, and for one that the table lacks.
    """
    bucket = make_buckets([aspect], longest_side)[0]
    if sizes == "training":
        return bucket.height, bucket.width
    if aspect not in RELEASE_SIZES:
        raise UserError(
            f"aspect {aspect}: the released sizes are {', '.join(RELEASE_SIZES)}; use one or --sizes training"
        )
    width, height = (round_to_multiple(side * longest_side / 1024) for side in RELEASE_SIZES[aspect])
    return height, width


def matched_size(picture: Image.Image, longest_side: int) -> tuple[int, int]:
    """(height, width) in multiples of 16 px nearest to a picture's own, its longest side at most `longest_side`."""
    scale = min(1.0, longest_side / max(picture.size))
    width, height = (round_to_multiple(side * scale) for side in picture.size)
    return height, width


def round_to_multiple(length: float) -> int:
    """The nearest positive multiple of 16."""
    return max(MULTIPLE, MULTIPLE * int(length / MULTIPLE + 0.5))


def reference_tensor(picture: Image.Image, longest_side: int, name: str = "reference") -> tuple[Tensor, list[str]]:
    """(uint8 (1, 3, H, W), notes): a PIL picture upright, in RGB on white, scaled down to the longest side.

    A picture of that size or smaller keeps its pixels; bringing them to whole tokens is the image
    processor's.
    """
    notes: list[str] = []
    picture = upright_rgb(picture, name, notes)
    scale = longest_side / max(picture.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        notes.append(f"{name}: {picture.width}x{picture.height} scaled down to {size[0]}x{size[1]}")
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return tensors.from_picture(picture)[None], notes


def canvas(picture: Image.Image, height: int, width: int, name: str = "image") -> tuple[Image.Image, list[str]]:
    """(the picture upright, in RGB, at exactly width x height px; notes): scaled to cover, cropped around the centre."""
    notes: list[str] = []
    picture = upright_rgb(picture, name, notes)
    if picture.size != (width, height):
        notes.append(f"{name}: {picture.width}x{picture.height} brought to {width}x{height}")
        scale = max(width / picture.width, height / picture.height)
        cut_width, cut_height = width / scale, height / scale
        left, top = (picture.width - cut_width) / 2, (picture.height - cut_height) / 2
        box = (left, top, left + cut_width, top + cut_height)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return picture, notes


def upright_rgb(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """A PIL picture upright, in RGB on white; adds to `notes`. UserError for one of an extreme shape."""
    picture = images.to_rgb(picture, notes)
    if max(picture.size) > images.MAX_ASPECT * min(picture.size):
        raise UserError(f"{name}: {picture.width}x{picture.height}: {images.REASONS['extreme_ratio']}; crop it")
    return picture


def check_sampling(height: int, width: int, steps: int, guidance: float) -> None:
    """UserError for values that nothing can be sampled with."""
    for name, side in (("height", height), ("width", width)):
        if side < MULTIPLE or side % MULTIPLE:
            raise UserError(f"{name}: {side} px; use a positive multiple of {MULTIPLE}")
    if steps < 1:
        raise UserError(f"steps: {steps}; use at least 1")
    if not (0 <= guidance < float("inf")):
        raise UserError(f"guidance: {guidance}; use a number of at least 0")
