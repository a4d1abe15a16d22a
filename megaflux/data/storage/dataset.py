"""The dataset on disk: MDS shards by split and bucket, and dataset.json beside them.

    ROOT/dataset.json                          what the dataset is; written last, so it marks completeness
    ROOT/index.json                            all shards of all splits and buckets
    ROOT/<split>/<bucket>/index.json           the shards of one stream: train/16x9, held_out/1x1, ...
    ROOT/<split>/<bucket>/.../*.mds       shards of JPEG and WebP files, which zstd would not make smaller, and caches
    ROOT/<split>/<bucket>/.../*.mds.zstd  of PNG files, and of earlier caches; streaming unpacks them beside it, as *.mds

Columns of prepared images: key (str), caption (str), image (bytes of a png, jpeg or webp file at the
bucket's size). A derived dataset has the same layout and other columns: latents and hidden_states as
arrays. NumPy has no bfloat16, so those bits are stored as uint16.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
from megaflux.data.buckets import Bucket, check_ratio
from megaflux.data.storage.index import (
    inspect_index,
    raise_problems,
    read_index,
    shown,
    stored_file,
    with_prefix,
    write_index,
    write_json,
)

FORMAT_VERSION = 1
SPLITS = ("train", "held_out")
IMAGE_COLUMNS = {"key": "str", "caption": "str", "image": "bytes"}
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


@dataclass(frozen=True)
class DatasetInfo:
    """dataset.json. counts: split -> bucket name -> samples. bad: reason -> images that were skipped."""

    longest_side: int
    buckets: tuple[Bucket, ...]
    counts: dict[str, dict[str, int]]
    columns: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    attribution: str | None = None

    def samples(self, split: str) -> int:
        """Samples of one split over all buckets."""
        return sum(self.counts.get(split, {}).values())


def read_dataset_info(path: str | Path) -> DatasetInfo:
    """Read `path`/dataset.json. Raises UserError if it is missing, unreadable or of a newer format."""
    file = Path(path) / "dataset.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file}: missing, so there is no complete dataset here; make one with "
            f"python -m megaflux.data.prepare SOURCE {path}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    try:
        version = content.pop("format_version")
        if version > FORMAT_VERSION:
            newer = f"format version {shown(version)}, this code reads up to {FORMAT_VERSION}"
            raise UserError(f"{file}: {newer}; update it")
        if not _is_whole(version, 1):
            raise TypeError(f"format version {shown(version)}")
        buckets = tuple(Bucket(**bucket) for bucket in content.pop("buckets"))
        info = DatasetInfo(buckets=buckets, **content)
        _check_info(info)
        return info
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{file}: not a dataset description ({what}); prepare the dataset again") from None


def _check_info(info: DatasetInfo) -> None:
    """TypeError for a description whose values are of other types, or that would lead out of the dataset's folder."""
    names = [bucket.name for bucket in info.buckets]
    for bucket in info.buckets:
        try:
            check_ratio(bucket.name)  # it becomes a folder's name
        except UserError as error:
            raise TypeError(str(error)) from None
        if not _is_whole(bucket.width, 1) or not _is_whole(bucket.height, 1):
            raise TypeError(f"bucket {bucket.name} of {shown(bucket.width)} x {shown(bucket.height)} px")
    if len(set(names)) < len(names):
        raise TypeError("a bucket is there twice")
    if not _is_whole(info.longest_side, 1):
        raise TypeError(f"longest_side {shown(info.longest_side)}")
    for name in ("counts", "columns", "settings", "bad", "notes"):
        if not isinstance(getattr(info, name), dict):
            raise TypeError(f"{name} is no object")
    for split, counts in info.counts.items():
        if not isinstance(counts, dict) or not all(_is_whole(count, 0) for count in counts.values()):
            raise TypeError(f"counts of {shown(split)} are none")
        if unknown := counts.keys() - set(names):
            raise TypeError(f"counts of {shown(split)} name {shown(min(unknown))}, which is no bucket")
    if not all(_is_whole(count, 0) for counts in (info.bad, info.notes) for count in counts.values()):
        raise TypeError("bad or notes holds something else than counts")
    if not isinstance(info.attribution, str | None):
        raise TypeError("attribution is no text")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def squarest_bucket(info: DatasetInfo, split: str) -> Bucket | None:
    """The bucket nearest to a square that has samples in the split; None where none has."""
    buckets = [bucket for bucket in info.buckets if info.counts.get(split, {}).get(bucket.name)]
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - 1), default=None)


def write_dataset(root: str | Path, info: DatasetInfo) -> None:
    """Complete a dataset whose buckets are written: the merged index.json, then dataset.json.

    Raises UserError, before anything is written, if the buckets' indexes do not agree with `info`.
    """
    root = Path(root)
    merged, problems = [], []
    for split, bucket, count in _streams(info):
        folder = f"{split}/{bucket.folder}"
        shards, found = inspect_index(root / folder, expected_samples=count)
        problems += found
        merged += [with_prefix(shard, folder) for shard in shards] if not found else []
    raise_problems(problems)
    write_index(root, merged)
    content = {
        "format_version": FORMAT_VERSION,
        "longest_side": info.longest_side,
        "buckets": [{"name": b.name, "width": b.width, "height": b.height} for b in info.buckets],
        "counts": info.counts,
        "columns": info.columns,
        "settings": info.settings,
        "bad": info.bad,
        "notes": info.notes,
        "attribution": info.attribution,
    }
    write_json(root / "dataset.json", content)


