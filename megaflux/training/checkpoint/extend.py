"""More updates for a run that is resumed: where its stages end then, and what the learning rate does. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from megaflux.common.errors import UserError
from megaflux.config.schema import Config, Stage
from megaflux.training.checkpoint.saved import Begun
from megaflux.training.schedule import learning_rates


def extended(config: Config, begun: Begun) -> Config:
    """A resumed run's configuration with the ends of its stages.

    Ends of finished stages stay. Added updates go to the appended stages, by their shares; without any, to the running stage
    or, if all are finished, to the last one. Stages after the running one move with its end. UserError for fewer updates, a
    changed share, a missing stage, and appended stages without updates.
    """
    old = begun.config
    if old is None:
        return config
    _check(config, old, begun)
    config = _with_layers(config, old)
    added, appended = config.train.updates - old.train.updates, config.stages[len(old.stages) :]
    if not added:
        return _with_ends(config, old.train.stage_ends, old.train.ended_at)
    ends, running = old.stage_ends(), begun.stage
    if begun.update >= ends[running]:
        running = min(running + 1, len(ends) - 1)
    if appended:
        ends += _divided(appended, ends[-1], added)
    else:
        ends = [end + added if stage >= running else end for stage, end in enumerate(ends)]
    finished = (old.train.updates,) if begun.update == old.train.updates else ()
    return _with_ends(config, tuple(ends), old.train.ended_at + finished)


def _check(config: Config, old: Config, begun: Begun) -> None:
    where, updates = config.run.dir, config.train.updates
    if updates < old.train.updates:
        raise UserError(
            f"train.updates: {updates}, but {where} holds a run of {old.train.updates}, and a run may only be given more; "
            "leave it out, or end earlier with train.stop_after"
        )
    if len(config.stages) < len(old.stages):
        names = ", ".join(stage.name for stage in old.stages)
        raise UserError(f"stages: {where} holds a run with the stages {names}; list them all, and new ones after them")
    for i, (now, then) in enumerate(zip(config.stages, old.stages)):
        if now.share != then.share:
            raise UserError(
                f"stages.{i}.share: {now.share:g}, but {where} holds a run begun with {then.share:g}; leave it as it was"
            )
    new = len(config.stages) - len(old.stages)
    if new and updates - old.train.updates < new:
        raise UserError(
            f"stages.{len(old.stages)}: appended to a run of {old.train.updates} updates, all of which other stages have; "
            "raise train.updates by those of the new stages"
        )
    for name, kept in (("stage_ends", old.stage_ends()), ("ended_at", list(old.train.ended_at))):
        given = getattr(config.train, name)
        if given and list(given) != kept:
            raise UserError(f"train.{name}: {where} holds a run with {kept}; leave it out")


def _with_layers(config: Config, old: Config) -> Config:
    """With as many of Qwen2-VL's layers apart from the trunk as when the run began, where that followed from its stages.
    UserError if a stage now trains more."""
    if config.vlm_layers == old.vlm_layers or config.model.vlm_layers is not None:
        return config
    for i, stage in enumerate(config.stages):
        if stage.vlm_layers > old.vlm_layers:
            raise UserError(
                f"stages.{i}.vlm_layers: {stage.vlm_layers}, but {config.run.dir} holds a run begun with {old.vlm_layers} of "
                "Qwen2-VL's last layers apart from the frozen trunk; lower it to that, or begin a new run (from this one: "
                "model.init)"
            )
    model = config.model.model_copy(update={"vlm_layers": old.vlm_layers})
    return config.model_copy(update={"model": model})


def _divided(stages: Sequence[Stage], start: int, updates: int) -> list[int]:
    """Ends of stages that begin at `start` and take so many updates, at least one each, by their shares."""
    total, reached = math.fsum(stage.share for stage in stages), 0.0
    ends: list[int] = []
    for i, stage in enumerate(stages):
        reached += stage.share
        least, most = (ends[-1] if ends else start) + 1, start + updates - (len(stages) - 1 - i)
        ends.append(min(max(start + round(updates * reached / total), least), most))
    return ends


def _with_ends(config: Config, ends: tuple[int, ...] | None, ended_at: tuple[int, ...]) -> Config:
    train = config.train.model_copy(update={"stage_ends": ends, "ended_at": ended_at})
    return config.model_copy(update={"train": train})


def describe(config: Config, begun: Begun) -> str | None:
    """One line on a run's further updates, with the learning rate of the next update before and after; None: no more were
    given. config: from `extended`."""
    old = begun.config
    if old is None or config.train.updates == old.train.updates:
        return None
    ends, at = config.stage_ends(), begun.update
    stage = next(i for i, end in enumerate(ends) if end > at)
    before = learning_rates(old, min(stage, len(old.stages) - 1), at) if at < old.train.updates else {}
    now = learning_rates(config, stage, at)
    parts = [(part, before.get(part, 0.0), rate) for part, rate in now.items()]
    ended = " (it had ended)" if not before else ""
    if len({(then, rate) for _, then, rate in parts}) == 1:
        rates = f"from {parts[0][1]:.3g} to {parts[0][2]:.3g}"
    else:
        rates = ", ".join(f"{part} from {then:.3g} to {rate:.3g}" for part, then, rate in parts)
    taken = [
        f"{s.name} {start + 1} to {end}" for s, (start, end) in zip(config.stages, pairwise([0, *ends])) if end > at
    ]
    return (
        f"train.updates: {old.train.updates} -> {config.train.updates}; the learning rate of update {at + 1} goes {rates}{ended}; "
        f"updates by stage from here: {', '.join(taken)}"
    )
