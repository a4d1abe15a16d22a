"""The learning rate: a trapezoid over the run, or over each stage. A leaf: imports no torch."""

from __future__ import annotations

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
