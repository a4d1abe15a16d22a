"""index.json of MDS shards, checked before streaming sees it.

Streaming trusts the file: `../x` in it reads and writes outside the folder, wrong counts and duplicate entries load
silently, and a missing shard ends an epoch early or hangs. So the whole index is checked here first, and every problem is
reported at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.files import write_json

INDEX = "index.json"
# Never pkl: it runs code on reading.
SAFE_ENCODING = re.compile(r"str|bytes|int|ndarray:(u?int(8|16|32|64)|float(16|32|64)):[1-9]\d{0,8}(,[1-9]\d{0,8})*")
COMPRESSION = re.compile(r"(br|bz2|gz|snappy|zstd)(:\d{1,2})?")
KEYS = {
    "column_encodings",
    "column_names",
    "column_sizes",
    "compression",
    "format",
    "hashes",
    "raw_data",
    "samples",
    "size_limit",
    "version",
    "zip_data",
}
MAX_NAME, MAX_PART = 1000, 255  # bytes of a file's path and of each of its parts; file systems allow no more
RESTORE = "Restore the files or prepare the dataset again"
MAX_PROBLEMS = 20  # named in an error; further ones are counted

_short = reprlib.Repr()  # a value from a file as part of one line, however deep or long it is
_short.maxstring = _short.maxother = _short.maxlong = 80
shown = _short.repr


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset; as text one line "FILE: reason"."""

    file: Path | None
    """None: the reason names what it is about."""
    reason: str

    def __str__(self) -> str:
        return self.reason if self.file is None else f"{self.file}: {self.reason}"


def read_index(folder: Path, check_files: bool = True) -> list[dict[str, Any]]:
    """The checked shard entries of `folder`/index.json. Raises UserError with every problem that inspect_index finds."""
    shards, problems = inspect_index(folder, check_files)
    raise_problems(problems)
    return shards


def raise_problems(problems: Sequence[Problem], agreed: bool = False, remedy: str = RESTORE) -> None:
    """Raises one UserError with all problems, if there are any. agreed: all ranks raise it. remedy: what to do, a sentence."""
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        listed = "; ".join(map(str, problems[:MAX_PROBLEMS]))
        raise UserError(f"{listed}{more}. {remedy}", agreed)