def compression_for(encoding: str) -> str | None:
    """How shards of images of this encoding (png, jpeg, webp) are compressed; None: not at all.

    zstd makes a JPEG hardly smaller, and every reader would have to unpack the shard onto the disk first, where both forms
    then stay.
    """
    return COMPRESSION if encoding == "png" else None


def open_writer(
    folder: Path, columns: dict[str, str], shard_size: int = SHARD_SIZE, compression: str | None = COMPRESSION
) -> MDSWriter:
    """A writer of hashed shards into a new folder; the same samples give the same bytes. compression: "zstd", or None."""
    return MDSWriter(
        out=str(folder), columns=columns, compression=compression, hashes=HASHES, size_limit=shard_size, max_workers=4
    )


def write_shards(
    folder: Path, samples: Iterable[dict[str, Any]], shard_size: int = SHARD_SIZE, compression: str | None = COMPRESSION
) -> tuple[int, dict[str, str]]:
    """Write shards and their index.json into `folder`, which must not be there yet; all of it is on disk afterwards.

    `samples` have the same fields throughout: str, bytes, or tensors of one dtype and shape per field,
    whose encodings are taken from the first sample. compression: "zstd", or None. Returns the number of samples and the
    columns. Without samples there is no folder.
    """
    writer, columns, count = None, {}, 0
    try:
        for sample in samples:
            if writer is None:
                columns = {name: _encoding(name, value) for name, value in sample.items()}
                writer = open_writer(folder, columns, shard_size, compression)
            arrays = {name: to_numpy(v) if isinstance(v, torch.Tensor) else v for name, v in sample.items()}
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


def write_bucket(
    root: str | Path, split: str, bucket: Bucket, samples: Iterable[dict[str, Any]], shard_size: int = SHARD_SIZE
) -> tuple[int, dict[str, str]]:
    """Write one bucket of a derived dataset, replacing what is there: `root`/<split>/<bucket>/.

    `samples` and what is returned: as for write_shards. A kill leaves a folder whose name begins with a dot. After all
    buckets: write_dataset.
    """
    folder = Path(root) / split / bucket.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unfinished", dir=folder.parent))
    try:
        count, columns = write_shards(unfinished / folder.name, samples, shard_size)
        shutil.rmtree(folder, ignore_errors=True)
        if count:
            (unfinished / folder.name).rename(folder)
    finally:
        shutil.rmtree(unfinished)
    return count, columns


def read_split(root: str | Path, split: str, bucket: Bucket, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The samples of one bucket in stored order (at most `limit`), arrays as tensors.

    Reads the files directly: no shared memory, nothing written, each shard held against its hash. An
    absent bucket has no samples. Raises UserError for a damaged index or shard.
    """
    folder = Path(root) / split / bucket.folder
    if not folder.exists():
        return
    every = itertools.chain.from_iterable(read_shard(folder, shard) for shard in read_index(folder))
    yield from itertools.islice(every, limit)


def read_shard(folder: Path, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of one shard in stored order, as read_split; folder: the bucket's, shard: its checked index entry."""
    data = _read_shard(folder, shard)
    file = folder / stored_file(shard)["basename"]
    reader = reader_from_json(str(folder), None, shard)
    offsets = np.frombuffer(data, np.uint32, shard["samples"] + 1, offset=4)
    for number, (begin, end) in enumerate(itertools.pairwise(offsets)):
        try:
            sample = reader.decode_sample(data[begin:end])
        except Exception as error:  # streaming's decoders raise what they meet
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"{file}: sample {number} of the shard cannot be read ({problem})") from None
        yield {name: from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in sample.items()}


def verify_dataset(root: str | Path) -> DatasetInfo:
    """Read every shard and hold it against its index: size, hashes, sample count. Takes a full read.

    Returns the dataset's description; raises UserError with all problems at once.
    """
    root = Path(root)
    info = read_dataset_info(root)
    problems = []
    for split, bucket, count in _streams(info):
        folder = root / split / bucket.folder
        shards, found = inspect_index(folder, expected_samples=count)
        problems += found
        for shard in shards if not found else []:
            try:
                _read_shard(folder, shard)
            except UserError as error:
                problems.append(str(error))
    raise_problems(problems)
    return info


def ndarray_encoding(tensor: torch.Tensor) -> str:
    """The MDS encoding of a tensor's dtype and shape: bfloat16 (8, 16, 16) -> "ndarray:uint16:8,16,16".

    Raises ValueError for a dtype that has no lossless form here.
    """
    if tensor.dtype not in _ARRAY_TYPES:
        raise ValueError(f"no shard column for tensors of {tensor.dtype}; one of {list(_ARRAY_TYPES)}")
    return f"ndarray:{_ARRAY_TYPES[tensor.dtype]}:{','.join(map(str, tensor.shape))}"


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values as an array of the same bits; bfloat16 becomes uint16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The inverse of to_numpy: uint16 becomes bfloat16 of the same bits. Copies."""
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _encoding(name: str, value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return ndarray_encoding(value)
    if isinstance(value, str | bytes):
        return type(value).__name__
    raise ValueError(f"column {name}: a {type(value).__name__}, not str, bytes or a tensor")


def _streams(info: DatasetInfo) -> Iterator[tuple[str, Bucket, int]]:
    """(split, bucket, samples) of every bucket that has any."""
    for split in SPLITS:
        for bucket in info.buckets:
            if count := info.counts.get(split, {}).get(bucket.name, 0):
                yield split, bucket, count


def _read_shard(folder: Path, shard: dict[str, Any]) -> bytes:
    """The uncompressed bytes of a shard, held against its hash and sample count."""
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
