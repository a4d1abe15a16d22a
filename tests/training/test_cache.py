"""Caching: shared among ranks, kept over kills, side by side with other runs, and the same order of samples."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, detect_world
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage import parts as parts_module
from megaflux.data.storage.dataset import read_dataset_info, write_dataset
from megaflux.data.storage.index import read_index
from megaflux.data.storage.shards import read_split, verify_dataset
from megaflux.data.tensors import from_image
from megaflux.models import latents
from megaflux.models.pretrained import load_models
from megaflux.training import cache, frozen, objective
from megaflux.training.planning import costs
from tests import forked
from tests.derived import write_bucket
from tests.training.faults import newest
from tests.training.runs import ds_config, launch, make_dataset, rank_environments, small_config, write_config

WORKER = Path(__file__).with_name("cache_worker.py")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("source"), chunk=4, captions=3)


@pytest.fixture
def data(source, tmp_path):
    """A dataset of two buckets, each in several shards, of the test's own."""
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(scope="module")
def models(source):
    return load_models(configured(source))


def configured(data, *kinds, **changes):
    return build_config(merge(tiny(), small_config(data, data.parent / "run", data__cache=list(kinds), **changes)))


def shards(data):
    info = read_dataset_info(data)
    return {b: read_index(data / "train" / b.folder) for b in info.buckets if info.counts["train"].get(b.name)}


def parts(data):
    """Finished parts of the dataset's only cache -> what tells one written from one kept."""
    return {path: path.stat().st_ino for path in data.glob("cache/*/train/*/part-*")}


def start(data, ranks=1, fault="", limit=600, kinds=("latents",), **changes):
    """The worker on each rank."""
    values = small_config(data, data.parent / "run", data__cache=list(kinds), **changes)
    config = write_config(values, data.parent / "cache.yaml")
    more = {"FAULT": fault, "LIMIT": str(limit)}
    return [forked.Forked([str(WORKER), str(config)], env | more) for env in rank_environments(ranks)]


def ended(processes):
    """[(exit code, stdout, stderr)] of each."""
    said = [process.communicate(timeout=200) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, said, strict=True)]


def encoded(output):
    return int(re.search(r"encoded (\d+) batches", output)[1])


