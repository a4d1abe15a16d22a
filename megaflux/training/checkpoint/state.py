"""Checkpoints of a run: what is in them, which one a run goes on from, and how it takes it up.

    RUN/checkpoints/update-0000400/
        manifest.json             format, update, stage, world size, data position; size and SHA-256 of every file below
        weights-....safetensors   every parameter that has trained so far, a part by each rank (trained.py)
        deepspeed/...             DeepSpeed's shards: fp32 masters and Adam's moments of the active stage
        rng-rank0000.pt           global random state of each rank

How they come to be, durably, is in manifest.py. The learning rate is a function of the update and needs no state.

For people: python -m megaflux.training.checkpoint ls|verify|prune RUN
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaflux.common.errors import UserError, is_out_of_memory
from megaflux.common.ranks import World, first_problem, gathered
from megaflux.config.parse import Config
from megaflux.models.loading_errors import named
from megaflux.models.sources import HUB
from megaflux.training import distributed
from megaflux.training.checkpoint import manifest, saved
from megaflux.training.checkpoint import reshard as repartition
from megaflux.training.checkpoint import weights as trained
from megaflux.training.checkpoint.manifest import FORMAT, folder, listed, verify
from megaflux.training.checkpoint.space import NoRoom
from megaflux.training.ds_config import sharding
from megaflux.training.engine import StageEngine

__all__ = ["FORMAT", "Checkpoint", "folder", "identity", "listed", "load_training_state", "resolve", "save", "verify"]

log = logging.getLogger("megaflux")
WAYS_OUT = (
    "Three ways out: put the named file back (from a copy) and start again; or give another --run.dir and begin anew; "
    "or move {root} away, which gives up what it holds, and begin anew here"
)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its files verified."""

    path: Path
    manifest: dict[str, Any]
    refused: list[str] = field(default_factory=list)
    """Why newer ones were not taken, one line each."""

    @property
    def update(self) -> int:
        """Updates done."""
        return self.manifest["update"]

    @property
    def stage(self) -> int:
        """Index of the stage whose optimizer it holds."""
        return self.manifest["stage"]

    @property
    def world_size(self) -> int:
        return self.manifest["world_size"]

    @property
    def data(self) -> dict[str, Any]:
        """Position of the loader."""
        return self.manifest["data"]


def save(
    config: Config,
    engine: StageEngine,
    update: int,
    data: dict[str, Any],
    base: str,
    world: World,
    guard: dict[str, Any] | None = None,
    resumed_from: int | None = None,
    plan: dict[str, Any] | None = None,
) -> Path:
    """Write a checkpoint after `update` updates; returns its folder. Collective.

    base: fingerprint of the weights that the run started from (`Models.base`). guard: state of the spike rule.
    resumed_from: update of the checkpoint that this process began with, which is kept. plan: the stage's micro-batch and
    activation policies, and what they were chosen for (out_of_memory.Plan). UserError, alike on all ranks,
    where the disk refuses; the checkpoints before stay.
    """
    partial, final = manifest.partial_of(config.run.dir, update), folder(config.run.dir) / manifest.name_of(update)
    with _written(partial, final, world):
        if world.is_main:
            manifest.clear(partial)
            partial.mkdir(parents=True)
    weights = trained.gather_share(config, engine, world)  # collective, so before anything can fail on one rank
    with _written(partial, final, world):
        with _errors_after(engine), _weights_left_out(engine):
            engine.deepspeed.save_checkpoint(
                str(partial), tag="deepspeed", client_state={}, save_latest=False, exclude_frozen_parameters=True
            )
        torch.save(distributed.rng_state(), partial / f"rng-rank{world.rank:04d}.pt")
        trained.write_share(weights, partial, world)
        # Each rank syncs and hashes what it wrote: a machine has its own unwritten pages, and it all goes side by side.
        mine = [file for file in manifest.files_in(partial) if writer_of(file.name) == world.rank]
        for file in mine:
            manifest.sync(file)
        files = manifest.inventory(partial, mine)
    files = {name: entry for of_rank in gathered(files, world) for name, entry in of_rank.items()}
    with _written(partial, final, world):
        if world.is_main:
            there = min(
                sum(name.startswith(start) and name.endswith(end) for name in files)
                for start, end in (("rng-", ".pt"), ("deepspeed/", "optim_states.pt"), ("weights", ".safetensors"))
            )
            if there != world.size:
                raise UserError(
                    f"{partial}: {there} of {world.size} ranks' shards are here; run.dir must be on storage "
                    "that all machines share"
                )
            manifest.publish(
                partial,
                final,
                {
                    "format": FORMAT,
                    "update": update,
                    "stage": engine.stage,
                    "stage_name": config.stages[engine.stage].name,
                    "world_size": world.size,
                    "data": data,
                    "identity": identity(config),
                    "base": base,
                    "deepspeed": engine.sharding,
                    "guard": guard or {},
                    "plan": plan or {},
                    "started_with": saved.snapshot(config.run.dir),
                },
                files,
            )
            # In a row of dropped updates the run may go back, to one that must still be there.
            if not (guard or {}).get("in_a_row"):
                _prune(config, () if resumed_from is None else (resumed_from,))
    return final


