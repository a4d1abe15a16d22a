"""The command line's modes: replay from the PNG alone, dots, control, dry run, interactive, bad input."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from megaflux.common.errors import UserError
from megaflux.generation import outputs
from megaflux.generation.job import Input, Job, JobControl, JobReference
from megaflux.generation.run import read_inputs
from megaflux.infer import __main__ as infer
from megaflux.infer.interactive import line_options, of_line
from tests.conftest import picture
from tests.generation.test_modes import controlnet_folder  # noqa: F401  (a fixture)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Pictures by what they are for."""
    mask = Image.new("L", (64, 48))
    ImageDraw.Draw(mask).rectangle([16, 16, 47, 31], fill=255)
    made = {
        "cat": picture(84, 56, 1),
        "dog": picture(56, 56, 2),
        "room": picture(64, 48, 3),
        "mask": mask,
        "depth": picture(64, 48, 4),
    }
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in made}


MODES = {
    "text": ["--prompt", "a red fox"],
    "variation": [
        "--reference",
        "{cat}:0.7",
        "{dog}",
        "--dot",
        "0.5,0.5,0.6,3",
        "--dot",
        "2:0.1,0.1,0.9,0.5",
        "--variety",
        "0.3",
        "--prompt",
        "a fox",
        "--cfg",
        "2.5",
        "--negative",
        "rain at night",
    ],
    "img2img": ["--image", "{room}", "--reference", "{cat}", "--strength", "0.6"],
    "inpaint": [
        "--image",
        "{room}",
        "--mask",
        "{mask}",
        "--reference",
        "{cat}",
        "--preserve-mass",
        "--background",
        "0.5",
        "--dot",
        "0.2,0.2,0.5,2",
    ],
    "controlnet": [
        "--image",
        "{room}",
        "--control",
        "canny:0.4",
        "--control-image",
        "depth={depth}:0.2",
        "--reference",
        "{cat}",
        "--controlnet",
        "{net}",
        "--control-end",
        "0.7",
        "--cfg",
        "3",
    ],
    "controlnet-inpaint": ["--image", "{room}", "--mask", "{mask}", "--control", "canny", "--controlnet", "{net}"],
}


def run(*arguments: str) -> None:
    assert infer.main([*arguments, "--steps", "3", "--device", "cpu"]) == 0


def pixels(file: Path) -> bytes:
    return Image.open(file).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_its_replay(run_folder, controlnet_folder, files, tmp_path, mode):  # noqa: F811
    arguments = [a.format(**files, net=controlnet_folder) for a in MODES[mode]]
    run(
        "--checkpoint",
        str(run_folder),
        *arguments,
        "--count",
        "3",
        "--seed",
        "5",
        "--batch-size",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--save-control",
    )
    made = sorted(tmp_path.glob("out/*-seed[567].png"))
    assert len(made) == 3 and len({pixels(file) for file in made}) == 3
    saved = json.loads(Image.open(made[1]).text["megaflux"])
    assert saved["job"]["mode"] == mode and saved["seed"] == 6
    assert saved["job"]["cfg"] == {"variation": 2.5, "controlnet": 3}.get(mode, 1)
    sheet = Image.open(next(tmp_path.glob("out/*-sheet.png")))
    assert sheet.width * sheet.height > 3 * Image.open(made[0]).width * Image.open(made[0]).height
    assert len(list(tmp_path.glob("out/*control*"))) == {"controlnet": 2, "controlnet-inpaint": 2, "inpaint": 1}.get(
        mode, 0
    )
    # from the PNG alone, one of a batch of two and one alone
    for file in made[1:]:
        assert infer.main(["--from-image", str(file), "--out", str(tmp_path / "again")]) == 0
        assert pixels(tmp_path / "again" / file.name) == pixels(file)
    assert len(list((tmp_path / "again").glob("*-seed*.png"))) == 2 + len(
        list((tmp_path / "again").glob("*-seed*-dots*"))
    )


