"""`~` at the beginning of a path, wherever one is read: every field and every option that exists, so that a new one which
forgets it fails here."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaflux.bench.__main__ import BENCHES
from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.common.paths import expanded, keyed_path_option, literal, path_option
from megaflux.common.ranks import World
from megaflux.config import plain_yaml
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.located import located
from megaflux.config.parse import build_config
from megaflux.config.presets import PRESETS
from megaflux.config.schema import PATHS, Config, field_paths
from megaflux.infer.interactive import line_options
from megaflux.infer.options import build_parser
from megaflux.training.checkpoint import saved
from megaflux.training.ds_config import load_ds_config
from megaflux_kernels.bench.report import path as kernels_path
from tests.conftest import picture, small_values, write_run

ROOT = Path(__file__).parents[1]
TAKES_PATHS = {path_option, keyed_path_option, kernels_path}
WORDS = {  # options and fields that hold words and no path
    "--image-column",
    "--caption-column",
    "--prompt",
    "--negative",
    "--mask-point",
    "--aspect",
    "--dot",
    "--control",
    "--device",
    "--aspect-ratios",
    "--sets",
    "--commit",
    "--preset",
    "--train",
    "--train-blocks",
    "config",
}
WORD_FIELDS = {"preset", "data.cache_limit", "data.aspect_ratios", "stages.name", "stages.blocks", "stages.components"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def parse(*argv: str, kept=lambda run_dir: None) -> Config:
    parser = Parser()
    add_config_arguments(parser)
    return parse_config(parser, list(argv), saved=kept)[1]


def commands() -> list[str]:
    """Every module that is a program with options, as `python -m` names it."""
    found = []
    for root, folder in ((ROOT, "megaflux"), (ROOT, "launch"), (ROOT / "kernels", "megaflux_kernels")):
        for file in sorted((root / folder).rglob("*.py")):
            text = file.read_text()
            if re.search(r"^def main\(", text, re.M) and ("Parser(" in text or "build_parser" in text):
                found.append(".".join(file.relative_to(root).with_suffix("").parts))
    return found


class Probed(Exception):
    pass


def parsers(module: str, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parsers that a program makes before it reads its command line."""
    seen: list[argparse.ArgumentParser] = []

    def probe(self, *args, **kwargs):
        seen.append(self)
        if self._subparsers is not None:
            for action in self._subparsers._group_actions:
                seen.extend(action.choices.values())
        if any(action.dest == "bench" for action in self._actions):
            return SimpleNamespace(bench=sys.argv[1])
        raise Probed

    program = importlib.import_module(module)
    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", probe)
        patched.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, *a, **k: probe(self))
        for bench in BENCHES if module == "megaflux.bench.__main__" else ("",):
            patched.setattr(sys, "argv", [module, *([bench] if bench else [])])
            with pytest.raises(Probed):
                program.main(*([sys.argv[1:]] if bench else []))
    return seen


@pytest.mark.parametrize("module", commands())
def test_every_option_that_holds_a_path_expands_it(module, monkeypatch):
    if module.startswith("launch."):
        monkeypatch.syspath_prepend(str(ROOT))
    found = parsers(module, monkeypatch)
    assert found
    for parser in found:
        for action in parser._actions:
            name = (action.option_strings or [action.dest])[0]
            takes_text = isinstance(action, argparse._StoreAction | argparse._AppendAction) and action.type is None
            field = name.lstrip("-") in field_paths() or name in ("--cache", "--kernels")
            if takes_text and action.choices is None and not field:
                assert name in WORDS, f"{module} {name}: type=path_option, or a word of this test"
            if re.search(r"DIR|FILE|PATH|IMG|PNG|RUN|OUT|SRC|DST|SOURCE", action.metavar or "") and not field:
                assert action.type in TAKES_PATHS or name in WORDS, f"{module} {name}"


def test_every_program_is_walked_over():
    assert {
        "megaflux.infer.__main__",
        "megaflux.panel.__main__",
        "megaflux.export",
        "megaflux.convert",
        "megaflux.data.prepare",
        "megaflux.data.verify",
        "megaflux.training.report",
        "megaflux.training.checkpoint.__main__",
        "megaflux.bench.__main__",
        "launch.train",
        "launch.demo",
        "launch.gpu_train",
    } <= set(commands())


