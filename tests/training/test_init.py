"""model.init: a new run begins with the weights of an export or of a run, is whole without them, and says what does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaflux import runs
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.located import located
from megaflux.config.parse import build_config, load_yaml, merge
from megaflux.config.presets import tiny
from megaflux.export import export
from megaflux.generation.layout import Settings
from megaflux.generation.pipeline import Qwen2VLFluxPipeline
from megaflux.models import shipped
from megaflux.models.parameters import beginnings, weights_fingerprint
from megaflux.models.pretrained import Models, load_models, load_vae
from megaflux.models.sources import model_problems
from megaflux.models.writing import write_tensors
from megaflux.training import cache
from megaflux.training.checkpoint import __main__ as checkpoints
from megaflux.training.checkpoint import init_folder, init_weights, manifest, saved
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.planning.checks import find_problems
from tests import forked
from tests.conftest import picture, small_values, write_run
from tests.training.runs import LAUNCH, ROOT, ds_config, make_dataset, rank_environments, small_config, write_config

ALONE = World(0, 1, torch.device("cpu"))
NO_QWEN = {"name": "flux", "share": 1, "blocks": "all", "vlm_layers": 0}


def configured(run: Path, init: Path | None, stages=None, **model):
    """The models of tests/conftest.py, whose seed is 3."""
    values = small_values()
    values["model"] |= {"init": None if init is None else str(init)} | model
    if stages:
        values["stages"] = stages
    return build_config(values | {"run": {"dir": str(run), "seed": 3}})


def begun(config, dtype=torch.float32, load=load_models) -> Models:
    """What a new run's first update starts with."""
    os.makedirs(config.run.dir, exist_ok=True)
    init_weights.prepare(config, None, load, ALONE)
    models = load(config, "cpu", dtype)
    init_weights.lay_over(models, config.run.dir, init_weights.expected(config, None))
    return models


