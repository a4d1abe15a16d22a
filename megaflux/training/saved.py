"""What a run was begun with, for whoever resumes it, exports it or generates from it.

RUN/config.yaml holds the configuration that a run was last started with; each checkpoint's manifest, its format and the part
of the configuration that must not change. Two rules keep old runs alive:

- A field that they lack means the value it had before it existed: ADDED, by the format that the field came with. Whoever
  adds a field to megaflux.schema raises `manifest.FORMAT` and writes it down here; tests/test_old_runs.py holds it.
- On resume, a value that the user does not set, in a file or on the command line, is the run's saved one (`resume_values`):
  a changed default never changes a run.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflux.config import Config, build_config, load_yaml
from megaflux.errors import UserError
from megaflux.training import manifest

NAME = "config.yaml"
ADDED: dict[int, dict[str, Any]] = {
    3: {"train.drawn_per_rank": lambda values: values["train"].get("micro_batch_size")},
}
"""Format of a manifest -> {dotted field that came with it: what it means where it is missing: a value, or a function of the
whole configuration as plain data}. `*` stands for every element of a list: `stages.*.name`."""
PER_START = ("run.dir", "run.resume", "train.stop_after")
"""Fields that say how one start goes and not what the run is: never taken from an earlier start."""
FIXED = ("train.drawn_per_rank",)
"""Fields that are settled when a run begins, and that its checkpoints' identity does not hold."""


def filled(values: dict[str, Any], format: int = 0) -> dict[str, Any]:
    """Plain nested values of an earlier version with the fields that came later. format: of the manifest they are from; 0:
    of a configuration, where a missing field tells its age by itself."""
    values = copy.deepcopy(values)
    for came_with, fields in sorted(ADDED.items()):
        for path, before in fields.items() if came_with > format else ():
            for section in _sections(values, path.split(".")[:-1]):
                name = path.rpartition(".")[2]
                if name not in section:
                    section[name] = before(values) if callable(before) else before
    return values


def load(run_dir: str | Path) -> Config:
    """The configuration that a run was last started with. UserError, naming the file, where it cannot be read."""
    file = Path(run_dir) / NAME
    try:
        return build_config(filled(load_yaml(str(file))))
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'--config {file}').lstrip(': ')}") from None


def resume_values(config: Config) -> dict[str, Any] | None:
    """The values that the run in `config.run.dir` has where nobody sets them, as plain nested data, with this start's own
    in PER_START; None: it holds no checkpoint, so there is nothing to resume, or no configuration.

    UserError where its configuration cannot be read."""
    run_dir = config.run.dir
    if not os.path.isdir(manifest.folder(run_dir)):  # Path's own raises where a name is too long
        return None
    cut_short = manifest.folder(run_dir).glob(".update-*.partial/manifest.json")  # whole but for its name, perhaps
    if not (manifest.listed(run_dir) or any(cut_short)) or not (Path(run_dir) / NAME).is_file():
        return None
    values = load(run_dir).model_dump()
    for path in PER_START:
        section, _, name = path.partition(".")
        values[section][name] = getattr(getattr(config, section), name)
    return values


def ds_config(run_dir: str) -> dict[str, Any]:
    """DeepSpeed's configuration that a run was last started with; {} where there is none that can be read."""
    try:
        values = json.loads((Path(run_dir) / "ds_config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("zero_optimization"), dict) else {}


def describe(run_dir: str, kept: dict[str, Any]) -> str:
    """One line on values that a run keeps though this version's preset has others. kept: dotted field -> value."""
    shown = ", ".join(f"{path} {str(value)[:60]}" for path, value in kept.items())
    return f"resuming {run_dir} with its own values where none is given now: {shown} (the preset has others)"


def refuse_changes(config: Config, saved: dict[str, Any]) -> None:
    """UserError where a configuration for resuming sets one of FIXED to another value than the run's saved one."""
    for path in FIXED:
        section, _, name = path.partition(".")
        wanted, kept = getattr(getattr(config, section), name), saved[section][name]
        if wanted != kept:
            raise UserError(f"{path}: {wanted}, but {config.run.dir} holds a run begun with {kept}; leave it out, or give "
                            "another --run.dir")  # fmt: skip


def changed(identity: dict[str, Any], format: int, now: dict[str, Any]) -> list[str]:
    """The keys of a run's identity (`checkpoint.identity`) in which the manifest of another format differs from `now`."""
    nested = filled(_nested(identity), format)
    return [key for key, value in now.items() if _at(nested, key) != value]


_NOTHING = object()


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return _NOTHING
        values = values[key]
    return values


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"run.seed": 0} -> {"run": {"seed": 0}}."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        at = nested
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = value
    return nested


def _sections(values: Any, path: list[str]) -> Iterator[dict[str, Any]]:
    """Every section at a path with `*`; none where the values have no such section (an identity holds a part only)."""
    if not path:
        if isinstance(values, dict):
            yield values
    elif path[0] == "*":
        for element in values if isinstance(values, list | tuple) else ():
            yield from _sections(element, path[1:])
    elif isinstance(values, dict) and path[0] in values:
        yield from _sections(values[path[0]], path[1:])
