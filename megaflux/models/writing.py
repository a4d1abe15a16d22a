"""A safetensors file, written one tensor at a time: the host never holds more than the largest."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megaflux.common.files import sync_file

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNED = 8  # the header is padded with spaces, so that values begin at a multiple of this many bytes
Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""(name, dtype, shape) of a tensor."""


def size_of(entry: Entry) -> int:
    """Bytes of a tensor's values."""
    return math.prod(entry[2]) * entry[1].itemsize


def write_tensors(file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> str:
    """Write tensors of the host in the order of their entries, and fsync the file; returns its SHA-256.

    ValueError where one has no or other values than its entry says; OSError where the file cannot be written."""
    header, end = {}, 0
    for entry in entries:
        name, dtype, shape = entry
        start, end = end, end + size_of(entry)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for data in (struct.pack("<Q", len(text)), text):
            stream.write(data)
            digest.update(data)
        for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
            values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            stream.write(values.data)
            digest.update(values.data)
        sync_file(stream)
    return digest.hexdigest()
