"""The verdict on a dataset before the first update: every file that training will read, compared with its index.

Streaming never hashes local data, so a shard damaged on disk would be found weeks later, or never. Here each file's size
and hash are compared with index.json. Reading a terabyte takes a quarter of an hour or more, so the verdict on a file is
kept, and holds while the file's size, modification time and inode stay the same:

    PATH/.verified.json    {"version": 1, "path": PATH, "files": {"train/1x1/shard.00000.mds.zstd":
                            [size, mtime_ns, inode, "xxh64:<digest that was found>"], ...}}

The machines of a run that see the same folder (megaflux.data.storage.machines) divide its files, and each keeps the
verdicts on its share: .verified.json, .verified-1.json, ...; all of them are read. A machine with its own copy reads that
whole copy. Only sound files are listed. Damage that leaves the modification time unchanged is found by `python -m
megaflux.data.verify`, which trusts no earlier verdict, or while training (megaflux.data.reading.quarantine).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.common.ranks import World, exchanged_until_done
from megaflux.data.storage.dataset import read_dataset_info
from megaflux.data.storage.index import Problem, inspect_index, stored_file
from megaflux.data.storage.machines import share_of

logger = logging.getLogger(__name__)

VERDICT = ".verified.json"
ANY_VERDICT = ".verified*.json"
VERSION = 1
CHUNK = 1 << 22  # bytes read at once by each thread
THREADS = 8  # hashing releases the interpreter's lock, and a disk or network is faster with several readers
SAVE_EVERY = 60.0  # seconds of reading that a kill may cost

_HASHES: dict[str, Callable[[], Any]] = {  # the fastest first: one whole hash finds any damage
    "xxh3_64": xxhash.xxh3_64,
    "xxh64": xxhash.xxh64,
    "xxh128": xxhash.xxh128,
    "sha256": hashlib.sha256,
    "sha1": hashlib.sha1,
    "md5": hashlib.md5,
}


def verify_shards(path: str | Path, splits: Sequence[str], cache: Path | None, world: World) -> list[Problem]:
    """Compare every shard of some splits of a local dataset with its index: present, size, hash. Collective.

    path: the dataset's folder. splits: "train", "held_out"; one without samples is sound. cache: the folder (the run's)
    that keeps the verdict where `path` is read-only; None: it is then not kept.

    A compressed shard that streaming has unpacked is checked in both forms, because the unpacked one is what is read. A
    file whose size, modification time, inode and expected hash are those of an earlier verdict is not read again.

    The first rank of each node reads; nodes that share the folder divide its files, and each looks at the size of all.
    The others wait for as long as reading takes, which may exceed a barrier's time limit, so the ranks exchange a
    sign of life every few seconds (exchanged_until_done).

    Returns the problems of all nodes, on all ranks. With one rank raises UserError where
    dataset.json is missing or invalid; with several that is one of the problems.
    """
    path, stop, share = Path(path), threading.Event(), _Share()

    def mine() -> list[Problem]:
        return [p for split in splits for p in _verify(path, split, cache, world.is_main, stop, share)]

    def mine_with_errors() -> list[Problem]:
        try:
            return mine()
        except UserError as error:
            return [Problem(None, str(error))]

    if world.size == 1:
        return mine()
    number, of = share_of(_folders(path, splits) if world.nodes > 1 else [], world)
    share = _Share(number, of, world.rank // world.local_size)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(mine_with_errors) if world.local_rank == 0 else None
        try:
            return _exchange(work, world)
        except BaseException:
            stop.set()  # or the pool would first read the rest
            raise


def _exchange(work: Future[list[Problem]] | None, world: World) -> list[Problem]:
    """Every rank's problems, when all have finished. work: this rank's; None where it does not read."""

    def state() -> tuple[bool, list[Problem]]:
        if work is None:
            return True, []
        # An exception raised here is a bug; this rank's end then ends the others' wait.
        return (True, work.result()) if work.done() else (False, [])

    *_, found = exchanged_until_done(state, world)
    return list(dict.fromkeys(problem for _, problems in found for problem in problems))


@dataclass(frozen=True)
class _File:
    """A file to read. name: relative to the dataset. size: bytes. digest: "xxh64:...", from the index. turn: the number
    of its shard in the split, counting missing ones too."""

    name: str
    size: int
    digest: str
    turn: int


@dataclass(frozen=True)
class _Share:
    """What this machine reads: the files whose turn modulo `of` is `number`. machine: its number in the run."""

    number: int = 0
    of: int = 1
    machine: int = 0


def _folders(path: Path, splits: Sequence[str]) -> list[Path]:
    """The folders of all streams; empty where dataset.json is invalid, which each machine reports itself."""
    try:
        info = read_dataset_info(path)
    except UserError:
        return []
    return [path / split / bucket.folder for split in splits for bucket, _ in info.filled(split)]


def _verify(
    path: Path, split: str, cache: Path | None, progress: bool, stop: threading.Event, share: _Share
) -> list[Problem]:
    files, problems = _listed(path, split)
    verdicts = _Verdicts(path, split, cache, share.machine)
    listed, files = files, [file for file in files if file.turn % share.of == share.number]
    todo = [file for file in files if not verdicts.holds(file)]
    verdicts.keep_only({file.name for file in listed} - {file.name for file in todo})
    if not files:
        return problems
    size = sum(file.size for file in todo)
    shown = progress and sys.stderr.isatty()
    if progress and not shown:
        known = f"; {len(files) - len(todo)} of {len(files)} are unchanged since they were read" if todo else ""
        known += f"; machine {share.number + 1} of {share.of} that divide them" if share.of > 1 else ""
        what = f"{len(todo)} files, {size / 1e9:.2f} GB{known}" if todo else f"all {len(files)} files unchanged"
        logger.info("verifying the shards of %s/%s: %s", path, split, what)
    bar = tqdm(total=size, desc=f"verify {path.name}/{split}", unit="B", unit_scale=True, disable=not shown)
    with bar, ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        jobs = {pool.submit(_check, path, file, advance, stop): file for file in todo}
        try:
            for job in as_completed(jobs):
                stat, problem = job.result()
                if problem:
                    problems.append(problem)
                elif stat:
                    verdicts.add(jobs[job], stat)
        except BaseException:  # Ctrl-C: do not read the rest first, but keep the verdicts so far
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            verdicts.save()
    return sorted(problems, key=str)


def _listed(path: Path, split: str) -> tuple[list[_File], list[Problem]]:
    """The files of a split that exist with the right size, and every problem found without reading them."""
    info = read_dataset_info(path)
    files: list[_File] = []
    problems: list[Problem] = []
    turn = -1
    for bucket, count in info.filled(split):
        folder = path / split / bucket.folder
        shards, found = inspect_index(folder, expected_samples=count)
        problems += found
        if inspect_index(folder, check_files=False, expected_samples=count)[1]:
            continue  # an invalid index does not say what the files should be
        for shard in shards:
            turn += 1
            stored = stored_file(shard)
            for entry in (stored,) if stored is shard["raw_data"] else (stored, shard["raw_data"]):
                file = folder / entry["basename"]
                if not file.is_file() or file.stat().st_size != entry["bytes"]:
                    continue  # reported by inspect_index, or not unpacked yet
                algorithm = next((name for name in _HASHES if name in entry["hashes"]), None)
                if algorithm is None:
                    problems.append(Problem(file, f"the index has none of the hashes {', '.join(_HASHES)}"))
                    continue
                name = file.relative_to(path).as_posix()
                files.append(_File(name, entry["bytes"], f"{algorithm}:{entry['hashes'][algorithm]}", turn))
    return files, problems


def _check(
    path: Path, file: _File, advance: Callable[[int], None], stop: threading.Event
) -> tuple[os.stat_result | None, Problem | None]:
    """Read a file and compare its hash. Returns (its stat if it is sound and did not change meanwhile, the problem)."""
    algorithm, _, expected = file.digest.partition(":")
    digest = _HASHES[algorithm]()
    try:
        with open(path / file.name, "rb", buffering=0) as opened:
            before = os.fstat(opened.fileno())
            while chunk := opened.read(CHUNK):
                if stop.is_set():
                    return None, None
                digest.update(chunk)
                advance(len(chunk))
            after = os.fstat(opened.fileno())
    except OSError as error:
        return None, Problem(path / file.name, f"cannot be read ({error.strerror})")
    if digest.hexdigest() != expected:
        return None, Problem(path / file.name, f"damaged, its {algorithm} is not the one in the index")
    return (before if _identity(before) == _identity(after) else None), None


def _identity(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


class _Verdicts:
    """The kept verdicts on a dataset's files, in its folder or, where that is read-only, in the run's.

    fallback: the run's folder. machine: this one's number in the run; each writes a file of its own.
    """

    def __init__(self, path: Path, split: str, fallback: Path | None, machine: int):
        self.path, self.split = path, split
        name = VERDICT if machine == 0 else VERDICT.replace(".json", f"-{machine}.json")
        self.places = [folder / name for folder in (path, Path(fallback) if fallback else None) if folder]
        self.files: dict[str, list[Any]] = {}
        # Other machines' verdicts are trusted where they match; only this machine's own are written again.
        self._others = [self._read(place) for place in sorted(path.glob(ANY_VERDICT))]
        for place in reversed(self.places):  # the dataset's own last, so it counts more
            self.files.update(self._read(place))
        self._changed, self._saved = False, time.monotonic()

    def _read(self, place: Path) -> dict[str, list[Any]]:
        try:
            content = json.loads(place.read_text())
        except (OSError, ValueError):  # missing or torn: its files are read again
            return {}
        if not isinstance(content, dict) or content.get("version") != VERSION:
            return {}
        if place.parent != self.path and content.get("path") != str(self.path.resolve()):
            return {}  # in the run's folder, but of another dataset; one in the dataset's own folder moves with it
        files = content.get("files")
        return dict(files) if isinstance(files, dict) else {}

    def holds(self, file: _File) -> bool:
        """Whether the file was found sound and has not changed since."""
        try:
            wanted = [*_identity(os.stat(self.path / file.name)), file.digest]
        except OSError:
            return False
        if self.files.get(file.name) == wanted:
            return True
        if any(files.get(file.name) == wanted for files in self._others):
            self.files[file.name] = wanted
            self._changed = True
            return True
        return False

    def keep_only(self, names: set[str]) -> None:
        """Drop the verdicts on this split's other files, which have changed or are gone."""
        stale = [name for name in self.files if name.startswith(f"{self.split}/") and name not in names]
        for name in stale:
            del self.files[name]
        self._changed |= bool(stale)

    def add(self, file: _File, stat: os.stat_result) -> None:
        self.files[file.name] = [*_identity(stat), file.digest]
        self._changed = True
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the verdicts if they have changed; warn where none of the places can be written."""
        if not self._changed:
            return
        content = {"version": VERSION, "path": str(self.path.resolve()), "files": self.files}
        for place in self.places:
            try:
                write_json(place, content, indent=None)
                self._changed, self._saved = False, time.monotonic()
                return
            except OSError as error:
                refused = f"{place}: {error.strerror}"
        logger.warning("%s; the verdict on the shards is not kept, a restart will read them again", refused)
        self._saved = time.monotonic()  # do not warn after every file
