"""Damaged data in a running job: bad shards are quarantined, and another sample replaces each one that cannot be read.

A shard that is missing, truncated, has the wrong hash or cannot be unpacked is quarantined: this process does not try it
again until the run is restarted. A sample of a sound shard may also be unreadable or undecodable by itself. In both cases
another sample of the same bucket replaces it:

    candidate k for sample s: the sample of the bucket at position blake2b(seed, s, k) mod size, k = 0, 1, 2, ...
    the first candidate that can be read and decoded; the run ends where PROBES of them cannot

The choice depends on the seed, the sample's number and what is readable, not on which process reads or what it tried
before: it is the same for any number of workers, and after resuming. Quarantine only avoids reads that would fail again.

Faults of the machine end the run instead: a full disk, a read-only folder, no file handles or memory left, a cache limit
that is too small. Such a moment would otherwise replace sound samples for the rest of the run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.base.reader import FileInfo, JointReader, Reader

from megaflux.data import references
from megaflux.data.buckets import Bucket
from megaflux.data.reading.order import resample
from megaflux.data.reference_size import COLUMN
from megaflux.data.storage.index import Problem
from megaflux.data.storage.unpack import MachineFault, UnpackingStream
from megaflux.data.tensors import from_stored_image

PROBES = 64  # candidates for a sample; with half of a bucket's shards gone, all fail once in 10**19
MAX_REASON = 200  # characters of an error that are shown

# The machine's fault: another shard would fail too, and this one may be readable a moment later.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Unreadable(Exception):
    """A sample that cannot be read, by itself or because of its shard. The message says which, and why."""


def stand_ins(seed: int, sample: int, first: int, count: int) -> Iterator[int]:
    """The PROBES candidates to replace `sample`, in order, out of `first` .. `first + count - 1`."""
    for probe in range(PROBES):
        digest = hashlib.blake2b(f"{seed} {sample} {probe}".encode(), digest_size=8).digest()
        yield first + int.from_bytes(digest, "little") % count


def _files_of(shard: Reader) -> tuple[FileInfo, FileInfo | None]:
    """(the unpacked file of a shard, the compressed one if any)."""
    joint = cast(JointReader, shard)  # as all MDS shards are
    return joint.raw_data, joint.zip_data


class QuarantiningStream(UnpackingStream):
    """A stream that quarantines a shard instead of raising when it cannot be fetched or unpacked.

    name: train/16x9, for messages. bad: the quarantined shards, unpacked file's name -> reason. Streaming takes such a
    shard for present and wakes everyone who waits for it, here and in other processes; reading a sample of it then fails.
    """

    def __init__(self, *, name: str, **options: Any):
        super().__init__(**options)
        self.name = name
        self.bad: dict[str, str] = {}

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch and unpack a shard, or quarantine it. Returns the change of the cache's size in bytes."""
        if _files_of(shard)[0].basename in self.bad:
            return 0
        cached = 0  # bytes of the shard that streaming has counted; without a remote there is no cache
        if self.remote is not None:
            cached = sum(path.stat().st_size for path in self.paths(shard) if path.exists())
        try:
            try:
                return super().prepare_shard(shard)
            except Exception as error:
                # A damaged file in a cache must go, or the next run would take it for sound; it can be fetched again.
                if _is_machines(error) or self.remote is None or not shard.evict():
                    raise
                return super().prepare_shard(shard) - cached
        except Exception as error:
            if _is_machines(error):
                raise
            self.quarantine(shard, self._diagnosis(shard, error))
            if self.remote is None:
                return 0
            shard.evict()
            return -cached

    def quarantine(self, shard: Reader, reason: str) -> None:
        """Do not try this shard again in this process. An earlier reason is kept."""
        self.bad.setdefault(_files_of(shard)[0].basename, reason)

    def paths(self, shard: Reader) -> list[Path]:
        """Where a shard's files are, the compressed one, if any, first."""
        raw, compressed = _files_of(shard)
        return [Path(shard.dirname) / info.basename for info in (compressed, raw) if info]

    def _diagnosis(self, shard: Reader, error: Exception) -> str:
        """Why a shard cannot be read, in words that are the same in every process."""
        raw, compressed = _files_of(shard)
        stored, path = compressed or raw, self.paths(shard)[0]
        if self.remote is None:
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                return "missing"
            except OSError as unreadable:
                return _one_line(unreadable, shard.dirname)
            if size != stored.bytes:
                return f"{size} bytes, the index says {stored.bytes}"
        return _one_line(error, shard.dirname)


