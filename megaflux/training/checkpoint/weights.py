"""The weights in a checkpoint: which parameters, which rank writes which, and loading them.

    weights.safetensors                     all of them, from a run on one rank (before format 4: from any run)
    weights-00000-of-00008.safetensors ...  each rank's share of them

They are the parameters that any stage so far has trained, by Qwen2VLFlux's names, in the dtype they train in. Each is in one
file. A run with an average of the weights (training/average.py) has it in float32 in files of the same kind:

    average.safetensors, average-00000-of-00008.safetensors ...
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.models import reading
from megaflux.models.loading_errors import named
from megaflux.training import stages
from megaflux.training.engine import StageEngine, whole_size

if TYPE_CHECKING:  # imports diffusers and transformers, which would delay the command for checkpoints by seconds
    from megaflux.models.pretrained import Models

WEIGHTS, AVERAGE = "weights", "average"
"""What files hold, and how their names begin."""


def trained_names(config: Config, module: nn.Module, stage: int) -> set[str]:
    """Names of the parameters that this stage (an index) or an earlier one trains."""
    return {name for s in config.stages[: stage + 1] for name in stages.trainable_names(module, s)}


def count_trained(config: Config, module: nn.Module, stage: int) -> int:
    """Number of values in a checkpoint's weights in this stage (an index)."""
    names = trained_names(config, module, stage)
    return sum(whole_size(p) for name, p in module.named_parameters() if name in names)


def file_name(rank: int, world_size: int, what: str = WEIGHTS) -> str:
    """Name of the file that holds a rank's share of the weights, or of their averages."""
    return f"{what}.safetensors" if world_size == 1 else f"{what}-{rank:05d}-of-{world_size:05d}.safetensors"


