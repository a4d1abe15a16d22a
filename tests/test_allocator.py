"""The allocator's settings stand in the environment before torch is imported, whatever a person starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaflux_kernels.allocator import NAMES, expand_segments

ROOT = Path(__file__).parent.parent
# Ends the process where torch is first looked for, and says how the environment stands then.
STARTED = """
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("PYTORCH_ALLOC_CONF =", os.environ.get("PYTORCH_ALLOC_CONF"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
what, *sys.argv = sys.argv[1:]
if what.endswith(".py"):
    sys.argv.insert(0, what)
    runpy.run_path(what, run_name="__main__")
else:
    sys.argv.insert(0, what)
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "command",
    [
        "launch/train.py --dry-run",
        "launch/gpu_train.py",
        "megaflux.infer --checkpoint . --prompt a",
        "megaflux.bench step",
        "megaflux_kernels.bench",
    ],
)
def test_segments_grow_before_torch_is_imported(command, tmp_path):
    what, *arguments = command.split()
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(ROOT / what) if "/" in what else what, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "PYTORCH_ALLOC_CONF = expandable_segments:True", done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_persons_choice_stays(name):
    environment = {name: "max_split_size_mb:128"}
    expand_segments(environment)
    assert environment == {name: "max_split_size_mb:128"}
