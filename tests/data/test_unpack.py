"""Two runs on one fresh dataset, folders that cannot be written, and what killed runs leave."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import SMALL, write_folder
from test_faults import BATCHES, dataset, opened, stored  # noqa: F401  fixtures
from test_loader import keys_of, take

from megaflux.common.errors import UserError
from megaflux.data.storage import remote, unpack
from megaflux.data.storage.index import read_index
from megaflux.data.storage.unpack import UNPACKING, own_folder, remove_abandoned
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from tests import forked

TWO = """
import itertools, json, os, sys, time
from pathlib import Path
from megaflux.common.ranks import detect_world
from megaflux.data import loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage import unpack
import streaming.base.stream
roots, out, me = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def meet(name):
    (out / f"{name}-{me}").touch()
    until = time.monotonic() + 0.5
    while not (out / f"{name}-{1 - me}").exists() and time.monotonic() < until:
        pass

def together(moment, real):
    def call(*given):
        if moment == "unpack":
            count[0] += 1
        meet(f"{turn}-{count[0]}-{moment}")  # both are about to write the same shard, or to rename it
        return real(*given)
    return call

for module in (streaming.base.stream, unpack):
    if hasattr(module, "decompress"):
        module.decompress = together("unpack", module.decompress)
os.rename, os.replace = together("rename", os.rename), together("rename", os.replace)
for turn, root in enumerate(roots):
    count = [0]
    opened = loader.build_loader(root, LoaderOptions(batch_size=4, seed=3), detect_world())
    (out / f"{turn}-{me}").touch()
    while not (out / f"{turn}-{1 - me}").exists():
        time.sleep(0.001)
    replaced = [text for batch in itertools.islice(iter(opened), 17) for text in batch.replaced]
    print("REPLACED", replaced, opened._dataset.failure, [stream.bad for stream in opened._dataset.streams], flush=True)
    opened.close()
"""


def packed(dataset, path):  # noqa: F811
    return Path(shutil.copytree(dataset, path, ignore=shutil.ignore_patterns("*.mds", UNPACKING)))


def two_at_once(roots, out):
    """What two processes report that read the same folders one after the other, at the same time."""
    out.mkdir()
    command = ["-c", TWO, json.dumps([str(root) for root in roots]), str(out)]
    processes = [forked.Forked([*command, str(me)]) for me in (0, 1)]
    return [process.communicate(timeout=80)[0].splitlines() for process in processes]


def test_two_runs_on_a_fresh_dataset_replace_nothing(dataset, tmp_path):  # noqa: F811
    """Ten times, both unpacking the same shards in the same order, and writing each at the same moment."""
    roots = [packed(dataset, tmp_path / f"{turn}") for turn in range(10)]
    for lines in two_at_once(roots, tmp_path / "out"):
        assert [line for line in lines if line.startswith("REPLACED")] == ["REPLACED [] None [{}, {}]"] * 10
    for root in roots:
        assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")]
        assert all(not list(folder.iterdir()) for folder in root.rglob(UNPACKING))
        for bucket in (0, 1):
            assert all(path.with_suffix("").exists() for path in stored(root, bucket))


def test_a_cache_whose_first_copy_arrives_damaged_is_fetched_again(dataset, tmp_path, opened, monkeypatch):  # noqa: F811
    """Half a file of a broken connection is no loss, and never lies under the shard's name."""
    remote, cache, bad = packed(dataset, tmp_path / "remote"), tmp_path / "cache", []
    loader = opened(cache, remote=str(remote))
    downloader = type(loader._dataset.streams[0]._downloader)
    real = downloader._download_file_impl

    def once_broken(self, source, target, timeout):
        real(self, source, target, timeout)
        if source not in bad:
            bad.append(source)
            os.truncate(target, 10)

    monkeypatch.setattr(downloader, "_download_file_impl", once_broken)
    assert not any(batch.replaced for batch in take(loader, BATCHES))
    assert len(bad) == len(stored(remote)) + len(stored(remote, 1))


