"""A damaged index is refused before streaming sees it, with everything that is wrong in one message."""

import copy
import json
import shutil

import pytest

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import read_dataset_info
from megaflux.data.storage.index import MAX_PROBLEMS, inspect_index, read_index
from megaflux.data.storage.shards import read_split, verify_dataset

SQUARE = Bucket("1:1", 64, 64)


@pytest.fixture
def folder(small_dataset, tmp_path):
    """A private copy of one bucket: train/1x1 with three shards."""
    shutil.copytree(small_dataset, tmp_path / "dataset", ignore=shutil.ignore_patterns("*.mds"))
    return tmp_path / "dataset" / "train" / "1x1"


def edit(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def problems(folder, **options):
    return "; ".join(map(str, inspect_index(folder, **options)[1]))


def test_a_sound_index(folder):
    assert not inspect_index(folder, expected_samples=37)[1]
    shards = read_index(folder)
    assert [shard["samples"] for shard in shards] == [16, 16, 5]


CASES = {
    "zip_data basename '../../x' does not stay": lambda i: i["shards"][0]["zip_data"].update(basename="../../x"),
    "raw_data basename '/etc/x' does not stay": lambda i: i["shards"][0]["raw_data"].update(basename="/etc/x"),
    "'a/../../x' does not stay": lambda i: i["shards"][1]["raw_data"].update(basename="a/../../x"),
    "'..\\\\\\\\x' does not stay": lambda i: i["shards"][1]["raw_data"].update(basename="..\\x"),
    "'index.json' does not stay": lambda i: i["shards"][1]["raw_data"].update(basename="index.json"),
    "basename 5 does not stay": lambda i: i["shards"][1]["raw_data"].update(basename=5),
    "appears twice": lambda i: i["shards"].append(copy.deepcopy(i["shards"][0])),
    "encoding 'pkl', which is not allowed": lambda i: i["shards"][0]["column_encodings"].__setitem__(1, "pkl"),
    "samples = 0": lambda i: i["shards"][0].update(samples=0),
    "samples = -3": lambda i: i["shards"][0].update(samples=-3),
    "samples = '16'": lambda i: i["shards"][0].update(samples="16"),
    "38 samples, but dataset.json counts 37": lambda i: i["shards"][0].update(samples=17),
    "36 samples, but dataset.json counts 37": lambda i: i["shards"][0].update(samples=15),
    "do not fit into": lambda i: i["shards"][0].update(samples=10**6),
    "21 samples, but dataset.json counts 37": lambda i: i["shards"].pop(0),
    "bytes = -1": lambda i: i["shards"][0]["zip_data"].update(bytes=-1),
    "the index says 99999": lambda i: i["shards"][0]["zip_data"].update(bytes=99999),
    "has no hashes": lambda i: i["shards"][0]["zip_data"].update(hashes={}),
    "not in MDS format": lambda i: i["shards"][0].update(format="csv"),
    "compression and zip_data": lambda i: i["shards"][0].update(zip_data=None),
    "shard 0: not an object": lambda i: i["shards"].__setitem__(0, 7),
    "raw_data is not an object": lambda i: i["shards"][0].pop("raw_data"),
    "names and encodings do not match": lambda i: i["shards"][0]["column_names"].pop(),
    "different columns": lambda i: i["shards"][0]["column_names"].__setitem__(0, "title"),
    "no shards": lambda i: i["shards"].clear(),
    "not an MDS index of version 2": lambda i: i.update(version=3),
    "'\\ud800' does not stay": lambda i: i["shards"][0]["raw_data"].update(basename="\ud800"),
    "does not stay inside": lambda i: i["shards"][0]["raw_data"].update(basename="x" * 300),
    "'surprise' missing or unknown": lambda i: i["shards"][0].update(surprise=1),
    "'hashes' missing or unknown": lambda i: i["shards"][0].pop("hashes"),
    "names and sizes do not match": lambda i: i["shards"][0]["column_sizes"].pop(),
    "compression 'zip' is not one of": lambda i: i["shards"][0].update(compression="zip"),
    "compression 5 is not one of": lambda i: i["shards"][0].update(compression=5),
    "size_limit is not a size": lambda i: i["shards"][0].update(size_limit="a lot"),
    "encoding 'ndarray:object:2'": lambda i: i["shards"][0]["column_encodings"].__setitem__(1, "ndarray:object:2"),
    "column 'two\\nlines' has": lambda i: (
        i["shards"][0]["column_names"].__setitem__(1, "two\nlines"),
        i["shards"][0]["column_encodings"].__setitem__(1, "pkl"),
    ),
    "not a positive count": lambda i: i["shards"][0].update(samples=2**32),
    "not a positive size": lambda i: i["shards"][0]["raw_data"].update(bytes=10**4000),
    "zip_data has no hashes": lambda i: i["shards"][0]["zip_data"].update(hashes={"sha1": None}),
    "[[[": lambda i: i["shards"][0].update(samples=deep(400)),
    "chunk-00000: not a file": lambda i: i["shards"][0]["zip_data"].update(basename="chunk-00000"),
}


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("message", CASES)
def test_each_fault_is_named(folder, message):
    edit(folder, CASES[message])
    assert message.replace("\\\\\\\\", "\\\\") in problems(folder, expected_samples=37)


@pytest.mark.parametrize("content", ["", '{"version": 2, "shards": [', "[]", "null", '{"version": 2}', "[" * 100_000])
def test_an_index_that_is_partial_or_something_else(folder, content):
    (folder / "index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json"):
        read_index(folder)


def test_files_that_are_missing_cut_or_empty(folder):
    stored = sorted(folder.rglob("*.zstd"))
    stored[0].unlink()
    stored[1].write_bytes(stored[1].read_bytes()[:100])
    stored[2].write_bytes(b"")
    message = problems(folder)
    assert f"{stored[0]}: missing" in message
    assert f"{stored[1]}: 100 bytes" in message
    assert f"{stored[2]}: 0 bytes" in message
    assert not problems(folder, check_files=False)


def test_an_unpacked_shard_of_the_wrong_size(folder):
    (folder / "chunk-00000" / "shard.00000.mds").write_bytes(b"short")
    assert "shard.00000.mds: 5 bytes" in problems(folder)


def test_all_problems_at_once(folder):
    def change(index):
        index["shards"][0]["samples"] = 0
        index["shards"][1]["raw_data"]["basename"] = "../x"
        index["shards"][2]["column_encodings"][0] = "pkl"

    edit(folder, change)
    with pytest.raises(UserError) as caught:
        read_index(folder)
    message = str(caught.value)
    assert all(text in message for text in ("samples = 0", "'../x'", "'pkl'"))
    assert "\n" not in message


def test_many_problems_are_cut_to_a_number(folder):
    edit(folder, lambda index: index["shards"].extend([None] * 100))
    with pytest.raises(UserError, match=f"and {100 - MAX_PROBLEMS} more"):
        read_index(folder)


def test_a_flipped_byte_is_found_by_the_full_check(folder):
    root = folder.parent.parent
    assert verify_dataset(root).samples("train") == 61
    path = min(folder.rglob("*.zstd"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not problems(folder)  # the size is right: only the content tells
    with pytest.raises(UserError, match=r"shard\.00000\.mds\.zstd: damaged"):
        verify_dataset(root)
    with pytest.raises(UserError, match="damaged"):
        list(read_split(root, "train", SQUARE))


def test_a_count_that_disagrees_with_the_shard_itself(folder):
    root = folder.parent.parent

    def move_one(index):
        index["shards"][0]["samples"] += 1
        index["shards"][1]["samples"] -= 1

    edit(folder, move_one)
    assert not problems(folder, expected_samples=37)
    with pytest.raises(UserError, match="holds 16 samples, the index says 17"):
        verify_dataset(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(compression="gz"), "shard.00000.mds.zstd: cannot be unpacked"),
        (lambda s: s["raw_data"].update(bytes=s["raw_data"]["bytes"] + 1), "the index says"),
        (lambda s: s.update(column_sizes=[None, None, 4]), "sample 0 of the shard|holds"),
        (lambda s: s.update(column_encodings=["str", "str", "ndarray:uint8:7"]), "sample 0 of the shard"),
    ],
)
def test_an_index_that_does_not_say_what_the_shard_holds(folder, change, message):
    edit(folder, lambda index: [change(shard) for shard in index["shards"]])
    with pytest.raises(UserError, match=message):
        list(read_split(folder.parent.parent, "train", SQUARE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=99), "format version 99"),
        (lambda c: c.pop("buckets"), "not a dataset description"),
        (lambda c: c.update(surprise=1), "not a dataset description"),
        (lambda c: c.update(format_version="1"), "not a dataset description"),
        (lambda c: c.update(format_version=0.5), "format version 0.5"),
        (lambda c: c["buckets"][0].update(name="../../x"), "'../../x' is not WIDTH:HEIGHT"),
        (lambda c: c["buckets"][0].update(name=5), "'5' is not WIDTH:HEIGHT"),
        (lambda c: c["buckets"][0].update(width="64"), "bucket 1:1 of '64' x 64 px"),
        (lambda c: c["buckets"].append(c["buckets"][0]), "a bucket appears twice"),
        (lambda c: c.update(longest_side=None), "longest_side None"),
        (lambda c: c.update(counts=5), "counts is not an object"),
        (lambda c: c["counts"].update(train=5), "counts of 'train' are not counts"),
        (lambda c: c["counts"]["train"].update({"1:1": -1}), "counts of 'train' are not counts"),
        (lambda c: c["counts"]["train"].update({"9:9": 1}), "name '9:9', which is not a bucket"),
        (lambda c: c.update(notes={"rotated": "many"}), "values that are not counts"),
        (lambda c: c.update(attribution=[1]), "attribution is not text"),
    ],
)
def test_dataset_json(folder, change, message):
    path = folder.parent.parent / "dataset.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_dataset_info(path.parent)
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            read_dataset_info(path.parent)
    path.unlink()
    with pytest.raises(UserError, match=r"megaflux\.data\.prepare"):
        read_dataset_info(path.parent)
