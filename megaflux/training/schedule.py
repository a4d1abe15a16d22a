"""The learning rate, a trapezoid over the run or over each stage, and the decay of the weights' average. A leaf: imports no torch."""

from __future__ import annotations

import math

from megaflux.config.recipe import Optim, Part
from megaflux.config.schema import Config


def learning_rate(peak: float, update: int, updates: int, optim: Optim) -> float:
    """Learning rate of an update, counted from 0, in a trapezoid over `updates`.

    Linear from peak / n to peak over the n updates of the warm-up, constant over the plateau, then linear towards 0, which it
    would reach one update after the last.
    """
    warmup = round(updates * optim.warmup_fraction)
    plateau = round(updates * optim.plateau_fraction)
    if update < warmup:
        return peak * (update + 1) / warmup
    falling = max(1, updates - warmup - plateau)
    return peak * min(1.0, (updates - update) / falling)


def learning_rates(config: Config, stage: int, update: int) -> dict[Part, float]:
    """Learning rate of each part that trains in a stage (an index), at an update of the run, counted from 0."""
    start, end = 0, config.train.updates
    if config.optim.schedule == "per_stage":
        ends = config.stage_ends()
        start, end = ends[stage - 1] if stage else 0, ends[stage]
    peaks = config.optim.peaks(config.stages[stage])
    parts = config.stages[stage].parts
    return {part: learning_rate(peaks[part].lr, update - start, end - start, config.optim) for part in parts}


def average_decay(decay: float, update: int) -> float:
    """Decay of the weights' average at the update-th update that it takes in, counted from 1: smaller at first, so that it
    leaves the weights that it began with (tf.train.ExponentialMovingAverage's num_updates)."""
    return min(decay, (1 + update) / (10 + update))


def left_of_beginning(decay: float, start: int, end: int) -> float:
    """The share that an average still has, after update `end`, of what it was after update `start`: the product of the decays
    between them. (1 + n) / (10 + n) is a quotient of gamma functions, so no update is visited."""
    rising = min(
        end, max(start, math.floor((10 * decay - 1) / (1 - decay)))
    )  # the last update whose decay is below `decay`
    log = math.lgamma(rising + 2) - math.lgamma(start + 2) + math.lgamma(start + 11) - math.lgamma(rising + 11)
    return math.exp(log + (end - rising) * math.log(decay)) if end > rising else math.exp(log)