@pytest.mark.parametrize("encoding", ["jpeg", "webp"])
def test_jpeg_and_webp_have_nothing_to_unpack(tmp_path, opened, encoding):  # noqa: F811
    source = write_folder(tmp_path / "source", {(70, 70): 44, (90, 45): 4})
    options = Options(**SMALL | {"encoding": encoding}, held_out=0)
    prepare(str(source), tmp_path / "data", options, workers=1, progress=False)
    shards = read_index(tmp_path / "data" / "train" / "1x1")
    assert all(shard["compression"] is None and shard["zip_data"] is None for shard in shards)
    before = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    loader = opened(tmp_path / "data", verify=True)
    batches = take(loader, loader.batches_per_epoch)
    assert not any(batch.replaced for batch in batches)
    after = [path for path in (tmp_path / "data").rglob("*") if path.is_file() and path.name != ".verified.json"]
    assert sorted(after) == before  # no second form of any shard
    cached = opened(tmp_path / "cache", remote=str(tmp_path / "data"))
    assert keys_of(take(cached, loader.batches_per_epoch)) == keys_of(batches)
    cached.close()

    lost = sorted((tmp_path / "data" / "train" / "1x1").rglob("*.mds"))
    again = opened(tmp_path / "data", verify=True)
    lost[0].unlink()
    os.truncate(lost[1], lost[1].stat().st_size - 1)
    texts = [text for batch in take(again, loader.batches_per_epoch) for text in batch.replaced]
    assert {text.partition("the shard is bad: ")[2].partition(";")[0].split()[0] for text in texts} == {
        "missing",
        str(lost[1].stat().st_size),
    }
    with pytest.raises(UserError, match=f"{lost[0]}: missing"):
        opened(tmp_path / "data", verify=True)


@contextlib.contextmanager
def read_only(root):
    """Folders in which nobody can make a file, root neither."""
    folders = [path for path in [root, *root.rglob("*")] if path.is_dir()]
    if subprocess.run(["chattr", "+i", *folders], capture_output=True).returncode:
        pytest.skip("no immutable folders on this file system")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", *folders], check=True)


def test_half_unpacked_and_read_only_is_said_at_once(dataset, tmp_path, opened):  # noqa: F811
    root = packed(dataset, tmp_path / "data")
    take(opened(root), BATCHES)
    unpacked = sorted(root.rglob("*.mds"))
    with read_only(root):
        assert not any(batch.replaced for batch in take(opened(root, verify=True), BATCHES))  # all are there
    for path in unpacked[::2]:
        path.unlink()
    missing = len(unpacked[::2])
    with read_only(root):
        for options in ({}, {"replace_damaged": True}):
            with pytest.raises(UserError) as caught:
                opened(root, **options)
            assert caught.value.agreed
            assert str(caught.value).startswith(f"data.path: {root} cannot be written (")
            assert (
                f"{missing} of its shards are still to be unpacked there; make it writable, or set data.remote to"
                in str(caught.value)
            )
        cached = opened(tmp_path / "elsewhere", remote=str(root))  # the remedy
        assert not any(batch.replaced for batch in take(cached, BATCHES))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_that_becomes_read_only_ends_the_run(dataset, tmp_path, opened, num_workers):  # noqa: F811
    """No sample is replaced for what is the machine's fault."""
    root = packed(dataset, tmp_path / "data")
    loader = opened(root, num_workers=num_workers)
    with read_only(root), pytest.raises(UserError, match="epoch 0 ended after 0 of 17"):
        take(loader, BATCHES)


