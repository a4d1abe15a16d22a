"""Resuming on a different number of ranks: the same global batches, cut into other micro-batches.

What all ranks together draw from one bucket at a time (ranks x train.drawn_per_rank) is fixed when a run begins; whatever
ranks resume it divide that among them. reshard.py divides the optimizer's state.
"""

from __future__ import annotations

import logging

from megaflux.common.errors import UserError
from megaflux.config.schema import Config
from megaflux.data.reading.position import Position
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.ds_config import batch_sizes, divisors

log = logging.getLogger("megaflux")


def fit(config: Config, resumed: Checkpoint | None, world_size: int) -> Config:
    """The configuration with what each rank draws at a time, and the largest micro-batch that divides it and is not larger
    than the configured one; for `auto`, not larger than what a rank drew when the run began (Plan may choose another).

    Raises UserError, the same on all ranks, if the ranks cannot share evenly what the run draws at a time."""
    if resumed:
        together = Position.from_state_dict(resumed.progress.data).global_micro_batch
    else:
        together = batch_sizes(config.for_world(world_size)).drawn * world_size
    if together % world_size:
        raise UserError(
            f"run.dir: this run draws {together} pictures at a time, which {world_size} ranks cannot share evenly; "
            f"use {', '.join(map(str, divisors(together)))} ranks",
            agreed=True,
        )
    share, wanted = together // world_size, config.train.given_micro_batch
    most = wanted or config.train.drawn_per_rank or share  # on fewer ranks each draws more, but holds no more at a time
    micro = max(m for m in divisors(share) if m <= most)
    if wanted not in (None, micro):
        log.warning(
            "train.micro_batch_size: %d, since %d ranks share the %d pictures that this run draws at a time",
            micro,
            world_size,
            together,
        )
    return config.with_batches(share, micro)
