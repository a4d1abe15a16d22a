"""Sizes of a run of gpu-first: FLUX.1-dev's on a GPU, or those of a test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megaflux.bench.sizes import Sizes, published
from megaflux.data.buckets import ASPECT_RATIOS, Bucket, make_buckets
from megaflux.models.latents import TOKEN_PIXELS
from megaflux.models.tokens import Tokens, count_tokens
from megaflux_kernels.bench.machine import default_device

SMALL_SIDE = 128  # px, of a test's pictures: the smallest at which the five ratios differ


@dataclass(frozen=True)
class Setting:
    """What a run of gpu-first measures with."""

    small: bool
    """Sizes that a CPU does in seconds."""
    work: Path
    """For data and runs of the training loop."""

    @property
    def device(self) -> torch.device:
        return default_device()

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def samples(self) -> int:
        return 2 if self.small else 8

    @property
    def warmup(self) -> int:
        return 1 if self.small else 3

    def pictures(self) -> list[tuple[Bucket, Tokens]]:
        """The buckets with their token counts, the square first."""
        buckets = make_buckets(ASPECT_RATIOS, SMALL_SIDE if self.small else 1024)
        largest_first = sorted(buckets, key=lambda bucket: -bucket.height * bucket.width)
        return [(bucket, count_tokens(bucket.height, bucket.width)) for bucket in largest_first]

    def square(self) -> Tokens:
        return self.pictures()[0][1]

    def flux(self, text: int | None = None, batch: int = 1) -> Sizes:
        """Stage 1 of the published recipe, with the square's condition tokens unless another number is given."""
        text = self.square().condition if text is None else text
        if self.small:
            return Sizes(2, 2, 2, 32, 64, text, batch, "attention", published(2, 2))
        return Sizes(19, 38, 24, 128, 4096, text, batch, "attention", published(19, 38))


def grid(bucket: Bucket) -> tuple[int, int]:
    """Rows and columns of a bucket's image tokens."""
    return bucket.height // TOKEN_PIXELS, bucket.width // TOKEN_PIXELS
