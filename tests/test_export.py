"""An export is whole or absent, holds the run's weights bit for bit, and loads with the libraries' own
classes."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megaflux import export as exporting
from megaflux import runs
from megaflux.common.errors import UserError
from megaflux.models import pretrained
from tests.conftest import picture, small_values, write_run

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel  # isort: skip
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLModel, Qwen2VLProcessor  # isort: skip


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def models(run_folder):
    return runs.load(runs.find(run_folder))


def test_the_libraries_load_their_parts(export_folder, models):
    transformer = FluxTransformer2DModel.from_pretrained(export_folder, subfolder="transformer")
    same(transformer.state_dict(), models.trainable.transformer.state_dict())
    vae = AutoencoderKL.from_pretrained(export_folder, subfolder="vae")
    same(vae.state_dict(), models.vae.state_dict())
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(export_folder, subfolder="scheduler")
    assert scheduler.config.shift == models.scheduler.config.shift
    vlm = Qwen2VLModel.from_pretrained(export_folder / "text_encoder")
    layer = models.trainable.vlm.layers[0].state_dict()  # trained, and back in its place
    same(vlm.language_model.layers[-1].state_dict(), layer)
    assert len(vlm.language_model.layers) == vlm.config.text_config.num_hidden_layers == 2
    processor = Qwen2VLProcessor.from_pretrained(export_folder / "text_encoder")
    assert processor.tokenizer.get_vocab() == models.trunk.processor.tokenizer.get_vocab()
    connector = load_file(export_folder / "connector/model.safetensors")
    same(connector, models.trainable.connector.state_dict())


def test_the_trained_weights_are_in(export_folder, run_folder, small_config):
    fresh = pretrained.load_models(small_config).trainable.transformer.state_dict()
    exported = load_file(export_folder / "transformer/diffusion_pytorch_model.safetensors")
    trained = load_file(run_folder / "checkpoints/update-0000008/weights.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained["transformer." + name]) and not torch.equal(tensor, fresh[name])


def test_text_encoder_is_qwen2_vls_published_layout(export_folder):
    names = set(load_file(export_folder / "text_encoder/model.safetensors"))
    assert all(name.startswith(("visual.", "model.")) for name in names)
    assert {"model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"} <= names
    config = json.loads((export_folder / "text_encoder/config.json").read_text())
    assert config["architectures"] == ["Qwen2VLModel"]  # built from nothing: no lm_head to invent
    vlm, processor = pretrained.load_vlm(str(export_folder / "text_encoder"), dtype=torch.float32)
    same(vlm.state_dict(), Qwen2VLModel.from_pretrained(export_folder / "text_encoder").state_dict())
    assert type(processor) is Qwen2VLProcessor


def test_diffusers_own_pipeline_makes_our_picture(export_folder):
    ours = runs.load_pipeline(export_folder, dtype=torch.float32, device="cpu")
    condition, _ = ours.encode(picture(64, 64))
    ours.models.trainable.configure(False)
    image = ours(picture(64, 64), None, 48, 64, 3, seed=5).images[0]
    theirs = FluxPipeline.from_pretrained(
        export_folder,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        torch_dtype=torch.float32,
    )
    with torch.no_grad():
        again = theirs(
            prompt_embeds=ours.models.trainable.encode_condition(condition),
            pooled_prompt_embeds=load_file(export_folder / "pooled_prompt_embeds.safetensors")["pooled_prompt_embeds"],
            height=48,
            width=64,
            num_inference_steps=3,
            guidance_scale=3.5,
            generator=[torch.Generator().manual_seed(5)],
        ).images[0]
    assert np.array_equal(np.array(image), np.array(again))


def test_the_index_says_what_is_inside(export_folder, run_folder):
    content = json.loads((export_folder / "megaflux.json").read_text())
    assert content["source"]["update"] == 8 and content["source"]["stage"] == "stage1"
    assert content["settings"]["longest_side"] == 64 and "torch" in content["versions"]
    files = {p.relative_to(export_folder).as_posix() for p in export_folder.rglob("*") if p.is_file()}
    assert set(content["files"]) == files - {"megaflux.json"}
    for name, known in content["files"].items():
        assert hashlib.sha256((export_folder / name).read_bytes()).hexdigest() == known["sha256"]
    index = json.loads((export_folder / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "Qwen2VLModel"]
    assert [name for name in files if name.endswith((".bin", ".pt", ".pkl"))] == []


def test_files_have_the_usual_permissions(export_folder):
    mask = os.umask(0)
    os.umask(mask)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in export_folder.rglob("*") if p.is_file()}
    assert modes == {0o666 & ~mask}


def test_an_older_update(run_folder, export_folder, tmp_path):
    assert exporting.main([str(run_folder), str(tmp_path / "old"), "--update", "4"]) == 0
    assert json.loads((tmp_path / "old/megaflux.json").read_text())["source"]["update"] == 4
    old, new = (load_file(p / "connector/model.safetensors") for p in (tmp_path / "old", export_folder))
    assert not torch.equal(old["weight"], new["weight"])


def test_a_run_on_published_models_keeps_lm_head_and_dtype(published, tmp_path):
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(published["qwen"]), "vae": None}
    root = write_run(tmp_path / "run", values, updates=(8,), dtype=torch.bfloat16)
    assert exporting.main([str(root), str(tmp_path / "export")]) == 0
    whole = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "export/text_encoder", dtype="auto")
    source = load_file(published["qwen"] / "model.safetensors")
    assert whole.dtype == torch.bfloat16 and torch.equal(whole.lm_head.weight, source["lm_head.weight"])
    exported = load_file(tmp_path / "export/text_encoder/model.safetensors")
    assert set(exported) == set(source)
    changed = {name for name in source if not torch.equal(source[name], exported[name])}
    assert changed == {name for name in source if name.startswith("model.layers.1.")}
    config = json.loads((tmp_path / "export/text_encoder/config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    made = [
        runs.load_pipeline(path, dtype=dtype)(picture(64, 64), num_inference_steps=2).images[0].tobytes()
        for dtype in (torch.bfloat16, torch.float32)
        for path in (root, tmp_path / "export")
    ]
    assert made[0] == made[1] and made[2] == made[3]


@pytest.mark.parametrize("layers", [0, 2])
def test_a_run_that_trained_none_or_all_of_qwens_layers(tmp_path, layers):
    values = small_values()
    values["stages"] = [{"name": "one", "share": 1, "blocks": [1], "vlm_layers": layers}]
    root = write_run(tmp_path / "run", values, updates=(8,))
    exporting.export(runs.find(root), tmp_path / "export")
    run, exported = (runs.load_pipeline(path, dtype=torch.float32) for path in (root, tmp_path / "export"))
    assert len(run.models.trainable.vlm.layers) == layers
    exported.save_pretrained(tmp_path / "again")
    made = [
        p(picture(64, 64), num_inference_steps=2).images[0].tobytes()
        for p in (run, exported, runs.load_pipeline(tmp_path / "again", dtype=torch.float32))
    ]
    assert made[0] == made[1] == made[2]
    run.save_pretrained(tmp_path / "of the run")
    ours, theirs = (load_file(tmp_path / name / "text_encoder/model.safetensors") for name in ("of the run", "export"))
    same(ours, theirs)


def test_weights_trained_in_float32_on_a_bfloat16_base_keep_their_bits(published, tmp_path):
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(published["qwen"]), "vae": None}
    root = write_run(tmp_path / "run", values, updates=(8,), dtype=torch.float32)
    exporting.export(runs.find(root), tmp_path / "export")
    trained = load_file(root / "checkpoints/update-0000008/weights.safetensors")
    exported = load_file(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(exported["proj_out.weight"], trained["transformer.proj_out.weight"])
    pictures = [
        runs.load_pipeline(path, dtype=torch.float32)(picture(64, 64), num_inference_steps=2).images[0]
        for path in (root, tmp_path / "export")
    ]
    assert pictures[0].tobytes() == pictures[1].tobytes()


def test_nothing_is_overwritten(run_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "folder", "link"):
        with pytest.raises(UserError, match=f"{name}: exists"):
            exporting.main([str(run_folder), str(tmp_path / name)])
    with pytest.raises(UserError, match="cannot be made"):
        exporting.main([str(run_folder), str(tmp_path / "file/below")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_failure_midway_leaves_nothing(run_folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megaflux.generation.layout.write_indexes", full)
    with pytest.raises(UserError, match="No space left on device; nothing was written"):
        exporting.main([str(run_folder), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_broken_run_is_refused_before_models_load(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_models", lambda *_, **__: pytest.fail("models were loaded"))
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run/checkpoints/update-0000008/manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json"):
        exporting.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_is_loaded_to_where_it_is_used(run_folder, monkeypatch):
    load, given = pretrained.load_models, []
    monkeypatch.setattr(runs, "load_models", lambda config, *target: given.append(target) or load(config, *target))
    models = runs.load(runs.find(run_folder), "cpu", torch.bfloat16)
    assert given == [("cpu", torch.bfloat16)]  # tensor by tensor (test_reading.py), and no whole copy on the host first
    assert {p.dtype for p in models.trainable.parameters()} == {torch.bfloat16}


def test_the_command_leaves_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "megaflux.export", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/nowhere: no such folder; give a run\n"
