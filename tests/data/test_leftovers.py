"""What killed runs leave in /dev/shm and the temporary folder goes with the next start; what living ones use stays."""

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from test_faults import dataset, opened  # noqa: F401  fixtures
from test_loader import take

from megaflux.common import files
from megaflux.data.reading import shared_memory
from megaflux.data.reading.shared_memory import FORGOTTEN, remove_leftovers

TEMPORARY = Path(tempfile.gettempdir())

RUN = """
import sys, time
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
loader = build_loader(sys.argv[1], LoaderOptions(batch_size=4, seed=3), detect_world())
next(iter(loader))
print(loader._dataset._shm_prefix_int, flush=True)
time.sleep(600)
"""


def of(prefix):
    """Name -> what makes a file that very file, of a prefix' files in the temporary folder."""
    found = {}
    for path in TEMPORARY.glob(f"{prefix}_*"):
        with contextlib.suppress(OSError):
            found[path.name] = (path.stat().st_ino, path.stat().st_ctime_ns)
    return found


def test_lock_files_of_a_killed_run_go_though_its_blocks_are_gone(dataset, opened):  # noqa: F811
    """Python's resource tracker outlives the run and unlinks its blocks, but nothing unlinks the files."""
    command = [sys.executable, "-c", RUN, str(dataset)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (f"{int(run.stdout.readline()):06}" for run in runs)
        runs[0].send_signal(signal.SIGKILL)
        runs[0].wait()
        deadline = time.monotonic() + 20
        while any(Path("/dev/shm").glob(f"{killed}_*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = {f"{killed}_{name}" for name in ("barrier_filelock", "cache_filelock", "megaflux_owner")}
        there = of(killed)
        assert set(there) in (left, set())  # a test beside this one may have removed them
        before = of(living)
        loader = opened(dataset)
        assert living not in loader.stale
        loader.close()
        assert not set(there.items()) & set(of(killed).items())  # the number is free again, and may be taken
        assert set(of(living)) == set(before)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    deadline = time.monotonic() + 20
    while of(living) and time.monotonic() < deadline:
        remove_leftovers([str(dataset / "train" / "1x1")])
    assert not of(living)


@pytest.fixture
def unclaimed():
    """Makes a file of a prefix that no run takes."""
    made, numbers = [], itertools.count(900_000 + os.getpid() % 1000 * 10)

    def make(name, folder=TEMPORARY, age=0.0, prefix=None):
        path = folder / f"{prefix or next(numbers)}_{name}"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        made.append(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_files_that_nobody_claimed_go_when_they_are_old_and_certainly_unused(unclaimed):
    old = FORGOTTEN + 60
    forgotten, fresh, held = (unclaimed("cache_filelock", age=age) for age in (old, 0, old))
    with_blocks, other = unclaimed("barrier_filelock", age=old), unclaimed("notes", age=old)
    half = unclaimed("barrier_filelock", age=old)
    used = unclaimed("cache_filelock", prefix=half.name.partition("_")[0])  # the pair's other one was opened just now
    unclaimed("locals", shared_memory.SHM, prefix=with_blocks.name.partition("_")[0])
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers([])
    assert not forgotten.exists()
    assert all(path.exists() for path in (fresh, held, with_blocks, other, half, used))


def test_a_claim_whose_owner_is_gone_goes_and_one_that_is_held_stays(unclaimed):
    gone, held = unclaimed("megaflux_owner"), unclaimed("megaflux_owner")
    with open(held) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        remove_leftovers([])
    assert not gone.exists()
    assert held.exists()


def test_shared_memory_of_another_dataset_goes_after_an_hour(unclaimed):
    claim = unclaimed("megaflux_owner")
    block = unclaimed("locals", shared_memory.SHM, prefix=claim.name.partition("_")[0])
    remove_leftovers([])
    assert block.exists() and claim.exists()
    os.utime(block, (time.time() - shared_memory.OTHERS - 60,) * 2)
    remove_leftovers([])
    assert not block.exists() and not claim.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_temporary_folder_without_locks_is_one_warning(dataset, opened, monkeypatch, caplog, number, unclaimed):  # noqa: F811
    """Training goes on, removes nothing of others that it cannot judge, and leaves nothing of its own."""
    judged = unclaimed("megaflux_owner")
    monkeypatch.setattr(files, "_warned", set())
    real = fcntl.flock

    def refused(file, how):
        if "megaflux" in str(getattr(file, "name", "")):
            raise OSError(number, os.strerror(number))
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", refused)
    loader = opened(dataset)
    assert len(take(loader, 3)) == 3
    prefix = f"{loader._dataset._shm_prefix_int:06}"
    loader.close()
    assert not of(prefix)
    assert judged.exists()
    (warning,) = (text for text in caplog.messages if "no locks" in text)
    assert os.strerror(number) in warning


def test_a_real_fault_of_the_lock_stays_one(dataset, opened, monkeypatch):  # noqa: F811
    def broken(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    loader = opened(dataset)
    take(loader, loader.batches_per_epoch)  # no shard is left to be unpacked, which takes a lock of its own
    loader.close()
    with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
        patched.setattr(fcntl, "flock", broken)
        stack.enter_context(pytest.raises(OSError, match="Input/output error"))
        opened(dataset)
