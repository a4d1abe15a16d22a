"""Random models made in place: the same bits each time, RoPE exact, nothing of training's packages needed for VAE and VLM."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaflux.bench import random_models as random_models_module
from megaflux.bench.loader import make_pictures
from megaflux.bench.random_models import random_models, random_vae, random_vlm
from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.config.presets import tiny
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from megaflux.models.pretrained import load_models
from megaflux.models.scratch import TINY
from tests.bench.runs import ROOT, start
from tests.conftest import small_values

SCRIPT = str(ROOT / "launch" / "train_random.py")
CPU = torch.device("cpu")
# Imports with some packages absent, as on a machine without them.
WITHOUT = """
import importlib.machinery, sys
ABSENT = {"pydantic", "deepspeed", "streaming", "einops"}
class Finder:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
import torch
from megaflux.bench.random_models import random_vae, random_vlm
from megaflux.config.presets import tiny
random_vlm(tiny()["model"]["vlm_config"], torch.bfloat16, "cpu")
random_vae({"latent_channels": 8}, torch.bfloat16, "cpu")
print("made", sorted(ABSENT & set(sys.modules)))
"""


def pictures(folder: Path, side: int) -> None:
    ratios = ("16:9", "1:1", "1:2")
    make_pictures(folder.parent / "pictures", 20 * len(ratios), side, ratios)
    options = Options(longest_side=side, aspect_ratios=ratios, held_out=0.2)
    prepare(str(folder.parent / "pictures"), folder, options, progress=False)


def small(seed: int = 0):
    values = small_values() | {"run": {"dir": "runs/tiny", "seed": seed}}
    values["model"] |= {"flux": None, "vlm": None}
    return build_config(values)


def test_the_vae_and_the_vlm_need_none_of_trainings_packages():
    done = start("-c", WITHOUT)
    assert done.stdout == "made []\n", done.stderr[-2000:]


def test_the_same_bits_each_time_and_others_from_another_seed():
    config = small()
    first = random_models(config, CPU, torch.bfloat16)
    torch.manual_seed(5)
    second = random_models(config, CPU, torch.bfloat16)
    for one, other in (
        (first.trainable, second.trainable),
        (first.trunk.vlm, second.trunk.vlm),
        (first.vae, second.vae),
    ):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(first.pooled_projections, second.pooled_projections)
    config = small(seed=1)
    assert first.base == second.base != random_models(config, CPU, torch.bfloat16).base


def test_they_have_the_names_and_shapes_that_a_run_loads():
    config = small()
    ours, built = random_models(config, CPU, torch.float32), load_models(config)
    for mine, theirs in ((ours.trainable, built.trainable), (ours.trunk.vlm, built.trunk.vlm), (ours.vae, built.vae)):
        shapes = [{name: t.shape for name, t in module.state_dict().items()} for module in (mine, theirs)]
        assert shapes[0] == shapes[1]
        assert not [name for name, parameter in mine.named_parameters() if parameter.dtype != torch.float32]
    assert ours.pooled_projections.shape == built.pooled_projections.shape
    assert (ours.vae.config.scaling_factor, ours.vae.config.shift_factor) == (0.45744, 0.57811)


def test_rope_stays_float32_where_weights_are_bfloat16():
    vlm, _ = random_vlm(tiny()["model"]["vlm_config"], torch.bfloat16, CPU)
    frequencies = {name: b for name, b in vlm.named_buffers() if name.endswith("inv_freq")}
    assert len(frequencies) >= 2 and {b.dtype for b in frequencies.values()} == {torch.float32}
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16}


def test_the_vae_makes_latents_of_the_order_of_one():
    vae = random_vae(
        {
            "latent_channels": 8,
            "block_out_channels": [32, 64],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "_class_name": "AutoencoderKL",
        },
        torch.float32,
        CPU,
    )
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(picture).latent_dist
    assert 0.1 < posterior.mean.std() < 10 and posterior.std.max() < 30


@pytest.mark.parametrize("field", ["flux", "vlm"])
def test_a_configuration_that_names_weights_is_refused(field):
    values = small_values()
    values["model"][field] = "owner/name"
    with pytest.raises(UserError, match=f"^model.{field}: owner/name.* set model.{field} to null"):
        random_models(build_config(values), CPU)


def test_sizes_that_describe_nothing_are_named():
    with pytest.raises(UserError, match="^vae_config: cannot be loaded"):
        random_vae({"latent_chanels": 8}, torch.float32, CPU)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), RuntimeError("CUDA error: out of memory")],
)
def test_too_little_memory_is_not_said_to_be_a_wrong_configuration(monkeypatch, error):
    """It reaches training, which knows what to do about it."""

    def full(*_):
        raise error

    monkeypatch.setattr(random_models_module, "_built", full)
    with pytest.raises(type(error), match="out of memory"):
        random_vlm(tiny()["model"]["vlm_config"], torch.bfloat16, CPU)
    with pytest.raises(type(error), match="out of memory"):
        random_vae({"latent_channels": 8}, torch.float32, CPU)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_vlm_attends_as_the_configuration_says(attention):
    values = small_values()
    values["model"] |= {"flux": None, "vlm": None, "attention": attention}
    vlm = random_models(build_config(values), CPU).trunk.vlm
    assert {module.config._attn_implementation for module in (vlm, vlm.language_model, vlm.visual)} == {attention}


def test_norms_of_the_vlm_leave_their_input_as_it_is():
    vlm, _ = random_vlm(tiny()["model"]["vlm_config"], torch.float32, CPU)
    norms = [module for module in vlm.modules() if "Norm" in type(module).__name__]
    assert len(norms) > 4 and all(bool((module.weight == 1).all()) for module in norms)
    assert vlm.language_model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(0.04, rel=0.1)


def test_a_run_of_random_models_is_saved_and_resumed_without_any_weights(tmp_path):
    """Real processes; of the VAE there is a config.json alone, and the base weights must be the same each time."""
    (tmp_path / "vae").mkdir()
    shutil.copy(TINY / "vae" / "config.json", tmp_path / "vae")
    pictures(tmp_path / "data", 64)
    values = small_values()
    values["model"] |= {"vae": str(tmp_path / "vae")}
    values["data"] |= {"path": str(tmp_path / "data"), "num_workers": 0}
    values["train"] |= {"updates": 4}
    values["run"] = {"dir": str(tmp_path / "run")}
    values["monitor"] = {"every": 1}
    values["validation"] |= {"every": 0, "panel_every": 0, "samples": 1, "panel_samples": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "preset"}))

    first = start(SCRIPT, "--config", str(config), "--train.stop_after", "2")
    assert first.returncode == 0, first.stderr[-3000:]
    second = start(SCRIPT, "--config", str(config))
    assert second.returncode == 0 and "at update 2" in second.stderr, second.stderr[-3000:]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert len(losses) == 4 and all(0 < loss < 50 for loss in losses)
    assert not list(tmp_path.joinpath("vae").glob("*.safetensors"))


def test_bad_configurations_end_before_anything_is_loaded(tmp_path):
    done = start(SCRIPT, "--model.vlm", "owner/name", "--model.vae", str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "model.vlm: owner/name, but launch/train_random.py reads no weights" in done.stderr
    assert f"model.vae: {tmp_path} holds no config.json" in done.stderr


def test_what_launch_train_asks_for_is_asked_for_here_too(tmp_path):
    """But for weights."""
    options = ["--preset", "dev", "--model.flux", "null", "--model.vlm", "null", "--run.dir", str(tmp_path / "run")]
    done = start(SCRIPT, *options, "--data.path", str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: data.path: {tmp_path / 'none'} does not exist")
    assert not (tmp_path / "run").exists()
