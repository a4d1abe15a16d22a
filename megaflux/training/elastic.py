"""A run that goes on with another number of ranks: the same global batches, cut into other micro-batches.

What all ranks draw together, of one bucket, is fixed when a run begins (ranks x micro-batch); later ranks share it.
The optimizer's shards are cut anew in repartition.py.
"""

from __future__ import annotations

import logging

from megaflux.config import Config
from megaflux.data.pieces import global_micro_batch
from megaflux.errors import UserError
from megaflux.training.checkpoint import Checkpoint

log = logging.getLogger("megaflux")


def drawn(config: Config, resumed: Checkpoint | None, world_size: int) -> int:
    """Samples that all ranks draw together."""
    return global_micro_batch(resumed.data) if resumed else config.train.micro_batch_size * world_size


def fit(config: Config, resumed: Checkpoint | None, world_size: int) -> Config:
    """The configuration with the largest micro-batch, up to its own, that divides a rank's share of what is drawn.

    UserError: ranks that cannot share it evenly. The same on all ranks."""
    together, micro = drawn(config, resumed, world_size), config.train.micro_batch_size
    if together % world_size:
        fitting = [n for n in range(1, together + 1) if together % n == 0]
        raise UserError(f"run.dir: this run draws {together} pictures at a time, which {world_size} ranks cannot share "
                        f"evenly; use {', '.join(map(str, fitting))} ranks", agreed=True)  # fmt: skip
    share = together // world_size
    fitting = max(m for m in range(1, min(micro, share) + 1) if share % m == 0)
    if fitting != micro:
        log.warning("train.micro_batch_size: %d, for %d ranks share the %d pictures that this run draws at a time",
                    fitting, world_size, together)  # fmt: skip
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": fitting})})