def test_a_picture_with_its_inputs_inside_needs_no_files(run_folder, files, tmp_path):
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"],
        "--count",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--embed-inputs",
    )
    made = tmp_path / "out/cat-seed0.png"
    Path(files["cat"]).unlink()
    assert infer.main(["--from-image", str(made), "--out", str(tmp_path / "again")]) == 0
    assert pixels(tmp_path / "again/cat-seed0.png") == pixels(made)


def test_replay_says_what_is_gone_or_changed_and_takes_another(run_folder, files, tmp_path):
    run("--checkpoint", str(run_folder), "--reference", files["cat"], "--count", "1", "--out", str(tmp_path / "out"))
    made, cat = str(tmp_path / "out/cat-seed0.png"), Path(files["cat"])
    moved = cat.rename(tmp_path / "moved.png")
    with pytest.raises(UserError, match="--reference .*cat.png: No such file"):
        infer.main(["--from-image", made, "--out", str(tmp_path / "again")])
    picture(84, 56, 9).save(cat)
    with pytest.raises(UserError, match="cat.png: has changed since"):
        infer.main(["--from-image", made, "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()
    assert infer.main(["--from-image", made, "--reference", str(moved), "--out", str(tmp_path / "again")]) == 0
    assert pixels(tmp_path / "again/moved-seed0.png") == pixels(Path(made))
    # another seed, and another number of steps, of the same settings
    assert (
        infer.main(
            [
                "--from-image",
                made,
                "--reference",
                str(moved),
                "--seed",
                "4",
                "--count",
                "2",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "more"),
            ]
        )
        == 0
    )
    more = json.loads(Image.open(tmp_path / "more/moved-seed5.png").text["megaflux"])["job"]
    assert more["steps"] == 2 and more["seeds"] == [4, 5] and (tmp_path / "more/moved-sheet.png").is_file()


def test_embedded_inputs_serve_the_dry_run_and_lines_too(run_folder, files, tmp_path, capsys):
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"],
        "--count",
        "1",
        "--out",
        str(tmp_path / "out"),
        "--embed-inputs",
    )
    made = str(tmp_path / "out/cat-seed0.png")
    Path(files["cat"]).unlink()
    assert infer.main(["--from-image", made, "--dry-run"]) == 0 and "problem" not in capsys.readouterr().out
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "megaflux.infer",
            "--from-image",
            made,
            "--interactive",
            "--out",
            str(tmp_path / "lines"),
        ],
        input="--seed 3\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "error" not in done.stdout and (tmp_path / "lines/cat-seed3.png").is_file()


def test_options_beside_from_image_change_what_they_name(run_folder, controlnet_folder, files, tmp_path):  # noqa: F811
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"] + ":0.5",
        "--dot",
        "0.4,0.4,0.6,3",
        "--count",
        "1",
        "--image",
        files["room"],
        "--control",
        "canny",
        "--controlnet",
        str(controlnet_folder),
        "--mode",
        "controlnet",
        "--out",
        str(tmp_path / "out"),
    )
    made, moved = str(tmp_path / "out/cat-seed0.png"), str(Path(files["cat"]).rename(tmp_path / "moved.png"))
    again = ["--from-image", made, "--reference", moved, "--out", str(tmp_path / "again")]
    assert infer.main([*again, "--save-control"]) == 0
    assert pixels(tmp_path / "again/moved-seed0.png") == pixels(Path(made))  # the dot and the strength stayed
    assert (tmp_path / "again/moved-dots.png").is_file() and (tmp_path / "again/moved-control-canny.png").is_file()
    assert infer.main([*again[:-1], str(tmp_path / "wide"), "--aspect", "16:9"]) == 0
    assert Image.open(tmp_path / "wide/moved-seed0.png").size == (64, 32)
    assert infer.main(["--from-image", made, "--reference", moved + ":0.9", "--out", str(tmp_path / "own")]) == 0
    settings = json.loads(Image.open(tmp_path / "own/moved-seed0.png").text["megaflux"])
    assert settings["job"]["references"][0]["strength"] == 0.9


