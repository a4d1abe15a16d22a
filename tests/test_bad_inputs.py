"""Bad inputs that belong to no one module: checkpoints that a run must not use, and what may never happen anywhere:
code that runs from a file, a page that others can open, a picture that fills the memory, a path that leads out.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import logging
import pickle
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from megaflux import runs
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config import plain_yaml
from megaflux.config.parse import build_config
from megaflux.data.buckets import Bucket
from megaflux.data.tensors import from_stored_image
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from megaflux.generation import outputs
from megaflux.generation.job import Input, Job, JobControl, JobReference, Runtime
from megaflux.generation.run import read_inputs
from megaflux.infer import __main__ as infer
from megaflux.panel import serve
from megaflux.panel.__main__ import build_parser
from megaflux.panel.files import store
from megaflux.panel.work import settings_text
from megaflux.training.checkpoint import manifest
from megaflux.training.checkpoint import resume as checkpoint
from megaflux.training.checkpoint.identity import identity
from megaflux.training.ds_config import sharding
from tests.conftest import picture, small_values

ROOT = Path(__file__).parents[1]
DS_CONFIG = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
ZERO3 = DS_CONFIG | {"zero_optimization": {"stage": 3}}


# Checkpoints: a resume goes on from one that is whole and this run's, or says why not; it never starts over in silence


def configure(folder: Path, **changes):
    values = small_values() | {"run": {"dir": str(folder)}}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value} if key else value
    return build_config(values)


def resolve(folder: Path, ds_config: dict = DS_CONFIG, size: int = 1, **changes) -> int | None:
    """The update that a run of these ranks would go on from."""
    found = checkpoint._resolve(configure(folder, **changes), ds_config, size)
    return None if found is None else found.update


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(folder: Path, update: int, ds_config: dict = DS_CONFIG, **changes) -> Path:
    """A checkpoint as checkpoint.save writes it, with bytes in the place of tensors."""
    partial, config = manifest.partial_of(folder, update), configure(folder)
    (partial / "deepspeed").mkdir(parents=True)
    for name in ("weights.safetensors", "deepspeed/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng-rank0000.pt"):
        (partial / name).write_bytes(hashlib.sha256(f"{name} {update}".encode()).digest() * 10)
    content = {
        "format": manifest.FORMAT,
        "update": update,
        "stage": 0,
        "stage_name": "base",
        "world_size": 1,
        "data": {},
        "identity": identity(config),
        "base": "b",
        "deepspeed": sharding(ds_config),
        "guard": {},
    }
    final = manifest.folder(folder) / manifest.name_of(update)
    manifest.publish(partial, final, content | changes, manifest.inventory(partial))
    return final


def reseal(path: Path, **changes) -> None:
    """A forger's change of a manifest: its own hash is right."""
    content = json.loads((path / manifest.MANIFEST).read_text()) | changes
    (path / manifest.MANIFEST).write_text(json.dumps(manifest.sealed(content)))


