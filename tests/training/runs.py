"""Small real runs for tests: a dataset of a few pictures, a configuration, and processes launched as a user would."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests import forked

ROOT = Path(__file__).parents[2]
LAUNCH = str(ROOT / "launch" / "train.py")
FAULTY = str(ROOT / "tests" / "training" / "faulty_train.py")


def make_dataset(
    folder: Path,
    images: int = 40,
    square: bool = False,
    side: int = 64,
    chunk: int = 1000,
    captions: int = 1,
    references: int = 0,
) -> Path:
    """A prepared dataset of two buckets (64x64, 64x32; square: one), every fourth picture held out or so. side: px, in the
    place of 64. chunk: pictures that shards are made of. captions: of every other picture. references: the most of a picture;
    the first has none, the next one, and so on."""
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    source, rng = folder / "pictures", np.random.default_rng(0)
    source.mkdir(parents=True)
    for i in range(images):
        height = side if i % 2 or square else side // 2
        picture = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(picture).resize((side, height), Image.Resampling.BICUBIC).save(source / f"{i:03d}.png")
        texts = [f"picture number {i}", *(f"{n} times picture number {i}" for n in range(1, captions))]
        for r in range(i % (references + 1)):
            other = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            size = side, side // (1 + (i + r) % 2)
            Image.fromarray(other).resize(size, Image.Resampling.BICUBIC).save(source / f"{i:03d}.ref{r}.png")
        (source / f"{i:03d}.txt").write_text("\n".join(texts[: None if i % 2 else 1]))
    options = Options(longest_side=side, aspect_ratios=("1:1", "2:1"), held_out=0.25, encoding="png", chunk=chunk)
    options = replace(options, captions="lines" if captions > 1 else options.captions)
    prepare(str(source), folder / "data", options, workers=1, progress=False)
    return folder / "data"


def small_config(data: Path, run: Path, **changes) -> dict:
    """Plain values of a run of seconds: 1 + 2 blocks of width 32, two stages of 3 updates, batch 4."""
    values = {
        "run": {"dir": str(run)},
        "model": {
            "vlm": None,
            "flux_config": {
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "axes_dims_rope": [4, 6, 6],
                "joint_attention_dim": 48,
            },
        },
        "data": {"path": str(data), "source": None, "longest_side": 64, "aspect_ratios": ["1:1", "2:1"], "cache": []},
        "stages": [
            {"name": "base", "share": 1.0, "blocks": "all", "components": "model"},
            {"name": "one", "share": 1.0, "blocks": [0, 2]},
        ],
        "train": {
            "updates": 6,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
        },
        "validation": {"every": 0, "panel_every": 0, "samples": 3, "panel_samples": 2, "steps": 2},
        "monitor": {"every": 1, "grad_norms_every": 2, "peak_tflops": 0.1},
    }
    for path, value in changes.items():
        at = values
        *parents, last = path.split("__")
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return values


def write_config(values: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def ds_config(folder: Path, precision: str = "bf16", base: str = "zero2.json") -> Path:
    """One of the shipped DeepSpeed configurations, in the precision asked for."""
    values = json.loads((ROOT / "ds_configs" / base).read_text())
    if precision == "fp32":
        values["bf16"] = {"enabled": False}
    path = folder / f"{precision}-{base}"
    path.write_text(json.dumps(values))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """One thread per process: workers and ranks share two cores."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TRITON_INTERPRET")
    }
    bin_dir = str(Path(sys.executable).parent)
    return env | {"OMP_NUM_THREADS": "1", "PATH": bin_dir + os.pathsep + env["PATH"], "PYTHONWARNINGS": "ignore"}


def launch(*arguments: object, ranks: int = 1, with_: str = "deepspeed", timeout: float = 300):
    """Run launch/train.py; returns the finished process with its output as text.

    with_: deepspeed, torchrun or python, as a user starts it; or "forked": the same processes without a launcher, which
    need not import anything first (tests/forked.py), for tests of what a run computes."""
    if with_ == "forked":
        return forked.run_ranks([LAUNCH, *map(str, arguments)], rank_environments(ranks), timeout)
    starters = {
        "deepspeed": ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())],
        "python": [sys.executable],
    }
    command = [*starters[with_], LAUNCH, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def launch_faulty(*arguments: object, fault: str, ranks: int = 2, timeout: float = 300, **env: object):
    """The same forked, with a fault put in (faulty_train.py); env: more environment variables."""
    more = {"FAULT": fault} | {name: str(value) for name, value in env.items()}
    envs = [rank | more for rank in rank_environments(ranks)]
    return forked.run_ranks([FAULTY, *map(str, arguments)], envs, timeout)


def rank_environments(ranks: int, nodes: int = 1) -> list[dict[str, str]]:
    """The environment that a launcher gives each rank, of as many on each node."""
    local = ranks // nodes
    shared = environment() | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(ranks)]


def copy_until(run: Path, to: Path, update: int) -> Path:
    """A run folder as it stood after `update`: later checkpoints are left out."""
    shutil.copytree(run, to)
    for path in (to / "checkpoints").glob("update-*"):
        if int(path.name.removeprefix("update-")) > update:
            shutil.rmtree(path)
    return to
