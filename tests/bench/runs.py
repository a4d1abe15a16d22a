"""The benches as people start them, at sizes of a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[2]
SMALL = [
    "--double",
    "1",
    "--single",
    "2",
    "--heads",
    "2",
    "--head-dim",
    "32",
    "--joint-dim",
    "16",
    "--text",
    "5",
    "--grids",
    "3x4,2x3",
]
TRAFFIC = ["--image", "40", "--text", "7", "--heads", "4", "--head-dim", "32"]
QUICK = ["--samples", "2", "--warmup", "1"]
KEYS = ["device", "versions", "attention_backend", "commit", "rows"]
ROW = {"bench": str, "arm": str, "shape": str, "metric": str, "value": float, "unit": str, "samples": int}


# Python that hides what a machine with torch, triton, transformers and diffusers may lack; then `hide()`.
WITHOUT = """
import sys
missing = {"pydantic", "deepspeed", "streaming", "tensorboard", "pyarrow", "einops"}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

def hide():
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def bench(*argv: str, module: str = "megaflux.bench", timeout: float = 240) -> subprocess.CompletedProcess:
    return start("-m", module, *argv, timeout=timeout)


def start(*argv: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """A process of its own with one thread and the repository importable."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    env.pop("TRITON_INTERPRET", None)
    if argv[0] == "-c":  # which may hide libraries that a forked process has
        return subprocess.run(
            [sys.executable, *argv], env=env, capture_output=True, text=True, timeout=timeout, cwd=ROOT
        )
    return forked.run(argv, env, timeout)


def read(path: Path) -> dict:
    """A report, its form checked."""
    report = json.loads(path.read_text())
    assert list(report) == KEYS
    assert set(report["versions"]) == {"torch", "triton", "diffusers", "transformers", "python", "cuda"}
    assert report["device"] and report["rows"]
    for row in report["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW, row
    return report


def metrics(report: dict, bench: str) -> dict[tuple[str, str], dict[str, float]]:
    """{(arm, shape): {metric: value}} of one bench."""
    found: dict = {}
    for row in report["rows"]:
        if row["bench"] == bench:
            found.setdefault((row["arm"], row["shape"]), {})[row["metric"]] = row["value"]
    return found
