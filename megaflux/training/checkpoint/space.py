"""Whether the disk has room for the next checkpoints: checked before a stage's first update and before each save."""

from __future__ import annotations

import os

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.training import distributed
from megaflux.training.checkpoint import manifest
from megaflux.training.engine import StageEngine


class NoRoom(UserError):
    """The disk has no room for a checkpoint, or writing one failed."""


STATE_BYTES = 12  # per trainable parameter: master, exp_avg and exp_avg_sq in fp32
AVERAGE_BYTES = 4  # per parameter that any stage so far has trained, where the weights are averaged
MARGIN = 1.02  # file headers, rounding up to blocks
FILES_EACH = 6  # besides each rank's shard, part of the weights and random state


def checkpoint_bytes(training: int, weights: int, item: int, averaged: bool = False) -> int:
    """Bytes of one checkpoint. training: parameters that its stage trains; weights: parameters that any stage so far has
    trained; item: bytes of one of them in the dtype it trains in; averaged: with their averages (optim.ema_decay)."""
    return int(MARGIN * (STATE_BYTES * training + (item + AVERAGE_BYTES * averaged) * weights))


def check(config: Config, engine: StageEngine, weights: int, world: World, at_once: int | None) -> None:
    """Raise NoRoom, on all ranks, if the disk of run.dir lacks room or inodes for the next checkpoints. Collective.

    weights: parameters trained so far (`count_trained`). at_once: the most checkpoints, existing ones included, that will
    exist at the same time (`retention.most_at_once`), all taken to be as large as this stage's; None: one more than now."""
    problem = None
    if world.is_main:
        there = len(manifest.listed(config.run.dir))
        wanted = 1 if at_once is None else max(1, at_once - there)
        item = next(engine.module.parameters()).element_size()
        averaged = config.optim.ema_decay > 0
        need = wanted * checkpoint_bytes(engine.num_trainable, weights, item, averaged)
        files = wanted * ((3 + averaged) * world.size + FILES_EACH)
        disk = os.statvfs(config.run.dir)
        free = disk.f_bavail * disk.f_frsize
        if free < need:
            problem = (
                f"run.dir: {config.run.dir} has {free / 1e9:.1f} GB free, and {wanted} checkpoint"
                f"{'s' * (wanted > 1)} of this stage need {need / 1e9:.1f} GB; make room, lower "
                "train.keep_checkpoints, or give another --run.dir"
            )
        elif disk.f_files and disk.f_favail < files:
            problem = (
                f"run.dir: {config.run.dir} has {disk.f_favail} inodes left, and {wanted} checkpoints need {files}; "
                "delete files there, or give another --run.dir"
            )
    problem = distributed.from_main(problem, world)
    if problem:
        raise NoRoom(problem, agreed=True)