def pictures(pipeline: Qwen2VLFluxPipeline) -> torch.Tensor:
    return pipeline(
        picture(64, 64), num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images


def of(models: Models, config) -> torch.Tensor:
    return pictures(Qwen2VLFluxPipeline(models, Settings.of(config)))


@pytest.fixture(scope="module")
def wanted(export_folder) -> torch.Tensor:
    return pictures(runs.load_pipeline(export_folder, dtype=torch.float32, device="cpu"))


@pytest.mark.parametrize(("source", "stages", "layers"), [("export", None, 1), ("run", None, 2), ("run", [NO_QWEN], 0)])
def test_the_first_update_has_the_pictures_of_what_it_began_from(
    run_folder, export_folder, wanted, tmp_path, source, stages, layers
):
    """Also where Qwen2-VL is cut elsewhere than in the run that it began from (at 1)."""
    init = {"export": export_folder, "run": run_folder}[source]
    config = configured(tmp_path / "new", init, stages, vlm_layers=layers)
    models = begun(config)
    assert models.base == load_models(configured(tmp_path, None)).base != weights_fingerprint(models.trainable)
    assert torch.equal(of(models, config), wanted)
    assert not torch.equal(of(load_models(config), config), wanted)
    half = runs.load_pipeline(export_folder, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(of(begun(config, torch.bfloat16), config), pictures(half))


def test_it_is_copied_in_files_of_limited_size_and_only_where_it_differs(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(init_weights, "MOST_BYTES", 30_000)
    config = configured(tmp_path / "new", run_folder)
    begun(config)
    root = init_folder.folder(config.run.dir)
    trained = load_file(run_folder / "checkpoints/update-0000008/weights.safetensors")
    stored = {}
    for file in root.glob("*.safetensors"):
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000
        with safe_open(file, "pt") as opened:
            assert list(opened.keys())
        stored |= tensors
    last = {name.replace("vlm.layers.0.", "vlm.layers.1."): tensor for name, tensor in trained.items()}
    assert stored.keys() == last.keys() and all(torch.equal(stored[name], last[name]) for name in last)
    content = init_folder.verify(config.run.dir, init_folder.read(config.run.dir)["fingerprint"])
    assert len(content["files"]) > 3
    assert content["source"] | {"sha256": None} == {"kind": "run", "path": str(run_folder), "update": 8, "sha256": None}
    entries = [("a", torch.bfloat16, (2, 3)), ("b", torch.float32, ())]
    tensors = [torch.arange(6).reshape(3, 2).T.bfloat16(), torch.tensor(2.5)]
    write_tensors(tmp_path / "one.safetensors", entries, tensors)
    assert all(torch.equal(load_file(tmp_path / "one.safetensors")[name], t) for (name, *_), t in zip(entries, tensors))


def test_a_killed_copy_leaves_nothing_and_one_of_a_start_that_saved_nothing_is_made_anew(
    run_folder, tmp_path, monkeypatch
):
    config = configured(tmp_path / "new", run_folder)
    partial = init_folder.partial_of(config.run.dir)
    partial.mkdir(parents=True)
    (partial / "init-00001-of-00001.safetensors").write_bytes(b"half")
    real = init_weights.write_tensors

    def full(file, *rest):
        real(file, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(init_weights, "write_tensors", full)
    with pytest.raises(UserError, match="run.dir: .*/init cannot be written .No space left"):
        begun(config)
    assert os.listdir(config.run.dir) == []
    monkeypatch.setattr(init_weights, "write_tensors", real)
    begun(config)
    older = shutil.copytree(run_folder, tmp_path / "older")
    shutil.rmtree(older / "checkpoints/update-0000008")
    begun(configured(tmp_path / "new", older))  # another source, before there is a checkpoint
    assert init_folder.read(config.run.dir)["source"]["update"] == 4
    begun(configured(tmp_path / "new", None))  # nor is it left where the run begins without one
    assert os.listdir(config.run.dir) == []


def test_a_kill_while_a_copy_is_deleted_leaves_nothing_that_looks_like_the_users(run_folder, tmp_path, monkeypatch):
    config = configured(tmp_path / "new", run_folder)
    begun(config)
    real, unlinked = os.unlink, []

    def killed(path, **options):
        if unlinked:
            raise KeyboardInterrupt
        unlinked.append(path)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        init_folder.clear(config.run.dir, everything=True)
    monkeypatch.setattr(os, "unlink", real)
    assert os.listdir(config.run.dir) == [".init.partial"]
    assert not [line for line in find_problems(config, {}, 1) if "init" in line]
    begun(configured(tmp_path / "new", None))
    assert os.listdir(config.run.dir) == []


def test_before_the_first_checkpoint_the_source_may_be_gone_and_a_bad_one_costs_no_copy(
    export_folder, tmp_path, caplog
):
    source = shutil.copytree(export_folder, tmp_path / "export")
    config = configured(tmp_path / "new", source)
    before, kept = of(begun(config), config), init_folder.read(config.run.dir)
    manifest_file = source / "megaflux.json"
    whole = manifest_file.read_text()
    manifest_file.write_text("{")
    with pytest.raises(UserError, match="model.init: .*megaflux.json"):
        begun(config)
    assert init_folder.read(config.run.dir) == kept
    manifest_file.write_text(whole)
    source.rename(tmp_path / "gone")
    assert not [line for line in find_problems(config, {}, 1) if "init" in line]
    assert torch.equal(of(begun(config), config), before)
    assert f"model.init: {source} is gone; beginning from the copy of it in {config.run.dir}" in caplog.text
    other = configured(tmp_path / "new", tmp_path / "another")  # of which there is no copy
    with pytest.raises(UserError, match="model.init: .*another: no such folder"):
        begun(other)
    assert [line for line in find_problems(other, {}, 1) if "another: no such folder" in line]
    (file,) = init_folder.folder(config.run.dir).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="init-00001-of-00001.safetensors: damaged"):
        begun(config)


def test_a_folder_named_init_that_is_the_users_is_kept(export_folder, tmp_path):
    """Whether a new run begins with model.init, even from that very folder, or without."""
    run = tmp_path / "new"
    shutil.copytree(export_folder, run / "init")
    begun(configured(run, None))
    for init in (export_folder, run / "init"):
        config = configured(run, init)
        assert any("new/init: is there, and the run would write" in line for line in find_problems(config, {}, 1))
        with pytest.raises(UserError, match="new/init: is there, .* move it away, or give another --run.dir"):
            begun(config)
    (run / "init").rename(tmp_path / "mine")
    (run / "init").symlink_to(tmp_path / "mine")
    begun(configured(run, None))
    assert (tmp_path / "mine/megaflux.json").is_file()


def test_a_full_disk_is_said_before_anything_is_written(run_folder, tmp_path, monkeypatch):
    statvfs = os.statvfs

    class Full:
        f_bavail, f_frsize = 1, 1

    config = configured(tmp_path / "new", run_folder)
    monkeypatch.setattr(os, "statvfs", lambda path: Full if str(path) == config.run.dir else statvfs(path))
    with pytest.raises(
        UserError, match=r"new has 0.0 GB free, and the copy of what the run begins from \(model.init\) needs"
    ):
        begun(config)
    assert os.listdir(config.run.dir) == []


def test_what_is_no_source_is_one_line_before_anything_is_loaded(run_folder, export_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    halves = shutil.copytree(run_folder, tmp_path / "halves")
    for file in halves.rglob("weights.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    broken = shutil.copytree(export_folder, tmp_path / "broken")
    (broken / "vae/config.json").unlink()
    authors = tmp_path / "authors"
    for name in ("flux", "qwen2-vl"):
        (authors / name).mkdir(parents=True)
    for path, words in (
        (tmp_path / "nowhere", "nowhere: no such folder; give an export, a converted release or a run"),
        (run_folder / "config.yaml", "config.yaml: is not a folder"),
        (empty, "empty: neither a run .no config.yaml. nor an export .no megaflux.json."),
        (run_folder / "checkpoints/update-0000008", "one checkpoint of a run; give the run's folder"),
        (halves, "checkpoints: holds no complete checkpoint .*weights.safetensors: missing or damaged"),
        (broken, "vae/config.json: missing; export the run again"),
        (authors, "run python -m megaflux.convert .*authors OUT, and give OUT"),
    ):
        (found,) = [
            line for line in find_problems(configured(tmp_path / "new", path), {}, 1) if line.startswith("model.init: ")
        ]
        assert re.search(words, found), found
    assert not [line for line in find_problems(configured(tmp_path / "new", run_folder), {}, 1) if "init" in line]


def test_the_newest_whole_checkpoint_is_taken(run_folder, tmp_path, caplog):
    source = shutil.copytree(run_folder, tmp_path / "source")
    weights = source / "checkpoints/update-0000008/weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")  # its size is right
    config = configured(tmp_path / "new", source)
    begun(config)
    assert "update-0000008/weights.safetensors: damaged" in caplog.text
    assert init_folder.read(config.run.dir)["source"]["update"] == 4


def test_what_does_not_fit_names_the_file_and_the_key(run_folder, export_folder, tmp_path):
    def refused(init: Path, words: str, **model) -> None:
        with pytest.raises(UserError, match=words):
            begun(configured(tmp_path / "new", init, **model))

    def damaged(part: str, change) -> Path:
        root = tmp_path / f"export-{len(os.listdir(tmp_path))}"
        shutil.copytree(export_folder, root)
        tensors = load_file(root / part)
        change(tensors)
        save_file(tensors, root / part)
        content = json.loads((root / "megaflux.json").read_text())
        content["files"][part]["bytes"] = (root / part).stat().st_size
        (root / "megaflux.json").write_text(json.dumps(content))
        return root

    flux, text, vae = (
        f"{part}.safetensors"
        for part in ("transformer/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    )
    name = "x_embedder.weight"
    refused(damaged(flux, lambda t: t.pop(name)), "missing key transformer.x_embedder.weight")
    refused(damaged(flux, lambda t: t.update(new=t[name].clone())), f"{flux}: unexpected key new")
    refused(
        damaged(flux, lambda t: t.update({name: t[name][:, 1:].clone()})),
        f"{flux}: wrong shape {name}: .32, 31., .*.32, 32.",
    )
    refused(damaged(flux, lambda t: t.update({name: t[name].byte()})), f"{flux}: {name} is stored as torch.uint8")
    other = damaged(text, lambda t: t["model.embed_tokens.weight"].mul_(2))
    refused(other, f"{text}: model.embed_tokens.weight is not that of the run's Qwen2-VL.*--model.vlm .*text_encoder")
    refused(damaged(text, lambda t: t["model.norm.weight"].mul_(2)), "model.norm.weight is not that")
    refused(damaged(vae, lambda t: next(iter(t.values())).mul_(2)), "vae: is not the run's VAE.*--model.vae")
    pooled = damaged("pooled_prompt_embeds.safetensors", lambda t: t["pooled_prompt_embeds"].mul_(2))
    refused(pooled, "pooled_prompt_embeds.safetensors: is not the vector of the run's CLIP.*--model.flux")
    config = export_folder / "transformer/config.json"
    turned = tmp_path / "turned"
    shutil.copytree(export_folder, turned)
    text_of = config.read_text()
    changed = json.loads(text_of) | {"axes_dims_rope": [6, 4, 6]}
    (turned / "transformer/config.json").write_text(json.dumps(changed))
    content = json.loads((turned / "megaflux.json").read_text())
    content["files"]["transformer/config.json"]["bytes"] = (turned / "transformer/config.json").stat().st_size
    (turned / "megaflux.json").write_text(json.dumps(content))
    refused(turned, "transformer/config.json: axes_dims_rope is .6, 4, 6., the run's model.flux has .*4, 6, 6")
    assert not os.path.exists(init_folder.folder(tmp_path / "new"))


def test_other_base_weights_are_refused_and_another_seed_of_published_ones_is_not(published, run_folder, tmp_path):
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(published["qwen"]), "vae": None}
    source = write_run(tmp_path / "source", values, updates=(8,), dtype=torch.bfloat16)
    new = build_config(
        merge(values, {"run": {"dir": str(tmp_path / "new"), "seed": 77}, "model": {"init": str(source)}})
    )
    assert "clip" in load_models(new).base_parts
    path = manifest.listed(source)[8] / "manifest.json"
    content = manifest.read(path.parent)
    other = content | {"base_parts": content["base_parts"] | {"clip": "0" * 64}}
    path.write_text(json.dumps(manifest.sealed({k: v for k, v in other.items() if k != "seal"})))
    with pytest.raises(UserError, match="began from other base weights than this run's model.flux; give those"):
        begun(new, None)
    path.write_text(json.dumps(content))
    models, theirs = begun(new, None), runs.load(runs.find(source))
    for ours, there in zip(models.trainable.parameters(), theirs.trainable.parameters(), strict=True):
        assert torch.equal(ours, there)
    # One that trained everything but the connector: its own, drawn from its seed.
    values["stages"] = [{"name": "one", "share": 1, "blocks": [0], "connector": False}]
    held = write_run(tmp_path / "held", values, updates=(8,), dtype=torch.bfloat16)
    assert "connector.weight" not in load_file(held / "checkpoints/update-0000008/weights.safetensors")
    second = merge(new.model_dump(), {"run": {"dir": str(tmp_path / "second")}, "model": {"init": str(held)}})
    models = begun(build_config(second), None)
    assert torch.equal(models.trainable.connector.weight, runs.load(runs.find(held)).trainable.connector.weight)
    with pytest.raises(
        UserError,
        match=r"small: began from other base weights than this run's model.flux, model.vlm; give those, or, of what is drawn, --run.seed 3$",
    ):
        begun(
            build_config(
                merge(
                    new.model_dump(),
                    {"run": {"dir": str(tmp_path / "x")}, "model": {"init": str(run_folder), "vae": "tiny"}},
                )
            )
        )


def test_an_init_of_an_init_and_the_cache_of_its_trunk(run_folder, tmp_path):
    """The second run's trunk is cut below the layer that the first one trained: it begins with a trunk of its own."""
    first = configured(tmp_path / "first", run_folder)
    begun(first)
    source = write_run_from(first, tmp_path)
    config = configured(tmp_path / "second", source, [NO_QWEN])
    models, theirs = begun(config), runs.load(runs.find(source))
    assert torch.equal(of(models, config), of(theirs, first))
    data = tmp_path / "data"
    data.mkdir()
    (data / "index.json").write_text("{}")
    caching = build_config(merge(config.model_dump(), {"data": {"path": str(data), "cache": ["trunk"]}}))
    assert cache._fingerprint(caching, models) != cache._fingerprint(caching, load_models(config))
    assert not torch.equal(of(theirs, first), of(runs.load(runs.find(run_folder)), first))


def write_run_from(config, tmp_path: Path, dtype=torch.float32, **stage) -> Path:
    """The run of a configuration that has begun: one checkpoint, which trained less than what it began from."""
    stages = [{"name": "c", "share": 1, "blocks": "none"} | stage]
    made = write_run(tmp_path / "made", config.model_dump() | {"stages": stages}, (7,), dtype)
    root = Path(config.run.dir)
    shutil.copytree(made, root, dirs_exist_ok=True)
    path = root / "checkpoints/update-0000007"
    content = json.loads((path / "manifest.json").read_text())
    content["init"] = init_folder.read(root)["fingerprint"]
    del content["seal"]
    (path / "manifest.json").write_text(json.dumps(manifest.sealed(content)))
    return root


def test_what_was_trained_in_float32_keeps_its_bits_over_a_bfloat16_base(published, tmp_path):
    """In the export of a run that trained in bfloat16; the layer that the first run trained is in the second one's trunk."""
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(published["qwen"]), "vae": None}
    source = write_run(tmp_path / "source", values, updates=(8,))
    changes = {"run": {"dir": str(tmp_path / "new"), "seed": 3}, "model": {"init": str(source)}, "stages": [NO_QWEN]}
    config = build_config(merge(values, changes))
    begun(config)
    export(runs.find(write_run_from(config, tmp_path, torch.bfloat16, vlm_layers=0)), tmp_path / "export")
    first = load_file(source / "checkpoints/update-0000008/weights.safetensors")
    flux, text = (
        load_file(tmp_path / "export" / name)
        for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
    )
    assert all(torch.equal(flux[name], first[f"transformer.{name}"]) for name in flux)
    layer = {name.removeprefix("vlm.layers.0."): t for name, t in first.items() if name.startswith("vlm.layers.")}
    assert layer and all(torch.equal(text[f"model.layers.1.{name}"], tensor) for name, tensor in layer.items())
    assert text["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_what_a_resumed_run_began_from_must_be_there_and_its_own(run_folder, tmp_path, capsys):
    config = configured(tmp_path / "first", run_folder)
    begun(config)
    root = write_run_from(config, tmp_path)
    path = manifest.listed(root)[7]
    resumed, folder = Checkpoint(path, manifest.read(path)), init_folder.folder(root)
    init_weights.prepare(config, resumed, load_models, ALONE)
    assert checkpoints.main(["verify", str(root)]) == 0 and "init: whole" in capsys.readouterr().out
    (file,) = folder.glob("*.safetensors")
    data, text = file.read_bytes(), (folder / "manifest.json").read_text()

    def refused(words: str) -> None:
        for what in (lambda: init_weights.prepare(config, resumed, load_models, ALONE), lambda: runs.find(root)):
            with pytest.raises(UserError, match=words):
                what()

    file.write_bytes(data[:-1] + b"\x01")
    refused("init-00001-of-00001.safetensors: damaged .it does not match its SHA-256.*restore it")
    file.write_bytes(data[:-1])
    refused("init-00001-of-00001.safetensors: damaged")
    assert [line for line in find_problems(config, {}, 1) if "init-00001-of-00001.safetensors: damaged" in line]
    file.unlink()
    refused("init-00001-of-00001.safetensors: missing")
    file.write_bytes(data)
    (folder / "manifest.json").write_text(text.replace('"update": 8', '"update": 9'))
    refused("manifest.json: damaged")
    (folder / "manifest.json").write_text(text)
    begun(configured(tmp_path / "other", run_folder, vlm_layers=1))
    older = shutil.copytree(run_folder, tmp_path / "older")
    shutil.rmtree(older / "checkpoints/update-0000008")
    begun(configured(tmp_path / "other", older))
    shutil.rmtree(folder)
    shutil.copytree(init_folder.folder(tmp_path / "other"), folder)
    refused("init: is not what this run began from .model.init. but another run's")
    shutil.rmtree(folder)
    assert checkpoints.main(["verify", str(root)]) == 2 and "init: missing" in capsys.readouterr().out
    refused("init: missing, and it holds what the run began from .model.init.; restore the folder")


def test_a_run_trains_on_from_an_export_that_is_gone_in_folders_that_were_moved(tmp_path):
    """By real starts: a new run on two ranks with nothing of Qwen2-VL in the engine, given relative paths. Its source is deleted,
    its folder, its data's and its VAE's are renamed; resumed from another working directory on one rank, and exported."""
    data = make_dataset(tmp_path / "made")
    data.rename(tmp_path / "data")
    values = small_config(Path("data"), Path("run"), train__updates=2, train__checkpoint_every=1, data__cache=["trunk"])
    values |= {"run": {"dir": "run", "seed": 3}, "optim": {"lr": 1e-9}}
    full = merge(tiny(), values | {"stages": [{"name": "base", "share": 1, "blocks": "all", "components": "model"}]})
    source = write_run(tmp_path / "source", {k: v for k, v in full.items() if k != "run"}, updates=(2,))
    export(runs.find(source), tmp_path / "export")
    wanted = pictures(runs.load_pipeline(tmp_path / "export", dtype=torch.float32, device="cpu"))
    load_vae("tiny", None).save_pretrained(tmp_path / "vae")
    values["model"] |= {"vae": "vae"}
    values["stages"] = [{"name": "c", "share": 1, "blocks": "none", "vlm_layers": 0}]
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "fp32")

    def start(*arguments: object, ranks: int = 1, code: int = 0, cwd: Path = ROOT) -> str:
        command = [LAUNCH, "--deepspeed", str(ds), *map(str, arguments)]
        done = forked.run_ranks(command, rank_environments(ranks), 300, cwd)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stderr

    given = ["--config", config, "--model.init", "export", "--train.stop_after", 1]
    start(*given, ranks=2, cwd=tmp_path)
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(source)
    (tmp_path / "data").rename(tmp_path / "renamed")
    run = (tmp_path / "run").rename(tmp_path / "elsewhere")
    vae = (tmp_path / "vae").rename(tmp_path / "other vae")
    said = start("--run.dir", run, code=2)
    assert f"data.path: {tmp_path}/data does not exist" in said and f"model.vae: {tmp_path}/vae does not exist" in said
    new = ["--run.dir", run, "--data.path", tmp_path / "renamed", "--model.vae", vae]
    said = start(*new, "--model.init", tmp_path / "else")
    assert f"model.init: {tmp_path}/else has no effect: {run} began from {tmp_path}/export, which is copied" in said
    found = runs.find(run)
    assert found.manifest["init"] == init_folder.read(run)["fingerprint"] and found.manifest["update"] == 2
    assert (found.config.model.init, found.config.data.path) == (f"{tmp_path}/export", f"{tmp_path}/renamed")
    assert found.config.model.vae == str(vae)
    assert (found.source["run"], found.source["init"]) == (str(run), found.manifest["init"])
    pipeline = runs.load_pipeline(run, dtype=torch.float32, device="cpu")
    assert len(pipeline.models.trainable.vlm.layers) == 0
    assert torch.allclose(pictures(pipeline), wanted, atol=1e-3)  # two updates of 1e-9 later
    assert not torch.allclose(of(load_models(found.config), found.config), wanted, atol=1e-3)
    export(found, tmp_path / "exported")
    again = runs.load_pipeline(tmp_path / "exported", dtype=torch.float32, device="cpu")
    assert torch.equal(pictures(pipeline), pictures(again))
    shutil.rmtree(init_folder.folder(run))
    assert f"error: {run}/init: missing" in start(*new, code=2)


def test_a_run_that_began_without_one_is_given_none(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    begun_with = saved.begun(str(run))
    config = begun_with.config.model_copy(update={"run": begun_with.config.run.model_copy(update={"dir": str(run)})})
    assert init_folder.settled(config, begun_with) is config
    given = config.model_copy(update={"model": config.model.model_copy(update={"init": "x"})})
    began_from = given.model_copy(update={"model": config.model.model_copy(update={"init": str(Path("x").absolute())})})
    assert init_folder.describe(began_from, "x") is None is init_folder.describe(config, None)  # the same command again
    with pytest.raises(
        UserError, match="model.init: x, but .*run holds a run that began without one; leave it out, or"
    ):
        init_folder.settled(given, begun_with)
    path = manifest.listed(run)[8]
    with pytest.raises(UserError, match="model.init: x, but .* began without one"):  # nor where config.yaml is lost
        init_weights.prepare(given, Checkpoint(path, manifest.read(path)), load_models, ALONE)


ZERO2 = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
STARTED = {"init": "tiny", "vae": "tiny-icons"}


@pytest.mark.parametrize(("seed", "vae"), [(0, "tiny-icons"), (5, "tiny")])  # the second: as an earlier version began
def test_the_shipped_start_is_laid_over_whatever_the_seed(tmp_path, seed, vae):
    values = merge(tiny(), {"run": {"dir": str(tmp_path / "run"), "seed": seed}, "model": STARTED | {"vae": vae}})
    config = build_config(values)
    assert init_folder.problem(config) is None is init_folder.kept(config.run.dir, "tiny")
    models = begun(config)
    found = beginnings(models.trainable, models.trunk.vlm)
    shipped_weights = load_file(shipped.START_WEIGHTS)
    trained = {name for name, _ in models.trainable.named_parameters() if not name.startswith("vlm.")}
    assert trained < set(shipped_weights) and {name for name in shipped_weights if name not in trained} == {
        name for name in found if name.startswith("vlm.layers.2.")
    }
    for name, tensor in shipped_weights.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    content = init_folder.read(config.run.dir)
    assert (content["source"]["kind"], content["source"]["path"]) == ("shipped", "tiny")
    assert located(config).model.init == "tiny"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"vlm": None}, "model.init: tiny was .* model.vlm tiny, but model.vlm is null; give --model.vlm tiny, or"),
        (
            {"vae": "tiny"},
            "model.init: tiny was .* model.vae tiny-icons, but model.vae is tiny; give --model.vae tiny-icons",
        ),
        (
            {"flux_config": {"num_layers": 3}},
            r"model.flux_config.num_layers: 3, but the shipped FLUX .* has 2; .*--model.init null",
        ),
    ],
)
def test_the_shipped_start_of_other_models_is_refused_in_a_line(model, words, monkeypatch):
    config = build_config(merge(tiny(), {"model": STARTED | model}))
    said = shipped.start_problem(config.model)
    assert said is not None and re.match(words, said)
    assert said in find_problems(config, ZERO2, 1)
    monkeypatch.setattr(saved, "has_begun", lambda run_dir: True)  # as an earlier version began: it has its own start
    assert said not in find_problems(config, ZERO2, 1)
    assert shipped.start_problem(build_config(merge(tiny(), {"model": STARTED})).model) is None


@pytest.mark.parametrize("recipe", ["demo", "grid"])
def test_the_recipes_of_the_tiny_preset_fit_its_start(recipe, tmp_path):
    file = Path(__file__).parents[2] / "recipes" / "tiny" / f"{recipe}.yaml"
    config = build_config(merge(merge(tiny(), load_yaml(str(file))), {"run": {"dir": str(tmp_path)}}))
    assert config.model.init == "tiny" and not list(model_problems(config.model))
    assert not [line for line in find_problems(config, ZERO2, 1) if "model." in line]