def _prune(config: Config, protected: Collection[int]) -> None:
    try:
        manifest.prune(config.run.dir, config.train.keep_checkpoints, milestones(config), protected)
    except OSError as error:  # the checkpoint is there; an old one too many is no reason to stop
        log.warning("%s: %s; an old checkpoint stays", error.filename, error.strerror)


def milestones(config: Config) -> set[int]:
    """Updates whose checkpoints are never deleted: each stage's last, and every `keep_every`-th."""
    every = config.train.keep_every
    return set(config.stage_ends()) | (set(range(every, config.train.updates + 1, every)) if every else set())


def most_at_once(config: Config, update: int) -> int:
    """How many checkpoints will be there at the same time after this update: those that come and go, the one being
    written, and those kept for good; or, in a short run, all that are due and one that a signal asks for."""
    every = set(range(0, config.train.updates, config.train.checkpoint_every)) | {config.train.stop_after}
    kept = sum(milestone > update for milestone in milestones(config))
    due = sum(save > update for save in milestones(config) | every)
    return min(config.train.keep_checkpoints + 1 + kept, due + 1)


def resolve(config: Config, ds_config: dict[str, Any], world: World, sound: bool = False) -> Checkpoint | None:
    """The newest checkpoint of the run folder whose every file is whole; None where the folder holds no trace of any.

    Damaged newer ones are passed over and said. UserError where there are some and none can be used, or this run is
    another one: a run never starts over silently. Rank 0 looks, all hear the same.

    sound: pass over those that were saved between dropped updates, too; going back to them would change nothing.
    """
    found: Checkpoint | str | None = None
    if world.is_main:
        try:
            found = _resolve(config, ds_config, world.size, sound)
        except UserError as error:
            found = str(error)
        except OSError as error:
            found = (
                f"{error.filename or config.run.dir}: {error.strerror}; run.dir must be a folder that can be written"
            )
    found = distributed.from_main(found, world)
    if isinstance(found, str):
        raise UserError(found, agreed=True)
    return found


def _resolve(config: Config, ds_config: dict[str, Any], world_size: int, sound: bool = False) -> Checkpoint | None:
    root = folder(config.run.dir)
    if config.run.resume == "never" and listed(config.run.dir):
        raise UserError(f"run.dir: {config.run.dir} holds checkpoints and run.resume is never; give another --run.dir")
    manifest.recover(config.run.dir, log.warning)
    found = list(listed(config.run.dir).values())
    if not found:
        aside = sorted(path.name for path in root.glob("update-*")) if root.is_dir() else []
        if aside:
            raise UserError(
                f"{root}: holds no checkpoint under its own name, only {', '.join(aside[:3])}. "
                + WAYS_OUT.format(root=root)
            )
        if config.run.resume == "must":
            raise UserError(f"run.dir: {config.run.dir} holds no checkpoint and run.resume is must")
        return None
    refused: list[str] = []
    for path in reversed(found):
        try:
            content = verify(path)
        except manifest.NewerFormat:
            raise
        except UserError as error:
            refused.append(str(error))
            continue
        if sound and content.get("guard", {}).get("in_a_row"):
            continue
        _check_same_run(path, content, config, ds_config, world_size)
        for line in refused:
            log.warning("%s; going on from %s, the newest that is whole", line, path.name)
        return Checkpoint(path, content, refused)
    if sound and not refused:
        return None
    raise UserError(
        f"{refused[0]}; and no other of the {len(found)} checkpoints is whole. " + WAYS_OUT.format(root=root)
    )


