"""Weight files by their names, headers and indexes, without reading a weight."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

POINTER = b"version https://git-lfs"
SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes, as the safetensors library allows


def is_pointer(file: Path) -> bool:
    """Whether a file is the pointer that git leaves in place of a large file until git-lfs fetches it."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def read_header(file: Path) -> tuple[set[str], int]:
    """(names of the tensors, size of the whole file in bytes), as the header of a safetensors file says. ValueError
    where it has no valid header; OSError."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER + 1
        if length > MOST_HEADER:
            raise ValueError("is not a safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
        end = max((int(offsets[1]) for offsets in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("is truncated or not a safetensors file") from None
    return set(tensors), 8 + length + end


def read_index(file: Path) -> dict[str, str]:
    """Name of each tensor -> file beside the index that holds it. ValueError, beginning with the index's name, where it
    is not such a map; OSError."""
    content = read_json(file)
    keys = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(keys, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(SAFETENSORS) for name in keys.values()
    ):
        raise ValueError(f"{file.name}: weight_map does not name safetensors files beside it")
    return keys


def read_json(file: Path) -> Any:
    """The content of a JSON file; None where it is not JSON. OSError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