def test_true_guidance_is_stored_added_and_turned_off_again(run_folder, files, tmp_path, capsys):
    run("--checkpoint", str(run_folder), "--reference", files["cat"], "--count", "1", "--out", str(tmp_path / "out"))
    plain, info = Image.open(tmp_path / "out/cat-seed0.png"), PngInfo()
    settings = json.loads(plain.text["megaflux"])
    assert settings["job"].pop("cfg") == 1 and settings["job"].pop("negative") == ""
    info.add_text("megaflux", json.dumps(settings))
    plain.save(tmp_path / "old.png", pnginfo=info)  # as of a version without the two

    def again(name: str, file: Path, *options: str) -> Image.Image:
        assert infer.main(["--from-image", str(file), *options, "--out", str(tmp_path / name)]) == 0
        return Image.open(tmp_path / name / "cat-seed0.png")

    assert again("same", tmp_path / "old.png").tobytes() == plain.tobytes()
    capsys.readouterr()
    guided = again("guided", tmp_path / "old.png", "--cfg", "2.5", "--negative", "rain\n at night")
    assert guided.tobytes() != plain.tobytes()
    assert "negative prompt: these weights were trained without captions" in capsys.readouterr().out
    job = json.loads(guided.text["megaflux"])["job"]
    assert (job["cfg"], job["negative"]) == (2.5, "rain\n at night")
    assert "Negative prompt: rain\n at night\n" in guided.text["parameters"]
    assert "CFG scale: 2.5, Distilled CFG Scale: 3.5" in guided.text["parameters"]
    empty = again("empty", tmp_path / "guided/cat-seed0.png", "--negative", " ")
    said = capsys.readouterr().out
    assert "--negative is empty: with --cfg, the empty condition is used" in said
    assert "true CFG: these weights never saw an empty condition" in said
    assert empty.tobytes() not in (plain.tobytes(), guided.tobytes())
    off = again("off", tmp_path / "guided/cat-seed0.png", "--cfg", "1")
    assert off.tobytes() == plain.tobytes() and json.loads(off.text["megaflux"])["job"]["negative"] == ""
    assert "CFG scale: 1, Distilled" in off.text["parameters"] and "Negative" not in off.text["parameters"]


def test_replay_notices_other_nets_and_other_maps(run_folder, controlnet_folder, files, tmp_path, monkeypatch):  # noqa: F811
    net = tmp_path / "net"
    shutil.copytree(controlnet_folder, net)
    monkeypatch.chdir(tmp_path)
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"],
        "--image",
        files["room"],
        "--control",
        "canny",
        "--controlnet",
        "net",
        "--count",
        "1",
        "--out",
        "out",
    )
    made = tmp_path / "out/cat-seed0.png"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a relative net is found from any folder
    assert infer.main(["--from-image", str(made), "--out", "again"]) == 0
    assert pixels(Path("again/cat-seed0.png")) == pixels(made)
    settings = json.loads(Image.open(made).text["megaflux"])
    settings["maps"]["canny"] = "0" * 64
    Path("other.png").write_bytes(outputs.png_bytes(Image.open(made), settings))
    with pytest.raises(UserError, match="the canny map is not the picture"):
        infer.main(["--from-image", "other.png", "--out", "third"])
    weights = load_file(net / "diffusion_pytorch_model.safetensors")
    save_file({k: v * 1.1 for k, v in weights.items()}, net / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="ControlNet's folder now holds other weights"):
        infer.main(["--from-image", str(made), "--out", "third"])
    assert not Path("third").exists()