def test_every_field_that_holds_a_path_expands_it(home):
    words = {
        path
        for path, info in (
            (p, _field(p)) for p in [*field_paths(), "stages.name", "stages.blocks", "stages.components"]
        )
        if "str" in str(info.annotation)
    }
    tables = {"model.flux_config", "model.vlm_config", "model.clip_config"}
    assert words - set(PATHS) - tables - WORD_FIELDS == set()
    for path in PATHS:
        config = parse(f"--{path}=~/a b/c")
        assert at(config, path) == f"{home}/a b/c"
        assert at(build_config(plain_yaml.load(config.to_yaml())), path) == f"{home}/a b/c"


def _field(path: str):
    if path.startswith("stages."):
        from megaflux.config.schema import Stage

        return Stage.model_fields[path.partition(".")[2]]
    if path == "stages" or "." not in path:
        return Config.model_fields[path]
    section, _, name = path.partition(".")
    section = Config.model_fields[section].annotation
    while "." in name:
        part, _, name = name.partition(".")
        section = section.model_fields[part].annotation
    return section.model_fields[name]


def at(config: Config, path: str):
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)


def test_yaml_and_the_config_option(home):
    (home / "run.yaml").write_text(
        "run: {dir: ~/run}\ndata: {path: ~/data, source: ~root/pictures, remote: s3://b/~x}\n"
    )
    config = parse("--config=~/run.yaml", "--model.vlm=Qwen/Qwen2-VL-7B-Instruct", "--model.flux=~")
    assert config.run.dir == f"{home}/run" and config.data.path == f"{home}/data"
    assert config.data.source == os.path.expanduser("~root") + "/pictures"
    assert config.data.remote == "s3://b/~x"
    assert config.model.vlm == "Qwen/Qwen2-VL-7B-Instruct" and config.model.flux is None


def test_paths_in_deepspeeds_file(home, tmp_path):
    offload = {"device": "nvme", "nvme_path": "~/nvme"}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}))
    assert load_ds_config(file)["zero_optimization"]["offload_optimizer"]["nvme_path"] == f"{home}/nvme"
    file.write_text(file.read_text().replace("~/", "~nobodyhere/"))
    with pytest.raises(UserError, match="ds.json: '~nobodyhere/nvme': there is no user"):
        load_ds_config(file)


def test_the_run_that_is_resumed_is_looked_for_where_it_is(home):
    asked = []
    parse("--run.dir=~/run", kept=asked.append)
    assert asked == [f"{home}/run"]


def test_what_cannot_be_expanded_is_one_line(monkeypatch):
    for text, words in (("~nobodyhere/x", "there is no user 'nobodyhere' here"), ("~/x", "HOME names no folder")):
        if text == "~/x":
            monkeypatch.setenv("HOME", "")
        for refused in (lambda text=text: parse(f"--run.dir={text}"), lambda text=text: parse(f"--config={text}")):
            with pytest.raises(UserError, match=words) as error:
                refused()
            assert "\n" not in str(error.value) and "./~" in str(error.value)
    assert expanded("a~/b") == "a~/b" and expanded("./~/b") == "./~/b" and expanded("~\0") == "~\0"


def test_a_folder_named_so_by_an_earlier_version_is_not_left_behind_in_silence(home):
    Path("~/run").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run.dir: '~/run': means .*home/run, which is not there.*write \./~/run"):
        parse("--run.dir=~/run")
    assert parse("--run.dir=./~/run").run.dir == "./~/run"
    (home / "run").mkdir()
    assert parse("--run.dir=~/run").run.dir == f"{home}/run"


def test_an_old_runs_own_paths_stay_what_they_were(tmp_path, monkeypatch):
    values = {
        "run": {"dir": "~/run"},
        "model": {"vlm": "tiny", "vae": "tiny"},
        "data": {"path": "~data", "source": None},
    }
    assert literal(values, PATHS) == {
        "run": {"dir": "./~/run"},
        "model": {"vlm": "tiny", "vae": "tiny"},
        "data": {"path": "./~data", "source": None},
    }
    run = write_run(tmp_path / "run", small_values(), updates=(4,))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("path: data/openmoji", "path: ~/openmoji"))
    assert saved.load(run).data.path == "./~/openmoji"
    assert saved.begun(str(run)).values["data"]["path"] == "./~/openmoji"
    started = {"config": (run / "config.yaml").read_text()}  # as manifests hold it from format 3 on
    monkeypatch.setattr(saved, "newest", lambda run_dir: {"format": 3, "data": {}, "started_with": started})
    assert saved.begun(str(run)).values["data"]["path"] == "./~/openmoji"


def test_an_old_run_on_weights_in_a_folder_named_so_still_finds_them(tmp_path):
    run = write_run(tmp_path / "run", small_values(), updates=(4,))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("vae: tiny", "vae: ~/vae"))
    assert saved.load(run).model.vae == "./~/vae"


