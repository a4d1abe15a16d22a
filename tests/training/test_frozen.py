"""Frozen networks whose output is cached: off the device, missed by nothing, and known to the formulas."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import dev, tiny
from megaflux.data.buckets import make_buckets
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.storage import parts as parts_module
from megaflux.data.storage.dataset import read_dataset_info
from megaflux.data.storage.index import read_index, stored_file
from megaflux.data.storage.shards import read_split, verify_dataset
from megaflux.data.tensors import from_image
from megaflux.generation import sampling
from megaflux.models import latents as latent_ops
from megaflux.models.parameters import weights_fingerprint
from megaflux.models.pretrained import load_models, meta_models
from megaflux.training import cache, frozen, objective, pictures, validation
from megaflux.training.planning import cache_size, memory, trial
from megaflux.training.planning.dry_run import dry_run
from megaflux.training.planning.sizes import Sizes
from tests.training.runs import ROOT, make_dataset, small_config

ALONE = World(0, 1, torch.device("cpu"))
KINDS = [("latents",), ("trunk",), ("latents", "trunk")]
DS_CONFIG = json.loads((ROOT / "ds_configs/zero2.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two buckets, each in several shards."""
    return make_dataset(tmp_path_factory.mktemp("frozen"), images=24, chunk=4)


def configured(data: Path, *kinds: str):
    return build_config(merge(tiny(), small_config(data, data.parent / "run", data__cache=list(kinds)))).for_world(1)


def cached_dev(*kinds: str):
    values = dev()
    values["data"]["cache"] = list(kinds)
    values["model"]["activation_checkpointing"] = "full"  # auto fills whatever is free
    return build_config(values)