def test_masks_keep_their_alpha_and_maps_are_sharp(run_folder, files, tmp_path, controlnet_folder):  # noqa: F811
    mask = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    ImageDraw.Draw(mask).rectangle([16, 16, 47, 31], fill=(255, 255, 255, 255))
    mask.save(tmp_path / "alpha.png")
    picture(200, 150, 3).resize((400, 300)).save(tmp_path / "large.png")
    run(
        "--checkpoint",
        str(run_folder),
        "--image",
        files["room"],
        "--mask",
        str(tmp_path / "alpha.png"),
        "--count",
        "1",
        "--save-control",
        "--out",
        str(tmp_path / "out"),
    )
    kept = np.array(Image.open(tmp_path / "out/room-control-mask.png").convert("L"))
    assert np.array_equal(kept, np.array(Image.open(files["mask"])))
    run(
        "--checkpoint",
        str(run_folder),
        "--image",
        str(tmp_path / "large.png"),
        "--control",
        "canny",
        "--controlnet",
        str(controlnet_folder),
        "--count",
        "1",
        "--save-control",
        "--out",
        str(tmp_path / "net"),
    )
    edges = Image.open(tmp_path / "net/large-control-canny.png")
    assert edges.size == Image.open(tmp_path / "net/large-seed0.png").size
    assert set(np.unique(np.array(edges))) == {0, 255}


def test_out_of_memory_is_one_line(run_folder, files, tmp_path, monkeypatch):
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline

    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(Qwen2VLFluxPipeline, "__call__", fail)
        with pytest.raises(UserError, match="out of memory .*--offload model") as caught:
            run("--checkpoint", str(run_folder), "--reference", files["cat"], "--out", str(tmp_path / "out"))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_replay_refuses_other_weights(run_folder, files, tmp_path):
    run(
        "--checkpoint",
        str(run_folder),
        "--update",
        "4",
        "--reference",
        files["cat"],
        "--count",
        "1",
        "--out",
        str(tmp_path / "out"),
    )
    made = str(tmp_path / "out/cat-seed0.png")
    assert infer.main(["--from-image", made, "--out", str(tmp_path / "again")]) == 0  # update 4, not the newest
    assert pixels(tmp_path / "again/cat-seed0.png") == pixels(Path(made))
    settings = json.loads(Image.open(made).text["megaflux"])
    settings["source"]["weights_sha256"] = "0" * 64
    (tmp_path / "other.png").write_bytes(outputs.png_bytes(Image.open(made), settings))
    with pytest.raises(UserError, match="was made with update 4, weights 000000000000"):
        infer.main(["--from-image", str(tmp_path / "other.png"), "--out", str(tmp_path / "third")])


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (60_000, 60_000)).save(buffer, "PNG")
    return buffer.getvalue()


