"""Checkpoints of a run: written under a temporary name, completed by a manifest, then renamed.

    RUN/checkpoints/update-0000400/
        manifest.json          format, update, stage, world size, data position; size and SHA-256 of every file below
        weights.safetensors    every parameter that has trained so far, by Qwen2VLFlux's names
        deepspeed/...          DeepSpeed's shards: fp32 masters and Adam's moments of the active stage
        rng-rank0000.pt        global random state of each rank

A folder without manifest.json is not a checkpoint. The learning rate is a function of the update and needs no state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megaflux.config import Config
from megaflux.errors import UserError
from megaflux.models.pretrained import Models
from megaflux.training import distributed, stages
from megaflux.training.distributed import World
from megaflux.training.ds_config import sharding
from megaflux.training.engine import StageEngine

log = logging.getLogger("megaflux")
FORMAT = 1
WEIGHTS = "weights.safetensors"
MANIFEST_KEYS = {"format", "update", "stage", "stage_name", "world_size", "data", "identity", "base", "deepspeed",
                 "files"}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its files verified."""

    path: Path
    update: int
    """Updates done."""
    stage: int
    """Index of the stage whose optimizer it holds."""
    world_size: int
    data: dict[str, Any]
    """Position of the loader."""
    manifest: dict[str, Any]


def listed(run_dir: str | Path) -> dict[int, Path]:
    """The checkpoint folders of a run by update, oldest first; complete or not. Others' names are passed over, so one
    that somebody moved aside as update-0000400.bad is none."""
    found = folder(run_dir).glob("update-*") if folder(run_dir).is_dir() else []
    numbered = {path.name.removeprefix("update-"): path for path in found if path.is_dir()}
    return dict(sorted((int(number), path) for number, path in numbered.items() if number.isdigit()))


def folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def save(config: Config, engine: StageEngine, update: int, data: dict[str, Any], base: str, world: World) -> Path:
    """Write a checkpoint after `update` updates; returns its folder. Collective.

    base: fingerprint of the weights that the run started from (`Models.base`).
    """
    final = folder(config.run.dir) / f"update-{update:07d}"
    partial = final.with_name(f".{final.name}.partial")
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier(world)
    engine.deepspeed.save_checkpoint(
        str(partial), tag="deepspeed", client_state={}, save_latest=False, exclude_frozen_parameters=True
    )
    torch.save(distributed.rng_state(), partial / f"rng-rank{world.rank:04d}.pt")
    weights = trained_weights(config, engine, keep=world.is_main)
    if world.is_main:
        save_file(weights, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o666 & ~_umask())  # safetensors makes it the owner's alone
    distributed.barrier(world)
    if world.is_main:
        shards = len(list(partial.glob("rng-rank*.pt"))), len(list(partial.glob("deepspeed/*optim_states.pt")))
        if shards != (world.size, world.size):
            raise UserError(
                f"{partial}: {shards[1]} of {world.size} ranks' shards are here; run.dir must be on storage that all "
                "machines share"
            )
        manifest = {
            "format": FORMAT, "update": update, "stage": engine.stage, "stage_name": config.stages[engine.stage].name,
            "world_size": world.size, "data": data, "identity": identity(config), "base": base,
            "deepspeed": engine.sharding, "files": _inventory(partial),
        }  # fmt: skip
        _write_durably(partial / "manifest.json", json.dumps(manifest, indent=1))
        if final.exists():  # written by the run this one was resumed from, and never worse than this one
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(final.parent)
        prune(config)
    distributed.barrier(world)
    return final


def trained_weights(config: Config, engine: StageEngine, keep: bool = True) -> dict[str, torch.Tensor]:
    """Every parameter that any stage so far has trained, on the host, by name. Collective under ZeRO-3; keep: False
    on the ranks that only take part."""
    names = trained_names(config, engine.module, engine.stage)
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if name in names:
            with _gathered(parameter, engine.zero_stage):
                if keep:
                    weights[name] = parameter.detach().cpu().contiguous().clone()
    return weights


def trained_names(config: Config, module: nn.Module, stage: int) -> set[str]:
    return {name for s in config.stages[: stage + 1] for name in stages.trainable_names(module, s)}


def resolve(config: Config, ds_config: dict[str, Any], world: World) -> Checkpoint | None:
    """The newest checkpoint of the run folder, verified; None where the run folder holds no trace of any.

    Raises UserError for one that cannot be used: a run never starts over silently. Rank 0 looks, all hear the same.
    """
    found: Checkpoint | str | None = None
    if world.is_main:
        try:
            found = _resolve(config, ds_config, world.size)
        except UserError as error:
            found = str(error)
    found = distributed.from_main(found, world)
    if isinstance(found, str):
        raise UserError(found, agreed=True)
    return found


