"""Folders that were moved or renamed since a run was trained: it is exported, generates and replays, told where they are now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from megaflux import export as exporting
from megaflux import runs
from megaflux.common.errors import UserError
from megaflux.config.located import located
from megaflux.config.parse import build_config, merge
from megaflux.generation.job import Job, Runtime
from megaflux.infer import __main__ as infer
from megaflux.infer.replay import Original, check_same_weights, expected_maps
from megaflux.infer.request import to_runtime
from megaflux.panel import __main__ as panel
from megaflux.training.checkpoint import weights
from megaflux.training.planning.checks import find_problems
from tests.conftest import picture, small_values, write_run


@pytest.fixture(scope="module")
def home(tmp_path_factory, published) -> Path:
    """A run on published weights, one picture of it (first.png), and then everything is elsewhere."""
    root = tmp_path_factory.mktemp("moved")
    for name in published:
        shutil.copytree(published[name], root / "old" / name)
    values = small_values()
    values["model"] |= {
        "flux": str(root / "old/flux"),
        "vlm": str(root / "old/qwen"),
        "vae": str(root / "old/flux/vae"),
    }
    write_run(root / "old/run", values, updates=(8,), dtype=torch.bfloat16)
    picture(64, 64).save(root / "cat.png")
    made(root, "first", "--checkpoint", root / "old/run", "--reference", root / "cat.png")
    (root / "old").rename(root / "new")
    (root / "new/run").rename(root / "renamed")
    return root


def made(root: Path, name: str, *arguments: object) -> bytes:
    """Pixels of the one picture that infer makes."""
    more = [] if "--from-image" in arguments else ["--count", "1", "--steps", "2"]
    assert infer.main([*map(str, arguments), *more, "--out", str(root / name)]) == 0
    (file,) = (root / name).glob("*-seed0.png")
    return Image.open(file).tobytes()


def now(root: Path) -> list[object]:
    return ["--flux", root / "new/flux", "--vlm", root / "new/qwen", "--vae", root / "new/flux/vae"]


def test_pictures_replays_and_exports_of_a_run_whose_folders_are_elsewhere(home, capsys):
    run = ["--checkpoint", home / "renamed"]
    for name in ("flux", "vlm", "vae"):
        with pytest.raises(UserError, match=f"model.{name}: .*/old/.* does not exist; give --{name} with the folder"):
            made(home, "x", *run, "--reference", home / "cat.png")
    assert infer.main([*map(str, [*run, "--reference", home / "cat.png"]), "--dry-run"]) == 2
    assert "give --vlm with the folder where it is now" in capsys.readouterr().out
    first = Image.open(home / "first/cat-seed0.png").tobytes()
    assert made(home, "second", *run, *now(home), "--reference", home / "cat.png") == first
    replay = ["--from-image", home / "first/cat-seed0.png"]
    with pytest.raises(UserError, match="old/run: no such folder"):
        made(home, "x", *replay)
    assert made(home, "third", *replay, *run, *now(home)) == first
    assert made(home, "fourth", "--from-image", home / "second/cat-seed0.png") == first  # it holds where they were then
    out = home / "export"
    assert exporting.main(list(map(str, [home / "renamed", out, *now(home)]))) == 0
    assert runs.find(home / "renamed").source["run"] == str(home / "renamed")
    # An export needs none of them: given now they are refused, and those of a replayed picture's run left out.
    with pytest.raises(UserError, match="--flux: .*export is an export, which holds all its weights; leave it out"):
        made(home, "x", "--checkpoint", out, *now(home), "--reference", home / "cat.png")
    assert made(home, "fifth", "--from-image", home / "second/cat-seed0.png", "--checkpoint", out) == first
    folders = runs.Folders(str(home / "new/flux"), str(home / "new/qwen"), str(home / "new/flux/vae"))
    assert runs.load_pipeline(home / "renamed", folders=folders).source["update"] == 8
    with pytest.raises(UserError, match="is an export, which holds all its weights"):
        runs.load_pipeline(out, folders=folders)
    given = panel.build_parser().parse_args(list(map(str, [*run, *now(home)])))
    assert to_runtime(vars(given)).vlm == str(home / "new/qwen")


def test_other_weights_there_are_refused_by_the_option_that_names_them(home, tmp_path):
    """Qwen2-VL with one other weight, where the run's is looked for."""
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(home / "new/qwen", tmp_path / "qwen")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    flux = str(home / "new/flux")
    run = runs.find(home / "renamed", folders=runs.Folders(flux, str(other), f"{flux}/vae"))
    with pytest.raises(
        UserError, match="update-0000008: was trained on other base weights than model.vlm now names .*--vlm"
    ):
        runs.load(run)
    # CLIP is read for its pooled vector only, and is none of the weights that `base` covers.
    flux = shutil.copytree(home / "new/flux", tmp_path / "flux")
    tensors = load_file(flux / "text_encoder/model.safetensors")
    tensors["text_model.final_layer_norm.weight"] += 1
    save_file(tensors, flux / "text_encoder/model.safetensors", {"format": "pt"})
    folders = runs.Folders(str(flux), str(home / "new/qwen"), str(home / "new/flux/vae"))
    with pytest.raises(
        UserError, match=r"with another CLIP .text_encoder. than model.flux now names .*--model.flux DIR .*--flux DIR"
    ):
        runs.load(runs.find(home / "renamed", folders=folders))
    assert weights.options_of(["flux", "vae", "connector"]) == "model.flux, model.vae"
    assert weights.options_of(["connector"]).startswith("run.seed")
    assert weights.other_parts({}, {"flux": "1", "vae": "2"}) == ["flux", "vae"]  # an old manifest does not tell
    assert weights.other_parts({"base_parts": {"flux": "1"}}, {"flux": "2", "clip": "3"}) == ["flux"]


