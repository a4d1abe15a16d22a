"""make gpu-check: one failing test, or one failing bench, ends none of the others, and everything leaves a file."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.bench.runs import ROOT

# In the place of a GPU machine's python: writes its arguments down; fails as ABSENT and FAILING say.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
  *"import sys, torch"*) exit 0 ;;
  "-c import "*) for name in $ABSENT; do case "$*" in *"$name"*) exit 1 ;; esac; done; exit 0 ;;
esac
for failing in $FAILING; do case "$*" in *"${failing%%=*}"*) exit "${failing##*=}" ;; esac; done
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def check(folder: Path, absent: str = "", failing: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
    """(make, the commands it gave to python, those that only look for a module left out)."""
    python, calls = folder / "python", folder / "calls"
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"CALLS": str(calls), "ABSENT": absent, "FAILING": failing}
    command = ["make", "-C", str(ROOT), "gpu-check", f"GPU_PYTHON={python}", f"GPU_BENCH={folder / 'bench'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done, [line for line in calls.read_text().splitlines() if not line.startswith("-c ")]


def of(commands: list[str], what: str) -> str:
    return next(line for line in commands if what in line)


def test_all_pieces_run_and_name_their_files(tmp_path):
    done, commands = check(tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(commands) == 4 and (tmp_path / "bench").is_dir()
    for what, file in (
        ("tests/kernels", "--junitxml {}/junit-kernels.xml"),
        ("tests/training", "--junitxml {}/junit-training.xml"),
        ("megaflux_kernels.bench", "--json {}/check-kernels.json"),
        ("megaflux.bench step", "--json {}/check-step.json"),
    ):
        assert file.format(tmp_path / "bench") in of(commands, what)
    assert "-n 8 --timeout 180" in of(commands, "tests/kernels") and " -x" not in of(commands, "tests/kernels")
    assert "--text 484 --grids 64x64 " in of(commands, "megaflux.bench step")
    assert "-n 8" not in of(commands, "tests/training")  # they measure the memory of the whole GPU


def test_gpu_bench_measures_steps_at_the_condition_of_a_square_picture_and_goes_on(tmp_path):
    command = ["make", "-C", str(ROOT), "-n", "gpu-bench", "GPU_PYTHON=python3", f"GPU_BENCH={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    steps = [line for line in done.stdout.splitlines() if "megaflux.bench step" in line]
    assert len(steps) == 5 and all(" step --text 484 --resume " in line for line in steps), done.stderr
    # A wrong cuDNN is refused, and ends make.
    assert [line for line in steps if "--attention cudnn" in line] == steps[-1:]


@pytest.mark.parametrize(
    "failing", ["pytest=1", "megaflux_kernels.bench=1", "pytest=3 megaflux_kernels.bench=1", "step=4"]
)
def test_what_fails_ends_nothing_else_and_is_not_forgotten(tmp_path, failing):
    done, commands = check(tmp_path, failing=failing)
    assert len(commands) == 4
    assert done.returncode != 0
    worst = max(int(part.split("=")[1]) for part in failing.split())
    assert f"Error {worst}" in done.stderr


def test_without_the_plugins_and_deepspeed_it_does_with_less(tmp_path):
    done, commands = check(tmp_path, absent="xdist pytest_timeout deepspeed")
    assert done.returncode == 0 and len(commands) == 3
    assert "-n 8" not in of(commands, "tests/kernels") and "--timeout" not in of(commands, "tests/kernels")
    assert "no deepspeed or streaming here" in done.stdout
