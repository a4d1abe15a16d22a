"""The command line: files that never overwrite, settings in the PNG, one line for each bad input."""

import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.generation import outputs
from megaflux.infer import __main__ as infer
from tests.conftest import picture, write_run


@pytest.fixture
def cat(tmp_path) -> Path:
    picture(100, 60).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def run(checkpoint, reference, out, *more: str) -> None:
    assert (
        infer.main(
            [
                "--checkpoint",
                str(checkpoint),
                "--reference",
                str(reference),
                "--out",
                str(out),
                "--steps",
                "2",
                "--device",
                "cpu",
                *more,
            ]
        )
        == 0
    )


def pixels(file: Path) -> bytes:
    return Image.open(file).tobytes()


def test_variations_sheet_and_settings(run_folder, cat, tmp_path, capsys):
    out = tmp_path / "deep/out"
    run(run_folder, cat, out, "--count", "3", "--seed", "7", "--aspect", "16:9", "--prompt", "ein Füchslein 🦊")
    names = ["cat-seed7.png", "cat-seed8.png", "cat-seed9.png", "cat-sheet.png"]
    assert sorted(file.name for file in out.iterdir()) == names
    said = capsys.readouterr().out.splitlines()
    assert said[-4:] == [str(out / name) for name in names] and "scaled down to 64x38" in said[0]

    image = Image.open(out / names[1])
    assert image.size == (64, 32)
    settings = json.loads(image.text["megaflux"])
    job = settings["job"]
    assert settings["seed"] == 8 and job["prompt"] == "ein Füchslein 🦊" and job["steps"] == 2
    assert job["guidance"] == 3.5 and (job["width"], job["height"]) == (64, 32) and job["seeds"] == [7, 8, 9]
    (reference,) = job["references"]
    assert reference["file"] == str(cat) and reference["sha256"] == hashlib.sha256(cat.read_bytes()).hexdigest()
    assert settings["runtime"]["checkpoint"] == str(run_folder) and settings["runtime"]["update"] == 8
    weights = run_folder / "checkpoints/update-0000008/weights.safetensors"
    assert settings["source"]["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"megaflux", "torch", "diffusers"} <= set(settings["versions"])
    prompt, line = image.text["parameters"].split("\n")
    assert prompt == "ein Füchslein 🦊" and "Steps: 2, Sampler: Euler" in line and "Seed: 8, Size: 64x32" in line

    sheet = np.array(Image.open(out / "cat-sheet.png"))
    cells = [sheet[row : row + 32, column : column + 64] for row in (8, 48) for column in (8, 80)]
    for cell, name in zip(cells[1:], names[:3], strict=True):
        assert np.array_equal(cell, np.array(Image.open(out / name)))
    middle = np.array(Image.open(cat).resize((53, 32)))[4:-4, 8:-8].astype(int)  # the reference, first, on white
    assert np.abs(cells[0][4:-4, 5 + 8 : 5 + 45].astype(int) - middle).mean() < 12
    assert (cells[0][:, :5] == 255).all()


def test_a_seed_gives_its_picture_whatever_the_count_and_nothing_is_overwritten(run_folder, cat, tmp_path):
    run(run_folder, cat, tmp_path / "out", "--count", "3", "--seed", "7")
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    run(run_folder, cat, tmp_path / "out", "--count", "1", "--seed", "8")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in first.items())
    assert pixels(tmp_path / "out/cat-seed8-2.png") == pixels(tmp_path / "out/cat-seed8.png")
    assert (tmp_path / "out/cat-sheet-2.png").is_file() and len(list((tmp_path / "out").iterdir())) == 6


def test_an_export_and_an_older_update(run_folder, export_folder, cat, tmp_path):
    run(run_folder, cat, tmp_path / "run", "--count", "1")
    run(export_folder, cat, tmp_path / "export", "--count", "1")
    run(run_folder, cat, tmp_path / "older", "--count", "1", "--update", "4")
    new, exported, old = (pixels(tmp_path / name / "cat-seed0.png") for name in ("run", "export", "older"))
    assert new == exported and new != old
    with pytest.raises(UserError, match="holds one set of weights"):
        run(export_folder, cat, tmp_path / "export", "--update", "8")