def _resolve(config: Config, ds_config: dict[str, Any], world_size: int) -> Checkpoint | None:
    root, found = folder(config.run.dir), list(listed(config.run.dir).values())
    if config.run.resume == "never" and found:
        raise UserError(f"run.dir: {config.run.dir} holds checkpoints and run.resume is never; give another --run.dir")
    if not found:
        if root.is_dir() and any(root.iterdir()):
            log.warning("%s holds no checkpoint, only unfinished or moved ones; the run starts at update 0", root)
        if config.run.resume == "must":
            raise UserError(f"run.dir: {config.run.dir} holds no checkpoint and run.resume is must")
        return None
    manifest = verify(found[-1])
    if manifest["world_size"] != world_size:
        raise UserError(
            f"{found[-1]}: saved by {manifest['world_size']} ranks, this run has {world_size}; start it with "
            f"{manifest['world_size']} (resuming on another number is not done yet)"
        )
    if "parameter_order" not in manifest["deepspeed"]:
        raise UserError(f"{found[-1]}: an earlier megaflux began this run, and its optimizer shards have another order; "
                        "finish the run with that version, or give another --run.dir")  # fmt: skip
    if manifest["deepspeed"] != sharding(ds_config):
        raise UserError(f"--deepspeed: {found[-1]} was saved with {manifest['deepspeed']}, this file says "
                        f"{sharding(ds_config)}; give the one the run began with")  # fmt: skip
    changed = [key for key, value in identity(config).items() if manifest["identity"].get(key) != value]
    if changed:
        raise UserError(
            f"run.dir: {config.run.dir} holds a run with other {', '.join(changed)}; restore the old values "
            f"(they are in {config.run.dir}/config.yaml) or give another --run.dir"
        )
    return Checkpoint(found[-1], manifest["update"], manifest["stage"], manifest["world_size"], manifest["data"],
                      manifest)  # fmt: skip


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint whose files match it; only: just these files. UserError naming the first that
    doesn't."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            raise UserError(f"{path}: format {manifest['format']} is newer than this code's {FORMAT}; update megaflux")
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        missing = MANIFEST_KEYS - set(manifest)
        if missing:
            raise KeyError(f"{sorted(missing)[0]} is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}/manifest.json: {getattr(error, 'strerror', None) or error}; this is not a complete checkpoint; "
            f"move {path.name} away to go on from the one before"
        ) from None
    for name, (size, digest) in files.items():
        if only is not None and name not in only:
            continue
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path}/manifest.json: {name} lies outside the checkpoint; do not use it")
        if not file.is_file():
            raise UserError(f"{file}: missing; move {path.name} away to go on from the checkpoint before")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise UserError(f"{file}: damaged (not what the manifest says); move {path.name} away to go on "
                            "from the checkpoint before")  # fmt: skip
    return manifest


def load_weights(path: Path, manifest: dict[str, Any], config: Config, models: Models) -> None:
    """Put a checkpoint's weights into freshly loaded models, before an engine is built on them.

    UserError if the models are not those that the run started from, or a name is missing or does not fit.
    """
    if manifest["base"] != models.base:
        raise UserError(
            f"{path}: was trained on other base weights than model.* names now (or than this version of megaflux "
            "builds); give the ones it started from"
        )
    weights, parameters = load_file(path / WEIGHTS), dict(models.trainable.named_parameters())
    missing = trained_names(config, models.trainable, manifest["stage"]) - set(weights)
    if missing:
        raise UserError(f"{path / WEIGHTS}: missing key {sorted(missing)[0]} (of {len(missing)}); it was trained")
    for name, tensor in weights.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise UserError(f"{path / WEIGHTS}: {name} does not fit this model; check model.* of the configuration")
        with torch.no_grad():
            parameters[name].copy_(tensor)


def load_training_state(checkpoint: Checkpoint, engine: StageEngine, world: World) -> None:
    """Optimizer and random state into an engine of the same stage. Collective."""
    path, _ = engine.deepspeed.load_checkpoint(
        str(checkpoint.path), tag="deepspeed", load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:  # DeepSpeed's way of saying that it found nothing
        raise UserError(f"{checkpoint.path}/deepspeed: cannot be loaded; move {checkpoint.path.name} away")
    state = torch.load(checkpoint.path / f"rng-rank{world.rank:04d}.pt", weights_only=True)
    distributed.set_rng_state(state)


def identity(config: Config) -> dict[str, Any]:
    """What must be the same for a checkpoint to continue a run, as plain data."""
    values = config.model_dump(mode="json")
    same_result = ("activation_checkpointing", "kernels")  # within rounding, and so a run's owner may change them
    kept = {f"model.{key}": value for key, value in values["model"].items() if key not in same_result}
    kept |= {f"data.{key}": values["data"][key] for key in ("longest_side", "aspect_ratios", "condition")}
    kept |= {f"train.{key}": values["train"][key] for key in ("updates", "global_batch_size", "micro_batch_size")}
    return kept | {"stages": values["stages"], "run.seed": values["run"]["seed"], "flow": values["flow"]}


def prune(config: Config) -> None:
    """Delete old checkpoints: the newest `keep_checkpoints` and each stage's last stay."""
    ends = set(config.stage_ends())
    for update, path in list(listed(config.run.dir).items())[: -config.train.keep_checkpoints]:
        if update not in ends:
            going = path.with_name(f".{path.name}.deleting")  # half a folder must not look like a checkpoint
            path.rename(going)
            shutil.rmtree(going)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _inventory(path: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gathered(parameter: nn.Parameter, zero_stage: int):
    import contextlib

    if zero_stage < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
