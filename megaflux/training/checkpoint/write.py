"""Writing a checkpoint: all ranks at the same time, whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megaflux.common.errors import UserError, is_out_of_memory, one_line
from megaflux.common.ranks import World, first_problem, gathered
from megaflux.config.schema import Config
from megaflux.training import distributed
from megaflux.training.average import WeightAverage
from megaflux.training.checkpoint import manifest, retention, saved, weights
from megaflux.training.checkpoint.identity import identity
from megaflux.training.checkpoint.space import NoRoom
from megaflux.training.checkpoint.state import Progress
from megaflux.training.engine import AVERAGE, StageEngine


def write_checkpoint(
    config: Config,
    engine: StageEngine,
    progress: Progress,
    origin: dict[str, Any],
    world: World,
    average: WeightAverage,
    resumed_from: int | None = None,
) -> Path:
    """Write a checkpoint and delete those no longer kept; returns its folder. Collective.

    average: of the weights. origin: fingerprints of the weights that the run began from (`Models.origin`).
    resumed_from: update of the checkpoint that this process started from, which is kept. UserError, the same on all
    ranks, if the disk refuses; earlier checkpoints stay.
    """
    partial = manifest.partial_of(config.run.dir, progress.update)
    final = manifest.folder(config.run.dir) / manifest.name_of(progress.update)
    with _written(partial, final, world):
        if world.is_main:
            manifest.clear(partial)
            partial.mkdir(parents=True)
    # Collective, so before anything can fail on one rank.
    trained, averages = weights.gather_share(config, engine, world), average.gather_share(engine)
    with _written(partial, final, world):
        with _errors_after(engine), _weights_left_out(engine), _averages_left_out(engine):
            engine.deepspeed.save_checkpoint(
                str(partial), tag="deepspeed", client_state={}, save_latest=False, exclude_frozen_parameters=True
            )
        torch.save(distributed.rng_state(), partial / f"rng-rank{world.rank:04d}.pt")
        weights.write_share(trained, partial, world)
        if average.decay:
            weights.write_share(averages, partial, world, weights.AVERAGE)
        # Each rank syncs and hashes what it wrote: a machine has its own unwritten pages, and the ranks work in parallel.
        mine = [file for file in manifest.files_in(partial) if writer_of(file.name) == world.rank]
        for file in mine:
            manifest.sync(file)
        files = manifest.inventory(partial, mine)
    files = {name: entry for of_rank in gathered(files, world) for name, entry in of_rank.items()}
    with _written(partial, final, world):
        if world.is_main:
            _check_complete(partial, files, world.size, bool(average.decay))
            content = {
                "format": manifest.FORMAT,
                "update": progress.update,
                "stage": progress.stage,
                "stage_name": config.stages[progress.stage].name,
                "world_size": world.size,
                "data": progress.data,
                "identity": identity(config),
                **origin,
                "deepspeed": engine.sharding,
                "groups_by_part": engine.by_part,
                "guard": progress.guard,
                "plan": progress.plan,
                **({"average": {"updates": average.updates}} if average.decay else {}),
                "started_with": saved.snapshot(config.run.dir),
            }
            manifest.publish(partial, final, content, files)
            # Between dropped updates the run may have to return to an older one.
            if not progress.guard.get("in_a_row"):
                retention.prune(config, () if resumed_from is None else (resumed_from,))
    return final


def _check_complete(partial: Path, files: dict[str, Any], world_size: int, averaged: bool) -> None:
    """UserError unless every rank's shards are visible here."""
    kinds = [("rng-", ".pt"), ("deepspeed/", "optim_states.pt"), (weights.WEIGHTS, ".safetensors")]
    kinds += [(weights.AVERAGE, ".safetensors")] * averaged
    there = min(sum(name.startswith(start) and name.endswith(end) for name in files) for start, end in kinds)
    if there != world_size:
        raise UserError(
            f"{partial}: {there} of {world_size} ranks' shards are here; run.dir must be on storage "
            "that all machines share"
        )


def writer_of(name: str) -> int:
    """Rank that wrote a file of a checkpoint: shards, ours and DeepSpeed's, have its number in their names; the other
    files are rank 0's."""
    found = re.search(r"(?:pp_rank_|rng-rank|weights-|average-)(\d+)", name)
    return int(found[1]) if found else 0


@contextmanager
def _written(partial: Path, final: Path, world: World) -> Iterator[None]:
    """A part of a save that succeeds on all ranks or raises NoRoom on all of them, after removing the unfinished folder.

    Inside, no rank may wait for another, since that one may have failed; the ranks meet at the end."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError on a full disk
        if is_out_of_memory(error):  # of the GPU: this rank ends, and the others leave as they do when a rank dies
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        problem = f"{final}: cannot be written ({reason})"
    first = first_problem(problem, world)
    if first is not None:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise NoRoom(first, agreed=True)


@contextmanager
def _errors_after(engine: StageEngine) -> Iterator[None]:
    """Raise what DeepSpeed could not write only when it is through: it ends with a barrier, at which the other ranks would
    wait for a rank that raised earlier."""
    writer, errors = engine.deepspeed.checkpoint_engine, []
    real = writer.save

    def save(*args: Any, **kwargs: Any) -> Any:
        try:
            return real(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            errors.append(error)

    # DeepSpeed's script that joins shards is left out: one more file to fail on a full disk, and our weights' files are
    # joined already.
    writer.save, engine.deepspeed._copy_recovery_script = save, lambda path: None
    try:
        yield
    finally:
        del writer.save, engine.deepspeed._copy_recovery_script
    if errors:
        raise errors[0]


@contextmanager
def _weights_left_out(engine: StageEngine) -> Iterator[None]:
    """Leave out DeepSpeed's own copy of the weights, which rank 0 would write alone: ours are loaded into the module before
    there is an engine. (ZeRO-3 writes only names there.)"""
    if engine.zero_stage < 3:
        engine.deepspeed.module_state_dict = lambda **_: {}
    try:
        yield
    finally:
        vars(engine.deepspeed).pop("module_state_dict", None)


@contextmanager
def _averages_left_out(engine: StageEngine) -> Iterator[None]:
    """Leave the averages out of DeepSpeed's copy of Adam's state: ours are whole tensors by name, which any number of ranks reads,
    and which export and generation read without the optimizer's files."""
    state = engine.deepspeed.optimizer.optimizer.state
    averages = {flat: of_flat.pop(AVERAGE) for flat, of_flat in state.items() if AVERAGE in of_flat}
    try:
        yield
    finally:
        for flat, values in averages.items():
            state[flat][AVERAGE] = values