def test_pictures_and_models_of_infer(home):
    picture(64, 64).save(home / "cat.png")
    (home / "net").mkdir()
    given = vars(
        build_parser().parse_args(
            [
                "--checkpoint=~/net",
                "--reference",
                "~/cat.png:0.5",
                "--control-image",
                "depth=~/cat.png:0.4",
                "--dots=~/d.json",
                "--controlnet",
                "depth=~/net",
                "--controlnet",
                "~/net",
                "--depth-model",
                "LiheYoung/depth",
                "--out=~/o",
            ]
        )
    )
    assert given["reference"] == [f"{home}/cat.png:0.5"] and given["control_image"] == [f"depth={home}/cat.png:0.4"]
    assert given["controlnet"] == [f"depth={home}/net", f"{home}/net"] and given["depth_model"] == "LiheYoung/depth"
    assert given["dots"] == f"{home}/d.json" and given["out"] == f"{home}/o" and given["checkpoint"] == f"{home}/net"
    assert line_options("~/cat.png:0.5 a red fox")["reference"] == [f"{home}/cat.png:0.5"]


def test_a_bad_home_on_any_command_line_is_one_line(capsys):
    from megaflux.data import prepare
    from megaflux.training.checkpoint import __main__ as checkpoint_command

    for main, argv, name in (
        (prepare.main, ["~nobodyhere/x", "out"], "SOURCE"),
        (checkpoint_command.main, ["ls", "~nobodyhere/x"], "RUN"),
    ):
        with pytest.raises(UserError, match=f"^{name}: '~nobodyhere/x': there is no user"):
            main(argv)


def test_presets_name_no_home():
    for preset in PRESETS.values():
        assert all(not str(at(build_config(preset()), path)).startswith("~") for path in PATHS)


# --- known by what they are ---


def test_what_a_run_saves_is_absolute_and_names_stay(home, tmp_path):
    (Path("weights") / "flux").mkdir(parents=True)
    Path("tiny").mkdir()
    Path("pictures").mkdir()
    here = Path.cwd()
    given = [
        "--run.dir=../run",
        "--data.path=data",
        "--model.flux=weights/flux",
        "--model.vlm=Qwen/Qwen2-VL-7B-Instruct",
    ]
    config = located(parse(*given, "--data.source=pictures", "--model.init=~"))
    assert (config.run.dir, config.data.path) == (f"{here}/../run", f"{here}/data")
    assert (config.model.flux, config.model.vlm) == (f"{here}/weights/flux", "Qwen/Qwen2-VL-7B-Instruct")
    assert (config.model.vae, config.data.source) == ("tiny", f"{here}/pictures") and config.model.init is None
    Path("hub:a").mkdir()
    (Path("hub:a") / "b").mkdir()
    config = located(
        parse("--model.flux=hub:a/b", "--model.vlm=nowhere", "--data.remote=s3://b/x", "--data.source=gone")
    )
    assert (config.model.flux, config.model.vlm, config.model.vae) == ("hub:a/b", "nowhere", "tiny")
    assert (config.data.remote, config.data.source) == ("s3://b/x", "gone")
    assert located(parse()).data.source == "openmoji" and located(config) == config
    Path("tiny-icons").mkdir()
    named = located(parse("--model.vae=tiny-icons", "--model.vlm=tiny-icons")).model
    assert (named.vae, named.vlm) == ("tiny-icons", f"{here}/tiny-icons")
    assert located(parse()).model.vlm == "tiny" and located(parse("--model.vlm=./tiny")).model.vlm == f"{here}/tiny"


def test_absolute_paths_of_a_run_are_no_values_that_it_keeps(tmp_path, monkeypatch):
    from megaflux.training.run_folder import write_configuration

    run = write_run(tmp_path / "run", small_values(), updates=(4,))
    write_configuration(saved.load(run), {}, World(0, 1))
    assert saved.load(run).data.path == f"{Path.cwd()}/{PRESETS['tiny']()['data']['path']}"
    parser = Parser()
    add_config_arguments(parser)

    def kept() -> set[str]:
        return set(
            parse_config(parser, [f"--run.dir={run}"], saved=lambda run_dir: saved.begun(run_dir).values)[0].kept
        )

    assert kept() & set(PATHS) == {"model.vlm"}  # null, where the preset has the shipped one
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert kept() & set(PATHS) == {"data.path", "model.vlm"}  # the preset's would be here