def numel(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def no_encoding(*_, **__):
    raise AssertionError("encoded, though the output is cached")


# --- where they are ---


def test_a_released_trunk_holds_no_memory_and_still_lays_out_tokens(data):
    models = load_models(configured(data), dtype=torch.bfloat16)
    trunk, held = models.trunk, models.trunk.vlm
    pictures = torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    before = trunk.encode(pictures)
    weights = {p.untyped_storage()._cdata: p.untyped_storage() for p in held.parameters()}
    storages = [StorageWeakRef(storage) for storage in weights.values()]
    assert sum(storage.nbytes() for storage in weights.values()) >= 2 * numel(held)
    del weights
    trainable = {name: p.clone() for name, p in models.trainable.named_parameters()}
    gc.disable()
    try:
        trunk.release()
        trunk.release()
        assert all(storage.expired() for storage in storages)  # although `held` is: no collector was needed
    finally:
        gc.enable()
    assert all(torch.equal(p, trainable[name]) for name, p in models.trainable.named_parameters())
    assert (trunk.device, trunk.dtype) == (torch.device("cpu"), torch.bfloat16)
    after = trunk.from_cache(before.hidden_states, 64, 32)
    assert (
        trunk.from_cache(before.hidden_states[:1], 32, 64).hidden_states.device.type == "cpu"
    )  # a grid not asked before
    assert torch.equal(after.position_ids, before.position_ids) and torch.equal(after.select, before.select)
    for needs_weights in (
        lambda: trunk.encode(pictures),
        lambda: trunk.encode(None, ["a", "b"], "text"),
        lambda: models.to("cpu", None),
        lambda: weights_fingerprint(trunk.vlm),
    ):
        with pytest.raises(RuntimeError, match="was released, because its output is cached"):
            needs_weights()


@pytest.mark.parametrize("kinds", [(), *KINDS])
def test_what_is_cached_leaves_and_the_rest_stays(data, kinds, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda device: memory.DeviceMemory(10**12, 10**11))
    config = configured(data, *kinds)
    models = load_models(config)
    trunk, everything = models.trunk.vlm, memory.budget(ALONE, models)
    frozen.send_away(config, models)
    assert models.trunk.released == ("trunk" in kinds)
    assert models.vae_visits == ("latents" in kinds)
    gone = {"trunk": trunk, "latents": models.vae}
    expected = numel(models.trainable) + sum(numel(gone[kind]) for kind in gone if kind not in kinds)
    assert sum(map(numel, models.resident())) == expected
    assert everything - memory.budget(ALONE, models) == 4 * sum(numel(gone[kind]) for kind in kinds)
    assert not any(p.is_meta for module in models.resident() for p in module.parameters())


class Moved:
    """A VAE that notes where it is asked to be."""

    def __init__(self, full: bool = False):
        self.places, self.full = [], full

    def to(self, device):
        self.places.append(torch.device(device).type)
        if self.full and self.places[-1] != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")


def on_an_accelerator(vae, visits: bool = True):
    return SimpleNamespace(
        vae=vae,
        vae_visits=visits,
        pooled_projections=torch.empty(1, device="meta"),
        trainable=SimpleNamespace(transformer=None),
        scheduler=None,
    )


def test_the_vae_comes_for_a_panel_and_leaves_whatever_happens(data, monkeypatch):
    config, vae, seen = configured(data, "latents"), Moved(), []
    monkeypatch.setattr(sampling, "flux_pipeline", lambda *_: seen.append(list(vae.places)))
    references = SimpleNamespace(
        bucket=SimpleNamespace(height=64, width=64), condition=lambda *_: SimpleNamespace(repeated=lambda _: None)
    )
    monkeypatch.setattr(sampling, "generate", lambda *_: torch.zeros(2, 3, 64, 64))
    pictures.variations(config, on_an_accelerator(vae), references, [0], 2)
    assert (seen, vae.places) == ([["meta"]], ["meta", "cpu"])
    for why in (torch.OutOfMemoryError, InterruptedError):
        vae.places.clear()

        def fails(*_, why=why):
            raise why

        monkeypatch.setattr(sampling, "generate", fails)
        with pytest.raises(why):
            pictures.variations(config, on_an_accelerator(vae), references, [0], 2)
        assert vae.places == ["meta", "cpu"]
    full, stays = Moved(full=True), Moved()
    with pytest.raises(torch.OutOfMemoryError), frozen.vae_at_hand(on_an_accelerator(full)):
        pytest.fail("no room for it")
    assert full.places == ["meta", "cpu"]  # half of it may be there
    with frozen.vae_at_hand(on_an_accelerator(stays, visits=False)):
        pass
    assert stays.places == []


# --- nothing misses them ---


@pytest.mark.parametrize("kinds", KINDS)
def test_losses_and_pictures_are_those_of_before_and_a_try_out_takes_what_the_run_takes(data, kinds, monkeypatch):
    config = configured(data, *kinds)
    models = load_models(config)
    models.trainable.train()
    references = validation.load_references(config, models)
    dataset = cache.cached_dataset(config, models, ALONE)
    bucket = references.bucket
    rows = list(read_split(dataset, "train", bucket))[:2]
    stored = {
        name: torch.stack([row[name] for row in rows]) for name in ("latents", "hidden_states") if name in rows[0]
    }
    images = [from_image(row["image"]) for row in rows if "image" in row]
    batch = SimpleNamespace(
        references=None,
        keys=[row["key"] for row in rows],
        captions=["", ""],
        bucket=bucket,
        pixel_values=torch.stack(images) if images else None,
        latents=stored.get("latents"),
        hidden_states=stored.get("hidden_states"),
    )
    t = torch.tensor([0.3, 0.8])

    def given():
        return objective.encode_latents(config, models, batch, 0), objective.encode_condition(
            config, models, batch, [objective.Sample(key, 0) for key in batch.keys], 0, 0
        )

    def results():
        latents, condition = given()
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        denoising = objective.Denoising(bucket, latents, condition, t, noise, 1.0)
        losses = objective.denoising_loss(models.trainable, models, denoising)
        shown = validation.validation_loss(models.trainable, config, models, references, ALONE)
        return losses.detach(), shown, pictures.variations(config, models, references, [0], 2)

    before = results()
    frozen.send_away(config, models)
    after = results()
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and torch.equal(before[2], after[2])

    tried, (latents, condition) = [], given()
    monkeypatch.setattr(
        objective,
        "denoising_loss",
        lambda *given: (
            tried.append(given)
            or models.trainable.connector(torch.zeros(1, models.trainable.connector.in_features)).mean()
        ),
    )
    if "latents" in kinds:
        monkeypatch.setattr(latent_ops, "encode", no_encoding)
    trial.forward_and_backward(config.for_world(1), models, bucket)
    blank, blank_condition = tried[0][2].latents, tried[0][2].condition
    assert (blank.shape, blank.dtype) == (latents.shape, latents.dtype)
    assert blank_condition.hidden_states.shape == condition.hidden_states.shape
    assert blank_condition.hidden_states.dtype == condition.hidden_states.dtype
    assert torch.equal(blank_condition.select, condition.select)


# --- the formulas ---


def test_a_run_of_dev_from_its_cache_needs_15_gb_less(capsys, tmp_path):
    found, totals = {}, {}
    module, trunk = meta_models(cached_dev())
    trunk_bytes, vae_bytes = 2 * numel(trunk), 2 * numel(memory._vae(json.dumps(memory.vae_config(cached_dev()))))
    assert (round(trunk_bytes / 1e9, 2), round(vae_bytes / 1e9, 2)) == (15.03, 0.17)
    for kinds in [(), *KINDS]:
        config = cached_dev(*kinds)
        bucket = make_buckets(config.data.aspect_ratios, config.data.longest_side)[0]
        found[kinds] = memory.stage_memory(Sizes(config, DS_CONFIG, 8, module, trunk), config.stages[0], bucket)
        dry_run(config, DS_CONFIG, 8, json_path=str(tmp_path / "r.json"))
        report = json.loads((tmp_path / "r.json").read_text())
        totals[kinds], out = report["memory_gb_per_gpu"], capsys.readouterr().out
        assert (report["cache"] is None) == (not kinds) == ("Cache of" not in out)
        if kinds == ("latents", "trunk"):
            # 1:1: 16 x 128 x 128 latents, 15 + 484 tokens of 3584; in the mean of five buckets
            assert report["cache"]["kinds"] == ["latents", "trunk"] and report["cache"]["dtype"] == "bfloat16"
            tokens, sizes = (495, 527, 491, 499, 527), (1024 * 576, 1024 * 512, 1024 * 432, 1024 * 1024, 1024 * 512)
            mean = sum(2 * 3584 * S + 2 * 16 * size / 64 for S, size in zip(tokens, sizes)) / 5
            assert report["cache"]["mb_per_image"] == pytest.approx(mean / 1e6)
            assert report["cache"]["gb_for_3m_images"] == pytest.approx(3e6 * mean / 1e9)
            assert re.search(r"latents and trunk: bfloat16, 3\.95 MB a picture.* 3,000,000 pictures take 11\.9 TB", out)
    weights = {kinds: sum(need.weights.values()) for kinds, need in found.items()}
    assert weights[()] - weights["trunk",] == trunk_bytes
    assert weights[()] - weights["latents",] == vae_bytes
    assert weights[()] - weights["latents", "trunk"] == trunk_bytes + vae_bytes
    assert round(totals[()] - totals["latents", "trunk"], 2) == round((trunk_bytes + vae_bytes) / 1e9, 2) == 15.19
    assert found[()].total - found["latents", "trunk"].total == trunk_bytes + vae_bytes
    assert found["latents",].transient - found["trunk",].transient == vae_bytes  # it is there while a panel decodes
    assert found["trunk",].transient == found[()].transient


def test_the_size_of_a_cache_is_that_of_its_arrays(data):
    buckets = read_dataset_info(data).buckets
    for kinds in KINDS:
        config = configured(data, *kinds)
        models = load_models(config)
        size = cache_size.size_of_run(config, models, buckets)
        by_formula = cache_size.size_of_config(config, {"bf16": {"enabled": False}}, meta_models(config)[1], buckets)
        assert size == by_formula
        root = Path(cache.cached_dataset(config, models, ALONE))
        for bucket in buckets:
            sample = next(iter(read_split(root, "train", bucket)))
            arrays = [value for value in sample.values() if isinstance(value, torch.Tensor)]
            assert sum(array.nbytes for array in arrays) == size.per_picture[bucket]
            assert {array.dtype for array in arrays} == {size.dtype}


@pytest.mark.parametrize("kinds", [("latents", "trunk")])
def test_a_cache_takes_its_size_once_and_one_begun_compressed_goes_on(data, kinds, tmp_path, monkeypatch):
    """Compressed, streaming would unpack each shard beside itself, and the disk hold both."""
    data = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    config, models, found, size = parts_of(data, *kinds)
    write = parts_module.write_shards
    with monkeypatch.context() as patch:
        patch.setattr(
            parts_module, "write_shards", lambda *given, compression: write(*given)
        )  # as earlier versions did
        root = Path(cache.cached_dataset(config, models, ALONE))
    old = {bucket: list(read_split(root, "train", bucket)) for bucket in size.per_picture}
    (root / "dataset.json").unlink()
    shutil.rmtree(next(root.glob("train/1x1/part-*")))
    cache.cached_dataset(config, models, ALONE)
    verify_dataset(root)
    assert {file.suffix for file in root.glob("train/1x1/part-*/shard.*")} == {".mds", ".zstd"}
    keys = []
    for where in (root, data):
        given = {"computed_from": data} if where == root else {}
        loader = build_loader(where, LoaderOptions(batch_size=2, seed=1, **given), ALONE)
        keys.append([batch.keys for batch in itertools.islice(iter(loader), loader.batches_per_epoch)])
        loader.close()
    assert keys[0] == keys[1]
    shutil.rmtree(root)
    cache.cached_dataset(config, models, ALONE)
    assert {file.suffix for file in root.glob("train/*/part-*/shard.*")} == {".mds"}
    for bucket, samples in old.items():
        for before, now in zip(samples, read_split(root, "train", bucket), strict=True):
            assert before["key"] == now["key"] and torch.equal(before["latents"], now["latents"])
            assert torch.equal(before["hidden_states"], now["hidden_states"])
    written = sum(file.stat().st_size for file in root.glob("train/*/part-*/shard.*"))
    assert (
        size.of_parts(found) < written < 1.1 * size.of_parts(found)
    )  # keys and captions weigh, with pictures of 64 px


# --- before the first is written ---


def parts_of(data: Path, *kinds: str):
    config = configured(data, *kinds)
    info, models = read_dataset_info(data), load_models(config)
    found = cache.all_parts(data, info)
    return config, models, found, cache_size.size_of_run(config, models, info.buckets)


def test_a_cache_says_its_size_before_it_is_written(data, tmp_path, caplog, monkeypatch):
    config, models, found, size = parts_of(data, "latents", "trunk")
    counts = {b: sum(p.shard["samples"] for p in found if p.bucket == b) for b in size.per_picture}
    pictures, total = sum(counts.values()), sum(counts[b] * size.per_picture[b] for b in counts)
    assert size.describe(found) == (
        f"caching latents and trunk: float32, {total / pictures / 1e6:.3g} MB a picture, {pictures} pictures, "
        f"{total / 1e9:.3g} GB; 3,000,000 pictures would take {total / pictures * 3e6 / 1e9:.3g} GB"
    )
    one = parts_of(data, "trunk")[3]
    files = sum(part.shard["raw_data"]["bytes"] for part in found)  # the pictures lie in it too
    assert one.of_parts(found) == files + sum(counts[b] * one.per_picture[b] for b in counts)
    assert "a picture beside its own file," in one.describe(found)


def test_a_disk_without_room_for_what_is_missing_is_refused_before_anything_is_computed(data, tmp_path, monkeypatch):
    data = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    config, models, found, size = parts_of(data, "latents")
    need, real = size.of_parts(found), os.statvfs
    free = [0]
    monkeypatch.setattr(
        cache_size.os,
        "statvfs",
        lambda path: SimpleNamespace(f_bavail=free[0], f_frsize=1) if str(path).startswith(str(data)) else real(path),
    )
    with monkeypatch.context() as patch:
        patch.setattr(latent_ops, "encode", no_encoding)
        free[0] = need
        with pytest.raises(UserError, match=r"data.cache: .* GB free, .* needs .*; make room there, train with --data"):
            cache.cached_dataset(config, models, ALONE)
        assert not list(data.glob("cache/*/*"))
    free[0] = int(1.02 * need)
    root = Path(cache.cached_dataset(config, models, ALONE))
    kept = sum(
        stored_file(shard)["bytes"] for index in root.glob("train/*/index.json") for shard in read_index(index.parent)
    )
    assert kept <= free[0]
    free[0] = 0
    assert cache.cached_dataset(config, models, ALONE) == str(root)  # it is whole: nothing is to be written
    (root / "dataset.json").unlink()
    lost = next(root.glob("train/*/part-*"))
    shutil.rmtree(lost)
    (part,) = [part for part in found if part.folder(root) == lost]
    free[0] = int(0.9 * size.of_parts([part]))
    with pytest.raises(UserError, match="the missing part of the cache needs"):
        cache.cached_dataset(config, models, ALONE)
    free[0] = int(1.02 * size.of_parts([part]))
    assert cache.cached_dataset(config, models, ALONE) == str(root)
