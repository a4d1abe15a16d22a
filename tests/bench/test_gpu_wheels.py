"""launch/gpu_wheels.py: the list is enough, for benches and for a run; versions, limit, what is there already."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import gpu_wheels
from megaflux.bench.loader import make_pictures
from megaflux.common.errors import UserError
from megaflux.data.writing.build import prepare
from megaflux.data.writing.options import Options
from tests.bench.runs import ROOT, start
from tests.conftest import small_values

SCRIPT = str(ROOT / "launch" / "gpu_wheels.py")
# A process in which, of all that is installed, only the distributions named in sys.argv[1] can be imported.
ONLY = """
import importlib.metadata, json, re, sys
allowed = set(json.loads(sys.argv.pop(1)))
name = lambda d: re.sub("[-_.]+", "-", d).lower()
absent = {top for top, dists in importlib.metadata.packages_distributions().items() if not allowed & set(map(name, dists))}
absent -= set(sys.stdlib_module_names) | {"megaflux", "megaflux_kernels"}
class Finder:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
for gone in json.loads(sys.argv.pop(1)):
    assert gone in absent, gone
"""


def only(roots, gone: list[str], code: str, *argv: str) -> subprocess.CompletedProcess:
    """Run code where what the other machine has, and what is carried for `roots`, is all there is; `gone` must be absent."""
    there = gpu_wheels.required(gpu_wheels.THERE, "3.12", strict=False)
    allowed = sorted(there | set(gpu_wheels.chosen(roots, "3.12")))
    return start("-c", ONLY + code, json.dumps(allowed), json.dumps(gone), *argv)


def test_the_first_part_is_enough_for_benches_of_flux_and_random_models():
    code = """
