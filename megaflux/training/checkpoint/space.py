"""Is there room for the checkpoints to come? Asked before a stage's first update and before each save."""

from __future__ import annotations

import os

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.parse import Config
from megaflux.training import distributed
from megaflux.training.checkpoint import manifest
from megaflux.training.engine import StageEngine


class NoRoom(UserError):
    """The disk has no room for a checkpoint, or refused one."""


STATE_BYTES = 12  # per trainable parameter: master, exp_avg and exp_avg_sq in fp32
MARGIN = 1.02  # file headers, rounding up to blocks
FILES_EACH = 6  # beside a shard, a part of the weights and a random state per rank


def checkpoint_bytes(training: int, weights: int, item: int) -> int:
    """Size of one checkpoint. training: parameters that train in its stage; weights: that any stage so far has trained;
    item: bytes of one of them in the dtype that it trains in."""
    return int(MARGIN * (STATE_BYTES * training + item * weights))


def check(config: Config, engine: StageEngine, weights: int, world: World, at_once: int | None) -> None:
    """UserError, alike on all ranks, where the disk of run.dir has no room or no inodes for the checkpoints to come.

    at_once: how many will ever be there at the same time, if they stay this stage's size (`checkpoint.most_at_once`); those
    that are there count. None: one more than are there. Collective."""
    problem = None
    if world.is_main:
        there = len(manifest.listed(config.run.dir))
        wanted = 1 if at_once is None else max(1, at_once - there)
        item = next(engine.module.parameters()).element_size()
        need, files = (
            wanted * checkpoint_bytes(engine.num_trainable, weights, item),
            wanted * (3 * world.size + FILES_EACH),
        )
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
