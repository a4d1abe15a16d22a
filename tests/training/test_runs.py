"""Whole runs: resume is exact, frozen stays frozen, every ZeRO configuration runs.

Most are forked (tests/forked.py); test_survival, test_report and the launchers' own test here start them as users do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaflux import runs
from megaflux.common.ranks import World
from megaflux.config.data import KINDS, ConditionModes
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import PUBLISHED_STAGES, tiny
from megaflux.models.pretrained import load_models
from megaflux.training import validation
from megaflux.training.checkpoint import manifest, saved
from megaflux.training.checkpoint.identity import NO_EFFECT
from megaflux.training.engine import MOMENTS
from megaflux.training.objective import draw_kind
from megaflux.training.planning import memory
from megaflux.training.planning.micro_batch import Planner
from megaflux.training.planning.sizes import Sizes
from megaflux.training.stages import trainable_names
from tests.training.faults import assert_same, events, final_averages, final_state, final_weights
from tests.training.runs import (
    ROOT,
    copy_until,
    ds_config,
    launch,
    launch_faulty,
    make_dataset,
    small_config,
    write_config,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), captions=3)


def run_ok(*arguments, with_="forked", **kwargs):
    done = launch(*arguments, with_=with_, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


# bf16 on two ranks is also what the kills of test_survival end in.
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp32"])
def test_resumed_run_is_bit_equal_to_the_uninterrupted_one(tmp_path, data, precision, ranks):
    # 6 updates over two stages, in a new process from update 2: the resumed half crosses the stage boundary at 3.
    config = write_config(small_config(data, tmp_path / "whole"), tmp_path / "config.yaml")
    ds = ds_config(tmp_path, precision)
    run_ok("--deepspeed", ds, "--config", config, ranks=ranks)
    half = copy_until(tmp_path / "whole", tmp_path / "half", 2)
    # By the launcher: processes with other hash seeds than those of the first run.
    done = run_ok("--deepspeed", ds, "--config", config, "--run.dir", half, ranks=ranks, with_="deepspeed")
    assert "resuming" in done.stdout + done.stderr
    weights, resumed = final_weights(tmp_path / "whole"), final_weights(half)
    assert_same(weights, resumed)
    assert_same(final_state(tmp_path / "whole"), final_state(half))
    newest = "checkpoints/update-0000006"
    position = [json.loads((run / newest / "manifest.json").read_text())["data"] for run in (tmp_path / "whole", half)]
    assert position[0] == position[1]
    for rank in range(ranks):
        states = [
            torch.load(run / newest / f"rng-rank{rank:04d}.pt", weights_only=True) for run in (tmp_path / "whole", half)
        ]
        assert_same(*states)


WITHOUT_EFFECT = {
    "run.resume": "must",
    "data.num_workers": 1,
    "data.source": "somewhere else",
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 2,
    "train.keep_every": 2,
    "train.hang_timeout": 900,
    "train.leave_within": 20,
    "train.deterministic": "true",  # a run on a CPU always is
    "model.activation_checkpointing": "full",
    "validation.every": 1,
    "validation.samples": 2,
    "validation.panel_every": 2,
    "validation.panel_samples": 1,
    "validation.steps": 1,
    "monitor.every": 2,
    "monitor.grad_norms_every": 1,
    "monitor.peak_tflops": 0.2,
    "monitor.label_blocks": "true",
}
TESTED_ELSEWHERE = {
    *(
        "run.dir",
        "data.path",
        "model.flux",
        "model.vlm",
        "model.vae",
        "model.init",
    ),  # where to look: folders that moved
    *("model.kernels", "train.micro_batch_size"),  # they round otherwise
    *("data.cache", "data.remote", "data.cache_limit"),  # test_cache, and the remote dataset below
}


def test_a_run_stopped_at_a_stages_end_goes_on_with_its_moments(tmp_path, data):
    """And with their averages; also with other values of everything that has no effect on what is learned, and with its data in
    another folder. The other run validates the averages after every update, in the place of the weights."""
    assert set(NO_EFFECT) == {*WITHOUT_EFFECT, *TESTED_ELSEWHERE} and not TESTED_ELSEWHERE & set(WITHOUT_EFFECT)
    values = small_config(data, tmp_path / "whole", optim__ema_decay=0.7)
    config = write_config(values, tmp_path / "config.yaml")
    ds = ds_config(tmp_path, "fp32")
    run_ok("--deepspeed", ds, "--config", config)
    half = copy_until(tmp_path / "whole", tmp_path / "half", 3)
    shutil.copytree(data, tmp_path / "moved")
    changed = [word for field, value in WITHOUT_EFFECT.items() for word in (f"--{field}", value)]
    run_ok("--deepspeed", ds, "--run.dir", half, "--data.path", tmp_path / "moved", *changed)
    assert_same(final_weights(tmp_path / "whole"), final_weights(half))
    assert_same(final_averages(tmp_path / "whole"), final_averages(half))
    assert_same(final_state(tmp_path / "whole"), final_state(half))
    for of_rank in final_state(half):  # averages are in files of their own, once
        assert {key for of_group in of_rank["base_optimizer_state"]["state"].values() for key in of_group} == {
            "step",
            *MOMENTS,
        }
    first, *_, last = map(json.loads, (tmp_path / "whole" / "validation.jsonl").read_text().splitlines())
    assert first["ema_loss"] == first["loss"] and first["ema_gap"] == first["gap"]
    averaged = runs.load(runs.find(tmp_path / "whole", ema=True))  # what export and generation load
    config = runs.find(tmp_path / "whole").config.for_world(1)
    shown = validation.load_references(config, averaged)
    again = validation.validation_loss(averaged.trainable, config, averaged, shown, World(0, 1))
    assert last["ema_loss"] == pytest.approx(again["loss"], rel=1e-5) and abs(last["ema_loss"] - last["loss"]) > 1e-6


def test_a_run_that_is_given_more_updates_twice_follows_the_new_trapezoids(tmp_path, data):
    """First while its last stage runs, then, finished, by a stage that is appended."""
    run = tmp_path / "run"
    values = small_config(
        data, run, optim__lr={"flux": 1e-3, "connector": 4e-3, "vlm": 1e-3}, train__keep_checkpoints=2
    )
    values["optim"] |= {"warmup_fraction": 0.2, "plateau_fraction": 0.0}
    ds, config = ds_config(tmp_path, "fp32"), write_config(values, tmp_path / "config.yaml")
    run_ok("--deepspeed", ds, "--config", config, "--train.stop_after", 5)
    done = run_ok("--deepspeed", ds, "--config", config, "--train.updates", 8)
    assert "train.updates: 6 -> 8; the learning rate of update 6 goes" in done.stderr
    values["stages"].append({"name": "two", "share": 0.1, "blocks": "none", "vlm_layers": 0, "lr": {"connector": 2e-2}})
    write_config(values, config)
    run_ok("--deepspeed", ds, "--config", config, "--train.updates", 11)

    def trapezoid(peak: float, update: int, updates: int) -> float:
        warmup = round(0.2 * updates)
        return peak * ((update + 1) / warmup if update < warmup else (updates - update) / (updates - warmup))

    lengths = [6] * 5 + [8] * 3 + [11] * 3
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    for part, peaks in {"flux": [1e-3] * 8, "connector": [4e-3] * 8 + [2e-2] * 3}.items():
        rates = [event.value for event in shown.Scalars(f"train/learning_rate_{part}")]
        wanted = [
            trapezoid(peak, i, length)
            for i, (peak, length) in enumerate(zip(peaks, lengths[: len(peaks)], strict=True))
        ]
        assert rates == pytest.approx(wanted)
    found = saved.load(run)
    assert found.stage_ends() == [3, 8, 11] and found.train.ended_at == (8,)
    there = manifest.listed(run)
    assert {3, 8, 11} <= set(there) and 6 not in there  # the ends of its stages; 6 was never one
    before, after = (load_file(there[update] / "weights.safetensors") for update in (8, 11))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"connector.weight", "connector.bias"}  # nothing of FLUX, nothing of Qwen


def test_checkpoint_holds_what_trained_and_all_of_it_changed(tmp_path, data):
    values = small_config(data, tmp_path / "run", train__updates=10)
    config = write_config(values, tmp_path / "config.yaml")
    run_ok("--deepspeed", ds_config(tmp_path, "fp32"), "--config", config)
    resolved = build_config(merge(tiny(), values))
    models = load_models(resolved)
    before = dict(models.trainable.named_parameters())
    after = final_weights(tmp_path / "run")
    # The second stage freezes most of what the first one trained; the checkpoint keeps it all the same.
    first, second = (set(trainable_names(models.trainable, stage)) for stage in resolved.stages)
    assert second < first == set(after)
    assert not [name for name in after if torch.equal(before[name], after[name])]


@pytest.mark.slow  # test_survival goes from two ranks to one and back
def test_two_ranks_train_as_one_does(tmp_path, data):
    # The loader, the noise of each sample, the gradient: all of it the same global batches, whatever the ranks.
    weights = []
    for ranks in (1, 2):
        values = small_config(
            data, tmp_path / str(ranks), train__micro_batch_size=4 // ranks, train__updates=4, optim__lr=1e-3
        )
        config = write_config(values, tmp_path / f"{ranks}.yaml")
        run_ok("--deepspeed", ds_config(tmp_path, "fp32"), "--config", config, ranks=ranks)
        rows = (tmp_path / str(ranks) / "validation.jsonl").read_text().splitlines()
        weights.append([json.loads(row)["loss"] for row in rows])
    assert weights[0] == pytest.approx(weights[1], rel=1e-3)
    assert abs(weights[0][0] - weights[0][-1]) > 1e-2  # it trained


def test_a_run_reads_a_remote_dataset_into_its_cache(tmp_path, data):
    values = small_config(tmp_path / "cache", tmp_path / "run", data__remote=str(data), train__updates=2)
    config = write_config(values, tmp_path / "config.yaml")
    run_ok("--deepspeed", ds_config(tmp_path), "--config", config)
    values = small_config(data, tmp_path / "local", train__updates=2)
    config = write_config(values, tmp_path / "local.yaml")
    run_ok("--deepspeed", ds_config(tmp_path), "--config", config)
    assert_same(final_weights(tmp_path / "run"), final_weights(tmp_path / "local"))


def test_published_block_lists_run_on_57_blocks(tmp_path, data):
    stages = [{"name": name, "share": 1, "blocks": blocks} for name, blocks in PUBLISHED_STAGES.items()]
    sizes = {
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 16,
        "num_attention_heads": 1,
        "axes_dims_rope": [4, 6, 6],
        "joint_attention_dim": 24,
    }
    values = small_config(data, tmp_path / "run", stages=stages, model__flux_config=sizes, train__updates=3)
    run_ok("--deepspeed", ds_config(tmp_path), "--config", write_config(values, tmp_path / "config.yaml"))
    trained = {name.split(".")[2] for name in final_weights(tmp_path / "run") if ".transformer_blocks." in name}
    single = {int(name.split(".")[2]) + 19 for name in final_weights(tmp_path / "run") if "single_transformer" in name}
    lists = {block for blocks in PUBLISHED_STAGES.values() for block in blocks}
    assert {int(block) for block in trained} | single == lists
    assert len(lists) == 57 - 12


@pytest.mark.parametrize("base", [pytest.param("zero2_offload.json", marks=pytest.mark.slow), "zero3.json"])
def test_other_deepspeed_configurations_run_over_a_stage_change_and_resume(tmp_path, data, base):
    values = small_config(
        data, tmp_path / "run", validation__every=4, validation__panel_every=4, optim__ema_decay=0.6, optim__lr=1e-3
    )
    values["model"]["flux_config"]["joint_attention_dim"] = 47  # a bias that two ranks cannot share evenly
    config = write_config(values, tmp_path / "config.yaml")
    ds = ds_config(tmp_path, base=base)
    run_ok("--deepspeed", ds, "--config", config, ranks=2)
    half = copy_until(
        tmp_path / "run", tmp_path / "half", 4
    )  # within the second stage, in an engine that is the process's first
    done = run_ok("--deepspeed", ds, "--config", config, "--run.dir", half, ranks=2)
    assert "resuming" in done.stdout + done.stderr
    assert_same(final_weights(tmp_path / "run"), final_weights(half))
    averages = final_averages(half)
    assert_same(final_averages(tmp_path / "run"), averages)
    assert averages.keys() == final_weights(half).keys()
    rows = [json.loads(row) for row in (half / "validation.jsonl").read_text().splitlines()]
    assert abs(rows[-1]["ema_loss"] - rows[-1]["loss"]) > 1e-6
    # Validating them left no trace: without it the run ends with the same bits.
    plain = copy_until(tmp_path / "run", tmp_path / "plain", 2)
    more = ("--validation.every", 0, "--validation.panel_every", 0, "--optim.ema_decay", 0)
    run_ok("--deepspeed", ds, "--config", config, "--run.dir", plain, *more, ranks=2)
    assert_same(final_weights(plain), final_weights(half))
    assert final_averages(plain) == {}


def test_torchrun_and_python_train_to_the_same_weights_as_deepspeed(tmp_path, data):
    weights = []
    for starter in ("deepspeed", "torchrun", "python"):
        # on a CPU the deterministic algorithms are those that run anyway
        values = small_config(data, tmp_path / starter, train__updates=2, train__deterministic=starter == "torchrun")
        config = write_config(values, tmp_path / f"{starter}.yaml")
        run_ok("--deepspeed", ds_config(tmp_path), "--config", config, with_=starter)
        weights.append(final_weights(tmp_path / starter))
    assert_same(weights[0], weights[1])
    assert_same(weights[0], weights[2])


def test_all_kinds_of_condition_train_on_two_ranks_with_workers_and_resume(tmp_path, data, monkeypatch):
    """The ranks choose how the two that each draws are cut: one by one in the first stage, for rank 1 has little memory; both
    at once in the second, which trains less."""
    values = small_config(
        data,
        tmp_path / "run",
        data__condition={"image": 0.3, "image_text": 0.2, "text": 0.2, "none": 0.3},
        flow__guidance=[1.0, 4.0],
        model__caption_max_tokens=2,  # so that all captions are cut
        data__num_workers=1,
        model__activation_checkpointing=True,
        train__drawn_per_rank=2,
        train__micro_batch_size="auto",
        stages=[
            {"name": "base", "share": 1.0, "blocks": "all", "components": "model"},
            {"name": "one", "share": 1.0, "blocks": [2]},
        ],
    )
    config = write_config(values, tmp_path / "config.yaml")
    resolved = build_config(merge(tiny(), values))
    monkeypatch.setattr(memory, "coding_peak", lambda *_: (0, 0))
    planner = Planner(Sizes.of(resolved, json.loads(ds_config(tmp_path).read_text()), 2))
    one, two = (planner.with_needs(resolved.stages[0], size, ["full"] * 3, 0).bytes for size in (1, 2))
    limit = (one + two) // 2
    assert one < limit < two and planner.with_needs(resolved.stages[1], 2, ["full"] * 3, 0).bytes < limit
    little = f"less_memory:{limit}:1"

    def train(run, *more) -> tuple[list[dict], str]:
        done = launch_faulty(
            "--deepspeed",
            ds_config(tmp_path),
            "--config",
            config,
            "--gpu-memory",
            1000,
            "--run.dir",
            run,
            *more,
            fault=little,
        )
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        return events(run, "ready")[-2:], said

    ready, said = train(tmp_path / "run")
    assert [event["micro_batch_size"] for event in ready] == [1, 2]
    assert "micro-batch 1 of 2 drawn (predicted" in said and "; 2 does not fit)" in said
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("plan/micro_batch_size")] == [(0, 1.0), (3, 2.0)]
    seed = resolved.run.seed
    modes = ConditionModes(**values["data"]["condition"])
    kinds = [draw_kind(modes, seed, update, 0) for update in range(6)]
    assert {*kinds} == set(KINDS)
    # Of both ranks: each draws two pictures an update.
    cut = [4 * sum(kind in ("image_text", "text") for kind in kinds[: update + 1]) for update in range(6)]
    assert [event.value for event in curves.Scalars("data/cut_captions")] == cut
    manifest = json.loads((tmp_path / "run/checkpoints/update-0000006/manifest.json").read_text())
    position = manifest["data"]
    assert (position["micro_batch_size"], position["world_size"]) == (2, 2)  # drawn by twos, however they are cut
    assert manifest["plan"] == {
        "stage": "one",
        "micro_batch_size": 2,
        "policies": ["full"] * 3,
        "gpu": "cpu",
        "ranks": 2,
        "free": True,
        "limit": None,
        "activation_checkpointing": "full",
    }
    half, other = (copy_until(tmp_path / "run", tmp_path / name, 2) for name in ("half", "other"))
    ready, _ = train(half)
    assert (ready[0]["micro_batch_size"], ready[0]["why"]) == (1, "as in the checkpoint")
    assert_same(final_weights(tmp_path / "run"), final_weights(half))
    # cut otherwise: the same pictures, and so the same weights but for rounding
    train(other, "--train.micro_batch_size", 2)
    last = json.loads((other / "checkpoints/update-0000006/manifest.json").read_text())
    assert last["data"] == position
    for name, value in final_weights(other).items():
        assert torch.allclose(value.float(), final_weights(half)[name].float(), rtol=0.05, atol=2e-3), name


def test_a_run_starts_from_folders_in_the_published_layouts(tmp_path, data, published):
    values = small_config(
        data,
        tmp_path / "run",
        train__updates=2,
        model__flux=str(published["flux"]),
        model__vae=None,
        model__vlm=str(published["qwen"]),
        stages=[{"name": "one", "share": 1, "blocks": [1]}],
    )
    config = write_config(values, tmp_path / "config.yaml")
    run_ok("--deepspeed", ds_config(tmp_path), "--config", config)
    source = load_file(published["flux"] / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = final_weights(tmp_path / "run")
    name = "single_transformer_blocks.0.attn.to_q.weight"
    assert "transformer." + name in trained
    drift = (trained["transformer." + name].float() - source[name]).abs().max()
    assert 0 < drift < 0.02  # two updates away from the folder's weights, not from random ones


def test_run_shows_itself_in_tensorboard(tmp_path, data):
    values = small_config(
        data, tmp_path / "run", validation__every=2, validation__panel_every=4, train__micro_batch_size=None
    )  # as the preset tiny has it
    config = write_config(values, tmp_path / "config.yaml")
    # A Python of its own: it imports what it needs by itself, TensorBoard and the pipelines of the panel among it.
    done = run_ok("--deepspeed", ds_config(tmp_path), "--config", config, with_="python")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = set(events.Tags()["scalars"])
    wanted = {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/large_gradient_share",
        "train/skipped_steps",
        "speed/images_per_second",
        "speed/data_wait_fraction",
        "speed/mfu",
        "memory/peak_gb",
        "validation/loss",
        "validation/shuffled",
        "validation/gap",
        "validation/loss_guidance_3.5",
        "grad_norm/flux",
        "grad_norm/connector",
        "grad_norm/vlm",
        "grad_norm/block00",
    }
    assert wanted <= scalars
    assert any(tag.startswith("train/loss_t") for tag in scalars)
    assert events.Tags()["images"] == ["variations"]
    assert any("config" in tag for tag in events.Tags()["tensors"])
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    rates = [e.value for e in events.Scalars("train/learning_rate")]
    assert rates[0] > 0 and rates[-1] < max(rates)
    # and what `make demo` says of it
    spec = importlib.util.spec_from_file_location("demo", ROOT / "launch" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    summary = demo.evaluate(tmp_path / "run")
    last = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[-1])
    assert summary["updates"] == 6
    assert summary["validation_loss_last"] == round(last["loss"], 4)
    assert 0 <= summary["retrieval_top1"] <= 1
    assert Path(summary["contact_sheet"]).is_file() and Path(summary["tensorboard"]).is_dir()


def test_a_damaged_or_foreign_checkpoint_stops_the_run_in_one_line(tmp_path, data):
    values = small_config(data, tmp_path / "run", train__updates=2)
    config = write_config(values, tmp_path / "config.yaml")
    ds = ds_config(tmp_path)
    run_ok("--deepspeed", ds, "--config", config)
    checkpoint = tmp_path / "run" / "checkpoints" / "update-0000002"
    pristine = tmp_path / "pristine"
    shutil.copytree(checkpoint, pristine)

    def refusal(*arguments, ranks=1):
        done = launch("--deepspeed", ds, "--config", config, *arguments, with_="forked", ranks=ranks)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in done.stderr
        return lines[0]

    weights = checkpoint / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    back = launch("--deepspeed", ds, "--config", config, with_="forked")
    assert back.returncode == 0 and "resuming from update-0000001, the newest complete checkpoint" in back.stderr
    for path in checkpoint.parent.iterdir():
        shutil.rmtree(path)
    shutil.copytree(pristine, checkpoint)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    said = refusal()
    assert (
        "weights.safetensors" in said and "none of the 1 checkpoints is complete" in said and "Three ways out" in said
    )
