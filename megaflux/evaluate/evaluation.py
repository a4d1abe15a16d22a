"""The whole evaluation: what is there already, the judge, the batches of each checkpoint shared among the ranks, the report.

Ranks take every size-th batch; all of them see OUT, where the results of batches are. Rank 0 trains the judge while the others wait,
and writes the report from the files of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.ranks import World, barrier, raise_first
from megaflux.evaluate import loss as losses
from megaflux.evaluate import work
from megaflux.evaluate.conditions import Conditions, choose
from megaflux.evaluate.judge import Judge
from megaflux.evaluate.making import Maker
from megaflux.evaluate.options import Settings
from megaflux.evaluate.samples import HeldOut
from megaflux.evaluate.sheets import GridSheet, grid_sheet
from megaflux.evaluate.work import Asked
from megaflux.models.pretrained import Models
from megaflux.training.engine import release_memory

log = logging.getLogger("megaflux")
Progress = Callable[[], object]


@dataclass
class Subject:
    """A checkpoint that is evaluated."""

    path: str
    """As the user gave it."""
    source: dict[str, Any]
    """Where its weights come from."""
    modes: tuple[str, ...]
    """Kinds of condition of its training."""
    models: Models | None
    """For the losses; None: they are not taken."""
    maker: Maker
    loss_guidance: float
    """Guidance value of the losses: the middle of training's."""

    def free(self) -> None:
        """Give up the networks, for another checkpoint's."""
        self.models = None
        del self.maker
        release_memory()


@dataclass(frozen=True)
class Task:
    """What is computed of a checkpoint, the same on every rank."""

    conditions: Conditions
    loss_batches: list[list[int]]
    pictures: list[Asked]
    picture_batches: list[list[Asked]]
    sheet: GridSheet | None


def plan(subject: Subject, held_out: HeldOut, settings: Settings) -> Task:
    """Everything that there is to do for a checkpoint."""
    conditions = Conditions(choose(settings.condition, subject.modes, held_out), settings.references)
    first = held_out.samples[: held_out.first]
    loss_batches = losses.batches(first, settings.batch_size) if "loss" in settings.parts else []
    captioned = any(sample.caption for sample in first)
    words = "words" in settings.parts and captioned and "text" in subject.modes
    pictures = work.asked(held_out, conditions, settings.seeds, words)
    if "pictures" not in settings.parts and held_out.grid is None:
        pictures = [one for one in pictures if one.kind == work.WORDS]
    sheet = None
    if held_out.grid is not None:
        sheet = grid_sheet(held_out, held_out.grid, conditions, settings.seeds[0])
        pictures += list(sheet.pictures.values())
    batches = work.in_batches(pictures, subject.maker, settings.batch_size)
    return Task(conditions, loss_batches, pictures, batches, sheet)


def compute(
    subject: Subject, task: Task, held_out: HeldOut, settings: Settings, root: Path, world: World, done: Progress
) -> None:
    """This rank's batches that have no result yet. Collective: returns when all ranks have theirs. done: called after each batch.

    UserError where a file cannot be written, or where the ranks do not see one folder."""
    first, problem = held_out.samples[: held_out.first], None
    try:
        for number, index in _mine(task.loss_batches, world):
            file = work.losses_file(root, number)
            if not file.is_file():
                assert subject.models is not None
                found = losses.losses(
                    subject.models, first, index, task.conditions, subject.loss_guidance, settings.seeds[0]
                )
                work.write_losses(file, [first[i].key for i in index], found)
            done()
        for _, batch in _mine(task.picture_batches, world):
            if not work.is_made(batch, root):
                work.make(batch, subject.maker, root)
            done()
    except OSError as error:
        problem = f"{root}: cannot be written ({error.strerror or error}); make room, or give another --out"
    raise_first(problem, world)
    barrier(world)
    if world.is_main and not all(work.is_made(batch, root) for batch in task.picture_batches):
        problem = f"{root}: not all ranks write into one folder; give an --out that all of them see"
    raise_first(problem, world)


def share(task: Task, world: World) -> int:
    """How many batches this rank computes."""
    return sum(1 for batches in (task.loss_batches, task.picture_batches) for _ in _mine(batches, world))


def _mine(batches: Sequence[Any], world: World) -> list[tuple[int, Any]]:
    return [(number, batch) for number, batch in enumerate(batches) if number % world.size == world.rank]


def check_judge(judge: Judge, held_out: HeldOut) -> None:
    """UserError where a judge knows other styles or contents than the grid's."""
    grid = held_out.grid
    if grid is not None and (set(judge.styles) != set(grid.styles) or not set(judge.contents) <= set(grid.contents)):
        raise UserError("--judge: was trained on another grid; leave it out, and one is trained for these data")