def test_a_rank_whose_share_takes_longer_than_a_collective_may_is_waited_for(data):
    count = sum(map(len, shards(data).values()))
    done = ended(start(data, ranks=2, fault="slow:1", limit=6))
    assert [code for code, *_ in done] == [0, 0], done
    assert [encoded(output) for _, output, _ in done] == [count - count // 2, count // 2]
    assert 0.5 * int(re.search(r"(\d+) images", done[1][1])[1]) > 6  # s that rank 1 took: more than the limit
    (root,) = (data / "cache").iterdir()
    assert verify_dataset(root).samples("train") == read_dataset_info(data).samples("train")


def test_a_rank_that_computes_nothing_is_given_up(data):
    done = ended(start(data, ranks=2, fault="hang:1", train__hang_timeout=4))
    assert done[1][0] == 11 and "rank 1: caching latents: no image in 4 s (train.hang_timeout)" in done[1][2]
    assert "cache_worker.py" in done[1][2]  # where it hangs
    assert done[0][0] not in (0, 2) and "no image" not in done[0][2]  # as where a rank is gone


def test_a_killed_cache_goes_on_and_two_at_once_share_what_is_left(data):
    count = sum(map(len, shards(data).values()))
    (killed,) = start(data, fault="crawl")
    while len(parts(data)) < 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = parts(data)
    assert list(data.glob("cache/*/.unfinished/*"))  # of the part that it was at
    lost = next(iter(kept))
    lost_file = next(lost.glob("shard.*"))
    lost_file.write_bytes(lost_file.read_bytes()[:-1])  # as a power cut may leave it
    one, two = start(data, fault="crawl"), start(data, fault="crawl")
    done = ended(one + two)
    assert [code for code, *_ in done] == [0, 0], done
    now = parts(data)
    assert len(now) == count
    assert {path: now[path] for path in kept if path != lost} == {p: i for p, i in kept.items() if p != lost}
    work = [encoded(output) for _, output, _ in done]
    assert count - len(kept) + 1 <= sum(work) <= count - len(kept) + 1 + 4  # a part or so at the begin and end by both
    assert min(work) > 1
    (root,) = (data / "cache").iterdir()
    verify_dataset(root)
    assert sorted(path.name for path in root.iterdir()) == ["dataset.json", "index.json", "train"]


@pytest.mark.parametrize("anew", [False, True])
def test_a_damaged_part_that_another_process_removes_first_or_writes_anew(data, models, monkeypatch, anew):
    root = Path(cache.cached_dataset(configured(data, "latents"), models, ALONE))
    all_parts = parts_module.all_parts(data, read_dataset_info(root))
    part, *others = all_parts
    folder = part.folder(root)
    whole = shutil.copytree(folder, data / "whole")
    file = next(folder.glob("shard.*"))
    file.write_bytes(file.read_bytes()[:-1])
    real = parts_module.inspect_index

    def inspected(path, **options):
        found = real(path, **options)
        if path == folder and found[1]:  # between this process's look and what it does about it
            shutil.rmtree(folder)
            if anew:
                whole.rename(folder)
        return found

    monkeypatch.setattr(parts_module, "inspect_index", inspected)
    assert parts_module.missing(root, all_parts) == [part]
    monkeypatch.undo()
    monkeypatch.setattr(parts_module.Part, "is_sound", lambda *_: False)  # the other is faster by even less
    with parts_module.Writing(root) as writing:
        writing.remove_damaged(part)
    monkeypatch.undo()
    assert part.is_sound(root) is anew and all(other.is_sound(root) for other in others)
    assert not (root / ".unfinished").exists()
    (root / "dataset.json").unlink()
    cache.cached_dataset(configured(data, "latents"), models, ALONE)
    verify_dataset(root)


def test_one_rank_on_a_full_disk_ends_all_with_its_line(data):
    done = ended(start(data, ranks=2, fault="full:1"))
    assert [code for code, *_ in done] == [2, 2], done
    (line,) = [line for line in done[0][2].splitlines() if line.startswith("error")]
    assert "rank 1: " in line and "cannot be written" in line and "--data.cache none" in line
    assert "Traceback" not in done[0][2] + done[1][2]


@pytest.mark.parametrize("kinds", [("latents",), ("trunk",), ("latents", "trunk")])
def test_a_cache_holds_what_the_networks_say_in_the_order_of_the_pictures(data, models, kinds):
    config = configured(data, *kinds)
    root = Path(cache.cached_dataset(config, models, ALONE))
    info = verify_dataset(root)
    assert info.format_version == 2  # images have several captions, which come along
    assert info.buckets == read_dataset_info(data).buckets  # 1:1 and 2:1, with arrays of other shapes
    assert set(info.columns) == {"key", "caption", *(("image",) if len(kinds) == 1 else ())} | {
        {"latents": "latents", "trunk": "hidden_states"}[kind] for kind in kinds
    }
    for bucket in shards(data):
        for stored, sample in zip(read_split(data, "train", bucket), read_split(root, "train", bucket), strict=True):
            assert (stored["key"], stored["caption"]) == (sample["key"], sample["caption"])
            assert sample.get("image", stored["image"]) == stored["image"]
            pixels = from_image(stored["image"])[None]
            if "latents" in kinds:
                torch.testing.assert_close(sample["latents"], latents.encode(models.vae, pixels)[0])
            if "trunk" in kinds:
                torch.testing.assert_close(sample["hidden_states"], models.trunk.encode(pixels).hidden_states[0])
    found = []
    for path, options in ((data, {}), (root, {"computed_from": data})):
        loader = build_loader(path, LoaderOptions(batch_size=2, seed=1, **options), detect_world())
        found.append([batch.keys for batch in itertools.islice(iter(loader), 2 * loader.batches_per_epoch + 3)])
        loader.close()
    assert found[0] == found[1]


WORDS = {"image": 0.4, "image_text": 0.2, "text": 0.2, "none": 0.2}


def test_conditions_with_words_are_the_same_beside_a_cache(data):
    """What a cache holds is read from it, the rest encoded; so the trunk stays, and pictures where words are seen with them."""
    config = configured(data, "latents", "trunk", data__condition=WORDS)
    plain = configured(data, data__condition=WORDS)
    models = load_models(config)
    root = cache.cached_dataset(config, models, ALONE)
    without_words = configured(data, "latents", "trunk")
    assert root != cache.cached_dataset(without_words, models, ALONE)
    assert "image" in read_dataset_info(root).columns
    only_text = configured(data, "latents", "trunk", data__condition={"image": 0.5, "text": 0.5})
    assert cache.cached_dataset(only_text, models, ALONE) == cache.cached_dataset(without_words, models, ALONE)
    bucket = next(iter(shards(data)))
    of_trunk = [costs.frozen_parts(c, models.trunk.vlm, bucket)[0] for c in (plain, config, without_words)]
    assert of_trunk == [of_trunk[0], round(0.4 * of_trunk[0]), 0] and of_trunk[0] > 0
    frozen.send_away(config, models)
    assert not models.trunk.released and models.vae_visits
    kinds, batches = set(), []
    for path, options in ((root, {"computed_from": data}), (data, {})):
        loader = build_loader(path, LoaderOptions(batch_size=2, seed=1, **options), detect_world())
        batches.append(list(itertools.islice(iter(loader), 16)))
        loader.close()
    for update, (cached, batch) in enumerate(zip(*batches, strict=True)):
        assert cached.hidden_states is not None and cached.keys == batch.keys
        samples = objective.count_up(cached.keys, Counter())
        found, wanted = (
            objective.encode_condition(c, models, b, samples, update, 0) for c, b in ((config, cached), (plain, batch))
        )
        kinds.add(objective.draw_kind(config.data.condition, config.run.seed, update, 0))
        torch.testing.assert_close(found.hidden_states, wanted.hidden_states)
        assert torch.equal(found.select, wanted.select) and torch.equal(found.position_ids, wanted.position_ids)
    assert kinds == set(WORDS)


def test_a_bucket_without_training_pictures(tmp_path, models):
    data = make_dataset(tmp_path, images=12, square=True, chunk=4)
    root = cache.cached_dataset(configured(data, "latents"), models, ALONE)
    assert verify_dataset(root).counts["train"] == read_dataset_info(data).counts["train"]
    assert not (Path(root) / "train" / "2x1").exists()


def test_a_finished_cache_of_an_earlier_version_is_used_as_it_is(data, models, monkeypatch):
    config = configured(data, "latents")
    root = data / "cache" / cache._fingerprint(config, models)
    info, counts, columns = read_dataset_info(data), {}, {}
    for bucket in shards(data):
        samples = ({**s, "latents": torch.zeros(4, 8, 8)} for s in read_split(data, "train", bucket))
        counts[bucket.name], columns = write_bucket(root, "train", bucket, samples)
    write_dataset(root, type(info)(64, info.buckets, {"train": counts}, columns))
    before = {path: path.stat().st_ino for path in root.rglob("*")}
    monkeypatch.setattr(latents, "encode", None)
    assert cache.cached_dataset(config, models, ALONE) == str(root)
    assert {path: path.stat().st_ino for path in root.rglob("*")} == before
    # One that was not finished has shards beside the parts, which nothing reads: they go.
    (root / "dataset.json").unlink()
    (root / "train" / ".1x1.unfinished").mkdir()
    monkeypatch.undo()
    cache.cached_dataset(config, models, ALONE)
    verify_dataset(root)
    assert {path.name for path in (root / "train").iterdir()} == {"1x1", "2x1"}
    assert {path.name.partition("-")[0] for path in (root / "train").glob("*/*")} == {"part", "index.json"}


def test_what_cannot_be_cached_is_one_line(data, models):
    config = configured(data, "latents")
    (data / "cache").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written \(.*--data.cache none"):
        cache.cached_dataset(config, models, ALONE)
    (data / "cache").unlink()
    bucket, (first, *_) = next(iter(shards(data).items()))
    file = data / "train" / bucket.folder / (first["zip_data"] or first["raw_data"])["basename"]
    sound = file.read_bytes()
    damaged = bytearray(sound)
    damaged[len(sound) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: damaged"):
        cache.cached_dataset(config, models, ALONE)
    file.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: missing"):
        cache.cached_dataset(config, models, ALONE)
    file.write_bytes(sound)
    done = parts(data)
    assert cache.cached_dataset(config, models, ALONE)
    assert done.items() <= parts(data).items()


def test_a_picture_that_cannot_be_decoded_is_one_line(tmp_path, models):
    data = make_dataset(tmp_path, images=12, square=True, chunk=4)
    bucket = next(iter(shards(data)))
    samples = list(read_split(data, "train", bucket))
    samples[1]["image"] = b"<html>".ljust(100)
    shutil.rmtree(data / "train")
    write_bucket(data, "train", bucket, samples)
    info = read_dataset_info(data)
    info.counts["held_out"].clear()
    write_dataset(data, info)
    with pytest.raises(UserError, match=re.escape(repr(samples[1]["key"])) + " cannot be decoded") as caught:
        cache.cached_dataset(configured(data, "latents"), models, ALONE)
    assert "train/1x1/shard.00000" in str(caught.value)
    assert not list((data / "cache").glob("*/.unfinished"))


def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    machine, dead = parts_module._machine(), subprocess.Popen(["true"])
    dead.wait()
    folders = {
        name: tmp_path / ".unfinished" / name
        for name in (
            f"{machine}-{dead.pid}-aa",
            f"{machine}-{os.getpid()}-aa",
            "0123456789ab-1-aa",
            "0123456789ab-2-aa",
        )
    }
    for folder in folders.values():
        (folder / "1x1-part-00000").mkdir(parents=True)
    os.utime(folders["0123456789ab-2-aa"], (time.time() - 7200,) * 2)
    parts_module.remove_leftovers(tmp_path)
    assert {name for name, folder in folders.items() if folder.exists()} == {
        f"{machine}-{os.getpid()}-aa",
        "0123456789ab-1-aa",
    }


def test_a_run_goes_on_without_its_cache_and_with_one_made_anew(data, tmp_path):
    """One launch for the whole; the keys are those of the undisturbed run by tests/data/test_order.py."""
    condition = {"image": 0.5, "none": 0.5}  # an empty one needs no trunk later
    values = small_config(data, tmp_path / "run", data__cache=["latents", "trunk"], data__condition=condition)
    command = ["--deepspeed", ds_config(tmp_path), "--config", write_config(values, tmp_path / "config.yaml")]
    for stop, more in ((2, []), (4, ["--data.cache", ""]), (6, [])):
        done = launch(*command, "--train.stop_after", stop, *more, with_="forked")
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("cached latents and trunk" in done.stderr) == (stop != 4)
        told = (
            r"caching latents and trunk: bfloat16, 0\.0\d+ MB a picture, \d+ pictures, .* 3,000,000 pictures would take"
        )
        assert len(re.findall(told, done.stderr)) == (stop != 4)
        for gone in ("the trunk's weights are discarded", "the VAE is on the device for panels only"):
            assert (gone in done.stderr) == (stop != 4)
        manifest = json.loads((newest(tmp_path / "run") / "manifest.json").read_text())
        assert (manifest["update"], manifest["data"]["batches"]) == (stop, 2 * stop)
        shutil.rmtree(data / "cache", ignore_errors=True)
