"""The configuration that a run was started with, read from its folder to resume it, export it or generate from it.

Each checkpoint's manifest holds its format, the part of the configuration that must not change and, from format 3 on, the whole
configuration of the start that saved it; RUN/config.yaml is that of the latest start. Two rules keep old runs usable:

- A missing field means what the code did before the field existed: see ADDED, by the format that introduced the field. Whoever
  adds a field to megaflux.config.schema raises `manifest.FORMAT` and adds it here; tests/test_old_runs.py checks it.
- On resume, a value that the user does not set, in a file or on the command line, is the saved one (`begun`), so that a
  changed default never changes a run.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import literal
from megaflux.config import plain_yaml
from megaflux.config.parse import build_config, load_yaml
from megaflux.config.schema import PATHS, Config, Train
from megaflux.training.checkpoint import manifest

NAME, DS_NAME = "config.yaml", "ds_config.json"
ADDED: dict[int, dict[str, Any]] = {
    3: {"train.drawn_per_rank": lambda values: values["train"].get("micro_batch_size")},
    4: {"model.seeded": "torch", "train.deterministic": False},
    5: {},  # no new field, but a new value: train.micro_batch_size may be `auto`, which earlier versions cannot read
    6: {
        "stages.*.connector": True,
        "stages.*.vlm_layers": 1,
        "stages.*.lr": None,
        "stages.*.weight_decay": None,
        "model.vlm_layers": 1,
        "model.init": None,
        "optim.schedule": "run",
        "train.stage_ends": None,
        "train.ended_at": [],
    },
    7: {
        "flow.guidance": 3.5,  # its default before; it was always written out
        "data.condition.none": 0.0,
        "data.caption_weights": None,
        "optim.large_gradient": 1e-3,
        "optim.large_gradient_share": None,
        "optim.ema_decay": 0.0,
    },
    # Also new values, which earlier versions take for folders: model.vlm and model.init `tiny`, model.vae `tiny-icons`.
    8: {"data.references": {"min": 1, "max": 1}, "data.reference_crop": 1.0, "data.reference_flip": 0.0},
}
"""Format of a manifest -> {dotted field that it introduced: its value where it is missing, or a function that gets the whole
configuration as plain data and returns it}. `*` stands for every element of a list: `stages.*.name`."""
PER_START = ("run.dir", "run.resume", "train.stop_after")
"""Fields of one start rather than of the run: never taken from an earlier start."""
FIXED = ("train.drawn_per_rank",)
"""Fields that are fixed when a run begins but are not in its checkpoints' identity."""


def filled(values: dict[str, Any], format: int = 0) -> dict[str, Any]:
    """Plain nested values of an earlier version, completed with later fields. format: that of their manifest; 0: the values
    are a configuration file's, where any missing field is filled in."""
    values = copy.deepcopy(values)
    for came_with, fields in sorted(ADDED.items()):
        for path, before in fields.items() if came_with > format else ():
            for section in _sections(values, path.split(".")[:-1]):
                name = path.rpartition(".")[2]
                if name not in section:
                    section[name] = before(values) if callable(before) else before
    return values


def load(run_dir: str | Path) -> Config:
    """The configuration of a run's latest start. Raises UserError naming the file if it cannot be read."""
    file = Path(run_dir) / NAME
    return _built(load_yaml(str(file)), file)


def _built(values: dict[str, Any], file: Path) -> Config:
    try:
        return build_config(literal(filled(values), PATHS))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and isinstance(values.get("zero_optimization"), dict) else {}


@dataclass(frozen=True)
class Begun:
    """What a resumable run had been started with when its newest checkpoint was saved."""

    values: dict[str, Any] | None
    """Its configuration without PER_START, as plain nested data; None: unknown (config.yaml is missing)."""
    ds_config: dict[str, Any]
    """DeepSpeed's configuration; {}: unknown."""
    config: Config | None = None
    """The same as `values`, with everything that they leave out; None: unknown, or no checkpoint is valid."""
    stage: int = 0
    """Index of the newest checkpoint's stage."""
    update: int = 0
    """Updates done at the newest checkpoint."""