def _check_same_run(
    path: Path, content: dict[str, Any], config: Config, ds_config: dict[str, Any], world_size: int
) -> None:
    """UserError where a whole checkpoint is of another run than this one."""
    if "parameter_order" not in content["deepspeed"]:
        raise UserError(
            f"{path}: an earlier megaflux began this run, and its optimizer shards have another order; "
            "finish the run with that version, or give another --run.dir"
        )
    if saved.changed({"deepspeed": content["deepspeed"]}, content["format"], {"deepspeed": sharding(ds_config)}):
        raise UserError(
            f"--deepspeed: {path} was saved with {content['deepspeed']}, this file says "
            f"{sharding(ds_config)}; give the one the run began with"
        )
    if content["world_size"] != world_size and content["deepspeed"]["zero_stage"] != 2:
        raise UserError(
            f"{path}: saved by {content['world_size']} ranks, this run has {world_size}, and ZeRO-3's shards "
            f"are not cut anew; start it with {content['world_size']}"
        )
    changed = saved.changed(content["identity"], content["format"], identity(config))
    if changed:
        raise UserError(
            f"run.dir: {config.run.dir} holds a run with other {', '.join(changed)}; restore the old values "
            f"(they are in {config.run.dir}/config.yaml) or give another --run.dir"
        )


def load_training_state(checkpoint: Checkpoint, engine: StageEngine, world: World) -> None:
    """Optimizer and random state into an engine of the same stage. Collective."""
    if checkpoint.world_size != world.size:  # cut anew, by name; the global random state of other ranks says nothing
        engine.take_over(repartition.read(checkpoint.path / "deepspeed", checkpoint.world_size, engine.shapes()))
        log.info(
            "%s was saved by %d ranks; its optimizer state is cut anew for %d",
            checkpoint.path.name,
            checkpoint.world_size,
            world.size,
        )
        return
    path, _ = engine.deepspeed.load_checkpoint(
        str(checkpoint.path), tag="deepspeed", load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:  # DeepSpeed's way of saying that it found nothing
        raise UserError(f"{checkpoint.path}/deepspeed: cannot be loaded; move {checkpoint.path.name} away")
    file = checkpoint.path / f"rng-rank{world.rank:04d}.pt"
    with named(str(file)):
        distributed.set_rng_state(torch.load(file, weights_only=True))


def identity(config: Config) -> dict[str, Any]:
    """What must be the same for a checkpoint to continue a run, as plain data."""
    values = config.model_dump(mode="json")
    same_result = ("activation_checkpointing", "kernels")  # within rounding, and so a run's owner may change them
    kept = {f"model.{key}": value for key, value in values["model"].items() if key not in same_result}
    for name in ("model.flux", "model.vlm", "model.vae"):  # `hub:` says where to look, and not what is there
        kept[name] = kept[name] and kept[name].removeprefix(HUB)
    kept |= {f"data.{key}": values["data"][key] for key in ("longest_side", "aspect_ratios", "condition")}
    kept |= {f"train.{key}": values["train"][key] for key in ("updates", "global_batch_size")}
    return kept | {"stages": values["stages"], "run.seed": values["run"]["seed"], "flow": values["flow"]}


@contextmanager
def _written(partial: Path, final: Path, world: World) -> Iterator[None]:
    """A part of a save that all ranks leave alike: where one of them fails, all raise its NoRoom, and what is there goes.

    Inside, only what every rank does without waiting for another after it failed; the wait is at the end."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError on a full disk
        if is_out_of_memory(error):  # of the GPU; the others leave as they do where a rank dies
            raise
        problem = (
            f"{final}: cannot be written ({getattr(error, 'strerror', None) or ' '.join(str(error).split())[:200]})"
        )
    first = first_problem(problem, world)
    if first is not None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise NoRoom(first, agreed=True)


@contextmanager
def _errors_after(engine: StageEngine) -> Iterator[None]:
    """What DeepSpeed cannot write is raised once it is through: it ends with a barrier, where the other ranks would wait
    for one that raised before."""
    writer, errors = engine.deepspeed.checkpoint_engine, []
    real = writer.save

    def save(*args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            errors.append(error)

    # Nor its script that puts shards together, another file that a full disk refuses: our weights' files are that.
    writer.save, engine.deepspeed._copy_recovery_script = save, lambda path: None
    try:
        yield
    finally:
        del writer.save, engine.deepspeed._copy_recovery_script
    if errors:
        raise errors[0]


@contextmanager
def _weights_left_out(engine: StageEngine) -> Iterator[None]:
    """Without DeepSpeed's own copy of the weights, which rank 0 would write alone: what trains is in our files, and loading
    a checkpoint puts those into the module before there is an engine. (ZeRO-3 has only names in that place.)"""
    if engine.zero_stage < 3:
        engine.deepspeed.module_state_dict = lambda **_: {}
    try:
        yield
    finally:
        vars(engine.deepspeed).pop("module_state_dict", None)


def writer_of(name: str) -> int:
    """Rank that wrote a file of a checkpoint: its number is in DeepSpeed's names of shards and in ours; the rest is 0's."""
    found = re.search(r"(?:pp_rank_|rng-rank|weights-)(\d+)", name)
    return int(found[1]) if found else 0
