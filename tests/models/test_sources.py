"""Which names mean the hub, and whether a folder of weights is whole: said before anything of it is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaflux import convert
from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.generation.job import Runtime
from megaflux.infer.load import check_sources, load
from megaflux.models import pretrained
from megaflux.models.safetensors_files import read_header
from megaflux.models.sources import FLUX, VLM, folder_problems, hub_name, model_problems, opened, problem
from tests.conftest import small_values

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 23\n"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def flux(tmp_path, published) -> Path:
    return Path(shutil.copytree(published["flux"], tmp_path / "flux"))


@pytest.fixture
def sharded(tmp_path, published) -> Path:
    """The Qwen2-VL folder with its weights in two shards and an index."""
    folder = Path(shutil.copytree(published["qwen"], tmp_path / "qwen"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_which_names_mean_the_hub(here):
    (here / "weights/vae").mkdir(parents=True)
    (here / "there").write_text("")
    assert hub_name("black-forest-labs/FLUX.1-dev") == hub_name("hub:black-forest-labs/FLUX.1-dev")
    assert hub_name("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert hub_name("weights/vae") is None and hub_name("hub:weights/vae") == "weights/vae"
    assert problem("weights/vae") is problem("black-forest-labs/FLUX.1-dev") is problem("hub:weights/vaee") is None
    assert problem("weights/vaee") == (
        "does not exist in the folder weights that is here; correct the path, or give hub:weights/vaee for the hub's"
    )
    for path in ("./x", "../x", "/x", "~/x", "x", "a/b/c", "./weights/vaee", "a/", "/a/b", "a b/c", ""):
        assert hub_name(path) is None and problem(path).startswith("does not exist; give a folder, or a hub name"), path
    assert problem("there") == "is a file; give the folder it belongs to"
    for name in ("hub:", "hub:x", "hub:/a/b", "hub:a/b/c", "hub:../b"):
        assert problem(name) == "is not a hub name; give hub:owner/name"
    with pytest.raises(UserError, match="^weights/vaee: does not exist"):
        opened("weights/vaee", ())


def test_a_whole_folder_has_no_problem(flux, sharded, published):
    assert folder_problems(flux, FLUX) == folder_problems(sharded, {"": VLM}) == []
    assert folder_problems(published["qwen"], {"": VLM}) == []
    keys, size = read_header(flux / TRANSFORMER)
    assert keys == set(load_file(flux / TRANSFORMER)) and size == (flux / TRANSFORMER).stat().st_size


def test_each_fault_of_a_folder_is_named(flux, sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    second.unlink()
    assert folder_problems(sharded, {"": VLM}) == [f"{sharded} lacks {second.name}; give a complete folder"]
    second.symlink_to("gone")
    assert folder_problems(sharded, {"": VLM}) == [f"{sharded} lacks {second.name}; give a complete folder"]
    second.unlink()
    second.write_text(POINTER)
    (said,) = folder_problems(sharded, {"": VLM})
    assert (
        said == f"{sharded} holds git-lfs pointers in the place of {second.name}; fetch the files with `git lfs pull`"
    )
    second.write_bytes(first.read_bytes())  # whole, but another's
    (said,) = folder_problems(sharded, {"": VLM})
    assert f"{second.name} lacks " in said and "which the index says it holds" in said
    index = sharded / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../x.safetensors"}}')
    assert (
        f"{index.name}: weight_map does not name safetensors files beside it" in folder_problems(sharded, {"": VLM})[0]
    )

    size = (flux / TRANSFORMER).stat().st_size
    for text in ((flux / TRANSFORMER).read_bytes()[:-100], (flux / TRANSFORMER).read_bytes() + b"0" * 100):
        (flux / TRANSFORMER).write_bytes(text)
        (said,) = folder_problems(flux, FLUX)
        assert (
            said
            == f"{flux} holds damaged files: {TRANSFORMER} has {len(text):,} bytes, its header says {size:,}; fetch them again"
        )
    for text in (b"", b"<html>" * 20, b"\x10" + b"\0" * 7 + b"{", b"\2" + b"\0" * 7 + b"[]"):
        (flux / TRANSFORMER).write_bytes(text)
        assert f"{TRANSFORMER} is " in folder_problems(flux, FLUX)[0]
    (flux / TRANSFORMER).unlink()
    (flux / "transformer/model.bin").write_text("")
    (flux / "tokenizer/merges.txt").unlink()
    (flux / "scheduler/scheduler_config.json").write_text(POINTER)
    (flux / "vae/config.json").write_text("{")
    assert folder_problems(flux, FLUX) == [
        f"{flux} lacks {TRANSFORMER}.index.json or diffusion_pytorch_model.safetensors (pickle files are not read), "
        "tokenizer/tokenizer.json or vocab.json and merges.txt; give a complete folder",
        f"{flux} holds git-lfs pointers in the place of scheduler/scheduler_config.json; fetch the files with `git lfs pull`",
        f"{flux} holds damaged files: vae/config.json is not JSON; fetch them again",
    ]


def test_generation_and_export_of_a_run_say_the_same(here, flux, sharded):
    values = small_values()
    values["model"] |= {"flux": str(flux), "vlm": str(sharded), "vae": "weights/vaee"}
    (here / "weights").mkdir()
    min(sharded.glob("*.safetensors")).write_text(POINTER)
    with pytest.raises(UserError, match="model.vlm: .*git lfs pull.*; model.vae: weights/vaee does not exist in"):
        pretrained.load_models(build_config(values))


def test_fluxs_own_vae_is_needed_only_where_no_other_is_given(flux):
    shutil.rmtree(flux / "vae")
    model = build_config(small_values()).model.model_copy(update={"flux": str(flux), "vlm": None, "vae": "tiny"})
    assert list(model_problems(model)) == []
    (said,) = model_problems(model.model_copy(update={"vae": None}))
    assert said.startswith(f"model.flux: {flux} lacks vae/config.json, vae/diffusion_pytorch_model")


def test_infers_own_models_follow_the_same_rule(here):
    (here / "weights").mkdir()
    for source, refused in (
        ("weights/nett", True),
        ("owner/name", False),
        ("hub:weights/nett", False),
        ("./net", True),
    ):
        runtime = Runtime(checkpoint="x", controlnet={"": source}, sam_model=source)
        if refused:
            with pytest.raises(UserError, match=f"^--controlnet {source}: does not exist"):
                check_sources(runtime)
        else:
            check_sources(runtime)


def test_a_controlnets_folder_is_looked_at_before_anything_is_loaded(here):
    """The checkpoint takes minutes to load, and is not there at all here."""
    (here / "net").mkdir()
    (here / "net/config.json").write_text("{}")
    (here / "net/diffusion_pytorch_model.safetensors").write_text(POINTER)
    with pytest.raises(UserError, match="^--controlnet depth net holds git-lfs pointers in the place of diffusion_pyt"):
        load(Runtime(checkpoint="x", controlnet={"depth": "net"}))


def test_conversion_names_pointers(tmp_path, flux, published):
    shutil.copytree(published["qwen"], tmp_path / "released/qwen2-vl")
    flux.rename(tmp_path / "released/flux")
    (tmp_path / "released/flux" / TRANSFORMER).write_text(POINTER)
    with pytest.raises(
        UserError, match="released/flux holds git-lfs pointers in the place of transformer/.*git lfs pull"
    ):
        convert.from_release(tmp_path / "released", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is a git-lfs pointer, not the file; fetch it with `git lfs pull`"):
        pretrained.load_transformer(str(tmp_path / "released/flux"), torch.float32)


def test_the_hub_is_meant_even_beside_a_folder_of_that_name(here, flux, published):
    """In an own process, offline, with the hub's cache as its library lays it out: huggingface_hub reads its environment
    when it is imported."""
    commit = "0" * 40
    cached = here / "cache/hub/models--owner--flux"
    for name in ("flux", "qwen"):
        shutil.copytree(published[name], cached.with_name(f"models--owner--{name}") / "snapshots" / commit)
        (cached.with_name(f"models--owner--{name}") / "refs").mkdir()
        (cached.with_name(f"models--owner--{name}") / "refs/main").write_text(commit)
    code = (
        "import sys, torch; from megaflux.models import pretrained as p\n"
        "from megaflux.models.parameters import weights_fingerprint as f\n"
        "for s in sys.argv[1:]:\n"
        "    t = p.load_transformer(s, torch.float32); v = p.load_vae(None, s); c, _ = p.load_clip(s); p.load_scheduler(s)\n"
        "    print(f(t, v, c))\n"
        "q, _ = p.load_vlm('hub:owner/qwen', dtype=torch.float32); p.read_lm_head('hub:owner/qwen').sum()\n"
    )
    env = os.environ | {"HF_HOME": str(here / "cache"), "HF_HUB_OFFLINE": "1"}
    run = lambda *names: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, *names], env=env, cwd=here, capture_output=True, text=True, timeout=300
    )
    shutil.copytree(published["flux"], here / "elsewhere/flux")
    done = run("owner/flux", "hub:owner/flux", "elsewhere/flux")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(done.stdout.split())) == 1
    other = load_file(here / "elsewhere/flux" / TRANSFORMER)
    shutil.copytree(here / "elsewhere/flux", here / "owner/flux")
    save_file({key: tensor + 1 for key, tensor in other.items()}, here / "owner/flux" / TRANSFORMER, {"format": "pt"})
    both = run("hub:owner/flux", "owner/flux")
    assert both.returncode == 0, both.stderr[-2000:]
    hubs, folders = both.stdout.split()
    assert hubs == done.stdout.split()[0] != folders


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--depth-model", {"depth_model": "x"}),
        ("--sam-model", {"sam_model": "x"}),
        ("--line-model", {"line_model": "x"}),
    ],
)
def test_a_detectors_folder_is_looked_at_before_anything_is_loaded(here, option, given):
    (here / "x").mkdir()
    with pytest.raises(UserError, match=f"^{option} x"):
        load(Runtime(checkpoint="not there", **given))
