"""Chunks written by several processes, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megaflux.common.errors import UserError
from megaflux.data.writing import chunks
from megaflux.data.writing.items import Item


def write_chunks(job: chunks.Job, jobs: list[tuple[int, list[Item]]], workers: int, bar: tqdm) -> None:
    """Write chunks, in `workers` processes if that is more than one, and advance the bar by the images done.

    jobs: (number of the chunk, its items). Raises UserError if a worker process dies.
    """
    batches = _read_together(job, jobs)
    if workers <= 1 or len(batches) <= 1:
        for number, items in jobs:
            chunks.write_chunk(job, number, items, bar.update)
        return
    context = multiprocessing.get_context("fork")  # importing torch anew would take seconds each
    counter, stop = context.Value("q", 0), context.Event()
    shown = 0
    initial = (job, counter, stop, os.getpid())
    with ProcessPoolExecutor(min(workers, len(batches)), context, _start_worker, initial) as pool:
        pending = {pool.submit(_write_in_worker, batch) for batch in batches}
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(counter.value - shown)
                shown = counter.value
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory? try fewer --workers); "
                "the same command continues where this one stopped"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _read_together(job: chunks.Job, jobs: list[tuple[int, list[Item]]]) -> list[list[tuple[int, list[Item]]]]:
    """The chunks in batches of one process each: those that begin in one part of the source that can only be read from its
    beginning, as a row group of a parquet file, are a batch."""
    batches: list[list[tuple[int, list[Item]]]] = []
    for number, items in jobs:
        if batches and job.source.together(batches[-1][-1][1][0]) == job.source.together(items[0]):
            batches[-1].append((number, items))
        else:
            batches.append([(number, items)])
    return batches


class _Stopped(Exception):
    """Leaves a chunk unfinished because another one failed, or because of Ctrl-C."""


@dataclass(frozen=True)
class _Worker:
    """What a worker process was started with. counter: images done by all workers. stop: set when they are to leave."""

    job: chunks.Job
    counter: Any
    stop: Any


_worker: list[_Worker] = []  # in a worker process its own, set by _start_worker


def _start_worker(job: chunks.Job, counter: Any, stop: Any, parent: int) -> None:
    _worker.append(_Worker(job, counter, stop))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the parent decides

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _write_in_worker(batch: list[tuple[int, list[Item]]]) -> None:
    (worker,) = _worker

    def count(done: int) -> None:
        if worker.stop.is_set():
            raise _Stopped
        with worker.counter.get_lock():
            worker.counter.value += done

    for number, items in batch:
        chunks.write_chunk(worker.job, number, items, count)
