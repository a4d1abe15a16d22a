"""The steps of gpu-first, in order, and the command that runs each in its own process.

A step is `run(recorder, setting)` of a module of this package. Limits are seconds on a GPU, several times the expected
time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from megaflux.bench.first.runner import Step
from megaflux_kernels import OPS

TRAINING = ("deepspeed", "streaming", "pydantic")  # what the second part needs in addition
# name -> (module, limit, group, needs)
TABLE: dict[str, tuple[str, float, str | None, tuple[str, ...]]] = {
    "machine": ("machine", 60, None, ()),
    "attention": ("attention", 60, None, ()),
    **{f"gate-{op}": ("gates", 100, "gates", ()) for op in OPS},
    "gate-blocks": ("gate_blocks", 90, None, ()),
    "blocks": ("blocks", 120, None, ()),
    "memory": ("memory_law", 100, None, ()),
    "networks": ("networks", 90, None, ()),
    "ops": ("ops", 60, None, ()),
    "loop": ("loop", 200, None, TRAINING),
    "continued": ("continued", 320, None, TRAINING),
    "tests": ("kernel_tests", 240, None, ("pytest",)),
    "compiled": ("compiled", 180, None, ()),
}
ON_A_GPU = ("tests", "compiled")
"""Left out at small sizes: the test suite is what runs those, and torch.compile wants minutes and a C++ compiler."""


def names(small: bool) -> list[str]:
    return [name for name in TABLE if not (small and name in ON_A_GPU)]


def steps(chosen: Sequence[str], out: Path, work: Path, small: bool) -> list[Step]:
    """The chosen steps as processes, in the order of the table."""
    found = []
    for name, (_, limit, group, needs) in TABLE.items():
        if name in chosen:
            command = [
                sys.executable,
                "-m",
                "megaflux.bench.first",
                "--step",
                name,
                "--out",
                str(out),
                "--work",
                str(work),
                *(["--small"] if small else []),
            ]
            found.append(Step(name, command, limit, group, needs))
    return found


def module(name: str) -> ModuleType:
    """The module of a step."""
    return importlib.import_module(f"megaflux.bench.first.{TABLE[name][0]}")
