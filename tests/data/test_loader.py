"""Batches are of one bucket, every sample comes once an epoch, and a resumed run sees what it would have."""

import contextlib
import io
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_folder
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.common.ranks import detect_world
from megaflux.data.buckets import make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.shared_memory import _folders_in, _is_orphaned, remove_leftovers
from megaflux.data.storage.dataset import DatasetInfo, write_dataset
from megaflux.data.storage.shards import read_split
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from megaflux.training import objective
from tests import forked
from tests.derived import write_bucket
from tests.training.runs import rank_environments

BATCHES = 17  # of 4 in an epoch of the small dataset: 10 square, 6 wide, 1 tall


@pytest.fixture
def build(small_dataset, tmp_path):
    """build_loader on the small dataset, closed at the test's end; nothing may stay in shared memory."""
    opened = []

    def build(path=small_dataset, micro_batch_size=4, seed=3, **options):
        opened.append(
            build_loader(path, LoaderOptions(batch_size=micro_batch_size, seed=seed, **options), detect_world())
        )
        return opened[-1]

    yield build
    for loader in opened:
        loader.close()
    assert not prefixes_on(small_dataset) | prefixes_on(tmp_path)


def prefixes_on(folder):
    """Streaming's prefixes whose streams lie in this folder; other tests run beside this one."""
    found = set()
    for block in Path("/dev/shm").glob("[0-9]*_locals"):
        with contextlib.suppress(OSError):
            if any(Path(stream).is_relative_to(folder) for stream in _folders_in(block.read_bytes())):
                found.add(block.name.partition("_")[0])
    return found


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def keys_of(batches):
    return [batch.keys for batch in batches]


def all_keys(path, split="train"):
    buckets = make_buckets(SMALL["aspect_ratios"], 64)
    return {sample["key"] for bucket in buckets for sample in read_split(path, split, bucket)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_what_was_stored(build, small_dataset, num_workers):
    loader = build(num_workers=num_workers)
    stored = {
        sample["key"]: (bucket, sample["caption"])
        for bucket in loader.buckets
        for sample in read_split(small_dataset, "train", bucket)
    }
    for batch in take(loader, BATCHES):
        assert len(batch.keys) == len(batch.captions) == 4
        assert batch.pixel_values.dtype == torch.uint8
        assert batch.pixel_values.shape == (4, 3, batch.bucket.height, batch.bucket.width)
        assert batch.latents is None
        assert batch.hidden_states is None
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert stored[key] == (batch.bucket, caption)  # so every batch is of one bucket


def test_pixels_are_those_of_the_stored_image(build, small_dataset):
    batch = take(build(), 1)[0]
    images = {s["key"]: s["image"] for s in read_split(small_dataset, "train", batch.bucket)}
    for key, pixels in zip(batch.keys, batch.pixel_values, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), Image.open(io.BytesIO(images[key])))


def test_each_sample_once_an_epoch_but_for_declared_repeats(build, small_dataset):
    loader = build()
    assert loader.repeats == {"1:1": 3, "2:1": 3, "1:2": 1}
    assert (loader.samples_per_epoch, loader.batches_per_epoch) == (68, BATCHES)
    batches = take(loader, 3 * BATCHES)
    epochs = [batches[start : start + BATCHES] for start in range(0, 3 * BATCHES, BATCHES)]
    for epoch in epochs:
        seen = Counter(key for batch in epoch for key in batch.keys)
        assert set(seen) == all_keys(small_dataset)
        assert sum(count - 1 for count in seen.values()) == sum(loader.repeats.values())
        assert max(seen.values()) == 2
        assert Counter(batch.bucket.name for batch in epoch) == {"1:1": 10, "2:1": 6, "1:2": 1}
    assert keys_of(epochs[0]) != keys_of(epochs[1]) != keys_of(epochs[2])