import torch, megaflux.bench.step, megaflux.bench.activations, megaflux_kernels.bench.__main__
from megaflux.bench.random_models import random_vae, random_vlm
from megaflux.config.presets import tiny
random_vlm(tiny()["model"]["vlm_config"], torch.bfloat16, "cpu")
print("fine")
"""
    done = only(gpu_wheels.FIRST, ["pydantic", "deepspeed", "streaming", "einops", "accelerate"], code)
    assert done.stdout.endswith("fine\n"), done.stderr[-2000:]


def test_all_of_it_is_enough_for_a_training_run(tmp_path):
    make_pictures(tmp_path / "pictures", 60, 64, ("16:9", "1:1", "1:2"))
    options = Options(longest_side=64, aspect_ratios=("16:9", "1:1", "1:2"), held_out=0.2)
    prepare(str(tmp_path / "pictures"), tmp_path / "data", options, progress=False)
    values = small_values()
    values["data"] |= {"path": str(tmp_path / "data"), "num_workers": 0}
    values["train"] |= {"updates": 2}
    values["stages"] = values["stages"][:1]
    values["run"] = {"dir": str(tmp_path / "run")}
    values["validation"] |= {"every": 0, "panel_every": 0, "samples": 1, "panel_samples": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "preset"}))
    script = str(ROOT / "launch" / "train_random.py")
    code = "import runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    done = only(gpu_wheels.ALL, ["boto3", "paramiko", "oci", "gradio", "scipy"], code, script, "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "run" / "checkpoints").glob("update-*2"))


def test_names_and_versions_are_those_that_are_installed_here():
    first, every = gpu_wheels.chosen(gpu_wheels.FIRST, "3.12"), gpu_wheels.chosen(gpu_wheels.ALL, "3.12")
    assert "diffusers" in first and "deepspeed" not in first and first.items() <= every.items()
    assert {"deepspeed", "mosaicml-streaming", "pydantic", "einops", "hjson", "zstd", "brotli"} <= set(every)
    assert not {"torch", "numpy", "transformers", "boto3", "oci", "cryptography"} & set(every)
    assert all(importlib.metadata.version(name) == version for name, version in every.items())
    exact = next(line for line in importlib.metadata.requires("pydantic") if line.startswith("pydantic-core"))
    assert exact == f"pydantic-core=={every['pydantic-core']}"


def test_a_package_that_is_not_installed_here_is_named():
    with pytest.raises(UserError, match="^no-such-package is not installed here"):
        gpu_wheels.chosen(["no-such-package"], "3.12")


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("a_b-1.0-py3-none-any.whl", True),
        ("a_b-1.0-cp312-cp312-manylinux_2_14_x86_64.whl", True),
        ("a_b-1.0-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a_b-1.0+local-py3-none-any.whl", True),
        ("a_b-1.0-cp311-cp311-manylinux_2_14_x86_64.whl", False),
        ("a_b-1.0-cp312-cp312-win_amd64.whl", False),
        ("a_b-1.0-cp312-cp312-manylinux_2_28_aarch64.whl", False),
        ("a_b-1.1-py3-none-any.whl", False),
        ("a_c-1.0-py3-none-any.whl", False),
        ("a_b-1.0-cp313-abi3-manylinux_2_28_x86_64.whl", False),
    ],
)
def test_which_wheel_is_there_already(tmp_path, file, fits):
    (tmp_path / file).touch()
    assert (gpu_wheels.found(tmp_path, "a-b", "1.0", "3.12") is not None) == fits


@pytest.fixture
def pip(monkeypatch):
    """A stand-in for pip: writes a wheel of 10 MB for each package but those in `refused`; records what it was asked for."""
    asked, refused = [], set()

    def stand_in(*arguments):
        asked.append(arguments)
        out, (name, version) = Path(arguments[-2]), arguments[-1].split("==")
        if name in refused:
            return subprocess.CompletedProcess(arguments, 1, "", "WARNING: x\nERROR: none of that\n")
        with (out / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").open("wb") as file:
            file.truncate(10**7)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(gpu_wheels, "pip", stand_in)
    return asked, refused


def run(monkeypatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", *argv])
    return gpu_wheels.main()


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch, capsys, pip):
    asked, _ = pip
    options = ["--out", str(tmp_path / "w"), "--limit", "1000"]
    assert run(monkeypatch, *options) == 0
    every = gpu_wheels.chosen(gpu_wheels.ALL, "3.12")
    assert [arguments[-1] for arguments in asked] == [f"{n}=={v}" for n, v in every.items()]
    assert {a[0] for a in asked if a[-1].startswith("deepspeed")} == {"wheel"}
    assert {a[0] for a in asked if not a[-1].startswith("deepspeed")} == {"download"}
    assert f"--no-deps --target DIR {tmp_path / 'w'}/*.whl" in capsys.readouterr().out
    gone = next((tmp_path / "w").glob("pydantic_core*"))
    gone.unlink()
    asked.clear()
    assert run(monkeypatch, *options) == 0
    assert [arguments[-1].split("==")[0] for arguments in asked] == ["pydantic-core"]


def test_more_than_the_limit_is_said(tmp_path, monkeypatch, pip):
    with pytest.raises(UserError, match=r"^--limit 50: the wheels in .* come to \d0\.0 MB; raise it$"):
        run(monkeypatch, "--out", str(tmp_path), "--first")


def test_a_wheel_that_cannot_be_had_is_named_and_the_others_stay(tmp_path, monkeypatch, capsys, pip):
    pip[1].add("diffusers")
    with pytest.raises(UserError, match=r"of diffusers==\S+ \(ERROR: none of that\); the others are in"):
        run(monkeypatch, "--out", str(tmp_path), "--first", "--limit", "1000")
    assert list(tmp_path.glob("httpx-*.whl")) and "httpx" in capsys.readouterr().out


def test_two_versions_of_one_package_are_refused(tmp_path, monkeypatch, pip):
    (tmp_path / "diffusers-0.1-py3-none-any.whl").touch()
    with pytest.raises(
        UserError, match="diffusers is there in two versions; delete one: diffusers-0.1-py3-none-any.whl"
    ):
        run(monkeypatch, "--out", str(tmp_path), "--first", "--limit", "1000")


@pytest.mark.parametrize("python", ["3", "3.10", "2.7", "3.x"])
def test_a_python_that_cannot_be_is_refused(python):
    done = start(SCRIPT, "--python", python)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--python: want a Python from 3.11" in done.stderr


@pytest.mark.slow
def test_real_wheels(tmp_path):
    done = start(SCRIPT, "--out", str(tmp_path / "w"), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    tagged = [path.name for path in (tmp_path / "w").glob("*.whl") if "cp312" in path.name]
    assert any(name.startswith("pydantic_core") for name in tagged)
    assert next((tmp_path / "w").glob("deepspeed-*")).name.endswith("py3-none-any.whl")
