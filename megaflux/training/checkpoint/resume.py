"""Resuming: which checkpoint a run continues from, whether it belongs to this run, and loading it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.models.loading_errors import named
from megaflux.training import distributed
from megaflux.training.checkpoint import identity, manifest, reshard
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.engine import StageEngine

log = logging.getLogger("megaflux")
WAYS_OUT = (
    "Three ways out: restore the named file from a copy and start again; or start a new run with another --run.dir; "
    "or move {root} away (and init/ beside it, if there is one), which discards what it holds, and start a new run here"
)


def resolve(config: Config, ds_config: dict[str, Any], world: World, sound: bool = False) -> Checkpoint | None:
    """The newest complete checkpoint of the run's folder; None if there is no trace of any. Collective: rank 0 looks, and
    all ranks return or raise the same.

    Damaged newer ones are skipped with a warning. UserError if there are checkpoints and none can be used, or if they are
    another run's: a run never starts over silently.

    sound: also skip those saved between dropped updates, since returning to one of them would change nothing.
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
    root = manifest.folder(config.run.dir)
    if config.run.resume == "never" and manifest.listed(config.run.dir):
        raise UserError(f"run.dir: {config.run.dir} holds checkpoints and run.resume is never; give another --run.dir")
    manifest.recover(config.run.dir, log.warning)
    found = list(manifest.listed(config.run.dir).values())
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
            content = manifest.verify(path)
        except manifest.NewerFormat:
            raise
        except UserError as error:
            refused.append(str(error))
            continue
        if sound and content.get("guard", {}).get("in_a_row"):
            continue
        if problem := identity.problem(path, content, config, ds_config, world_size):
            raise UserError(problem)
        for line in refused:
            log.warning("%s; resuming from %s, the newest complete checkpoint", line, path.name)
        return Checkpoint(path, content, refused)
    if sound and not refused:
        return None
    raise UserError(
        f"{refused[0]}; and none of the {len(found)} checkpoints is complete. " + WAYS_OUT.format(root=root)
    )


def load_training_state(checkpoint: Checkpoint, engine: StageEngine, world: World) -> None:
    """Load optimizer and random state into an engine of the same stage. Collective."""
    saved_by, name = checkpoint.world_size, checkpoint.path.name
    regrouped = checkpoint.manifest.get("groups_by_part", False) != engine.by_part
    if saved_by != world.size or regrouped:  # by name
        engine.take_over(reshard.read(checkpoint.path / "deepspeed", saved_by, engine.shapes()))
    if saved_by != world.size:
        log.info("%s was saved by %d ranks; its optimizer state is resharded for %d", name, saved_by, world.size)
        return  # the random state of other ranks is of no use here
    if not regrouped:
        path, _ = engine.deepspeed.load_checkpoint(
            str(checkpoint.path), tag="deepspeed", load_module_strict=False, load_lr_scheduler_states=False
        )
        if path is None:  # DeepSpeed found nothing to load
            raise UserError(f"{checkpoint.path}/deepspeed: cannot be loaded; move {name} away")
        engine.configure_optimizer()
    file = checkpoint.path / f"rng-rank{world.rank:04d}.pt"
    with named(str(file)):
        distributed.set_rng_state(torch.load(file, weights_only=True))
