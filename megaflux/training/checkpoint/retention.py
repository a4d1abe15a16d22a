"""Which checkpoints of a run are kept, and so how many there are at a time."""

from __future__ import annotations

import logging
from collections.abc import Collection

from megaflux.config.schema import Config
from megaflux.training.checkpoint import manifest

log = logging.getLogger("megaflux")


def milestones(config: Config) -> set[int]:
    """Updates whose checkpoints are never deleted: each stage's last, the run's last before it was given more, and every
    `keep_every`-th."""
    every = config.train.keep_every
    return {*config.stage_ends(), *config.train.ended_at} | (
        set(range(every, config.train.updates + 1, every)) if every else set()
    )


def most_at_once(config: Config, update: int) -> int:
    """The most checkpoints that will exist at the same time after this update: the newest ones, the one being written
    and the milestones; in a short run all that are due, and one that a signal asks for."""
    every = set(range(0, config.train.updates, config.train.checkpoint_every)) | {config.train.stop_after}
    kept = sum(milestone > update for milestone in milestones(config))
    due = sum(save > update for save in milestones(config) | every)
    return min(config.train.keep_checkpoints + 1 + kept, due + 1)


def prune(config: Config, protected: Collection[int]) -> None:
    """Delete all but the newest `keep_checkpoints`, the milestones and those of the protected updates. A failure is a
    warning: the new checkpoint is written, and an old one too many is no reason to stop."""
    try:
        manifest.prune(config.run.dir, config.train.keep_checkpoints, milestones(config), protected)
    except OSError as error:
        log.warning("%s: %s; an old checkpoint stays", error.filename, error.strerror)