def leads_out(path: Path) -> None:
    files = json.loads((path / manifest.MANIFEST).read_text())["files"]
    reseal(path, files=files | {"../../x": {"bytes": 0, "sha256": "0" * 64}})


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "an empty manifest": (
        lambda p: (p / "manifest.json").write_bytes(b""),
        "manifest.json: .*not a complete checkpoint",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: No such file"),
    "half a manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text()[:99]),
        "manifest.json: ",
    ),
    "a path that leads out": (leads_out, "../../x lies outside the checkpoint"),
    "truncated weights": (
        lambda p: (p / "weights.safetensors").write_bytes(b"x"),
        "weights.safetensors: damaged .1 bytes",
    ),
    "a missing shard": (lambda p: next(p.glob("deepspeed/*")).unlink(), "optim_states.pt: missing"),
    "a flipped byte": (lambda p: flip(next(p.glob("deepspeed/*"))), "optim_states.pt: damaged"),
    "a pickle among the weights": (
        lambda p: (p / "weights.safetensors").write_bytes(pickle.dumps({})),
        "weights.* damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_says_so_or_stops(tmp_path, caplog, damage):
    act, said = DAMAGE[damage]
    older, newest = save(tmp_path, 4), save(tmp_path, 8)
    act(newest)
    with caplog.at_level(logging.WARNING, "megaflux"):
        assert resolve(tmp_path) == 4
    (line,) = [record.getMessage() for record in caplog.records]
    assert "resuming from update-0000004, the newest complete checkpoint" in line and "update-0000008" in line
    act(older)
    line = refusal(tmp_path)
    assert re.search(said, line), line
    assert "none of the 2 checkpoints is complete" in line and "Three ways out" in line


def test_a_run_that_diverges_goes_back_to_one_from_before_and_deletes_none(tmp_path):
    def sound() -> int | None:
        found = checkpoint._resolve(configure(tmp_path), DS_CONFIG, 1, sound=True)
        return found and found.update

    save(tmp_path, 4, guard={"in_a_row": 1})
    assert sound() is None
    for update, in_a_row in ((2, 0), (8, 2)):
        save(tmp_path, update, guard={"in_a_row": in_a_row})
    assert sound() == 2 and resolve(tmp_path) == 8
    assert list(manifest.listed(tmp_path)) == [2, 4, 8]


def test_a_pickle_beside_those_that_were_hashed_is_refused(tmp_path):
    save(tmp_path, 4)
    (save(tmp_path, 8) / "deepspeed" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert resolve(tmp_path) == 4


def test_a_newer_format_is_not_passed_over(tmp_path):
    save(tmp_path, 4)
    reseal(save(tmp_path, 8), format=99)
    assert f"update-0000008: format 99 is newer than this code's {manifest.FORMAT}; update megaflux" in refusal(
        tmp_path
    )


def test_where_there_is_no_checkpoint(tmp_path):
    assert resolve(tmp_path) is None  # nothing was ever there: a start, not a start over
    must, never = ({"dir": str(tmp_path), "resume": resume} for resume in ("must", "never"))
    assert "holds no checkpoint and run.resume is must" in refusal(tmp_path, run=must)
    path = save(tmp_path, 4)
    (path.parent / "latest").write_text("")  # DeepSpeed's pointer; nothing here reads one, empty or not
    assert resolve(tmp_path) == 4
    assert "run.resume is never" in refusal(tmp_path, run=never)
    path.rename(path.with_name("update-0000004.bad"))
    assert "only update-0000004.bad" in refusal(tmp_path)


OTHERS = {
    "other stages": ({"stages": [{"name": "base", "share": 1, "blocks": "all"}]}, {}, "holds a run with other stages"),
    "another seed": ({"run": {"seed": 5}}, {}, "other run.seed"),
    "another model": ({"model__latent_channels": 4}, {}, "other model.latent_channels"),
    "other sharding": ({}, {"ds_config": ZERO3}, "--deepspeed: .* was saved with"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path, other):
    changes, options, said = OTHERS[other]
    save(tmp_path, 4)
    if "run" in changes:
        changes = {"run": changes["run"] | {"dir": str(tmp_path)}}
    with pytest.raises(UserError, match=said):
        resolve(tmp_path, **options, **changes)


def test_other_ranks_go_on_under_zero_2_and_are_refused_under_zero_3(tmp_path):
    save(tmp_path / "two", 4)
    assert resolve(tmp_path / "two", size=2) == 4
    save(tmp_path / "three", 4, ZERO3)
    assert "saved by 1 ranks, this run has 2" in refusal(tmp_path / "three", ZERO3, 2)
    assert resolve(tmp_path / "three", ZERO3, optim__lr=3e-4) == 4
    rates = {"flux": 1e-6, "connector": 1e-3, "vlm": 1e-5}
    assert "ZeRO-3's shards cannot be grouped anew" in refusal(tmp_path / "three", ZERO3, optim__lr=rates)
    assert resolve(tmp_path / "two", optim__lr=rates) == 4


def test_all_ranks_hear_what_the_first_found(tmp_path):
    save(tmp_path, 4)
    world = World(0, 1, torch.device("cpu"))
    assert checkpoint.resolve(configure(tmp_path), DS_CONFIG, world).update == 4
    with pytest.raises(UserError) as caught:
        checkpoint.resolve(configure(tmp_path, run={"dir": str(tmp_path), "seed": 9}), DS_CONFIG, world)
    assert caught.value.agreed


class Bomb:
    """Runs when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_pickle_in_the_place_of_weights_runs_nothing_even_under_its_right_hash(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    newest, ran = tmp_path / "run/checkpoints/update-0000008", tmp_path / "ran"
    torch.save({"x": Bomb(ran)}, newest / "weights.safetensors")
    reseal(newest, files=manifest.inventory(newest))
    with pytest.raises(UserError, match=r"update-0000008/weights\.safetensors: cannot be loaded") as caught:
        runs.load(runs.find(tmp_path / "run"))
    assert "\n" not in str(caught.value) and not ran.exists()
    torch.load(io.BytesIO((newest / "weights.safetensors").read_bytes()), weights_only=False)
    assert ran.exists()  # it would have run


# Nothing that is read runs code


SOURCES = sorted(file for folder in ("megaflux", "kernels", "launch") for file in (ROOT / folder).rglob("*.py"))
UNSAFE = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "np.load",
    "numpy.load",
    "pd.read_pickle",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
}
# DeepSpeed's shards hold its own classes; they are held against the manifest's hash before.
OPTIMIZER = "megaflux/training/checkpoint/reshard.py"
OFF = ("allow_pickle", "trust_remote_code", "allow_unsafe_types")
YAML = ("megaflux/config/plain_yaml.py", {"Loader": "_Loader"})


def calls(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_no_pickle_is_loaded_but_deepspeeds_own_optimizer_shards():
    assert len(SOURCES) > 80
    found = []
    for file in SOURCES:
        name = str(file.relative_to(ROOT))
        for called, words in calls(file):
            unsafe = called in UNSAFE or any(words.get(option, "False") != "False" for option in OFF)
            unsafe |= called == "torch.load" and words.get("weights_only") != "True"
            unsafe |= called in ("yaml.load", "yaml.load_all") and (name, words) != YAML
            found += [(name, called)] if unsafe else []
    assert found == [(OPTIMIZER, "torch.load")]
    assert issubclass(plain_yaml._Loader, yaml.SafeLoader)


# The panel and TensorBoard are this machine's own


def test_the_panel_listens_on_this_machine_only(monkeypatch, tmp_path):
    given = {}

    class Page:
        def queue(self, **_):
            return self

        def launch(self, **options):
            given.update(options)
            raise OSError

    pytest.importorskip("gradio")
    with pytest.raises(UserError, match="port 7860 is taken"):
        serve.serve(Page(), serve.PORT, tmp_path, {})
    assert given["server_name"] == "127.0.0.1" and given["share"] is False
    assert given["allowed_paths"] == [str(tmp_path)]
    assert not {"host", "server_name", "share", "listen"} & {action.dest for action in build_parser()._actions}


def test_no_page_is_ever_suggested_to_be_opened_to_others():
    texts = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*"), ROOT / "Makefile"]
    for file in texts:
        if file.is_file():
            text = file.read_text()
            for word in ("--bind_all", "--bind-all", "0.0.0.0", "--host ", "--host=", "share=True"):
                assert word not in text, (file, word)


# A picture's header says how large it is; nothing of that size is made. 10,000 px lies where Pillow only warns.


def claiming(side: int) -> bytes:
    """A PNG of a few bytes whose header claims side x side px."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    text = b"megaflux\0{}"
    chunks = ((b"IHDR", header), (b"tEXt", text), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


SIDES = [10_000, 65_500]


@pytest.fixture(params=SIDES)
def bomb(request, tmp_path) -> Path:
    (tmp_path / "bomb.png").write_bytes(claiming(request.param))
    return tmp_path / "bomb.png"


def test_a_bomb_is_refused_wherever_a_picture_is_named(bomb):
    given = Input(file=str(bomb))
    jobs = {
        "--reference": Job(references=(JobReference(file=str(bomb)),)),
        "--image": Job(image=given),
        "--mask": Job(mask=given),
        "--control-image depth": Job(controls=(JobControl(kind="depth", image=given),)),
    }
    for option, job in jobs.items():
        with pytest.raises(UserError, match=rf"{option} .*bomb.png: more pixels than the limit"):
            read_inputs(job)


def test_a_bomb_is_refused_by_the_panel(bomb, tmp_path):
    with pytest.raises(UserError, match="bomb.png: more pixels than the limit"):
        store(bomb, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="settings cannot be read"):
        settings_text(str(bomb))


def test_a_bomb_is_no_picture_of_ours(bomb, tmp_path):
    with pytest.raises(UserError, match="--from-image .*bomb.png: has too many pixels"):
        infer.main(["--from-image", str(bomb), "--out", str(tmp_path / "out")])


def test_a_bomb_is_left_out_of_a_dataset(bomb, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copy(bomb, tmp_path / "source")
    picture(64, 64).save(tmp_path / "source/sound.png")
    options = Options(longest_side=64, aspect_ratios=("1:1",), held_out=0)
    info = prepare(str(tmp_path / "source"), tmp_path / "data", options, workers=1, max_bad=1, progress=False)
    assert info.bad == {"too_many_pixels": 1} and info.samples("train") == 1


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_in_a_shard_is_an_error_before_it_is_decoded(bomb):
    # by Pillow's limit, or as one of another size than its bucket's
    bucket = Bucket("1:1", 64, 64)
    with pytest.raises((UserError, Image.DecompressionBombError)):
        from_stored_image(bomb.read_bytes(), bucket, "a")


def test_a_shards_picture_is_never_given_to_another_program():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(data)) as image:  # Pillow would run Ghostscript on it
        assert image.format == "EPS" and image.size == (64, 64)
    with pytest.raises(OSError, match="cannot identify"):
        from_stored_image(data, Bucket("1:1", 64, 64), "a")


# Names that are longer than a file system takes, and settings that only a forger writes


@pytest.mark.parametrize(
    "argv",
    [
        ["--checkpoint", "a" * 300, "--prompt", "x"],
        ["--checkpoint", "/", "--prompt", "x", "--out", "a" * 300],
        ["--checkpoint", "/", "--prompt", "x", "--out", "a\0b"],
        ["--from-image", "a" * 300],
        ["--checkpoint", "/", "--reference", "a" * 300],
    ],
)
def test_names_that_no_file_has_are_one_line(argv):
    with pytest.raises(UserError) as caught:
        infer.main(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"maps": [1]}, "maps is not an object of hashes"),
        ({"maps": {"canny": 5}}, "maps is not an object"),
        ({"seed": [7]}, "settings: seed .* is not one of the job's"),
        ({"format": {"a": "b\n" * 99}}, "settings of format"),
        ({"job": {"prompt": "a\0b"}}, "prompt: character 2 is NUL"),
    ],
)
def test_settings_that_megaflux_never_wrote(tmp_path, changes, said):
    sound = outputs.settings_of(Job(), Runtime(checkpoint="/"), {}, {}, 0)
    info = PngInfo()
    info.add_text("megaflux", json.dumps(sound | changes))
    picture(8, 8).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match=said) as caught:
        infer.main(["--from-image", str(tmp_path / "x.png"), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


# The command line of training


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--train.global_batch_size", "7", "--train.micro_batch_size", "2"], "train.global_batch_size: .*set it to"),
        (["--run.dir", "{file}"], "run.dir: .*file is a file"),
        (["--run.dir", "{file}/below"], "run.dir: .*file is a file"),
        (["--run.dir", "a" * 300], "run.dir: .*File name too long"),
        (["--train.updates", "0"], "train.updates: must be at least 1"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr", "-1"], "optim.lr"),
        (["--optm.lr", "1"], "did you mean --optim.lr"),
        (["--stages.1.blocks", "[1,99]"], "stages.1.blocks: 99 is out of range"),
        (["--stages.1.blocks", "[1,1]"], "lists block 1 twice"),
        (
            ["--model.flux_config", "{num_layers: 6, num_single_layers: 6, attention_head_dim: 4, axes_dims_rope: 5}"],
            "axes_dims_rope: must be a list",
        ),
    ],
)
def test_training_is_refused_in_one_line(tmp_path, monkeypatch, argv, said):
    from launch.train import main

    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *(word.replace("{file}", f"{tmp_path}/file") for word in argv)])
    with pytest.raises(UserError, match=said) as caught:
        main()
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["file"]