def test_a_bucket_smaller_than_a_batch_is_repeated_evenly(build, caplog):
    caplog.set_level(logging.INFO)
    loader = build(micro_batch_size=8)
    assert loader.repeats == {"1:1": 3, "2:1": 3, "1:2": 5}
    assert "bucket 1:2 (32x64): 3 samples, 5 repeats an epoch" in caplog.text
    (warned,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "bucket 1:2 (32x64): its 3 samples fill 8 places of an epoch" in warned and "fewer --aspect-ratios" in warned
    (tall,) = [b for b in take(loader, loader.batches_per_epoch) if b.bucket.name == "1:2"]
    assert sorted(Counter(tall.keys).values()) == [2, 3, 3]


def test_the_seed_makes_the_order(build):
    first, same, other = (keys_of(take(build(seed=seed), BATCHES)) for seed in (3, 3, 4))
    assert first == same != other
    stored = keys_of(take(build(shuffle=False), BATCHES))
    assert stored != first
    assert min(itertools.chain(*stored)) == "000.png"


def test_the_number_of_workers_does_not_change_the_order(build):
    plain = keys_of(take(build(), 2 * BATCHES + 3))
    for num_workers in (1, 2):
        assert keys_of(take(build(num_workers=num_workers), 2 * BATCHES + 3)) == plain, num_workers


RESUME = """
import itertools, json, sys
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
path, states, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
found = []
for num_workers, state in states:
    loader = build_loader(path, LoaderOptions(batch_size=4, seed=3, num_workers=num_workers), detect_world())
    loader.load_state_dict(state)
    found.append([batch.keys for batch in itertools.islice(iter(loader), count)])
    loader.close()
print("KEYS" + json.dumps(found))
"""


def test_exact_resume_in_a_new_process(build, small_dataset):
    """Stopped within an epoch, at its end and in a later one; with 0 and 2 workers."""
    uninterrupted = keys_of(take(build(), 70))
    stops, jobs = [1, 6, BATCHES, 40], []
    for num_workers in (0, 2):
        for stop in stops:
            loader = build(num_workers=num_workers)
            take(loader, stop)
            jobs.append((num_workers, json.loads(json.dumps(loader.state_dict()))))
            loader.close()
    assert (jobs[2][1]["epoch"], jobs[2][1]["batches"]) == (1, 0)
    done = forked.run(["-c", RESUME, str(small_dataset), json.dumps(jobs), "30"])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("KEYS")[2])
    for (num_workers, _), stop, keys in zip(jobs, stops * 2, found, strict=True):
        assert keys == uninterrupted[stop : stop + 30], (num_workers, stop)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_sample_once_over_resumes(build, small_dataset, num_workers):
    """Killed and resumed every few batches: still one epoch."""
    state, seen = None, Counter()
    for count in (3, 1, 7, 6):
        loader = build(num_workers=num_workers)
        if state:
            loader.load_state_dict(state)
        seen.update(key for batch in take(loader, count) for key in batch.keys)
        state = loader.state_dict()
        loader.close()
    assert (state["epoch"], state["batches"]) == (1, 0)
    assert set(seen) == all_keys(small_dataset)
    assert sum(seen.values()) - len(seen) == 7


def test_a_state_of_something_else_is_refused(build, tmp_path):
    state = build().state_dict()
    for changed, options in {"seed": {"seed": 4}, "micro_batch_size": {"micro_batch_size": 2}}.items():
        with pytest.raises(UserError, match=f"position is of {changed}"):
            build(**options).load_state_dict(state)
    with pytest.raises(UserError, match="world_size 2, this run has 1"):
        build().load_state_dict({**state, "world_size": 2})
    source = write_folder(tmp_path / "source", {(70, 70): 5})
    prepare(str(source), tmp_path / "other", Options(**SMALL, held_out=0), workers=1, progress=False)
    with pytest.raises(UserError, match="position is of dataset"):
        build(tmp_path / "other").load_state_dict(state)
    with pytest.raises(UserError):
        build().load_state_dict({})


def test_one_iteration_per_loader(build):
    loader = build()
    state = loader.state_dict()
    next(iter(loader))
    with pytest.raises(RuntimeError, match="iterated once"):
        iter(loader)
    with pytest.raises(RuntimeError, match="before the iteration"):
        loader.load_state_dict(state)
    loader.close()
    loader.close()


def test_two_loaders_side_by_side(build):
    one, two = iter(build()), iter(build(seed=4))
    alone = keys_of(take(build(), 5))
    assert [next(one).keys for _ in range(5) if next(two)] == alone


