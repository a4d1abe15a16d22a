"""Shards of samples: written, read and verified directly, without streaming's shared memory (formats: dataset.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import MDSWriter
from streaming.base.compression import decompress
from streaming.base.format import reader_from_json
from streaming.base.hashing import get_hash, is_hash

from megaflux.common.errors import UserError
from megaflux.common.files import sync_file
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import SPLITS, DatasetInfo, read_dataset_info
from megaflux.data.storage.index import Problem, inspect_index, raise_problems, read_index, stored_file
from megaflux.data.tensors import from_array, to_array

COMPRESSION = "zstd"  # of what a second compression makes smaller
HASHES = ["sha1", "xxh64"]  # sha1: what identifies the content; xxh64: fast enough to check on every read
SHARD_SIZE = 1 << 26  # bytes before compression

_ARRAY_TYPES = {
    torch.bfloat16: "uint16",  # the same bits; uint16 means bfloat16 in these columns, always
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
}


def compression_for(encoding: str) -> str | None:
    """The compression of shards of images of this encoding (png, jpeg, webp), or None.

    zstd makes a JPEG hardly smaller, and every reader would have to unpack the shard to disk first, where both forms then
    stay.
    """
    return COMPRESSION if encoding == "png" else None


def open_writer(
    folder: Path, columns: dict[str, str], shard_size: int = SHARD_SIZE, compression: str | None = COMPRESSION
) -> MDSWriter:
    """A writer of shards, with hashes, into a new folder; the same samples give the same bytes.

    columns: name -> MDS encoding. shard_size: bytes before compression. compression: "zstd", or None."""
    return MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=HASHES, size_limit=shard_size, max_workers=4
    )


def write_shards(
    folder: Path, samples: Iterable[dict[str, Any]], shard_size: int = SHARD_SIZE, compression: str | None = COMPRESSION
) -> tuple[int, dict[str, str]]:
    """Write shards and their index.json into `folder`, which must not exist yet, and make them durable.

    samples: all with the same fields, each str, bytes, or tensors of one dtype and shape; the encodings are taken from
    the first sample. Without samples no folder is made. compression: "zstd", or None. Returns the number of samples and
    the columns (name -> MDS encoding).
    """
    writer: MDSWriter | None = None
    columns: dict[str, str] = {}
    count = 0
    try:
        for sample in samples:
            if writer is None:
                columns = {name: _encoding(name, value) for name, value in sample.items()}
                writer = open_writer(folder, columns, shard_size, compression)
            arrays = {name: to_array(v) if isinstance(v, torch.Tensor) else v for name, v in sample.items()}
            writer.write(arrays)
            count += 1
    except BaseException:
        if writer is not None:
            writer.cancel_future_jobs()
        raise
    if writer is not None:
        writer.finish()
        for file in folder.iterdir():
            with open(file, "rb") as opened:
                sync_file(opened)
    return count, columns


def read_split(root: str | Path, split: str, bucket: Bucket, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The samples of one bucket in stored order (at most `limit`), arrays as tensors.

    Reads the files directly, without shared memory, writes nothing, and checks each shard's hash. An absent bucket has
    no samples. Raises UserError for a damaged index or shard.
    """
    folder = Path(root) / split / bucket.folder
    if not folder.exists():
        return
    every = itertools.chain.from_iterable(read_shard(folder, shard) for shard in read_index(folder))
    yield from itertools.islice(every, limit)


def read_shard(folder: Path, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of one shard in stored order, arrays as tensors. folder: the bucket's. shard: its checked index entry.

    Raises UserError for a damaged shard."""
    data = _shard_bytes(folder, shard)
    file = folder / stored_file(shard)["basename"]
    reader = reader_from_json(str(folder), None, shard)
    offsets = np.frombuffer(data, np.uint32, shard["samples"] + 1, offset=4)
    for number, (begin, end) in enumerate(itertools.pairwise(offsets)):
        try:
            sample = reader.decode_sample(data[begin:end])
        except Exception as error:  # streaming's decoders raise errors of any kind
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"{file}: sample {number} of the shard cannot be read ({problem})") from None
        yield {name: from_array(v) if isinstance(v, np.ndarray) else v for name, v in sample.items()}


def verify_dataset(root: str | Path) -> DatasetInfo:
    """Read every shard and compare it with its index: size, hashes, number of samples.

    Returns the dataset's description. Raises UserError with all problems at once.
    """
    root = Path(root)
    info = read_dataset_info(root)
    problems: list[Problem] = []
    for split in SPLITS:
        for bucket, count in info.filled(split):
            folder = root / split / bucket.folder
            shards, found = inspect_index(folder, expected_samples=count)
            problems += found
            for shard in shards if not found else []:
                try:
                    _shard_bytes(folder, shard)
                except UserError as error:
                    problems.append(Problem(None, str(error)))
    raise_problems(problems)
    return info


def ndarray_encoding(tensor: torch.Tensor) -> str:
    """The MDS encoding of a tensor's dtype and shape: bfloat16 (8, 16, 16) -> "ndarray:uint16:8,16,16".

    Raises ValueError for a dtype that is not one of _ARRAY_TYPES.
    """
    if tensor.dtype not in _ARRAY_TYPES:
        raise ValueError(f"no shard column for tensors of {tensor.dtype}; one of {list(_ARRAY_TYPES)}")
    return f"ndarray:{_ARRAY_TYPES[tensor.dtype]}:{','.join(map(str, tensor.shape))}"


def _encoding(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return ndarray_encoding(value)
    if isinstance(value, str | bytes):
        return type(value).__name__
    raise ValueError(f"column {name}: a {type(value).__name__}, not str, bytes or a tensor")


def _shard_bytes(folder: Path, shard: dict[str, Any]) -> bytes:
    """The uncompressed bytes of a shard. Raises UserError where hash, size or number of samples is not the index's."""
    stored = stored_file(shard)
    path = folder / stored["basename"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for algorithm, digest in stored["hashes"].items():
        if not is_hash(algorithm) or get_hash(algorithm, data) != digest:
            raise UserError(f"{path}: damaged, its {algorithm} is not the one in the index")
    if shard["zip_data"]:
        try:
            data = decompress(shard["compression"], data)
        except Exception as error:  # each library has its own
            raise UserError(f"{path}: cannot be unpacked ({str(error)[:200]})") from None
    if len(data) != shard["raw_data"]["bytes"]:
        raise UserError(f"{path}: holds {len(data)} bytes, the index says {shard['raw_data']['bytes']}")
    count = int.from_bytes(data[:4], "little")
    if count != shard["samples"]:
        raise UserError(f"{path}: holds {count} samples, the index says {shard['samples']}")
    return data
