"""Datasets that are derived from others, bucket by bucket."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaflux.data.buckets import Bucket
from megaflux.data.storage.shards import write_shards


def write_bucket(
    root: Path | str, split: str, bucket: Bucket, samples: Iterable[dict[str, Any]], **options: Any
) -> tuple[int, dict[str, str]]:
    """Write `root`/<split>/<bucket>/ with write_shards, replacing what is there."""
    folder = Path(root) / split / bucket.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_shards(folder, samples, **options)
