"""What goes bad while a run reads it: set aside, and another sample stands in.

A shard that is missing, truncated, of the wrong hash or that cannot be unpacked is quarantined: this process does not
try it again before the run is restarted. A sample of a sound shard that cannot be read or decoded is
bad by itself. In both cases another sample of the same bucket takes its place:

    stand-in k of sample s: the sample of the bucket at position blake2b(seed, s, k) mod size, k = 0, 1, 2, ...
    the first that can be read and decoded; UserError where PROBES of them cannot

Which one that is depends on the seed, the sample's number and what is readable, not on which process asks or what it
tried before: it is the same for any number of workers, and on a resumed run. Quarantine only spares the
reading of what would fail again.

Not the data's fault, and ending the run as ever: a full disk, a folder that cannot be written, no file handles or memory
left, a cache limit that is too small. Otherwise such a moment would replace sound samples for the rest of the run.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from megaflux.common import compat  # noqa: F401  before streaming, which imports torchvision

# isort: split
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format import Reader

from megaflux.data.batches import decode_image
from megaflux.data.buckets import Bucket
from megaflux.data.reading.order import resample
from megaflux.data.storage.unpack import MachineFault, UnpackingStream

PROBES = 64  # stand-ins tried for a sample; with half of a bucket's shards gone, that fails once in 10**19
MAX_REASON = 200  # characters of an error that is shown

# Not the shard's fault: another shard would fare no better, and the next moment this one may be fine.
_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Unreadable(Exception):
    """A sample that cannot be had, alone or with its shard: which, and why."""


def stand_ins(seed: int, sample: int, first: int, count: int) -> Iterator[int]:
    """The PROBES samples that may stand in for `sample`, in order, out of `first` .. `first + count - 1`."""
    for probe in range(PROBES):
        digest = hashlib.blake2b(f"{seed} {sample} {probe}".encode(), digest_size=8).digest()
        yield first + int.from_bytes(digest, "little") % count


class QuarantiningStream(UnpackingStream):
    """A stream to whose shards nothing bad can happen twice: what cannot be had is noted instead of raised.

    bad: the shards in quarantine, raw basename -> why. Streaming then takes the shard for present and lets go all that
    wait for it, here and in the other processes; whoever reads a sample of it learns that it is bad.
    """

    def __init__(self, *, name: str, **options: Any):
        super().__init__(**options)
        self.name = name  # as messages say it: train/16x9
        self.bad: dict[str, str] = {}

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch and unpack a shard, or quarantine it; the change of the cache's size in bytes."""
        if shard.raw_data.basename in self.bad:
            return 0
        cached = 0  # bytes of it that streaming has counted; there is no cache without a remote
        if self.remote is not None:
            cached = sum(path.stat().st_size for path in self._files(shard) if path.exists())
        try:
            try:
                return super().prepare_shard(shard)
            except Exception as error:
                # What is in a cache can be fetched again, and must not stay: the next run would take it for sound.
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
        """Do not try this shard again in this process. The first reason stays."""
        self.bad.setdefault(shard.raw_data.basename, reason)

    def _files(self, shard: Reader) -> list[Path]:
        return [Path(shard.dirname) / info.basename for info in (shard.zip_data, shard.raw_data) if info]

    def _diagnosis(self, shard: Reader, error: Exception) -> str:
        """Why a shard cannot be had, in words that are the same in every process."""
        stored, path = shard.zip_data or shard.raw_data, self._files(shard)[0]
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
    """A StreamingDataset that does not end, shorten its epoch or hang where data are bad.

    Its streams are QuarantiningStreams, one for each of `buckets`. A sample is as MDS gives it, without "image" and
    with

    bucket: the number of its stream
    pixel_values: the decoded image, uint8 (3, H, W), if there is one
    replaced: only in a stand-in, text: the sample it stands in for, why, and its own key
    failure: text, and nothing else of use: the run cannot go on
    """

    failure: str | None = None  # what the machine did not give, with streaming's threads unable to say so
    order: Sequence[Sequence[int]] | None = None
    """Of each stream the sizes of the shards that its order is drawn by (megaflux.data.reading.order); None: its own."""

    def __init__(self, *, streams: Sequence[QuarantiningStream], buckets: Sequence[Bucket], **options: Any):
        self.buckets = tuple(buckets)
        super().__init__(streams=streams, **options)

    def set_aside(self, problems: Sequence[str]) -> None:
        """Quarantine the shards that the verdict found bad ("FILE: reason", megaflux.data.storage.verdict): streaming itself does
        not hash what is there, and would read them as they are."""
        reasons = dict(problem.split(": ", 1) for problem in problems)
        for shard_id, shard in enumerate(self.shards if reasons else ()):
            stream = self.streams[int(self.stream_per_shard[shard_id])]
            for file in stream._files(shard):
                if reason := reasons.get(str(file)):
                    stream.quarantine(shard, reason)

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As streaming's, by the sizes of `order`."""
        if self.order is None:
            return super().resample_streams(epoch, stream_id)
        return resample(self, self.order, epoch, stream_id)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except GeneratorExit:
            # Abandoned within an epoch: streaming's own thread would wait for ever for a shard that is no
            # longer being fetched, and its process would not end.
            if hasattr(self, "_event"):
                self._event.set()
            raise

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """As streaming's. What comes here is the machine's fault: the shard's own stay in the stream."""
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            lock = getattr(self, "_cache_filelock", None)
            if lock is not None and lock.is_locked:  # by this thread: streaming fails to make room with it in hand
                lock.release(force=True)
            shard = self.shards[shard_id]
            self.failure = f"{shard.dirname}/{shard.raw_data.basename}: {_one_line(error)}"
            # Who waits for it, in another thread or rank, would wait for ever: streaming leaves it as being prepared.
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            if get_worker_info() is None:
                raise
            # The other workers would wait for this shard for ever; a dead worker ends the run instead.
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)

    def _evict_coldest_shard(self) -> None:
        try:
            super()._evict_coldest_shard()
        except Exception as error:
            raise MachineFault(str(error)) from error

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """A sample by its number in the dataset, or the one that stands in for it; see the class."""
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
        where = self.streams[stream_id].name
        return {
            "failure": f"{what}, and of {PROBES} other samples of {where} none can be read; "
            "python -m megaflux.data.verify names all damage"
        }

    def _read(self, sample_id: int, retry: int) -> dict[str, Any]:
        """A sample, decoded. Raises Unreadable, or what the machine did not give."""
        shard_id, row = self.spanner[sample_id]
        stream_id = int(self.stream_per_shard[shard_id])
        stream, shard = self.streams[stream_id], self.shards[shard_id]
        try:
            sample = self._present(shard_id, row, retry)
            if "image" in sample:
                sample["pixel_values"] = decode_image(sample, self.buckets[stream_id])
                del sample["image"]
        except Unreadable:
            raise
        except Exception as error:
            if _is_machines(error):
                raise
            raise Unreadable(f"{stream.name}/{shard.raw_data.basename} sample {row}: {_one_line(error)}") from None
        return {**sample, "bucket": stream_id}

    def _present(self, shard_id: int, row: int, retry: int) -> dict[str, Any]:
        """A sample as it is stored, its shard fetched and unpacked first where it is not there."""
        stream, shard = self.streams[int(self.stream_per_shard[shard_id])], self.shards[shard_id]
        name = shard.raw_data.basename
        raw = os.path.join(shard.dirname, shard.split, name)
        # A wait for another process that fetches it counts as an attempt too; each does so at most once if it is bad.
        for _ in range(1 + retry + self._unique_worker_world.workers_per_node):
            if reason := stream.bad.get(name):
                raise Unreadable(f"{stream.name}/{name} sample {row}: the shard is bad: {reason}")
            if self._event.is_set():
                raise MachineFault(self.failure or "streaming's thread has ended")
            try:
                # Beyond a file's end, reading gives less than was asked for and no error: a key or caption cut short.
                size = os.stat(raw).st_size
                if size != shard.raw_data.bytes:
                    stream.quarantine(shard, f"{size} bytes unpacked, the index says {shard.raw_data.bytes}")
                    continue
                sample = shard[row]
            except FileNotFoundError:
                self.prepare_shard(shard_id)
                continue
            self._shard_access_times[shard_id] = time.time_ns()  # what was read longest ago leaves the cache first
            return sample
        raise MachineFault(f"{raw}: removed as often as it was fetched; raise the cache limit")


def _is_machines(error: Exception) -> bool:
    return isinstance(error, MachineFault | MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE)


def _one_line(error: Exception, folder: str = "") -> str:
    """An error's text, the same in every process: without line breaks, addresses and the shard's folder, which
    the text around it names."""
    text = " ".join((str(error).replace(f"{folder}/", "") if folder else str(error)).split())
    return re.sub(r" at 0x[0-9a-f]+", "", text)[:MAX_REASON] or type(error).__name__
