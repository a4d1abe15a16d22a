"""Resuming on a different number of ranks: the same global batches, cut into other micro-batches.

What all ranks draw together, of one bucket, is fixed when a run begins (ranks x train.drawn_per_rank); later ranks share
it. The optimizer's shards are cut anew in repartition.py.
"""

from __future__ import annotations

import logging

from megaflux.common.errors import UserError
from megaflux.config.parse import Config
from megaflux.data.reading.position import Position
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.ds_config import divisors

log = logging.getLogger("megaflux")


def fit(config: Config, resumed: Checkpoint | None, world_size: int) -> Config:
    """The configuration with what each rank draws, and the largest micro-batch, up to its own, that divides it; where it is
    `auto`, up to what a rank drew when the run began (out_of_memory.Plan may choose another).

    UserError: ranks that cannot share evenly what the run draws at a time. The same on all ranks."""
    train = config.for_world(world_size).train
    together = (
        Position.from_state_dict(resumed.data).global_micro_batch if resumed else train.drawn_per_rank * world_size
    )
    if together % world_size:
        raise UserError(
            f"run.dir: this run draws {together} pictures at a time, which {world_size} ranks cannot share evenly; "
            f"use {', '.join(map(str, divisors(together)))} ranks",
            agreed=True,
        )
    share, wanted = together // world_size, config.train.given_micro_batch
    most = wanted or config.train.drawn_per_rank or share  # fewer ranks draw more each, but hold no more at a time
    micro = max(m for m in divisors(share) if m <= most)
    if wanted not in (None, micro):
        log.warning(
            "train.micro_batch_size: %d, since %d ranks share the %d pictures that this run draws at a time",
            micro,
            world_size,
            together,
        )
    return config.with_batches(share, micro)
