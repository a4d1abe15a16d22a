"""`--cache latents,trunk`: what the frozen networks say of each picture, computed once and trained from.

Writes a derived dataset (same layout, other columns) beside the images, under a name that is a fingerprint of all it
depends on: the images, the VAE's and the trunk's weights, sizes and dtype. A finished one is used as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megaflux.config import Config
from megaflux.data.buckets import Bucket
from megaflux.data.images import decode
from megaflux.data.shards import DatasetInfo, read_dataset_info, read_split, write_bucket, write_dataset
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models, weights_fingerprint
from megaflux.training.distributed import World, barrier, from_main

log = logging.getLogger("megaflux")
BATCH = 32


def cached_dataset(config: Config, models: Models, world: World) -> str:
    """The folder to train from: `data.path` itself, or its cache, made now if need be.

    The work is split over ranks by split and bucket. Only local shards can be cached.
    """
    kinds = config.data.cache
    if not kinds:
        return config.data.path
    info = read_dataset_info(config.data.path)
    train = info.counts.get("train", {})  # validation encodes its few itself
    info = dataclasses.replace(info, counts={"train": train})
    root = Path(config.data.path) / "cache" / _fingerprint(config, models, info)
    if not from_main((root / "dataset.json").exists(), world):
        started = time.monotonic()
        todo = [(split, b) for split, counts in info.counts.items() for b in info.buckets if counts.get(b.name)]
        columns: dict[str, str] = {}
        total = sum(info.counts[s][b.name] for s, b in todo[world.rank :: world.size])
        quiet = not world.is_main or not sys.stderr.isatty()  # a log file is spared the bar
        with tqdm(total=total, desc="caching " + " and ".join(kinds), unit="img", disable=quiet) as bar:
            for split, bucket in todo[world.rank :: world.size]:
                samples = _samples(config, models, split, bucket, bar)
                columns = write_bucket(root, split, bucket, samples)[1]
        barrier(world)
        if world.is_main:
            # The columns differ by bucket in their array shapes; the dataset's description names their kinds.
            write_dataset(
                root, dataclasses.replace(info, columns={name: e.split(":")[0] for name, e in columns.items()})
            )
            log.info("cached %s in %.0f s: %s", " and ".join(kinds), time.monotonic() - started, root)
        barrier(world)
    return str(root)


@torch.no_grad()
def _samples(config: Config, models: Models, split: str, bucket: Bucket, bar: tqdm) -> Iterator[dict[str, Any]]:
    kinds, rows = config.data.cache, []

    def computed() -> Iterator[dict[str, Any]]:
        pixel_values = torch.stack([to_tensor(row["image"]) for row in rows]).to(models.trunk.device)
        columns: dict[str, torch.Tensor] = {}
        if "latents" in kinds:
            columns["latents"] = latent_ops.encode(models.vae, pixel_values)
        if "trunk" in kinds:
            columns["hidden_states"] = models.trunk.encode(pixel_values).hidden_states
        for i, row in enumerate(rows):
            kept = {"key": row["key"], "caption": row["caption"]}
            if len(columns) < 2:  # one of the two is still computed live, from the picture
                kept["image"] = row["image"]
            yield kept | {name: values[i] for name, values in columns.items()}
        bar.update(len(rows))
        rows.clear()

    for row in read_split(config.data.path, split, bucket):
        rows.append(row)
        if len(rows) == BATCH:
            yield from computed()
    if rows:
        yield from computed()


def to_tensor(image: bytes) -> torch.Tensor:
    """An encoded picture -> uint8 (3, H, W)."""
    picture, _ = decode(image)
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def _fingerprint(config: Config, models: Models, info: DatasetInfo) -> str:
    index = hashlib.sha256((Path(config.data.path) / "index.json").read_bytes()).hexdigest()
    parts = {
        "index": index,
        "kinds": sorted(config.data.cache),
        "vae": weights_fingerprint(models.vae),
        "trunk": weights_fingerprint(models.trunk.vlm),
        "tokens": models.trunk.limits,
        "dtype": str(models.vae.dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
