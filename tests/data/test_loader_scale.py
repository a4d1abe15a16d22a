"""Report only: how long a loader over 3,000,000 samples takes to start, and in how much memory.

python -m pytest tests/data/test_loader_scale.py -m slow -s
"""

import itertools
import os
import resource
import time

import numpy as np
import pytest

from megaflux.common.ranks import detect_world
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage.dataset import DatasetInfo, write_dataset
from megaflux.data.storage.index import write_index
from megaflux.data.storage.shards import open_writer

SAMPLES = {"16:9": 900_000, "2:1": 300_000, "2.35:1": 200_000, "1:1": 1_200_000, "1:2": 400_000}
PER_SHARD = 1000


def resident_gb() -> float:
    pages = int(open("/proc/self/statm").read().split()[1])  # noqa: SIM115
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


@pytest.fixture(scope="module")
def three_million(tmp_path_factory):
    """One small real shard, linked 3,000 times: real reading at no cost in disk."""
    root = tmp_path_factory.mktemp("three_million")
    buckets = make_buckets(ASPECT_RATIOS, 1024)
    columns = {"key": "str", "caption": "str", "latents": "ndarray:uint16:1"}
    writer = open_writer(root / "one", columns)
    for number in range(PER_SHARD):
        writer.write({"key": f"{number:08}", "caption": "", "latents": np.zeros(1, np.uint16)})
    writer.finish()
    (shard,) = writer.shards
    stored = root / "one" / shard["zip_data"]["basename"]
    for bucket in buckets:
        folder = root / "train" / bucket.folder
        folder.mkdir(parents=True)
        shards = []
        for number in range(SAMPLES[bucket.name] // PER_SHARD):
            copy = {**shard, "raw_data": {**shard["raw_data"]}, "zip_data": {**shard["zip_data"]}}
            copy["raw_data"]["basename"] = f"shard.{number:05}.mds"
            copy["zip_data"]["basename"] = f"shard.{number:05}.mds.zstd"
            os.link(stored, folder / copy["zip_data"]["basename"])
            shards.append(copy)
        write_index(folder, shards)
    write_dataset(root, DatasetInfo(1024, buckets, {"train": SAMPLES}, columns))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_report_start_up(three_million, num_workers, capsys):
    before, started = resident_gb(), time.monotonic()
    loader = build_loader(three_million, LoaderOptions(batch_size=8, seed=1, num_workers=num_workers), detect_world())
    built = time.monotonic() - started
    started = time.monotonic()
    batches = iter(loader)
    next(batches)
    first = time.monotonic() - started
    started = time.monotonic()
    count = sum(1 for _ in itertools.islice(batches, 300))
    rate = count * 8 / (time.monotonic() - started)
    state = loader.state_dict()
    loader.close()
    loader = build_loader(three_million, LoaderOptions(batch_size=8, seed=1, num_workers=num_workers), detect_world())
    loader.load_state_dict({**state, "batches": loader.batches_per_epoch - 10})
    started = time.monotonic()
    next(iter(loader))
    resumed = time.monotonic() - started
    loader.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    with capsys.disabled():
        print(
            f"\n{sum(SAMPLES.values())} samples in {sum(SAMPLES.values()) // PER_SHARD} shards, {num_workers} "
            f"workers: opened in {built:.1f} s, first batch after {first:.1f} s, resumed at the epoch's end in "
            f"{resumed:.1f} s; then {rate:.0f} samples/s; resident {before:.2f} -> {resident_gb():.2f} GB, "
            f"peak {peak:.2f} GB"
        )
