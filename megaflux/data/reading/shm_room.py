"""Whether /dev/shm has room for the batches of the loading processes, checked before the first update.

Loading processes put each batch into shared memory, of which a container has 64 MB by default. When it is full, the
kernel kills a process with a bus error, or processes wait for one another forever.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaflux.common.ranks import World
from megaflux.data.buckets import Bucket
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage.index import column_encodings

SHM = "/dev/shm"
PAGE = 4096
COUNTERS = 1 << 20  # bytes; streaming's counters and barriers, semaphores
NCCL = 1 << 25  # bytes a rank for NCCL's own buffers between the ranks of a machine; an allowance, not measured


def sample_bytes(bucket: Bucket, encodings: Mapping[str, str]) -> int:
    """Bytes of a sample's tensors, an image being uint8 (3, H, W). encodings: column name -> MDS encoding."""
    size = 3 * bucket.width * bucket.height if "image" in encodings else 0
    for encoding in encodings.values():
        if encoding.startswith("ndarray:"):
            _, kind, shape = encoding.split(":")
            size += np.dtype(kind).itemsize * math.prod(map(int, shape.split(",")))
    return size


def batches_bytes(batch: int, num_workers: int, prefetch_factor: int) -> int:
    """Bytes of /dev/shm that one rank's loading processes need; 0 without any. batch: bytes of its largest micro-batch.

    Each process has prefetch_factor batches waiting, and the rank holds one more.
    """
    return (num_workers * prefetch_factor + 1) * (batch + 4 * PAGE) if num_workers else 0


def problem(
    shards: Mapping[Bucket, Sequence[dict[str, Any]]],
    options: LoaderOptions,
    world: World,
    samples_per_epoch: int,
    gpus: bool,
) -> str | None:
    """Why /dev/shm of this node is too small for the run, with the remedy, in one line; None where it is large enough.

    shards: the entries of each bucket's checked index. samples_per_epoch: over all ranks; streaming shares their order,
    8 bytes each. gpus: whether the ranks compute on GPUs, for NCCL's buffers.
    """
    num_workers, prefetch_factor, local_ranks = options.num_workers, options.prefetch_factor, world.local_size
    try:
        disk = os.statvfs(SHM)
    except OSError:  # not Linux, where shared memory has no such limit
        return None
    free = disk.f_bavail * disk.f_frsize
    batch = options.batch_size * max(sample_bytes(b, column_encodings(entries)) for b, entries in shards.items())
    streaming = COUNTERS + 8 * samples_per_epoch + 9 * sum(map(len, shards.values()))
    nccl = NCCL * local_ranks if gpus and local_ranks > 1 else 0
    loading = local_ranks * batches_bytes(batch, num_workers, prefetch_factor)
    need = loading + streaming + nccl
    if need <= free:
        return None
    counted = f"{local_ranks} x ({num_workers} x {prefetch_factor} + 1) batches of {_mb(batch)}" if loading else ""
    lower = f", or lower data.num_workers (0 needs {_mb(streaming + nccl)})" if loading else ""
    return (
        f"{SHM}: {_mb(free)} free, and this machine's ranks and their loading processes need {_mb(need)}"
        f"{f' ({counted})' if counted else ''}; give the container more (docker run --shm-size={-(-2 * need >> 20)}m, "
        f"Kubernetes: an emptyDir of medium Memory at {SHM}){lower}"
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 999e6 else f"{size / 1e9:.3g} GB"
