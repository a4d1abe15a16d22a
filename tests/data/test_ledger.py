"""Every sample once an epoch, over resumes and changed numbers of ranks, by a ledger of their numbers."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megaflux.common.ranks import detect_world
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage.dataset import DatasetInfo, write_dataset
from megaflux.data.storage.index import write_index
from megaflux.data.storage.shards import open_writer
from tests import forked
from tests.training.runs import rank_environments

WORKER = Path(__file__).with_name("ledger_worker.py")
TOGETHER = 16  # samples that all ranks draw together


def numbered_dataset(root: Path, counts: dict[str, int], per_shard: int = 10_000) -> Path:
    """Samples that are nothing but their number, 0 .. sum - 1, over the buckets."""
    columns = {"key": "str", "caption": "str", "latents": "ndarray:uint16:1"}
    buckets = [bucket for bucket in make_buckets(ASPECT_RATIOS, 1024) if bucket.name in counts]
    number, nothing = 0, np.zeros(1, np.uint16)
    for bucket in buckets:
        shards = []
        for first in range(0, counts[bucket.name], per_shard):
            folder = root / "train" / bucket.folder / f"chunk-{first:08}"
            writer = open_writer(folder, columns)
            for _ in range(min(per_shard, counts[bucket.name] - first)):
                writer.write({"key": str(number), "caption": "", "latents": nothing})
                number += 1
            writer.finish()
            for shard in writer.shards:
                for part in ("raw_data", "zip_data"):
                    if shard.get(part):
                        shard[part]["basename"] = f"{folder.name}/{shard[part]['basename']}"
                shards.append(shard)
        write_index(root / "train" / bucket.folder, shards)
    write_dataset(root, DatasetInfo(1024, buckets, {"train": counts}, columns))
    return root


def segment(dataset: Path, out: Path, ranks: int, seed: int, batches: int, beyond: int) -> np.ndarray:
    """Numbers (batches, TOGETHER) that all ranks took, each row in order; the processes are gone then."""
    command = [str(WORKER), str(dataset), str(out), str(TOGETHER), str(seed), str(batches), str(beyond)]
    processes = [forked.Forked(command, env) for env in rank_environments(ranks)]
    said = [process.communicate()[1] for process in processes]
    assert {process.returncode for process in processes} <= {0, 9}, said
    parts = [np.load(out / f"part-rank{rank}.npy") for rank in range(ranks)]
    for rank in range(ranks):
        (out / f"part-rank{rank}.npy").unlink()
    return np.sort(np.concatenate(parts, axis=1), axis=1)


def check_ledger(tmp_path: Path, counts: dict[str, int], worlds: list[int]) -> np.ndarray:
    """One epoch in as many attempts as `worlds` has, each of so many ranks: missed 0, repeats those declared."""
    dataset, rng = numbered_dataset(tmp_path / "dataset", counts), random.Random(5)
    samples = sum(counts.values())
    epoch = sum(-(-count // TOGETHER) for count in counts.values())
    cuts = sorted(rng.sample(range(1, epoch), len(worlds) - 1))
    rows = []
    for ranks, begin, end in zip(worlds, [0, *cuts], [*cuts, epoch]):
        last = end == epoch
        rows.append(segment(dataset, tmp_path, ranks, 7, end - begin, 0 if last else rng.randrange(1, 40)))
        position = json.loads((tmp_path / "position.json").read_text())
        assert (position["epoch"], position["batches"]) == ((1, 0) if last else (0, end))
    seen = np.bincount(np.concatenate(rows).ravel(), minlength=samples)
    assert len(seen) == samples and seen.min() == 1  # missed: none
    assert int((seen - 1).sum()) == position["repeats"] == epoch * TOGETHER - samples
    assert seen.max() <= 2
    return np.concatenate(rows)


def test_resumes_on_other_ranks_miss_and_repeat_nothing(tmp_path):
    counts = {"16:9": 3001, "2:1": 600, "1:1": 1999}
    changed = check_ledger(tmp_path, counts, [2, 4, 1])
    loader = build_loader(
        tmp_path / "dataset", LoaderOptions(batch_size=TOGETHER, seed=7), detect_world()
    )  # one process, without a stop
    keys = [sorted(map(int, batch.keys)) for batch in itertools.islice(loader, loader.batches_per_epoch)]
    loader.close()
    assert changed.tolist() == keys  # the same global batches


@pytest.mark.slow
def test_three_million_over_ten_resumes_and_three_numbers_of_ranks(tmp_path, capsys):
    counts = {"16:9": 900_001, "2:1": 300_007, "2.35:1": 199_999, "1:1": 1_200_003, "1:2": 399_990}
    assert sum(counts.values()) == 3_000_000
    rows = check_ledger(tmp_path, counts, [2, 4, 2, 1, 4, 1, 2, 4, 1, 2, 4])
    with capsys.disabled():
        print(
            f"\n3,000,000 numbers, 10 resumes, 1, 2 and 4 ranks: missed 0, repeated {rows.size - 3_000_000} (declared)"
        )
