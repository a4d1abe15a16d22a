"""launch/train.py as people start it: real processes, exit codes, one line on stderr."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def run(*argv: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", **environment}
    return subprocess.run([*argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optm.lr", "1"], "did you mean --optim.lr?"),
        (["--deepspeed", "none.json"], "--deepspeed none.json: No such file"),
        (["--world-size", "0", "--dry-run"], "--world-size: must be a whole number above 0, got '0'"),
        (["--mfu", "35", "--dry-run"], "--mfu: must be above 0 and at most 1"),
        (["--gpu", "l40s"], "--gpu: 'l40s' is not known; known: a100, h100, h200 (for another one"),
        (["--gpu-memory", "0"], "--gpu-memory: must be a number above 0"),
        (["--json", "x.json"], "only with --dry-run"),
        (["--local_rank=x"], "invalid int value"),
    ],
)
def test_bad_input_is_one_line_and_code_2_at_once(argv, words, tmp_path):
    started = time.monotonic()
    done = run(sys.executable, TRAIN, *argv, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr
    assert time.monotonic() - started < 5  # torch alone would take seconds
    assert list(tmp_path.iterdir()) == []


def test_only_rank_0_speaks():
    done = run(sys.executable, TRAIN, "--optim.lr", "nan", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr) == (2, "")


def test_help_shows_every_field():
    done = run(sys.executable, TRAIN, "--help")
    assert done.returncode == 0
    for words in ("--dry-run", "--deepspeed", "--optim.lr", "Peak learning rate", "--stages"):
        assert words in done.stdout
    assert "local_rank" not in done.stdout


def test_checks_need_no_heavy_library():
    code = (
        "import sys, megaflux.training.planning.checks; print({'torch', 'deepspeed', 'diffusers'} & set(sys.modules))"
    )
    assert run(sys.executable, "-c", code).stdout == "set()\n"


def test_dry_run_from_another_folder_without_deepspeed(tmp_path):
    """A list from a file, overlaid by the command line; --local_rank as DeepSpeed's launcher passes it."""
    (tmp_path / "my_run.yaml").write_text("stages: [{name: mine, share: 1, blocks: [3, 30]}]\noptim: {lr: 3e-5}\n")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('deepspeed' in sys.modules)"
    )
    done = run(
        sys.executable,
        "-c",
        code,
        TRAIN,
        "--local_rank=0",
        "--preset",
        "dev",
        "--config",
        "my_run.yaml",
        "--dry-run",
        "--optim.lr",
        "2e-5",
        "--world-size",
        "8",
        "--json",
        "out.json",
        "--data.remote",
        "s3://bucket/data",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [stage["blocks"] for stage in report["stages"]] == [[3, 30]]
    assert report["world_size"] == 8
    assert "lr: 2.0e-05" in done.stdout
    assert done.stdout.endswith("False\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_run.yaml", "out.json"]


def test_through_the_deepspeed_launcher(tmp_path):
    """Its --deepspeed PATH reaches us, and so does our exit code."""
    launcher = Path(sys.executable).with_name("deepspeed")
    argv = [TRAIN, "--deepspeed", str(ROOT / "ds_configs" / "zero2.json"), "--train.updates", "0"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, str(launcher), "--master_port", "29617", *argv],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "train.updates: must be at least 1, got 0" in done.stderr


@pytest.mark.parametrize(
    "program, at, argv",
    [
        ("launch/train.py", "pydantic", ["--dry-run"]),  # its first imports
        ("launch/train.py", "megaflux.training.planning.dry_run", ["--dry-run"]),
        ("megaflux.infer", "pydantic", ["--prompt", "a"]),
        ("megaflux.data.prepare", "tqdm", ["a", "b"]),
        ("megaflux.training.report", "argparse", ["none"]),
        ("megaflux.export", "torch", [str(ROOT / "tests/old_runs/a9a4819/small"), "out"]),
        ("megaflux.panel", "socket", []),
    ],
)
def test_ctrl_c_is_one_word_and_130(tmp_path, program, at, argv):
    """In each program's imports and beyond, by a sitecustomize that sends it where a module is first imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal, sys\ndone = []\ndef hook(event, args):\n"
        f"    if event == 'import' and args[0] == {at!r} and 'megaflux.common.errors' in sys.modules and not done:\n"
        "        done.append(os.kill(os.getpid(), signal.SIGINT))\nsys.addaudithook(hook)\n"
    )
    how = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT), str(ROOT / "kernels")])
    done = run("env", "--default-signal=INT", sys.executable, *how, *argv, cwd=tmp_path, PYTHONPATH=path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]  # no half file
