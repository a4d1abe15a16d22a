"""Size of the cache of data.cache, for the run that makes it and for `--dry-run`.

For a picture of H x W px it holds latents (C, H/8, W/8), C the VAE's channels, and hidden states (S, D), S tokens of the cut
chat turn and D Qwen2-VL's width, in the run's dtype and uncompressed. A cache of only one kind also holds the picture's file, from
which each update computes the other kind; so does one of both where pictures are seen with words too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megaflux.common.errors import UserError
from megaflux.config.schema import Config
from megaflux.data.buckets import Bucket
from megaflux.data.storage.parts import Part
from megaflux.models.latents import VAE_SCALE
from megaflux.models.pretrained import Models
from megaflux.training.ds_config import compute_dtype
from megaflux.training.planning.costs import token_counts, vae_config

LARGE = 3_000_000  # pictures in a full training set
MARGIN = 1.02  # keys, captions, shards' headers, rounding up to blocks
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class CacheSize:
    """Size of a cache of these kinds."""

    kinds: tuple[str, ...]
    dtype: torch.dtype
    per_picture: Mapping[Bucket, int]
    """Bucket -> bytes of the arrays of one picture."""
    keeps_pictures: bool
    """Whether the pictures' files are in the cache too."""

    @property
    def precision(self) -> str:
        """The dtype's name: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    def mean(self, counts: Mapping[Bucket, int] | None = None) -> float:
        """Mean bytes of the arrays of a picture. counts: bucket -> pictures, the weights of the mean; None: equal weights."""
        weights = {bucket: 1 if counts is None else counts.get(bucket, 0) for bucket in self.per_picture}
        total = sum(weights.values())
        return sum(weights[bucket] * size for bucket, size in self.per_picture.items()) / total if total else 0.0

    def of_parts(self, parts: Sequence[Part]) -> int:
        """Bytes that parts of a dataset take in the cache."""
        arrays = sum(part.shard["samples"] * self.per_picture[part.bucket] for part in parts)
        pictures = sum(part.shard["raw_data"]["bytes"] for part in parts) if self.keeps_pictures else 0
        return arrays + pictures

    def describe(self, parts: Sequence[Part]) -> str:
        """One line on the cache of these parts, which are a whole dataset."""
        counts: dict[Bucket, int] = {}
        for part in parts:
            counts[part.bucket] = counts.get(part.bucket, 0) + part.shard["samples"]
        pictures, total = sum(counts.values()), self.of_parts(parts)
        files = " beside its own file" if self.keeps_pictures else ""
        return (
            f"caching {' and '.join(self.kinds)}: {self.precision}, {megabytes(self.mean(counts))} a picture{files}, "
            f"{pictures:,} pictures, {gigabytes(total)}; {LARGE:,} pictures would take "
            f"{gigabytes(total / max(1, pictures) * LARGE)}"
        )

    def estimated(self) -> str:
        """One line on the cache before there are pictures to count: equal weights, without the pictures' files."""
        files = ", beside the pictures' own files" if self.keeps_pictures else ""
        return (
            f"Cache of {' and '.join(self.kinds)}: {self.precision}, {megabytes(self.mean())} a picture in the mean of the "
            f"buckets; {LARGE:,} pictures take {gigabytes(self.mean() * LARGE)} of data.path's disk{files}"
        )

    def as_json(self) -> dict[str, Any]:
        """For the dry run's report: equal weights, without the pictures' files."""
        return {
            "kinds": list(self.kinds),
            "dtype": self.precision,
            "mb_per_image": self.mean() / 1e6,
            "gb_for_3m_images": self.mean() * LARGE / 1e9,
        }


def shapes(kinds: Sequence[str], bucket: Bucket, channels: int, turn: int, width: int) -> Shapes:
    """Column of the cache -> shape of one picture's array. channels: of latents; turn: tokens of the cut chat turn; width:
    of Qwen2-VL."""
    found: Shapes = {}
    if "latents" in kinds:
        found["latents"] = channels, bucket.height // VAE_SCALE, bucket.width // VAE_SCALE
    if "trunk" in kinds:
        found["hidden_states"] = turn, width
    return found


def cached_shapes(models: Models, kinds: Sequence[str], bucket: Bucket) -> Shapes:
    """`shapes` of a bucket by the loaded models, whose trunk may have been released."""
    trunk = models.trunk
    vae: Any = models.vae
    turn = len(trunk.turn("image", (bucket.height, bucket.width)).input_ids)
    return shapes(kinds, bucket, vae.config.latent_channels, turn, trunk.config.text_config.hidden_size)


def size_of_run(config: Config, models: Models, buckets: Sequence[Bucket]) -> CacheSize:
    """Size of the cache that a run with these models makes for pictures of these buckets."""
    vae: Any = models.vae
    kinds, dtype = tuple(config.data.cache), vae.dtype
    per_picture = {b: _bytes(cached_shapes(models, kinds, b), dtype) for b in buckets}
    return CacheSize(kinds, dtype, per_picture, config.cache_keeps_pictures)


def size_of_config(config: Config, ds_config: dict[str, Any], trunk: Any, buckets: Sequence[Bucket]) -> CacheSize:
    """The same without loaded models. trunk: the one of `meta_models`."""
    kinds, dtype = tuple(config.data.cache), compute_dtype(ds_config)
    given = vae_config(config)["latent_channels"], trunk.config.text_config.hidden_size
    per_picture = {
        b: _bytes(shapes(kinds, b, given[0], token_counts(config, b).turn, given[1]), dtype) for b in buckets
    }
    return CacheSize(kinds, dtype, per_picture, config.cache_keeps_pictures)


def check_room(root: Path, size: CacheSize, todo: Sequence[Part]) -> None:
    """Raise UserError if the disk of the cache's folder, which need not exist yet, has no room for the missing parts. Raises
    OSError if the disk's free space cannot be read."""
    disk = os.statvfs(next(folder for folder in (root, *root.parents) if folder.exists()))
    free, need = disk.f_bavail * disk.f_frsize, int(MARGIN * size.of_parts(todo))
    if free < need:
        fewer = "cache fewer kinds or " if len(size.kinds) > 1 else ""
        raise UserError(
            f"data.cache: {root} has {gigabytes(free)} free, and the missing part of the cache needs {gigabytes(need)}; make "
            f"room there, {fewer}train with --data.cache none"
        )


def megabytes(size: float) -> str:
    """Bytes as text: "3.47 MB"."""
    return f"{size / 1e6:.3g} MB"


def gigabytes(size: float) -> str:
    """Bytes as text, in GB, or in TB from 1000 GB: "12 TB"."""
    return f"{size / 1e12:.3g} TB" if size >= 999.5e9 else f"{size / 1e9:.3g} GB"


def _bytes(found: Shapes, dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(math.prod(shape) for shape in found.values())