def inspect_index(
    folder: Path, check_files: bool = True, expected_samples: int | None = None
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """(the shard entries of `folder`/index.json, every problem with them).

    check_files: whether the files must exist with the size that the index gives. expected_samples: dataset.json's count.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text())
    except FileNotFoundError:
        return [], [Problem(path, "missing")]
    except (OSError, ValueError, RecursionError) as error:
        return [], [Problem(path, f"cannot be read ({str(error)[:80]})")]
    if not isinstance(index, dict) or index.get("version") != 2 or not isinstance(index.get("shards"), list):
        return [], [Problem(path, "not an MDS index of version 2")]
    shards = index["shards"]
    problems = [] if shards else [Problem(path, "no shards")]
    seen: set[str] = set()
    sound = []
    for number, shard in enumerate(shards):
        found = _shard_problems(shard, seen)
        problems += [Problem(path, f"shard {number}: {problem}") for problem in found]
        if not found:
            sound.append(shard)
    if len({json.dumps(_columns(shard)) for shard in sound}) > 1:
        problems.append(Problem(path, "shards with different columns"))
    if check_files:
        problems += _file_problems(folder, sound)
    samples = sum(shard["samples"] for shard in sound)
    if len(sound) == len(shards) and expected_samples is not None and samples != expected_samples:
        problems.append(Problem(path, f"{samples} samples, but dataset.json counts {expected_samples}"))
    return shards, problems


def column_encodings(shards: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Column name -> MDS encoding. shards: the entries of a checked index."""
    return dict(_columns(shards[0]))


def fingerprint(shards_by_bucket: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The identity of a dataset: SHA-256 over every shard's name, number of samples and content hashes."""
    content = {
        bucket: [[shard["raw_data"]["basename"], shard["samples"], shard["raw_data"]["hashes"]] for shard in shards]
        for bucket, shards in shards_by_bucket.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stored_file(shard: dict[str, Any]) -> dict[str, Any]:
    """The entry {"basename", "bytes", "hashes"} of the file in which the shard is stored: the compressed one, if any."""
    return shard["zip_data"] or shard["raw_data"]


def with_prefix(shard: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The shard's entry for the index of a higher folder, with `prefix`/ before its file names."""
    moved = dict(shard)
    for field in ("raw_data", "zip_data"):
        if shard[field]:
            moved[field] = {**shard[field], "basename": f"{prefix}/{shard[field]['basename']}"}
    return moved


def write_index(folder: Path, shards: Iterable[dict[str, Any]]) -> None:
    """Write `folder`/index.json, as files.write_json does."""
    write_json(folder / INDEX, {"version": 2, "shards": list(shards)}, indent=None)


def _columns(shard: dict[str, Any]) -> list[tuple[str, str]]:
    return list(zip(shard["column_names"], shard["column_encodings"], strict=True))


def _shard_problems(shard: Any, seen: set[str]) -> list[str]:
    """Problems with one entry. seen: the file names so far, to which this one's are added."""
    if not isinstance(shard, dict):
        return ["not an object"]
    problems = []
    if shard.get("version") != 2 or shard.get("format") != "mds":
        problems.append("not in MDS format, version 2")
    if set(shard) != KEYS:
        problems.append(f"{', '.join(sorted(ascii(key) for key in set(shard) ^ KEYS))[:200]} missing or unknown")
    samples = shard.get("samples")
    if not _is_count(samples, 2**32):  # four bytes hold it in the shard
        problems.append(f"samples = {shown(samples)}, not a positive count")
    names, encodings = _strings(shard.get("column_names")), _strings(shard.get("column_encodings"))
    sizes = shard.get("column_sizes")
    if not names or not encodings or {len(names), len({*names})} != {len(encodings)}:
        problems.append("column names and encodings do not match")
    else:
        for name, encoding in zip(names, encodings, strict=True):
            if not SAFE_ENCODING.fullmatch(encoding):
                problems.append(f"column {shown(name)} has the encoding {shown(encoding)}, which is not allowed")
        if not isinstance(sizes, list) or [_is_size(size) for size in sizes] != [True] * len(names):
            problems.append("column names and sizes do not match")
    compression = shard.get("compression")
    if bool(compression) != bool(shard.get("zip_data")):
        problems.append("compression and zip_data do not match")
    elif compression is not None and not (isinstance(compression, str) and COMPRESSION.fullmatch(compression)):
        problems.append(f"compression {shown(compression)} is not one of br, bz2, gz, snappy, zstd")
    if not _is_size(shard.get("size_limit")):
        problems.append("size_limit is not a size")
    for field in ("raw_data", "zip_data"):
        info = shard.get(field)
        if field == "zip_data" and info is None:
            continue
        problems += _file_info_problems(field, info, seen)
    if not problems:
        raw_bytes, samples = shard["raw_data"]["bytes"], shard["samples"]
        if raw_bytes < 4 * (samples + 2):  # a count, and an offset more than samples
            problems.append(f"{samples} samples do not fit into {raw_bytes} bytes")
    return problems


def _strings(values: Any) -> list[str] | None:
    """The values if they are a list of strings."""
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else None


def _is_count(value: Any, most: int = 2**63) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < most


def _is_size(value: Any) -> bool:
    return value is None or _is_count(value)


def _file_info_problems(field: str, info: Any, seen: set[str]) -> list[str]:
    if not isinstance(info, dict) or set(info) != {"basename", "bytes", "hashes"}:
        return [f"{field} is not an object of basename, bytes and hashes"]
    name, size = info["basename"], info["bytes"]
    problems = []
    if not isinstance(name, str) or not _is_inside(name):
        problems.append(f"{field} basename {shown(name)} does not stay inside the folder")
    elif name in seen:
        problems.append(f"{field} basename {shown(name)} appears twice")
    else:
        seen.add(name)
    if not _is_count(size):
        problems.append(f"{field} bytes = {shown(size)}, not a positive size")
    hashes = info["hashes"]
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(digest, str) for digest in hashes.values()):
        problems.append(f"{field} has no hashes")
    return problems


def _is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, is in normal form, and is not the index itself."""
    if not name or re.search("[\\\\\0:\ud800-\udfff]", name) or len(name.encode()) > MAX_NAME:
        return False
    path = PurePosixPath(name)
    if any(len(part.encode()) > MAX_PART for part in path.parts):
        return False
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and path.name not in (INDEX, ".")


def _file_problems(folder: Path, shards: Sequence[dict[str, Any]]) -> list[Problem]:
    """Files that are missing or have another size than the index gives."""
    problems = []
    for shard in shards:
        stored = stored_file(shard)
        path = folder / stored["basename"]
        try:
            found = path.stat()
        except OSError:
            problems.append(Problem(path, "missing"))
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(Problem(path, "not a file"))
            continue
        size = found.st_size
        if size != stored["bytes"]:
            problems.append(Problem(path, f"{size} bytes, the index says {stored['bytes']}"))
        raw = folder / shard["raw_data"]["basename"]  # streaming unpacks beside the compressed file
        if shard["zip_data"] and raw.exists() and raw.stat().st_size != shard["raw_data"]["bytes"]:
            reason = f"{raw.stat().st_size} bytes, the index says {shard['raw_data']['bytes']}"
            problems.append(Problem(raw, reason))
    return problems