def test_a_resumed_run_says_which_folder_is_gone(home):
    config = runs.find(home / "renamed").config
    config = build_config(merge(config.model_dump(), {"data": {"path": str(home / "no"), "source": None}}))
    found = find_problems(config, {}, 1)
    for words in (
        r"model.flux: .*old/flux does not exist; give --model.flux with the folder where it is now",
        r"model.vlm: .*old/qwen does not exist",
        r"data.path: .*no does not exist; the run in .*renamed was trained on it: give --data.path with the folder",
    ):
        assert [line for line in found if re.search(words, line)], (words, found)
    assert runs.attribution(config) is None


def test_a_run_is_known_by_its_weights_and_not_by_the_name_of_its_folder():
    """Pictures of earlier versions hold it as it was given: runs/demo."""
    source = {"run": "runs/demo", "update": 8, "stage": "one", "weights_sha256": "0" * 64}
    original = Original(Job(), Runtime(checkpoint="runs/demo"), {"source": source}, {})
    check_same_weights(original, source | {"run": "/home/me/runs/demo"}, set())
    with pytest.raises(
        UserError, match="the picture was made with update 8, weights 000000000000, the folder now holds"
    ):
        check_same_weights(original, source | {"weights_sha256": "1" * 64}, set())
    asked = Original(Job(), Runtime(checkpoint="runs/demo"), {"source": source, "maps": {"line": "1"}}, {})
    assert expected_maps(asked, {"checkpoint", "flux", "vlm", "vae"}) == {"line": "1"}  # where the weights are now
    assert expected_maps(asked, {"line_model"}) == {}


def test_a_bucket_that_is_a_folder_is_saved_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = small_values()
    for remote, saved in (("bucket", str(tmp_path / "bucket")), ("s3://bucket/x", "s3://bucket/x"), (None, None)):
        config = build_config(merge(values, {"data": {"path": "cache", "remote": remote}}))
        assert located(config).data.remote == saved
