"""/dev/shm that is too small is one line before the first update, and never a bus error or a hang."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_faults import BATCHES, dataset, opened  # noqa: F401  fixtures
from test_loader import take

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.data.buckets import make_buckets
from megaflux.data.reading import shm_room
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage.shards import ndarray_encoding

SQUARE, WIDE = make_buckets(("1:1", "2:1"), 64)

SMALL = """
import itertools, subprocess, sys
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.common.errors import UserError
for workers, size in ((2, "2m"), (0, "2m"), (2, "3040k")):
    subprocess.run(["mount", "-o", f"remount,size={size}", "/dev/shm"], check=True)
    try:
        loader = build_loader(sys.argv[1], LoaderOptions(batch_size=32, seed=3, num_workers=workers), detect_world())
        print(workers, "DREW", len(list(itertools.islice(iter(loader), 6))), flush=True)
        loader.close()
    except UserError as error:
        print(workers, "SAID", error.agreed, error, flush=True)
"""


def in_small_shm(script, *arguments):
    """A script run where /dev/shm is its own and has 2 MB, as in a container."""
    enter = 'mount -t tmpfs -o size=2m tmpfs /dev/shm && exec "$@"'
    if subprocess.run(["unshare", "-m", "sh", "-c", enter, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no mounts in a namespace of its own on this machine")
    command = ["unshare", "-m", "sh", "-c", enter, "sh", sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=80)


def test_a_small_shm_is_said_and_one_that_suffices_is_used(dataset):  # noqa: F811
    """32 pictures of 64 x 64 in 2 x 2 + 1 batches, and what streaming takes: 2 MB do for the loading rank alone, and
    3040 KB, 15 more than are needed, for two processes."""
    done = in_small_shm(SMALL, dataset)
    assert done.returncode == 0, done.stderr
    two, none, enough = done.stdout.splitlines()
    assert two.startswith("2 SAID True /dev/shm: 2."), two
    assert "need 3.1 MB (1 x (2 x 2 + 1) batches of 0.393 MB); give the container more (docker run --shm-size=" in two
    assert "or lower data.num_workers (0 needs 1.05 MB)" in two
    assert (none, enough) == ("0 DREW 6", "2 DREW 6")


def test_columns():
    encodings = {"key": "str", "caption": "str", "image": "bytes"}
    assert shm_room.sample_bytes(WIDE, encodings) == 3 * 64 * 32
    cached = {
        "latents": ndarray_encoding(torch.zeros(8, 16, 16, dtype=torch.bfloat16)),
        "hidden_states": ndarray_encoding(torch.zeros(77, 32, dtype=torch.float32)),
    }
    assert shm_room.sample_bytes(SQUARE, cached) == 2 * 8 * 16 * 16 + 4 * 77 * 32
    assert shm_room.sample_bytes(SQUARE, encodings | cached) == 3 * 64 * 64 + 2 * 8 * 16 * 16 + 4 * 77 * 32


def test_what_grows_the_need(monkeypatch):
    def entries(bucket):
        return [{"samples": 9, "column_names": ["image"], "column_encodings": ["bytes"]}]

    def need(free, **changes):
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free, f_frsize=1))
        of_run = {"local_ranks": 8, "samples_per_epoch": 10, "gpus": False}
        of_run |= {name: changes.pop(name) for name in of_run if name in changes}
        options = LoaderOptions(**{"batch_size": 8, "seed": 1, "num_workers": 8} | changes)
        ranks = of_run.pop("local_ranks")
        world = World(0, ranks, local_size=ranks)
        return shm_room.problem({b: entries(b) for b in (SQUARE, WIDE)}, options, world, **of_run)

    batch = 8 * 3 * 64 * 64 + 4 * 4096
    exact = 8 * 17 * batch + (1 << 20) + 8 * 10 + 9 * 2
    assert need(exact) is None
    assert need(exact - 1)
    for changes in (
        {"num_workers": 9},
        {"prefetch_factor": 3},
        {"local_ranks": 9},
        {"batch_size": 9},
        {"samples_per_epoch": 11},
        {"gpus": True},
    ):
        assert need(exact, **changes), changes
    assert need((1 << 20) + 98, num_workers=0) is None
    alone = need(1 << 20, num_workers=0)
    assert "--shm-size" in alone
    assert "num_workers" not in alone  # which could not be lower


def test_dev_shm_of_another_machine_is_everybodys_error(dataset, opened, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shm_room, "SHM", "/nowhere")  # not Linux: nothing to check
    assert len(take(opened(dataset, num_workers=1), BATCHES)) == BATCHES
    monkeypatch.setattr(shm_room, "problem", lambda *_, **__: "/dev/shm: too small")
    with pytest.raises(UserError) as caught:
        opened(dataset)
    assert caught.value.agreed


def test_what_streaming_shares_is_counted_for_what_is_drawn(dataset, opened, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(shm_room, "problem", lambda shards, options, world, samples, gpus: asked.append(samples))
    loader = opened(dataset)
    assert asked == [loader.samples_per_epoch] and asked[0] > 0
