"""Samples as stored -> one micro-batch of tensors."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import from_numpy

STORED = ("PNG", "JPEG", "WEBP")  # what prepare writes; Pillow would hand other formats to other programs


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. B: samples; all from one bucket. What the shards lack is None."""

    keys: list[str]
    captions: list[str]
    bucket: Bucket
    pixel_values: torch.Tensor | None  # uint8 (B, 3, H, W), RGB
    latents: torch.Tensor | None  # (B, C, h, w), of cached shards
    hidden_states: torch.Tensor | None  # (B, S, D), the frozen trunk's output, of cached shards
    replaced: list[str] = field(default_factory=list)  # a text for each sample that stands in for a bad one

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; copies from pinned memory do not wait."""
        names = ("pixel_values", "latents", "hidden_states")
        tensors = {name: getattr(self, name) for name in names}
        moved = {n: None if x is None else x.to(device, non_blocking=True) for n, x in tensors.items()}
        return replace(self, **moved)


def decode_image(sample: dict[str, Any], bucket: Bucket) -> torch.Tensor:
    """The stored image file -> uint8 (3, H, W). Raises UserError for another size than the bucket's, and
    whatever Pillow raises for a file that it cannot decode."""
    with Image.open(io.BytesIO(sample["image"]), formats=STORED) as image:
        if image.size != (bucket.width, bucket.height):  # before a damaged header makes it decode a gigapixel
            size = f"{image.width}x{image.height}"
            raise UserError(f"sample {sample['key']!r}: an image of {size} in the bucket {bucket}")
        if image.format == "PNG":
            # Holds every chunk against its checksum, in a twentieth of the time that decoding takes. Decoding alone
            # makes a picture of a file that ends in zeros, as a disk may leave it after a power cut.
            image.verify()
    with Image.open(io.BytesIO(sample["image"]), formats=STORED) as image:  # verify() leaves it unusable
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def collate(samples: Sequence[dict[str, Any]], buckets: Sequence[Bucket]) -> dict[str, Any]:
    """Samples of one bucket -> the fields of a Batch, with the bucket's number for the bucket.

    Each sample is as MDS gives it (key, caption, and image bytes or arrays) plus its "bucket", a number. Those of
    megaflux.data.reading.quarantine have "pixel_values" for the image, and may have "replaced" or be only a "failure", which
    is then the only field. Raises RuntimeError for samples of different buckets, UserError for an image of the wrong
    size.
    """
    for sample in samples:
        if "failure" in sample:
            return {"failure": sample["failure"]}
    numbers = {sample["bucket"] for sample in samples}
    if len(numbers) != 1:
        raise RuntimeError(f"a batch over several buckets: {[str(buckets[n]) for n in sorted(numbers)]}")
    number = numbers.pop()
    fields: dict[str, Any] = {
        "keys": [sample["key"] for sample in samples],
        "captions": [sample["caption"] for sample in samples],
        "bucket": number,
        "pixel_values": None,
        "replaced": [sample["replaced"] for sample in samples if "replaced" in sample],
    }
    if "pixel_values" in samples[0]:
        fields["pixel_values"] = torch.stack([sample["pixel_values"] for sample in samples])
    elif "image" in samples[0]:
        fields["pixel_values"] = torch.stack([decode_image(sample, buckets[number]) for sample in samples])
    for name in ("latents", "hidden_states"):
        present = name in samples[0]
        fields[name] = torch.stack([from_numpy(sample[name]) for sample in samples]) if present else None
    return fields
