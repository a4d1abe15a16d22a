"""What is written to shards comes back bit for bit."""

import numpy as np
import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.data import verify
from megaflux.data.buckets import Bucket, make_buckets
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info, write_dataset
from megaflux.data.storage.index import read_index
from megaflux.data.storage.parts import Writing, all_parts
from megaflux.data.storage.shards import ndarray_encoding, read_shard, read_split, verify_dataset
from megaflux.data.tensors import from_array, to_array
from tests.derived import write_bucket

SQUARE = Bucket("1:1", 64, 64)


def all_bits(dtype):
    """Every bit pattern of 16 bits, NaNs and infinities included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize(
    "tensor",
    [
        all_bits(torch.bfloat16),
        all_bits(torch.float16),
        torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45]),
        torch.arange(-3, 3),
        torch.arange(6, dtype=torch.int32),
        torch.arange(256).to(torch.uint8),
        torch.randn(4, 6, dtype=torch.bfloat16).T,  # not contiguous
        torch.randn(2, 3, requires_grad=True),
    ],
    ids=["bf16", "fp16", "fp32", "int64", "int32", "uint8", "transposed", "with_grad"],
)
def test_arrays_round_trip_bit_for_bit(tensor):
    array = to_array(tensor)
    back = from_array(array)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    as_bytes = tensor.detach().contiguous().view(torch.uint8)
    assert torch.equal(back.view(torch.uint8), as_bytes)


def test_encodings():
    assert ndarray_encoding(torch.zeros(8, 16, 16, dtype=torch.bfloat16)) == "ndarray:uint16:8,16,16"
    assert ndarray_encoding(torch.zeros(45, 128)) == "ndarray:float32:45,128"
    with pytest.raises(ValueError, match="float64"):
        ndarray_encoding(torch.zeros(1, dtype=torch.float64))


def cached_samples(count, start=0):
    generator = torch.Generator().manual_seed(start)
    for number in range(start, start + count):
        yield {
            "key": f"k{number}",
            "caption": f"caption {number}",
            "latents": torch.randn(8, 4, 4, generator=generator).bfloat16(),
            "hidden_states": torch.randn(5, 16, generator=generator),
        }


def write_cached(root, count=40, **options):
    buckets = make_buckets(("1:1", "2:1"), 64)
    counts = {"train": {}, "held_out": {}}
    for bucket in buckets:
        counts["train"][bucket.name], columns = write_bucket(root, "train", bucket, cached_samples(count), **options)
    counts["held_out"]["1:1"], _ = write_bucket(root, "held_out", buckets[0], cached_samples(3, 90))
    info = DatasetInfo(64, buckets, counts, columns, settings={"cache": "latents,trunk"})
    write_dataset(root, info)
    return info


def test_derived_dataset_round_trip(tmp_path):
    info = write_cached(tmp_path, shard_size=1 << 13)
    assert read_dataset_info(tmp_path) == info == verify_dataset(tmp_path)
    assert info.columns["latents"] == "ndarray:uint16:8,4,4"
    assert len(list((tmp_path / "train" / "1x1").glob("*.zstd"))) > 1
    for expected, sample in zip(cached_samples(40), read_split(tmp_path, "train", SQUARE), strict=True):
        assert (sample["key"], sample["caption"]) == (expected["key"], expected["caption"])
        for name in ("latents", "hidden_states"):
            assert sample[name].dtype == expected[name].dtype
            assert torch.equal(sample[name], expected[name])


def test_reading_part_of_a_split(tmp_path):
    write_cached(tmp_path, shard_size=1 << 13)
    assert [s["key"] for s in read_split(tmp_path, "held_out", SQUARE)] == ["k90", "k91", "k92"]
    assert [s["key"] for s in read_split(tmp_path, "train", SQUARE, limit=7)] == [f"k{n}" for n in range(7)]
    assert list(read_split(tmp_path, "train", Bucket("1:2", 32, 64))) == []
    assert list(read_split(tmp_path, "nowhere", SQUARE)) == []


def test_a_dataset_without_held_out_samples_is_described(tmp_path, capsys):
    buckets = make_buckets(("1:1", "2:1"), 64)
    count, columns = write_bucket(tmp_path, "train", buckets[0], cached_samples(2))
    write_dataset(tmp_path, DatasetInfo(64, buckets, {"train": {"1:1": count}}, columns))
    assert verify.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "2", "0"]


def test_an_interrupted_part_leaves_nothing_and_is_written_again(tmp_path):
    original, root = tmp_path / "original", tmp_path / "computed"
    write_cached(original, shard_size=1 << 13)
    part, *_ = all_parts(original, read_dataset_info(original))

    def interrupted():
        yield from cached_samples(1)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), Writing(root) as writing:
        writing.write(part, interrupted())
    assert not part.is_there(root) and not (root / ".unfinished").exists()
    with Writing(root) as writing:
        writing.write(part, part.samples(original))
    keys = [sample["key"] for shard in read_index(part.folder(root)) for sample in read_shard(part.folder(root), shard)]
    assert keys == [sample["key"] for sample in part.samples(original)]
    assert not (root / ".unfinished").exists()


def test_a_dataset_that_does_not_add_up_is_not_completed(tmp_path):
    buckets = make_buckets(("1:1", "2:1"), 64)
    _, columns = write_bucket(tmp_path, "train", buckets[0], cached_samples(3))
    with pytest.raises(UserError) as caught:
        write_dataset(tmp_path, DatasetInfo(64, buckets, {"train": {"1:1": 4, "2:1": 1}}, columns))
    assert "3 samples, but dataset.json counts 4" in str(caught.value)
    assert "2x1/index.json: missing" in str(caught.value)
    assert not (tmp_path / "dataset.json").exists()


def test_unequal_samples_are_refused(tmp_path):
    samples = [*cached_samples(2), {**next(cached_samples(1)), "latents": torch.zeros(8, 4, 5).bfloat16()}]
    with pytest.raises(ValueError, match="shape"):
        write_bucket(tmp_path, "train", SQUARE, samples)
    with pytest.raises(ValueError, match="column n"):
        write_bucket(tmp_path, "train", SQUARE, [{"n": 3}])


def test_no_samples_no_folder(tmp_path):
    assert write_bucket(tmp_path, "train", SQUARE, []) == (0, {})
    assert not (tmp_path / "train" / "1x1").exists()


def test_images_as_stored(small_dataset):
    sample = next(read_split(small_dataset, "train", SQUARE))
    assert set(sample) == {"key", "caption", "image"}
    assert sample["image"].startswith(b"\x89PNG")
    assert isinstance(np.frombuffer(sample["image"], np.uint8), np.ndarray)