def test_who_waits_for_a_shard_that_another_thread_cannot_unpack_is_let_go(dataset, tmp_path, opened, monkeypatch):  # noqa: F811
    """Without loading processes the rank itself waits for streaming's thread, and for those of the machine's other ranks."""
    drawn, started = opened(packed(dataset, tmp_path / "data"))._dataset, threading.Event()

    def refused(_):
        started.set()
        time.sleep(0.5)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def prepare_shard(*given):
        with contextlib.suppress(unpack.MachineFault):
            drawn.prepare_shard(*given)

    monkeypatch.setattr(unpack, "own_folder", refused)
    unpacking, waiting = (threading.Thread(target=prepare_shard, args=(0, wait), daemon=True) for wait in (False, True))
    unpacking.start()
    assert started.wait(20)
    waiting.start()
    for thread in (unpacking, waiting):
        thread.join(20)
        assert not thread.is_alive()
    assert "cannot be written (Read-only file system)" in drawn.failure


def writing(folder):
    """A process that is writing into `folder` until it is killed, and its own folder there."""
    reading, telling = os.pipe()
    if pid := os.fork():
        return pid, Path(os.read(reading, 1000).decode())
    try:
        with own_folder(folder) as own:
            (own / "unpacked").write_bytes(b"half")
            os.write(telling, str(own).encode())
            time.sleep(600)
    finally:
        os._exit(1)


def test_what_a_killed_process_was_fetching_goes_with_the_next_start(dataset, tmp_path, opened, monkeypatch):  # noqa: F811
    """Shards, indexes and the description alike, whichever it was at."""
    made = []
    monkeypatch.setattr(remote, "own_folder", lambda folder: made.append(folder) or own_folder(folder))
    cache = tmp_path / "cache"
    remote.fetch_split(str(dataset), cache, "train")
    for folder in {*made, cache / "train" / "1x1"}:
        (folder / UNPACKING / f"{unpack._machine()}-7-00000000").mkdir(parents=True)
        (folder / UNPACKING / f"{unpack._machine()}-7-00000000" / unpack.LOCK).touch()
    opened(cache, remote=str(dataset))
    assert not list(cache.rglob("*-7-00000000"))


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path):
    (first, killed), (second, living) = writing(tmp_path), writing(tmp_path)
    try:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        elsewhere = tmp_path / UNPACKING / f"{'f' * 32}-7-00000000"  # of another machine
        elsewhere.mkdir()
        assert remove_abandoned([tmp_path, tmp_path / "absent"]) == [killed]
        assert living.exists() and elsewhere.exists() and not killed.exists()
        old = time.time() - 2 * unpack.ABANDONED
        os.utime(elsewhere, (old, old))
        assert remove_abandoned([tmp_path]) == [elsewhere]
    finally:
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
    with own_folder(tmp_path) as own:
        assert remove_abandoned([tmp_path]) == [living]
        assert own.exists()
    assert not list((tmp_path / UNPACKING).iterdir())


def test_an_unpacked_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut would leave a short shard under the name of a whole one, and refuse the next start."""
    synced, real, target = set(), os.fsync, tmp_path / "shard.mds"

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with unpack.own_folder(tmp_path) as own:
        unpack._write(own / "unpacked", b"shard")
        assert os.stat(own / "unpacked").st_ino in synced
        unpack._publish(own / "unpacked", target)
    assert target.read_bytes() == b"shard"


def test_a_complete_cache_of_a_remote_may_be_where_nothing_can_be_written(dataset, tmp_path, monkeypatch):  # noqa: F811
    cache = tmp_path / "cache"
    remote.fetch_split(str(dataset), cache, "train")

    def refused(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(remote, "own_folder", refused)
    remote.fetch_split(str(dataset), cache, "train")
    (cache / "dataset.json").write_text((cache / "dataset.json").read_text() + " ")
    with pytest.raises(UserError, match="differs from"):
        remote.fetch_split(str(dataset), cache, "train")
    (cache / "dataset.json").unlink()
    with pytest.raises(UserError, match="data.path: .* cannot be written"):
        remote.fetch_split(str(dataset), cache, "train")