BOMB = _bomb()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"", "not a PNG picture"),
        (b"<html>", "not a PNG picture"),
        ({}, "holds no settings"),
        ({"megaflux": "nonsense"}, "cannot be read"),
        ({"megaflux": "[]"}, "cannot be read"),
        ({"megaflux": '{"format": 99}'}, "format 99"),
        ({"megaflux": '{"format": 1}'}, "cannot be read .*job"),
        ({"megaflux": '{"format": 1, "job": {"mode": "x"}, "runtime": {"checkpoint": "x"}}'}, "mode"),
        ({"megaflux": '{"format": 1, "job": {"batch_size": 0}, "runtime": {"checkpoint": "x"}}'}, "batch_size"),
        ({"megaflux": '{"format": 1, "job": {"seeds": []}, "runtime": {"checkpoint": "x"}}'}, "seeds"),
        ({"megaflux": '{"format": 1, "job": {}, "runtime": {"checkpoint": "x"}}'}, "source"),
        ({"megaflux": "[" * 200_000}, "cannot be read"),
        (BOMB, "too many pixels"),
    ],
)
def test_a_picture_of_another_program_is_refused(tmp_path, content, said):
    file = tmp_path / "x.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, value in content.items():
            info.add_text(key, value)
        buffer = io.BytesIO()
        picture(16, 16).save(buffer, "PNG", pnginfo=info)
        file.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=f"--from-image .*x.png: .*{said}") as caught:
        infer.main(["--from-image", str(file), "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_no_metadata_leaves_nothing(run_folder, files, tmp_path):
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"],
        "--count",
        "1",
        "--no-metadata",
        "--out",
        str(tmp_path / "out"),
    )
    for file in (tmp_path / "out").iterdir():
        assert Image.open(file).info == {} and files["cat"].encode() not in file.read_bytes()


def test_dots_and_attention_are_drawn(run_folder, files, tmp_path, capsys):
    run(
        "--checkpoint",
        str(run_folder),
        "--reference",
        files["cat"],
        files["dog"],
        "--dot",
        "1:0.5,0.5,0.5,2",
        "--dot",
        "2:0.3,0.3,0.5,4",
        "--count",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--attention-map",
    )
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [
        "cat-dots-1.png",
        "cat-dots-2.png",
        "cat-seed0-attention-1.png",
        "cat-seed0-attention-2.png",
        "cat-seed0.png",
        "cat-seed1-attention-1.png",
        "cat-seed1-attention-2.png",
        "cat-seed1.png",
        "cat-sheet.png",
    ]
    assert capsys.readouterr().out.count("of the picture's attention went to reference") == 4
    lit = np.array(Image.open(tmp_path / "out/cat-dots-2.png")).astype(int)
    assert lit.shape[0] == lit.shape[1] == 768  # the reference's shape, large enough to see


def test_sizes(run_folder, files, tmp_path):
    def size(*arguments):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run("--checkpoint", str(run_folder), *arguments, "--count", "1", "--out", str(out))
        return Image.open(next(out.glob("*-seed0.png"))).size

    assert size("--reference", files["cat"]) == (64, 64)
    assert size("--reference", files["cat"], "--match-input-size") == (64, 48)  # 84x56 scaled down to 64, in 16s
    assert size("--image", files["room"]) == (64, 48)
    assert size("--image", files["room"], "--aspect", "16:9") == (64, 32)
    assert size("--reference", files["cat"], "--width", "48", "--height", "80") == (48, 80)
    assert size("--reference", files["cat"], "--aspect", "9:16", "--sizes", "release") == (48, 80)


def test_dry_run_says_what_would_happen(run_folder, export_folder, files, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("megaflux.runs.load_models", refuse)
    monkeypatch.setattr("megaflux.generation.pipeline.pretrained.load_transformer", refuse)
    for checkpoint in (run_folder, export_folder):
        out = str(tmp_path / "out")
        assert (
            infer.main(
                [
                    "--checkpoint",
                    str(checkpoint),
                    "--reference",
                    files["cat"],
                    "--aspect",
                    "16:9",
                    "--dry-run",
                    "--out",
                    out,
                    "--offload",
                    "model",
                ]
            )
            == 0
        )
        said = capsys.readouterr().out
        assert "mode        variation" in said and "64x32 px, 8 tokens" in said and "cat.png: 2x2 = 4 tokens" in said
        assert "estimated peak on the device" in said and "FLUX" in said and not Path(out).exists()
        assert "steps       112 in all\n" in said and "negative" not in said
    guided = ["--checkpoint", str(run_folder), "--reference", files["cat"], "--cfg", "3", "--dry-run"]
    for negative, words in (((), "the empty condition"), (("--negative", "rain"), "4 characters")):
        assert infer.main([*guided, *negative]) == 0
        said = capsys.readouterr().out
        assert "steps       112 in all, FLUX twice in each (cfg 3)" in said and f"negative    {words}\n" in said
    assert infer.main([*guided, "--negative", "rain", "--text-encoder", "t5"]) == 2
    assert "problem: --text-encoder t5: these weights have none" in capsys.readouterr().out
    missing = [
        "--control",
        "depth",
        "--control",
        "line",
        "--controlnet",
        str(tmp_path / "nowhere"),
        "--image",
        str(tmp_path / "gone.png"),
        "--line-model",
        "some/hub-name",
    ]
    assert infer.main(["--checkpoint", str(run_folder), *missing, "--dry-run"]) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert "gone.png: No such file" in problems[0] and "--depth-model" in problems[1] and "nowhere" in problems[2]


CAT = {"reference": ["cat.png"]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cat.png a dog's hat --count 1", CAT | {"prompt": "a dog's hat", "count": 1}),
        ("the cat's and dog's house", {"prompt": "the cat's and dog's house"}),
        (r"a \ b C:\x 5\" #1 'tis  two", {"prompt": r"a \ b C:\x 5\" #1 'tis  two"}),
        ('a "red" fox and a "blue" one --count 2', {"prompt": 'a "red" fox and a "blue" one', "count": 2}),
        ('"red" fox and "blue" cat', {"prompt": '"red" fox and "blue" cat'}),
        ("'tis the season --count 1", {"prompt": "'tis the season", "count": 1}),
        ("rock--paper -- scissors --seed 3", {"prompt": "rock--paper -- scissors", "seed": 3}),
        ("-5 degrees", {"prompt": "-5 degrees"}),
        ('"a fox --count 2" --count 1', {"prompt": "a fox --count 2", "count": 1}),
        ("'the cat's house' --count 1", {"prompt": "the cat's house", "count": 1}),
        (r'cat.png "say \"hi\" "', CAT | {"prompt": 'say "hi" '}),
        ("'a fox'", {"prompt": "a fox"}),
        ('cat.png "" --count 1', CAT | {"count": 1}),
        ("a fox --out 'two words' --mask=m.png", {"prompt": "a fox", "out": "two words", "mask": "m.png"}),
        ("cat.png --prompt 'x y'", CAT | {"prompt": "x y"}),
        ('--prompt "it\'s" --count 1', {"prompt": "it's", "count": 1}),
        ("'my cat.png' a hat", {"reference": ["my cat.png"], "prompt": "a hat"}),
        ("'my cat.png':0.5 cat.png:2 a hat", {"reference": ["my cat.png:0.5", "cat.png:2"], "prompt": "a hat"}),
        (r"my\ cat.png dog's.png", {"reference": ["my cat.png", "dog's.png"]}),
        ("-cat.png", {"reference": ["-cat.png"]}),
        ("'' a", {"prompt": "'' a"}),
        ("a fox --prompt 'x", "close the quote"),
        ("a fox --prompt 'a dog'", "--prompt: the line has words before it"),
        ("'no cat.png' a fox", "no cat.png: no such picture"),
        ("cat.pgn:0.5 a fox", "cat.pgn:0.5: no such picture"),
        ("a --cuont 1", "unrecognized arguments: --cuont"),
    ],
)
def test_a_lines_words_are_kept_letter_by_letter(tmp_path, monkeypatch, line, said):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "my cat.png", "dog's.png", "-cat.png"):
        (tmp_path / name).touch()
    if isinstance(said, dict):
        assert line_options(line) == said
    else:
        with pytest.raises(UserError, match=said):
            line_options(line)


