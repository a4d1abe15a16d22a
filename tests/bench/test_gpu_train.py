"""launch/gpu_train.py: published layouts, two processes, numbers; here at sizes of a test on whatever is at hand."""

import json
from pathlib import Path

import pytest
import torch

from launch import gpu_train
from megaflux.config import build_config
from megaflux.training.checks import find_problems
from tests.bench.runs import ROOT, metrics, read, start

SCRIPT = str(ROOT / "launch" / "gpu_train.py")


@pytest.mark.slow
def test_small_run_is_saved_resumed_and_measured(tmp_path):
    file = tmp_path / "r.json"
    done = start(SCRIPT, "--small", "--run", str(tmp_path / "run"), "--updates", "6", "--json", str(file), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = metrics(read(file), "train")
    assert list(found) == [("ours", "64 px micro 1 x 4")]
    assert {"images_per_s", "peak_bytes", "mfu", "data_wait_fraction", "loss_first", "loss_last"} <= set(
        found["ours", "64 px micro 1 x 4"]
    )
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "run" / "checkpoints").glob("update-*"))
    assert checkpoints == ["update-0000003", "update-0000006"]
    index = json.loads((tmp_path / "run" / "flux" / "transformer" / "config.json").read_text())
    assert index["_class_name"] == "FluxTransformer2DModel"
    assert list(Path(tmp_path / "run" / "qwen").glob("*.safetensors"))


def test_weights_have_all_that_a_run_asks_of_folders(tmp_path):
    values = gpu_train.small_values()
    gpu_train.make_weights(tmp_path, values, torch.device("cpu"))
    values["model"] |= {"flux": str(tmp_path / "flux"), "vlm": str(tmp_path / "qwen")}
    problems = find_problems(build_config(values), {}, 1)
    assert not [line for line in problems if line.startswith("model.")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = start(SCRIPT, "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: no NVIDIA GPU") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_one_line(tmp_path):
    done = start(SCRIPT, "--updates", "4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--updates 4: use at least 6" in done.stderr