def test_a_bucket_without_samples_is_left_out(build, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    source = write_folder(tmp_path / "source", {(70, 70): 5, (90, 45): 4})
    prepare(str(source), tmp_path / "out", Options(**SMALL, held_out=0), workers=1, progress=False)
    assert [bucket.name for bucket in build(tmp_path / "out").buckets] == ["1:1", "2:1"]
    assert "bucket 1:2 (32x64) has no train samples" in caplog.text
    with pytest.raises(UserError, match="no samples in the split 'held_out'"):
        build(tmp_path / "out", split="held_out")


def test_what_is_wrong_is_said_before_streaming_starts(build, small_dataset, tmp_path):
    with pytest.raises(UserError, match=r"megaflux\.data\.prepare"):
        build(tmp_path)
    with pytest.raises(UserError, match="at least 1"):
        build(micro_batch_size=0)
    with pytest.raises(UserError, match="needs a remote"):
        build(cache_limit="1gb")
    shutil.copytree(small_dataset, tmp_path / "copy")
    lost = sorted((tmp_path / "copy").rglob("*.zstd"))
    lost[0].unlink()
    lost[-1].write_bytes(b"")
    with pytest.raises(UserError) as caught:
        build(tmp_path / "copy")
    assert f"{lost[0]}: missing" in str(caught.value)
    assert f"{lost[-1]}: 0 bytes" in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_damaged_behind_the_index_is_no_short_epoch(build, small_dataset, tmp_path, num_workers):
    shutil.copytree(small_dataset, tmp_path / "copy", ignore=shutil.ignore_patterns("*.mds"))
    path = min((tmp_path / "copy" / "train").rglob("*.zstd"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    batches = take(build(tmp_path / "copy", num_workers=num_workers), BATCHES)  # tests/data/test_faults.py has the rest
    assert sorted(Counter(batch.bucket.name for batch in batches).values()) == [1, 6, 10]
    texts = [text for batch in batches for text in batch.replaced]
    assert texts
    assert all("Checksum failure" in text for text in texts)


def test_a_remote_dataset_is_cached(build, small_dataset, tmp_path):
    local = keys_of(take(build(), BATCHES + 3))
    remote = build(tmp_path / "cache", remote=str(small_dataset), num_workers=2)
    assert keys_of(take(remote, BATCHES + 3)) == local
    cached = list((tmp_path / "cache").rglob("*.mds"))
    assert len(cached) == len(list((small_dataset / "train").rglob("*.zstd")))
    remote.close()
    again = build(tmp_path / "cache", remote=str(small_dataset), cache_limit="10mb")
    assert keys_of(take(again, 3)) == local[:3]


def test_remotes_that_do_not_fit(build, small_dataset, tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json: cannot be fetched"):
        build(tmp_path / "cache", remote=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cache folder itself"):
        build(small_dataset, remote=str(small_dataset))
    source = write_folder(tmp_path / "source", {(70, 70): 5})
    prepare(str(source), tmp_path / "other", Options(**SMALL, held_out=0), workers=1, progress=False)
    build(tmp_path / "cache", remote=str(tmp_path / "other")).close()
    with pytest.raises(UserError, match="the cache is of another dataset"):
        build(tmp_path / "cache", remote=str(small_dataset))


def test_cached_latents_and_hidden_states(build, tmp_path):
    buckets = make_buckets(("1:1", "2:1"), 64)
    generator = torch.Generator().manual_seed(0)
    latents = {b.name: torch.randn(6, 8, b.height // 8, b.width // 8, generator=generator).bfloat16() for b in buckets}
    states = {b.name: torch.randn(6, 5, 16, generator=generator).bfloat16() for b in buckets}
    counts = {}
    for bucket in buckets:
        samples = (
            {
                "key": f"{bucket.name} {n}",
                "caption": "",
                "latents": latents[bucket.name][n],
                "hidden_states": states[bucket.name][n],
            }
            for n in range(6)
        )
        counts[bucket.name], columns = write_bucket(tmp_path, "train", bucket, samples)
    write_dataset(tmp_path, DatasetInfo(64, buckets, {"train": counts}, columns))
    for batch in take(build(tmp_path, micro_batch_size=3, num_workers=2), 4):
        assert batch.pixel_values is None
        rows = [int(key.split()[1]) for key in batch.keys]
        assert torch.equal(batch.latents, latents[batch.bucket.name][rows])
        assert torch.equal(batch.hidden_states, states[batch.bucket.name][rows])


KILLED = """
import sys, time
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
loader = build_loader(sys.argv[1], LoaderOptions(batch_size=4, seed=3, num_workers=2, remote=sys.argv[2]), detect_world())
next(iter(loader))
print("RUNNING", flush=True)
time.sleep(600)
"""


def test_a_killed_run_does_not_stop_the_next(build, small_dataset, tmp_path, caplog):
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", KILLED, str(cache), str(small_dataset)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert run.stdout.readline() == "RUNNING\n"
    (prefix,) = prefixes_on(cache)
    folders = [str(cache / "train" / "1x1")]
    assert prefix not in remove_leftovers(folders)  # in use: left alone
    os.killpg(run.pid, signal.SIGKILL)  # with its workers and Python's resource tracker
    run.wait()
    deadline = time.monotonic() + 10
    while not _is_orphaned(prefix) and time.monotonic() < deadline:
        time.sleep(0.05)  # its workers' threads are still on their way out
    assert prefix not in remove_leftovers([str(tmp_path / "other" / "train" / "1x1")])  # not yet those of other folders
    caplog.set_level(logging.INFO)
    assert len(take(build(cache, remote=str(small_dataset)), 3)) == 3
    said = caplog.text.partition("removed shared memory that killed runs had left: ")[2].partition("\n")[0]
    assert prefix in said.split(", ")


RANKS = """
import itertools, json, os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
from megaflux.data.reading import opening, shm_room
from megaflux.common.ranks import detect_world
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.common.errors import UserError
path, out = sys.argv[1:]
found, captions, refused = {}, {}, []

def too_small(shards, options, world, *_, **__):
    refused.append(world.local_size)
    return "too small"
for num_workers in (0, 2):
    loader = build_loader(path, LoaderOptions(batch_size=2, seed=3, num_workers=num_workers), detect_world())
    iterator = iter(loader)
    taken = list(itertools.islice(iterator, 6))
    state = loader.state_dict()
    loader.close()
    loader = build_loader(path, LoaderOptions(batch_size=2, seed=3, num_workers=num_workers), detect_world())
    loader.load_state_dict(state)
    taken += itertools.islice(iter(loader), 20)
    found[num_workers] = [batch.keys for batch in taken]
    captions[num_workers] = [batch.captions for batch in taken]
    repeats = loader.repeats
    loader.close()
# What the first rank of a machine alone has seen.
shm_room.problem = too_small
for unwritable in (opening.unwritable, lambda *_: "not writable"):
    opening.unwritable = unwritable
    try:
        build_loader(path, LoaderOptions(batch_size=2, seed=3), detect_world())
    except UserError as error:
        refused.append([str(error), error.agreed])
with open(f"{out}/{dist.get_rank()}.json", "w") as file:
    json.dump({"keys": found, "captions": captions, "repeats": repeats, "state": state, "refused": refused}, file)
dist.barrier()
os._exit(0)  # a normal exit under gloo's threads aborts now and then (exit code -6)
"""


def drawn(keys, captions):
    """What an update of each of these batches draws: key -> caption, without keys that a batch repeats."""
    found = []
    for update, (names, stored) in enumerate(zip(keys, captions, strict=True)):
        samples = objective.count_up(names, Counter())
        texts = objective.draw_captions(None, 3, update, samples, stored)
        found.append({name: text for name, text in zip(names, texts, strict=True) if names.count(name) == 1})
    return found


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_ranks_see_the_batches_of_one(build, small_dataset, tmp_path, nodes):
    """Two ranks, on one node or on two, resumed in the middle, against one rank of twice the batch. What stops one of them at
    the start stops both, with one error."""
    batches = take(build(micro_batch_size=4), 26)
    alone, captions = keys_of(batches), drawn(keys_of(batches), [batch.captions for batch in batches])
    assert len({text for of_update in captions for text in of_update.values() if "caption" in text}) > 20
    (tmp_path / "ranks.py").write_text(RANKS)
    script = [str(tmp_path / "ranks.py"), str(small_dataset), str(tmp_path)]
    done = forked.run_ranks(script, rank_environments(2, nodes), timeout=120)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["repeats"] == ranks[1]["repeats"] == {"1:1": 3, "2:1": 3, "1:2": 1}
    assert ranks[0]["state"] == ranks[1]["state"]
    said = [["too small", True], ["not writable", True]]
    assert [rank["refused"] for rank in ranks] == [[2, *said], said]  # /dev/shm is asked about once, for both
    for num_workers in ("0", "2"):
        for first, second, together in zip(
            ranks[0]["keys"][num_workers], ranks[1]["keys"][num_workers], alone, strict=True
        ):
            assert first == together[0::2]  # rank r: positions r, r + ranks, ...
            assert second == together[1::2]
        # The caption that is drawn is the sample's own, whatever rank and worker has it, and after the resume as before.
        of_ranks = [drawn(rank["keys"][num_workers], rank["captions"][num_workers]) for rank in ranks]
        for texts, of_update in zip(captions, zip(*of_ranks, strict=True), strict=True):
            assert texts.items() <= (of_update[0] | of_update[1]).items()