class BucketDataset(StreamingDataset):
    """A StreamingDataset that does not raise, hang or cut an epoch short where data are damaged.

    It has one QuarantiningStream for each of `buckets`. A sample holds the stored columns, with these in place of "image":

    bucket: the number of its stream
    pixel_values: the decoded image, uint8 (3, H, W), if the column exists
    replaced: only where this sample replaces another; text: the other one, why, and this one's key
    failure: text, and nothing else of use: the machine's fault, for which the run has to end
    """

    failure: str | None = None
    """A fault of the machine, noted here because streaming's threads cannot report it."""
    references: bool = True
    """Whether to decode the column of references (a list of ReferencePicture), or to drop it."""
    order: Sequence[Sequence[int]] | None = None
    """For each stream the sizes of the shards by which its order is drawn (megaflux.data.reading.order); None: its own."""

    def __init__(self, *, streams: Sequence[QuarantiningStream], buckets: Sequence[Bucket], **options: Any):
        self.buckets = tuple(buckets)
        super().__init__(streams=streams, **options)

    def set_aside(self, problems: Sequence[Problem]) -> None:
        """Quarantine the shards in which the verdict found a problem: streaming itself would read local files without
        hashing them."""
        reasons = {problem.file: problem.reason for problem in problems}
        for shard_id, shard in enumerate(self.shards if reasons else ()):
            stream = self._stream(int(self.stream_per_shard[shard_id]))
            for file in stream.paths(shard):
                if reason := reasons.get(file):
                    stream.quarantine(shard, reason)

    def _stream(self, stream_id: int) -> QuarantiningStream:
        return cast(QuarantiningStream, self.streams[stream_id])  # as __init__ takes no others

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Streaming's method, by the shard sizes of `order`."""
        if self.order is None:
            return super().resample_streams(epoch, stream_id)
        return resample(self, self.order, epoch, stream_id)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except GeneratorExit:
            # Abandoned within an epoch: streaming's thread would wait forever for a shard that is no longer being
            # fetched, and the process would not end.
            if hasattr(self, "_event"):
                self._event.set()
            raise

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Streaming's method. Only faults of the machine are raised: those of a shard stay in its stream."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            lock = getattr(self, "_cache_filelock", None)
            if (
                lock is not None and lock.is_locked
            ):  # by this thread: streaming failed to make room while it held the lock
                lock.release(force=True)
            shard = self.shards[shard_id]
            self.failure = f"{shard.dirname}/{_files_of(shard)[0].basename}: {_one_line(error)}"
            # Other threads and ranks would wait for it forever: streaming leaves it marked as being prepared.
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            if get_worker_info() is None:
                raise
            # The other workers would wait for this shard forever; a dead worker ends the run instead.
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _evict_coldest_shard(self) -> None:
        try:
            super()._evict_coldest_shard()
        except Exception as error:
            raise MachineFault(str(error)) from error

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """A sample by its number in the dataset, or the one that replaces it, as described at the class."""
        try:
            return self._read(sample_id, retry)
        except Unreadable as error:
            what = str(error)
        except Exception as error:
            return {"failure": self.failure or _one_line(error)}
        stream_id = int(self.stream_per_shard[self.spanner[sample_id][0]])
        first, count = int(self.sample_offset_per_stream[stream_id]), int(self.samples_per_stream[stream_id])
        for candidate in stand_ins(self.shuffle_seed, int(sample_id), first, count):
            try:
                sample = self._read(candidate, retry)
            except Unreadable:
                continue
            except Exception as error:
                return {"failure": self.failure or _one_line(error)}
            return {**sample, "replaced": f"{what}; {sample['key']!r} stands in"}
        where = self._stream(stream_id).name
        return {
            "failure": f"{what}, and of {PROBES} other samples of {where} none can be read; "
            "python -m megaflux.data.verify names all damage"
        }

    def _read(self, sample_id: int, retry: int) -> dict[str, Any]:
        """A sample, decoded. Raises Unreadable, or the machine's error."""
        shard_id, row = self.spanner[sample_id]
        stream_id = int(self.stream_per_shard[shard_id])
        stream, shard = self._stream(stream_id), self.shards[shard_id]
        try:
            sample = self._present(shard_id, row, retry)
            if "image" in sample:
                sample["pixel_values"] = from_stored_image(sample.pop("image"), self.buckets[stream_id], sample["key"])
            if COLUMN in sample:
                column = sample.pop(COLUMN)
                if self.references:
                    sample[COLUMN] = references.decoded(column)
        except Unreadable:
            raise
        except Exception as error:
            if _is_machines(error):
                raise
            raise Unreadable(f"{stream.name}/{_files_of(shard)[0].basename} sample {row}: {_one_line(error)}") from None
        return {**sample, "bucket": stream_id}

    def _present(self, shard_id: int, row: int, retry: int) -> dict[str, Any]:
        """A sample as it is stored. Its shard is fetched and unpacked first where necessary. Raises as _read."""
        stream, shard = self._stream(int(self.stream_per_shard[shard_id])), self.shards[shard_id]
        info, _ = _files_of(shard)
        name = info.basename
        raw = os.path.join(shard.dirname, shard.split, name)
        # Waiting for another process that fetches it is an attempt too; each process fetches a bad shard at most once.
        for _ in range(1 + retry + self._unique_worker_world.workers_per_node):
            if reason := stream.bad.get(name):
                raise Unreadable(f"{stream.name}/{name} sample {row}: the shard is bad: {reason}")
            if self._event.is_set():
                raise MachineFault(self.failure or "streaming's thread has ended")
            try:
                # Reading past a file's end is no error: it would give a key or caption that is cut short.
                size = os.stat(raw).st_size
                if size != info.bytes:
                    stream.quarantine(shard, f"{size} bytes unpacked, the index says {info.bytes}")
                    continue
                sample = shard[row]
            except FileNotFoundError:
                self.prepare_shard(shard_id)
                continue
            self._shard_access_times[shard_id] = time.time_ns()  # the shard that was read longest ago is evicted first
            return sample
        raise MachineFault(f"{raw}: removed as often as it was fetched; raise the cache limit")


def _is_machines(error: Exception) -> bool:
    return isinstance(error, MachineFault | MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE)


def _one_line(error: Exception, folder: str = "") -> str:
    """An error's text without line breaks, memory addresses and the shard's folder, so that it is the same in every
    process."""
    text = " ".join((str(error).replace(f"{folder}/", "") if folder else str(error)).split())
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:MAX_REASON] or type(error).__name__
