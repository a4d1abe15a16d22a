"""Imports point one way: README's picture of the packages is true, and no circle hides in a function or behind
TYPE_CHECKING."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHIN = {"megaflux.training": ["planning", "checkpoint", "survival"], "megaflux.data": ["writing reading", "storage"]}
"""Parts of a package from top to bottom; the modules beside them may use them all."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of everything in megaflux and megaflux_kernels."""
    found = {}
    for top in (ROOT / "megaflux", ROOT / "kernels" / "megaflux_kernels"):
        for file in top.rglob("*.py"):
            parts = file.relative_to(top.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imported(name: str) -> Iterator[tuple[str, int]]:
    """(module of ours, line) of every import in a module, wherever it stands."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [one if one in MODULES else str(node.module) for one in inner]
        else:
            continue
        yield from ((one, node.lineno) for one in wanted if one in MODULES and one != name)


GRAPH = {name: list(imported(name)) for name in MODULES}


def part_of(name: str) -> str:
    """The package or module at the top that a module belongs to."""
    return name.split(".")[1] if name.startswith("megaflux.") else name.split(".")[0]


def floor_of(part: str, floors: list[str]) -> int | None:
    """Index of the floor that a part is on; None: on none of them."""
    return next((i for i, floor in enumerate(floors) if part in floor.split()), None)


def readme_floors() -> list[str]:
    """The lines of README's picture, from top to bottom: names of packages and modules."""
    section = (ROOT / "README.md").read_text().split("## How it is built")[1]
    (picture,) = re.findall(r"```\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    return [line.split("  ")[0] for line in picture.splitlines() if line.strip()]


def test_the_readmes_picture_names_everything_there_is():
    there = {part_of(name) for name in MODULES if name != "megaflux"}
    named = [name for floor in readme_floors() for name in floor.split()]
    assert sorted(named) == sorted(there)


def test_imports_point_down_in_the_readmes_picture():
    floors = readme_floors()
    upwards = []
    for name, targets in GRAPH.items():
        if name == "megaflux":  # offers its classes by a lazy import
            continue
        for target, line in targets:
            if target == "megaflux" or part_of(name) == part_of(target):
                continue
            here, there = floor_of(part_of(name), floors), floor_of(part_of(target), floors)
            if here is None or there is None or there <= here:
                upwards.append(f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}")
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("package", WITHIN)
def test_imports_point_down_within_a_package(package):
    floors = WITHIN[package]
    upwards = []
    for name, targets in GRAPH.items():
        for target, line in targets:
            if not (name.startswith(f"{package}.") and target.startswith(f"{package}.")):
                continue
            parts = [one.removeprefix(f"{package}.").split(".")[0] for one in (name, target)]
            here, there = (floor_of(part, floors) for part in parts)
            if here is not None and there is not None and parts[0] != parts[1] and there <= here:
                upwards.append(f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}")
    assert not upwards, "\n".join(upwards)


def test_there_are_no_circles():
    """Not at import time, nor by imports in functions, under TYPE_CHECKING or of a `__main__`."""
    try:
        TopologicalSorter({name: [target for target, _ in targets] for name, targets in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_entry_points_and_mathematics_stand_at_the_top():
    files = {path.name for path in (ROOT / "megaflux").glob("*.py")}
    assert files == {"__init__.py", "flow.py", "export.py", "convert.py", "runs.py"}
