"""Training with fused FLUX is training with diffusers': the same curve, the same files, resumed either way."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.training.ds_config import load_ds_config
from megaflux.training.planning.checks import find_problems
from tests.training.runs import copy_until, ds_config, launch, make_dataset, small_config, write_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def train(tmp_path, data, name, precision="fp32", ranks=1, **changes):
    """(loss of every update, the run's folder, its output)."""
    values = small_config(data, tmp_path / name, **changes)
    config = write_config(values, tmp_path / f"{name}.yaml")
    done = launch("--deepspeed", ds_config(tmp_path, precision), "--config", config, ranks=ranks, with_="forked")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / name / "tensorboard"))
    events.Reload()
    return np.array([e.value for e in events.Scalars("train/loss")]), tmp_path / name, done.stdout + done.stderr


def newest(run):
    newest = max((run / "checkpoints").glob("update-*"))
    return {name: tensor for file in newest.glob("weights*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_fifty_updates_have_the_same_losses_with_kernels_on_and_off(tmp_path, data):
    fifty = {"train__updates": 50, "train__checkpoint_every": 25, "optim__lr": 2e-3}
    off, run_off, said_off = train(tmp_path, data, "off", model__kernels="off", **fifty)
    on, run_on, said_on = train(tmp_path, data, "on", model__activation_checkpointing="mlp", **fifty)
    assert len(on) == len(off) == 50
    np.testing.assert_allclose(on, off, rtol=1e-3)
    assert off[-10:].mean() < 0.9 * off[:5].mean()  # it trained
    assert newest(run_on).keys() == newest(run_off).keys()
    assert "kernels: torch" in said_on and "6 blocks" not in said_on and "3 mlp" in said_on
    assert "kernels off (diffusers' own path)" in said_off

    # what one made the other goes on with, and generates from to a level of 255
    half = copy_until(run_off, tmp_path / "half", 25)
    resumed, *_ = train(tmp_path, data, "half", **fifty)
    assert (half / "checkpoints" / "update-0000050").is_dir()
    np.testing.assert_allclose(resumed[-25:], off[25:], rtol=1e-3)
    from megaflux.runs import load_pipeline

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    made = [
        np.array(load_pipeline(run_on, dtype=torch.float32, device="cpu", kernels=kernels)(picture, seed=1).images[0])
        for kernels in (True, False)
    ]
    assert np.abs(made[0].astype(int) - made[1].astype(int)).max() <= 1
    assert made[0].std() > 5


@pytest.mark.slow
def test_policies_train_to_the_same_bits(tmp_path, data):
    weights = []
    for policy in ("mlp", "full", "auto"):  # two ranks each, over a stage change
        _, run, said = train(
            tmp_path, data, policy, "bf16", 2, train__updates=4, model__activation_checkpointing=policy
        )
        weights.append(newest(run))
        assert f"3 {'none' if policy == 'auto' else policy}" in said  # a small model fits without computing again
    for other in weights[1:]:
        assert [name for name, value in weights[0].items() if not torch.equal(other[name], value)] == []


def test_zero3_runs_on_diffusers_own_path_and_says_so(tmp_path, data):
    values = small_config(data, tmp_path / "run", train__updates=2)
    config = write_config(values, tmp_path / "config.yaml")
    zero3 = ds_config(tmp_path, base="zero3.json")
    done = launch("--deepspeed", zero3, "--config", config, with_="forked")
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout + done.stderr
    assert "kernels off (diffusers' own path)" in said
    values["model"]["activation_checkpointing"] = "mlp"
    resolved = build_config(merge(tiny(), values))
    (problem,) = find_problems(resolved, load_ds_config(zero3), 1)
    assert "mlp needs kernels, but ZeRO-3 runs diffusers' own path" in problem
    values["run"] = {"dir": str(tmp_path / "new")}
    resolved = build_config(merge(tiny(), values))
    assert find_problems(resolved, load_ds_config(ds_config(tmp_path)), 1) == []


def test_settings_say_which_path_made_a_picture(tmp_path, run_folder):
    from megaflux.infer import __main__ as infer

    Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    for kernels in ("on", "off"):
        out = tmp_path / kernels
        infer.main(
            [
                "--checkpoint",
                str(run_folder),
                "--reference",
                str(tmp_path / "black.png"),
                "--count",
                "1",
                "--steps",
                "2",
                "--out",
                str(out),
                "--kernels",
                kernels,
            ]
        )
        (picture,) = out.glob("*-seed0.png")
        assert json.loads(Image.open(picture).text["megaflux"])["runtime"]["kernels"] == kernels


def test_shards_in_the_old_order_are_refused_with_the_reason(run_folder):
    from megaflux.common.errors import UserError
    from megaflux.config.parse import load_yaml
    from megaflux.training.checkpoint import resume as checkpoint

    config = build_config(load_yaml(str(run_folder / "config.yaml")))
    with pytest.raises(UserError, match="optimizer shards have another order; finish the run with that version"):
        checkpoint._resolve(config, {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, 1)
