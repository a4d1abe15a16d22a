"""The end of a rank whose GPU ran out of memory.

Its peers may be inside a collective, so nothing can be agreed on: the rank writes how much the stage may plan with into
RUN/memory.json and exits with code 11, as one that hangs does. The next start plans within that.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megaflux.common.errors import STUCK, UserError, one_line
from megaflux.common.ranks import World
from megaflux.training import distributed
from megaflux.training.planning import limits
from megaflux.training.planning.trial import held_by_others
from megaflux.training.survival import watch
from megaflux.training.survival.events import Events, Fault

log = logging.getLogger("megaflux")
REPORTING = 10.0  # s to write to the run's folder, whose file system may hang


@dataclass(frozen=True)
class Situation:
    """Where a rank ran out of memory, and what follows."""

    run_dir: str
    world: World
    stage: str | None
    """Its name; None: before the first stage."""
    update: int
    """Updates done."""
    advice: str
    """What the next start does, or what the user can change."""
    limit: int | None = None
    """Bytes that the next start may plan with in this stage; None: as many as now."""
    final: bool = False
    """Whether the next start would end here too, unless other processes free memory of this GPU."""


def leave(error: BaseException, situation: Situation) -> NoReturn:
    """Record what happened, in RUN/memory.json and as an event, and end the process with exit code 11.

    Raises UserError instead if the situation is final and no other process holds memory of this GPU."""
    what = one_line(error)
    others, advice = held_by_others(situation.world.device), situation.advice
    if others:
        advice += f"; other processes hold {others / 1e9:.1f} GB of this GPU"
    where = "before the first stage" if situation.stage is None else f"in stage {situation.stage}"
    why = f"out of memory {where} after update {situation.update}: {what}; {advice}"
    reporter = threading.Thread(target=_record, args=(situation, why), daemon=True)
    reporter.start()
    reporter.join(REPORTING)
    if situation.final and not others:
        raise UserError(why)
    watch.leave(why, STUCK)


def nothing_fits(situation: Situation, micro_batch_size: int) -> NoReturn:
    """End a start on whose ranks no plan of a stage fits. Raises UserError on all ranks, or leaves with exit code 11 if
    other processes hold memory, as the same command may then fit later. Collective."""
    world = situation.world
    why = f"stage {situation.stage}: a micro-batch of {micro_batch_size} does not fit the GPU's memory"
    others = -distributed.min_over_ranks(-held_by_others(world.device), world)
    if others:
        why += f", of which other processes hold {others / 1e9:.1f} GB"
        if world.is_main:
            Events(situation.run_dir, enabled=True).fault(Fault.OUT_OF_MEMORY, situation.update, why)
        watch.leave(why, STUCK)
    raise UserError(f"{why}; {situation.advice}", agreed=True)


def _record(situation: Situation, why: str) -> None:
    if situation.limit is not None and situation.stage is not None:
        file = Path(situation.run_dir) / limits.FILE
        try:
            limits.lower(file, situation.stage, situation.limit, situation.world.rank)
        except OSError as error:
            log.error("%s: %s; the next start plans as this one did", file, error.strerror)
    # Recorded by whichever rank ran out: rank 0 may be waiting for it.
    Events(situation.run_dir, enabled=True).fault(Fault.OUT_OF_MEMORY, situation.update, why)
