"""A dataset and what was computed from it are drawn from alike, however they are cut into shards."""

import contextlib
import itertools
import json
import shutil

import pytest
import torch
from conftest import SMALL, write_folder

from megaflux.common.errors import UserError
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.order import order_of, packed, unpacked
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info, write_dataset
from megaflux.data.storage.index import fingerprint, read_index
from megaflux.data.storage.shards import read_split
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from tests.derived import write_bucket

BATCHES = 17  # of 4 in an epoch of the small dataset


@contextlib.contextmanager
def opened(path, **options):
    loader = build_loader(path, LoaderOptions(**{"batch_size": 4, "seed": 3, **options}), detect_world())
    try:
        yield loader
    finally:
        loader.close()


def keys(path, count, state=None, **options):
    """Keys of each batch, and the position after them as a manifest holds it; `state`: where to go on."""
    with opened(path, **options) as loader:
        if state:
            loader.load_state_dict(state)
        found = [batch.keys for batch in itertools.islice(iter(loader), count)]
        return found, json.loads(json.dumps(loader.state_dict()))


def computed(source, root, shard_size, value=0.0):
    """What `source` has, with an array in the place of each picture, in shards of another size."""
    info, counts = read_dataset_info(source), {}
    for bucket in info.buckets:
        samples = (
            {"key": s["key"], "caption": s["caption"], "latents": torch.full((4, 8, 8), value)}
            for s in read_split(source, "train", bucket)
        )
        counts[bucket.name], columns = write_bucket(root, "train", bucket, samples, shard_size=shard_size)
    write_dataset(root, DatasetInfo(64, info.buckets, {"train": counts}, columns))
    return root


@pytest.fixture(scope="module")
def cache(small_dataset, tmp_path_factory):
    root = computed(small_dataset, tmp_path_factory.mktemp("cache"), 1 << 13)
    buckets = read_dataset_info(small_dataset).buckets
    cuts = [
        order_of({b.name: read_index(path / "train" / b.folder) for b in buckets}) for path in (small_dataset, root)
    ]
    assert cuts[0] != cuts[1]  # else the order would be the same by itself
    return root


@pytest.fixture(scope="module")
def undisturbed(small_dataset):
    return keys(small_dataset, 3 * BATCHES)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_is_that_of_the_pictures(small_dataset, cache, undisturbed, num_workers):
    found, _ = keys(cache, 3 * BATCHES, computed_from=small_dataset, num_workers=num_workers)
    assert found == undisturbed
    assert keys(cache, BATCHES)[0] != undisturbed[:BATCHES]  # by its own shards it would be another


def test_a_position_holds_for_what_is_computed_elsewhere(small_dataset, cache, undisturbed, tmp_path):
    """With a cache, without one, with one of other bytes and shards: in mid-epoch and behind its end, the run is the same."""
    rebuilt = computed(small_dataset, tmp_path / "rebuilt", 1 << 14, value=1e-3)
    places = [
        (cache, {"computed_from": small_dataset}),
        (small_dataset, {}),
        (rebuilt, {"computed_from": small_dataset}),
        (small_dataset, {}),
    ]
    state, seen = None, []
    for (path, options), count in zip(places, (5, 7, 9, 20), strict=True):
        found, state = keys(path, count, state, **options)
        seen += found
    assert seen == undisturbed[:41]
    assert "order" not in state


def test_a_position_of_an_earlier_version_goes_on_in_its_own_order(small_dataset, cache, tmp_path):
    """They named a cache by its bytes, and drew by its shards; the next save frees the run of that cache."""
    buckets = read_dataset_info(small_dataset).buckets
    as_before, _ = keys(cache, 2 * BATCHES)  # a dataset of its own: what earlier versions took a cache for
    old = {
        "dataset": fingerprint({b.name: read_index(cache / "train" / b.folder) for b in buckets}),
        "split": "train",
        "seed": 3,
        "shuffle": True,
        "micro_batch_size": 4,
        "world_size": 1,
        "epoch": 0,
        "batches": 6,
    }
    found, state = keys(cache, 4, old, computed_from=small_dataset)
    assert found == as_before[6:10]
    rebuilt = computed(small_dataset, tmp_path / "rebuilt", 1 << 14, value=1e-3)
    for path, options in ((small_dataset, {}), (rebuilt, {"computed_from": small_dataset})):
        more, again = keys(path, 12, state, **options)
        assert more == as_before[10:22]
        assert again["order"] == state["order"]
    with opened(rebuilt, computed_from=small_dataset) as loader:
        with pytest.raises(UserError, match="that very cache"):
            loader.load_state_dict(old)
        for broken in ({"1:1": [[37, 2]]}, {"1:1": [[-37, -1]]}, {"1:1": 3}, [], {"1:1": [[1, 2**40]]}, None):
            with pytest.raises(UserError, match="an order that is not"):
                loader.load_state_dict({**state, "order": broken})


def test_a_position_of_uncached_pictures_of_an_earlier_version_is_taken_as_it_is(small_dataset, undisturbed):
    state = keys(small_dataset, 3)[1]
    assert set(state) == {"dataset", "split", "seed", "shuffle", "micro_batch_size", "world_size", "epoch", "batches"}
    buckets = read_dataset_info(small_dataset).buckets
    assert state["dataset"] == fingerprint({b.name: read_index(small_dataset / "train" / b.folder) for b in buckets})
    assert keys(small_dataset, 3, state)[0] == undisturbed[3:6]


def test_other_pictures_are_refused(small_dataset, cache, tmp_path):
    source = write_folder(tmp_path / "source", {(70, 70): 37, (90, 45): 21, (40, 80): 3})
    (source / "000.txt").write_text("another caption\n")
    prepare(str(source), tmp_path / "other", Options(**SMALL, held_out=0), workers=1, progress=False)
    state = keys(small_dataset, 3)[1]
    for path, options in ((tmp_path / "other", {}), (cache, {"computed_from": tmp_path / "other"})):
        with (
            opened(path, **options) as loader,
            pytest.raises(UserError, match="position is of dataset .* give --data.path with what the run began with"),
        ):
            loader.load_state_dict(state)
    fewer = shutil.copytree(cache, tmp_path / "fewer")
    shutil.rmtree(fewer / "train" / "1x2")
    info = read_dataset_info(cache)
    del info.counts["train"]["1:2"]
    write_dataset(fewer, info)
    with pytest.raises(UserError, match="other numbers of samples"), opened(fewer, computed_from=small_dataset):
        pass


def test_an_order_is_saved_in_a_few_numbers():
    order = {"1:1": [14] * 70_000 + [3], "2:1": [5, 6, 5]}
    assert packed(order) == {"1:1": [[14, 70_000], [3, 1]], "2:1": [[5, 1], [6, 1], [5, 1]]}
    assert unpacked(json.loads(json.dumps(packed(order))), {"1:1": 980_003, "2:1": 16}) == order