def test_a_line_turns_the_true_guidance_of_the_start_off():
    start = {"cfg": 3.0, "negative": "blurry", "count": 1}
    assert of_line(start, {"cfg": 1.0}) == {"cfg": 1.0, "count": 1}
    assert of_line(start, {"cfg": 2.0}) == start | {"cfg": 2.0}
    assert of_line(start, {"cfg": 1.0, "negative": "x"}) == {
        "cfg": 1.0,
        "negative": "x",
        "count": 1,
    }  # refused, as ever


def test_interactive_reads_lines_and_survives_bad_ones(run_folder, files, tmp_path):
    lines = [
        files["cat"],
        f"{files['cat']} {files['dog']}:0.5 a red fox --count 2 --seed 3",
        "nothing.pgn a fox",
        "a fox --steps x",
        "a blue fox --count 1",
        f"{files['cat']} --steps 0",
        "--device cuda",
        "a fox --prompt 'unclosed",
        "",
        "quit",
        "never",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "megaflux.infer",
            "--checkpoint",
            str(run_folder),
            "--interactive",
            "--steps",
            "2",
            "--count",
            "1",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "out"),
        ],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert [e.split(":")[1].split()[0] for e in errors] == ["nothing.pgn", "--steps", "--steps", "--device", "line"], (
        errors
    )
    names = {file.name for file in (tmp_path / "out").glob("*-seed*.png")}
    assert names == {"cat-seed0.png", "cat-seed3.png", "cat-seed4.png", "text-seed0.png"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--mode variation|mode variation needs a picture"),
        (["--mode", "text"], "mode text needs a prompt"),
        (["--mode", "text", "--reference", "{cat}"], "takes no reference"),
        (["--prompt", "x", "--variety", "0.5"], "mode text has none"),
        (["--mode", "img2img", "--prompt", "x"], "needs a picture to begin with"),
        (["--mode", "variation", "--image", "{room}", "--reference", "{cat}"], "begins at noise"),
        (["--mode", "inpaint", "--image", "{room}"], "needs a mask"),
        (["--mode", "img2img", "--image", "{room}", "--mask", "{mask}"], "paints everywhere"),
        (["--image", "{room}", "--mask", "{mask}", "--mask-point", "0.5,0.5"], "give one of them"),
        (["--mode", "controlnet", "--image", "{room}"], "needs a control"),
        (["--mode", "img2img", "--image", "{room}", "--control", "canny", "--controlnet", "x"], "takes no control"),
        (["--image", "{room}", "--control", "canny"], "no ControlNet; give --controlnet"),
        (["--image", "{room}", "--control", "canny", "--control", "canny", "--controlnet", "x"], "given twice"),
        (["--image", "{room}", "--control", "pose", "--controlnet", "x"], "no detector makes such a map"),
        (["--image", "{room}", "--control", "smell", "--controlnet", "x"], "no such kind; use"),
        (["--image", "{room}", "--control", "canny:x", "--controlnet", "x"], "'x' is not a number"),
        (["--image", "{room}", "--control", "canny:-1", "--controlnet", "x"], "scale: -1"),
        (["--control-image", "depth", "--controlnet", "x"], "use KIND=IMG"),
        (
            [
                "--image",
                "{room}",
                "--control",
                "canny",
                "--controlnet",
                "x",
                "--control-start",
                "0.6",
                "--control-end",
                "0.4",
            ],
            "is not before",
        ),
        (["--reference", "{cat}:0"], "cat.png:0: strength: 0"),
        (["--reference", "{cat}:-1"], "strength: -1"),
        (["--reference", "{cat}:nan"], "strength: nan"),
        (["--reference", "{cat}", "--dot", "0.5,0.5,0,1"], "radius: 0"),
        (["--reference", "{cat}", "--dot", "1.5,0.5,0.1,1"], "x: 1.5; must be inside"),
        (["--reference", "{cat}", "--dot", "2:0.5,0.5,0.1,1"], "dot on reference 2: there are 1"),
        (["--prompt", "x", "--dot", "0.5,0.5,0.1,1"], "there is none"),
        (["--reference", "{cat}", "--background", "-1"], "--background: -1"),
        (["--reference", "{cat}", "--variety", "1"], "variety"),
        (["--reference", "{cat}", "--downsample", "0"], "--downsample: 0; use at least 1"),
        (["--reference", "{cat}", "--background", "0.2"], "--background: 0.2 without a dot"),
        (["--prompt", "x", "--background", "0.2"], "without a dot"),
        (["--prompt", "x", "--preserve-mass"], "mode text has none"),
        (["--reference", "{cat}", "--count", "100000000000"], "--count: 100000000000; use 1 to 100000"),
        (["--reference", "{cat}", "--width", "16000", "--height", "16"], "--width: 16000; .*at most 8192"),
        (["--reference", "{cat}", "--dots", "{deep}"], "dots .*deep.json"),
        (["--reference", "{cat}", "--interactive", "--dry-run"], "--interactive with --dry-run"),
        (["--reference", "{cat}", "--dots", "{cat}"], "dots .*cat.png"),
        (["--reference", "{cat}", "--width", "64"], "give both"),
        (["--reference", "{cat}", "--width", "40", "--height", "64"], "--width: 40; use a positive multiple of 16"),
        (["--image", "{room}", "--strength", "0"], "--strength: 0"),
        (["--image", "{room}", "--strength", "nan"], "--strength: nan"),
        (["--reference", "{cat}", "--shift", "-1"], "--shift: -1"),
        (["--reference", "{cat}", "--cfg", "-1"], r"^--cfg: -1.0; use 0 to 100 \(1 is off\)$"),
        (["--reference", "{cat}", "--cfg", "nan"], "--cfg: nan"),
        (
            ["--reference", "{cat}", "--negative", "x"],
            "^--negative: without effect at --cfg 1; give --cfg another value",
        ),
        (["--reference", "{cat}", "--cfg", "1", "--negative", "x"], "--negative: without effect"),
        (
            ["--reference", "{cat}", "--cfg", "3", "--negative", "x\ud800"],
            "^--negative: character 2 is half a surrogate",
        ),
        (["--reference", "{cat}", "--text-encoder", "t5", "--cfg", "3", "--negative", "x"], "these weights have no T5"),
        (["--reference", "{cat}", "--batch-size", "0"], "--batch-size: 0"),
        (["--reference", "{cat}", "--offload", "model"], "no.* GPU|there is none here"),
        (["--reference", "{cat}", "--text-encoder", "t5", "--prompt", "x"], "have no T5|has none"),
        (["--reference", "{cat}", "--attention-map", "--kernels", "off"], "--attention-map"),
        (["--reference", "caf\udce9.png"], "not valid UTF-8; rename"),
        (["--reference", "{cat}", "--unknown"], "unrecognized arguments: --unknown"),
        (["--image", "{room}", "--mask", "{black}", "--reference", "{cat}"], "mask: .*nothing"),
        (["--image", "{room}", "--mask-point", "0.5,0.5", "--reference", "{cat}"], "--sam-model"),
        (["--image", "{room}", "--mask-point", "2,0.5"], "2"),
        (["--image", "{room}", "--mask-point", "x"], "mask-point|X,Y"),
        (["--image", "{room}", "--control", "depth", "--controlnet", "{net}"], "--depth-model"),
        (["--reference", "{cat}", "--controlnet", "/nowhere", "--control-image", "depth={depth}"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run_folder, files, tmp_path, arguments, said, controlnet_folder):  # noqa: F811
    Image.new("L", (64, 48)).save(tmp_path / "black.png")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    extra = {"deep": str(tmp_path / "deep.json"), "black": str(tmp_path / "black.png"), "net": str(controlnet_folder)}
    given = [a.format(**files, **extra) if "{" in a else a for a in arguments]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said) as caught:
        infer.main(["--checkpoint", str(run_folder), "--out", str(tmp_path / "out"), "--device", "cpu", *given])
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_a_maps_values_are_kept_whatever_its_colour_profile(tmp_path, monkeypatch):
    """Photoshop writes "Dot Gain 20%" into every grey picture; depth and edges are no colours."""
    seen = []
    monkeypatch.setattr("megaflux.data.icc._transform", lambda profile, base: seen.append(base) or "invalid")
    file = str(tmp_path / "grey.png")
    grey = picture(64, 48, 3).convert("L")
    grey.save(file, icc_profile=b"a profile")
    controls = (JobControl(kind="depth", image=Input(file=file)),)
    job, opened = read_inputs(Job(references=(JobReference(file=file),), controls=controls))
    assert seen == ["L"] and opened.notes == ["reference: its colour profile cannot be used and is ignored"]
    assert job.controls[0].image.sha256 == job.references[0].sha256
    assert opened.maps[job.controls[0].image.sha256].tobytes() == grey.convert("RGB").tobytes()