def test_names_are_claimed_once_in_a_race(tmp_path):
    image = Image.new("RGB", (8, 8))
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: outputs.save(image, tmp_path / "out", "a"), range(32)))
    assert len(set(files)) == 32 and {f.name for f in files} == {"a.png"} | {f"a-{n}.png" for n in range(2, 33)}
    assert all(Image.open(file).size == (8, 8) for file in files)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("cat.png", "cat"),
        ("my cat (1).jpg", "my_cat_1_"),
        (".png", "_png"),
        ("../../x/..hidden.png", "_hidden"),
        ("猫.png", "猫"),
        ("a" * 300 + ".png", "a" * 60),
        ("\udce9t\udce9.png", "_t_"),
    ],
)
def test_file_names_are_safe(name, stem):
    assert outputs.safe_stem(name) == stem


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 65500, 65500, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def no_models(monkeypatch):
    """Fails the test where a model would be loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the bad input was refused")

    monkeypatch.setattr("megaflux.runs.load_models", refuse)
    monkeypatch.setattr("megaflux.generation.pipeline.pretrained.load_transformer", refuse)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", "0"], "--count: 0; use 1 to 100000"),
        (["--steps", "0"], "--steps: 0; use 1 to 100000"),
        (["--seed", "-1"], "--seed: -1; use 0 to"),
        (["--seed", str(2**64)], "--seed: .*; use 0 to"),
        (["--aspect", "square"], "--aspect: .*WIDTH:HEIGHT"),
        (["--aspect", "0:1"], "--aspect: .*WIDTH:HEIGHT"),
        (["--guidance", "nan"], "--guidance: nan"),
        (["--guidance", "-1"], "--guidance: -1"),
        (["--prompt", "a\0b"], "prompt: character 2 is NUL"),
        (["--prompt", "caf\udce9"], "prompt: character 4 is .*not valid UTF-8"),
        (["--checkpoint", "{tmp}/nowhere"], "--checkpoint .*nowhere: no such folder"),
        (["--checkpoint", "{tmp}/cat.png"], "--checkpoint .*cat.png: not a folder"),
        (["--checkpoint", "{tmp}"], "neither a run .* nor an export"),
        (["--update", "5"], "update-0000005: no such checkpoint; the run has 4, 8"),
        (["--checkpoint", "{run}/checkpoints/update-0000004"], "give the run's folder and --update 4"),
        (["--out", "{tmp}/cat.png"], "--out .*cat.png is a file"),
        (["--out", "{tmp}/cat.png/below"], "--out .*cat.png is a file"),
        (["--reference", "{tmp}/nothing.png"], "nothing.png: No such file"),
        (["--reference", "{tmp}"], "--reference .*Is a directory"),
        (["--device", "cuda:77"], "device: cuda:77"),
    ],
)
def test_bad_input_is_one_line_before_any_model(run_folder, cat, tmp_path, no_models, arguments, said):
    arguments = [a.format(tmp=tmp_path, run=run_folder) if a.startswith("{") else a for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said) as caught:
        run(run_folder, cat, tmp_path / "out", *arguments)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.png", b"", "no bytes"),
        ("page.jpg", b"<!doctype html><html></html>", "not an image"),
        ("bomb.png", bomb(), "pixels"),
        ("thin.png", None, "too long and narrow"),
        ("cut.png", ..., "cut short"),
    ],
)
def test_bad_references_are_one_line_before_any_model(run_folder, tmp_path, no_models, name, content, said):
    file = tmp_path / name
    if content is None:
        picture(1, 4000).save(file)
    elif content is ...:
        picture(200, 200).save(file)
        file.write_bytes(file.read_bytes()[:2000])
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"--reference .*{name}: .*{said}") as caught:
        run(run_folder, file, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def break_run(root: Path, how: str) -> str:
    """Damage a copied run; returns what the error must say."""
    newest = root / "checkpoints/update-0000008"
    if how == "no checkpoints":
        shutil.rmtree(root / "checkpoints")
        return "checkpoints: holds no complete checkpoint"
    if how == "unfinished only":
        (root / "checkpoints/update-0000004").rename(root / "checkpoints/.update-0000004.partial")
        shutil.rmtree(newest)
        return "checkpoints: holds no complete checkpoint"
    if how == "no manifest":
        (newest / "manifest.json").unlink()
        return "update-0000008/manifest.json"
    if how == "no weights":
        (newest / "weights.safetensors").unlink()
        return "update-0000008/weights.safetensors: missing"
    if how == "flipped byte":
        content = bytearray((newest / "weights.safetensors").read_bytes())
        content[-5] ^= 1
        (newest / "weights.safetensors").write_bytes(content)
        return "update-0000008/weights.safetensors: damaged"
    if how == "weights not in the manifest":
        from megaflux.training.checkpoint import manifest

        content = json.loads((newest / "manifest.json").read_text()) | {"files": {}}
        (newest / "manifest.json").write_text(json.dumps(manifest.sealed(content)))
        return "update-0000008/manifest.json: names no weights; it is not complete"
    if how == "another configuration":
        text = (root / "config.yaml").read_text()
        (root / "config.yaml").write_text(re.sub(r"seed: \d+", "seed: 99", text))
        return "config.yaml: run.seed is not what"
    if how == "bad configuration":
        (root / "config.yaml").write_text("preset: tiny\nmodel: 3\n")
        return "config.yaml: .*model"
    (root / "config.yaml").unlink()
    return "no config.yaml"


@pytest.mark.parametrize(
    "how",
    [
        "no checkpoints",
        "unfinished only",
        "no manifest",
        "no weights",
        "flipped byte",
        "weights not in the manifest",
        "another configuration",
        "bad configuration",
        "no config",
    ],
)
def test_a_broken_run_is_refused_never_random(run_folder, cat, tmp_path, no_models, how):
    shutil.copytree(run_folder, tmp_path / "run")
    with pytest.raises(UserError, match=break_run(tmp_path / "run", how)):
        run(tmp_path / "run", cat, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_put_aside_is_not_the_newest(run_folder, cat, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "update-0000008").rename(checkpoints / "update-0000008.bad")
    run(tmp_path / "run", cat, tmp_path / "out", "--count", "1")
    source = json.loads(Image.open(tmp_path / "out/cat-seed0.png").text["megaflux"])["source"]
    assert source["update"] == 4 and source["stage"] == "base"


def test_a_checkpoint_without_one_trained_weight_is_refused(small_config, cat, tmp_path):
    from safetensors.torch import load_file, save_file

    from megaflux.training.checkpoint import manifest

    root = write_run(tmp_path / "run", small_config.model_dump(), updates=(8,))
    folder = root / "checkpoints/update-0000008"
    weights = load_file(folder / "weights.safetensors")
    del weights["connector.bias"]
    save_file(weights, folder / "weights.safetensors")
    content = json.loads((folder / "manifest.json").read_text()) | {"files": manifest.inventory(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest.sealed(content)))
    with pytest.raises(UserError, match="weights.safetensors: missing key connector.bias"):
        run(root, cat, tmp_path / "out")


def test_an_empty_prompt_is_none_and_a_long_one_is_cut(run_folder, cat, tmp_path, capsys):
    run(run_folder, cat, tmp_path / "none", "--count", "1")
    run(run_folder, cat, tmp_path / "empty", "--count", "1", "--prompt", "  ")
    assert "--prompt is empty" in capsys.readouterr().out
    assert pixels(tmp_path / "none/cat-seed0.png") == pixels(tmp_path / "empty/cat-seed0.png")
    run(run_folder, cat, tmp_path / "long", "--count", "1", "--prompt", "x" * 100_000)
    assert "cut to the first 256" in capsys.readouterr().out
    assert len(json.loads(Image.open(tmp_path / "long/cat-seed0.png").text["megaflux"])["job"]["prompt"]) == 100_000


def test_the_command_leaves_with_2_and_one_line(run_folder, tmp_path):
    command = [sys.executable, "-m", "megaflux.infer", "--checkpoint", str(run_folder), "--reference"]
    done = subprocess.run([*command, str(tmp_path / "no.png")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: --reference .*no\.png: No such file or directory\n", done.stderr)


def test_help_imports_nothing_heavy():
    heavy = "[m for m in ('torch', 'PIL', 'numpy') if m in sys.modules]"
    code = f"import sys, megaflux.infer.__main__, megaflux.export; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"