def begun(run_dir: str) -> Begun | None:
    """What the run in a folder was started with; None: it holds no checkpoint, so there is nothing to resume.

    A start that ended before its first save leaves no trace. Raises UserError if RUN/config.yaml is needed (checkpoints
    before format 3) and cannot be read."""
    content = newest(run_dir)
    if content is None:
        return None
    snapshot = content.get("started_with", {})
    if "config" in snapshot:
        config = build_config(literal(filled(plain_yaml.load(snapshot["config"]), content["format"]), PATHS))
        ds_config = snapshot.get("ds_config", {})
    elif (Path(run_dir) / NAME).is_file():
        values = load_yaml(str(Path(run_dir) / NAME))
        if isinstance(values.get("train"), dict) and "micro_batch_size" in content["data"]:
            # What it drew when it began, whatever its micro-batches were later.
            values["train"].setdefault("drawn_per_rank", content["data"]["micro_batch_size"])
        config, ds_config = _built(values, Path(run_dir) / NAME), _read_json(Path(run_dir) / DS_NAME)
    else:
        return Begun(None, _read_json(Path(run_dir) / DS_NAME))
    values = _with_lists(config.model_dump())
    for path in PER_START:
        section, _, name = path.partition(".")
        del values[section][name]
    values["run"]["dir"] = run_dir
    for name in ("stage_ends", "ended_at"):  # extend.py decides on them anew
        values["train"][name] = Train.model_fields[name].default
    if "stage" not in content:
        return Begun(values, ds_config)
    return Begun(values, ds_config, config, content["stage"], content["update"])


def _with_lists(values: Any) -> Any:
    """Nested values with lists in the place of tuples, as a file has them: options set single elements (--stages.1.lr)."""
    if isinstance(values, dict):
        return {key: _with_lists(value) for key, value in values.items()}
    return [_with_lists(value) for value in values] if isinstance(values, list | tuple) else values


def snapshot(run_dir: str | Path) -> dict[str, Any]:
    """The configuration files that this start wrote into the run's folder, for a checkpoint's manifest (`begun` reads it);
    {} if they cannot be read."""
    try:
        return {"config": (Path(run_dir) / NAME).read_text(), "ds_config": _read_json(Path(run_dir) / DS_NAME)}
    except OSError:
        return {}


def refuse_changes(config: Config, saved: dict[str, Any]) -> None:
    """Raise UserError if a configuration for resuming names another preset than the run's, or changes a field of FIXED.
    saved: `Begun.values`."""
    remedy = "leave it out, or give another --run.dir"
    if config.preset != saved["preset"]:
        raise UserError(
            f"--preset {config.preset}: {config.run.dir} holds a run of the preset {saved['preset']}; {remedy}"
        )
    for path in FIXED:
        section, _, name = path.partition(".")
        wanted, kept = getattr(getattr(config, section), name), saved[section][name]
        if wanted != kept:
            raise UserError(f"{path}: {wanted}, but {config.run.dir} holds a run begun with {kept}; {remedy}")


def newest(run_dir: str) -> dict[str, Any] | None:
    """The newest valid manifest of a run; one without content, {"data": {}}, if no checkpoint has a valid one; None if there
    is no checkpoint."""
    if not os.path.isdir(manifest.folder(run_dir)):  # Path's own raises where a name is too long
        return None
    interrupted = sorted(manifest.folder(run_dir).glob(".update-*.partial"))  # may be complete but not renamed
    found = [*reversed(interrupted), *reversed(manifest.listed(run_dir).values())]
    for path in found:
        if (path / manifest.MANIFEST).is_file():
            try:
                return manifest.read(path)
            except UserError:  # resuming from it is refused later, with the reason
                continue
    return {"data": {}} if manifest.listed(run_dir) else None


def has_begun(run_dir: str) -> bool:
    """Whether a start in a run's folder resumes: it holds a checkpoint, perhaps one that is complete but not renamed yet."""
    return newest(run_dir) is not None


def describe(run_dir: str, kept: dict[str, Any]) -> str:
    """One line on the values that a run keeps although the preset now has others. kept: dotted field -> value."""
    shown = ", ".join(f"{path} {str(value)[:60]}" for path, value in kept.items())
    return f"resuming {run_dir} with its own values, where none is given now and the preset has others: {shown}"


def completed(identity: dict[str, Any], format: int) -> dict[str, Any]:
    """A manifest's identity ({dotted field: value}) as nested plain data, with the fields that are later than its format."""
    return literal(filled(_nested(identity), format), PATHS)


_NOTHING = object()


def at(values: Any, path: str, default: Any = _NOTHING) -> Any:
    """The value at a dotted path of nested plain data; default: what to return where it is absent."""
    for key in path.split("."):
        if not isinstance(values, dict) or key not in values:
            return default
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
    """Every section at a path with `*`; yields nothing if the path is absent (an identity is partial)."""
    if not path:
        if isinstance(values, dict):
            yield values
    elif path[0] == "*":
        for element in values if isinstance(values, list | tuple) else ():
            yield from _sections(element, path[1:])
    elif isinstance(values, dict) and path[0] in values:
        yield from _sections(values[path[0]], path[1:])