def shares(sizes: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Divide parameters among ranks: the largest first, each to the rank with the least so far. sizes: name -> number of
    values. Returns each rank's names; the same on every rank."""
    names: list[list[str]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = load.index(min(load))
        names[rank].append(name)
        load[rank] += sizes[name]
    return names


def gather_share(config: Config, engine: StageEngine, world: World) -> dict[str, torch.Tensor]:
    """This rank's share of the weights: name -> copy on the host. Collective under ZeRO-3."""
    names = trained_names(config, engine.module, engine.stage)
    parameters = {name: p for name, p in engine.module.named_parameters() if name in names}
    mine = set(shares({name: whole_size(p) for name, p in parameters.items()}, world.size)[world.rank])
    weights = {}
    for name, parameter in parameters.items():
        with gathered(parameter, engine.zero_stage):
            if name in mine:
                weights[name] = parameter.detach().cpu().contiguous().clone()
    return weights


def write_share(weights: Mapping[str, torch.Tensor], folder: Path, world: World, what: str = WEIGHTS) -> None:
    """Write this rank's share into a checkpoint's folder."""
    file = folder / file_name(world.rank, world.size, what)
    save_file(dict(weights), file)
    file.chmod(0o666 & ~_umask())  # safetensors lets only the owner read it


def files_of(manifest: Mapping[str, Any], path: Path, what: str = WEIGHTS) -> list[str]:
    """Names of the files with a checkpoint's weights, or their averages, from its manifest. Raises UserError if it does not name
    them all."""
    file = re.compile(rf"{what}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    found = sorted(name for name in manifest["files"] if file.fullmatch(name))
    divided = sum(name != file_name(0, 1, what) for name in found)
    if not found or divided and found != [file_name(rank, len(found), what) for rank in range(len(found))]:
        raise UserError(f"{path}/manifest.json: names {', '.join(found) or f'no {what}'}; it is not complete")
    return found


def sha256(manifest: Mapping[str, Any], path: Path, averaged: bool = False) -> str:
    """Identifies a checkpoint's weights: the SHA-256 of their file or, if there are several, the SHA-256 of the text that
    lists those of all files in order of rank, one a line. averaged: with those of their averages after them."""
    names = files_of(manifest, path) + (files_of(manifest, path, AVERAGE) if averaged else [])
    hashes = [manifest["files"][name]["sha256"] for name in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def any_float32(manifest: Mapping[str, Any], path: Path) -> bool:
    """Whether any of a checkpoint's weights is stored in float32."""
    for name in files_of(manifest, path):
        with named(str(path / name)):
            if "F32" in reading.dtypes(path / name).values():
                return True
    return False


def load_weights(path: Path, manifest: dict[str, Any], config: Config, models: Models) -> None:
    """Copy a checkpoint's weights into freshly loaded models, before an engine is built on them.

    Raises UserError if the run started from other base weights, or if a parameter is missing or has another shape.
    """
    refuse_other_base(str(path), manifest, models)
    if manifest.get("init") != models.init:
        raise UserError(
            f"{path}: its run began from another init (model.init) than is in its folder; restore the folder's init/"
        )
    parameters = dict(models.trainable.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    there = {name for stored_in in stored_shapes(path, manifest, shapes, WEIGHTS).values() for name in stored_in}
    missing = trained_names(config, models.trainable, manifest["stage"]) - there
    if missing:
        files = files_of(manifest, path)
        where = path / files[0] if len(files) == 1 else path
        raise UserError(f"{where}: missing key {sorted(missing)[0]} (of {len(missing)}); it was trained")
    with torch.no_grad():
        for name, tensor in stored(path, manifest, shapes):
            parameters[name].copy_(tensor)


def load_averages(path: Path, manifest: dict[str, Any], models: Models) -> None:
    """Put a checkpoint's averages in the place of its weights, which `load_weights` has loaded; those that it has no average of
    stay. UserError as there."""
    parameters = dict(models.trainable.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    with torch.no_grad():
        for name, tensor in stored(path, manifest, shapes, AVERAGE):
            parameters[name].copy_(tensor)


def stored(
    path: Path,
    manifest: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    what: str = WEIGHTS,
    only: Container[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a checkpoint's weights or averages, file by file; a tensor is valid until the next one is read. only: of
    these names. shapes: of the model's parameters. UserError naming the file for a tensor that does not fit, before the first."""
    for file, stored_in in stored_shapes(path, manifest, shapes, what).items():
        with named(str(file)):
            yield from reading.tensors(file, [name for name in stored_in if only is None or name in only])


def stored_shapes(
    path: Path, manifest: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], what: str
) -> dict[Path, dict[str, tuple[int, ...]]]:
    """File -> name -> shape of what is stored. UserError where it is not a parameter of the wanted shape."""
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    for name in files_of(manifest, path, what):
        with named(str(path / name)):
            found[path / name] = reading.shapes(path / name)
    for file, shapes in found.items():
        for name, shape in shapes.items():
            if wanted.get(name) != tuple(shape):
                raise UserError(f"{file}: {name} does not fit this model; check model.* of the configuration")
    return found


def refuse_other_base(where: str, content: Mapping[str, Any], models: Models) -> None:
    """UserError, naming the options to look at, where a manifest's base weights are not the models'. where: what was trained."""
    if content["base"] != models.base or other_clip(content, models.base_parts):
        parts = other_parts(content, models.base_parts)
        which = options_of(parts)
        what = "with another CLIP (text_encoder)" if parts == ["clip"] else "on other base weights"
        raise UserError(
            f"{where}: was trained {what} than {which} now names (or than this version of megaflux builds); give what the "
            f"run began with, by {_given_by(which)}"
        )


def other_parts(content: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """The parts of the base weights that differ between a manifest and now (`Models.base_parts`): all, where it does not tell."""
    then = content.get("base_parts") or {}
    return [part for part, digest in now.items() if then.get(part, digest) != digest] or list(now)


def other_clip(content: Mapping[str, Any], now: Mapping[str, str]) -> bool:
    """Whether CLIP, whose pooled vector enters every step, differs: it is not in `base`, and old manifests do not tell."""
    then = (content.get("base_parts") or {}).get("clip")
    return then is not None and then != now.get("clip", then)


def options_of(parts: Sequence[str]) -> str:
    """The fields that name these parts' weights."""
    fields = {
        "flux": "model.flux",
        "clip": "model.flux",
        "vlm": "model.vlm",
        "vae": "model.vae",
        "connector": "run.seed (of the connector)",
    }
    chosen = [
        field for part, field in fields.items() if part in parts and (part != "connector" or parts == ["connector"])
    ]
    return ", ".join(dict.fromkeys(chosen))


def _given_by(fields: str) -> str:
    """The options for fields of `options_of`."""
    names = [field.removeprefix("model.") for field in fields.split(", ") if field.startswith("model.")]
    training = " ".join(f"--model.{name} DIR" for name in names) or "--run.seed"
    return f"{training} (in generation and export {' '.join(f'--{name} DIR' for name in names)})" if names else training


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def gathered(parameter: nn.Parameter, zero_stage: int, modified: bool = False) -> AbstractContextManager:
    """Inside, the parameter is whole on every rank, as it always is but under ZeRO-3. modified: what rank 0 makes of it inside is
    its new value. Collective under ZeRO-3."""
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modified else None)
