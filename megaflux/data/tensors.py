"""Stored bytes, pictures and arrays -> tensors, and back."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.images import decode

STORED = ("PNG", "JPEG", "WEBP")  # what prepare writes; Pillow would hand other formats to other programs


def from_picture(picture: Image.Image) -> torch.Tensor:
    """An RGB picture -> uint8 (3, H, W), a view of memory in the order H, W, 3."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def from_image(data: bytes) -> torch.Tensor:
    """An image file of any known format, upright and on white -> uint8 (3, H, W), contiguous.

    Raises BadImage as images.decode does."""
    picture, _ = decode(data)
    return from_picture(picture).contiguous()


def from_stored_image(data: bytes, bucket: Bucket, key: str) -> torch.Tensor:
    """The image file of a stored sample -> uint8 (3, H, W), a view as from_picture's. key: the sample's.

    Raises UserError if the image does not have the bucket's size, and whatever Pillow raises for a file that it cannot
    decode.
    """
    with Image.open(io.BytesIO(data), formats=STORED) as image:
        if image.size != bucket.size:  # before a damaged header makes it decode a gigapixel
            raise UserError(f"sample {key!r}: an image of {image.width}x{image.height} in the bucket {bucket}")
    return _decoded(data)


def from_reference(data: bytes) -> torch.Tensor:
    """The image file of a stored reference, of any size -> uint8 (3, H, W), as from_stored_image."""
    return _decoded(data)


def _decoded(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data), formats=STORED) as image:
        if image.format == "PNG":
            # Compares every chunk with its checksum, in a twentieth of the time that decoding takes. Decoding alone
            # accepts a file that ends in zeros, as a disk may leave it after a power cut.
            image.verify()
    with Image.open(io.BytesIO(data), formats=STORED) as image:  # verify() leaves it unusable
        return from_picture(image.convert("RGB"))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor -> an array of the same bits and shape; bfloat16 becomes uint16, which NumPy has."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def from_array(array: np.ndarray) -> torch.Tensor:
    """The inverse of to_array: uint16 becomes bfloat16 of the same bits. Copies."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
