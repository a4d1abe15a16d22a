"""What follows each update, in this order: record it, look at the guard, save, validate, show a panel, leave if asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megaflux.common.errors import is_out_of_memory, one_line
from megaflux.common.ranks import barrier, gathered
from megaflux.config.schema import Config
from megaflux.training import distributed, pictures, validation
from megaflux.training.checkpoint import space, weights
from megaflux.training.checkpoint.write import write_checkpoint
from megaflux.training.engine import release_memory
from megaflux.training.planning import memory
from megaflux.training.survival.events import Fault, Kind
from megaflux.training.trainer import Divergence, Trainer, Verdict, due
from megaflux.training.update_result import UpdateResult

log = logging.getLogger("megaflux")


class _GivenUp(Exception):
    """A signal came while a panel was sampled."""


class Upkeep:
    """Called by the loop: `before_stage` when a stage's engine is built, `after_update` after each update."""

    def __init__(self, pending_loss: bool = False, pending_panel: bool = False):
        """pending_loss, pending_panel: due at the checkpoint that this process starts from, but the earlier process ended
        before it had shown it."""
        self._pending_loss, self._pending_panel = pending_loss, pending_panel

    @property
    def pending(self) -> bool:
        """Whether anything of that is still to be shown."""
        return self._pending_loss or self._pending_panel

    def before_stage(self, trainer: Trainer) -> None:
        """Curves of the stage's plan; the loss of the untrained model; what is pending. Collective."""
        trainer.monitor.scalars(trainer.run.plan.scalars(), trainer.updates_done)
        if trainer.updates_done == 0 or self._pending_loss:
            validate(trainer)
        if self._pending_panel:
            show_panel(trainer)
        self._pending_loss = self._pending_panel = False

    def after_update(self, trainer: Trainer, result: UpdateResult) -> Verdict:
        """Everything that follows an update; returns what follows, the same on all ranks. Collective.

        A signal only sets a flag (survival/watch.py). Here the ranks look at it together, after the update and again after
        pictures, which take minutes; what was asked for is saved before the verdict."""
        run, update = trainer.run, trainer.updates_done
        run.watch.moved()
        self._record(trainer, result)
        if result.drop and trainer.guard.exhausted:
            position = trainer.loader.state_dict()
            trainer.divergence = Divergence(result.drop, position, trainer.guard.dropped)
            return Verdict.GO_BACK
        leaving = trainer.asked_to_leave()
        must_save = leaving or update in (trainer.stage_end, trainer.last_update)
        with trainer.monitor.not_counted(), run.watch.slow_section():
            saved = False
            # Between dropped updates nothing has changed since the last save.
            if must_save or (due(update, run.config.train.checkpoint_every) and not trainer.guard.in_a_row):
                saved = save_checkpoint(trainer, must_save)
            if not leaving and show_what_is_due(trainer) and trainer.asked_to_leave():
                leaving = True
                if not saved:
                    save_checkpoint(trainer, must=True)
        return Verdict.LEAVE if leaving else Verdict.CONTINUE

    def _record(self, trainer: Trainer, result: UpdateResult) -> None:
        """Curves, progress bar, and what was dropped."""
        trainer.monitor.update(result, trainer.stage, trainer.updates_done, trainer.guard.dropped)
        if result.drop:
            keys = gathered(result.keys, trainer.run.world)
            trainer.monitor.dropped(trainer.updates_done, result.drop, keys)


def save_checkpoint(trainer: Trainer, must: bool) -> bool:
    """Returns True if a checkpoint was written. must: raise NoRoom if the disk refuses it; otherwise continue
    without it, with an error in the log. Collective."""
    run, engine, update = trainer.run, trainer.engine, trainer.updates_done
    resumed_from = trainer.resumed.update if trainer.resumed else None
    try:
        trained = weights.count_trained(run.config, engine.module, engine.stage)
        space.check(run.config, engine, trained, run.world, at_once=None)
        with trainer.monitor.timed(Kind.SAVE, update):
            write_checkpoint(
                run.config, engine, trainer.progress, trainer.models.origin, run.world, trainer.average, resumed_from
            )
    except space.NoRoom as error:
        if must:
            raise
        if run.world.is_main:
            log.error("error, continuing without this checkpoint: %s", error)
        run.events.fault(Fault.DISK, update, str(error))
        return False
    return True


def show_what_is_due(trainer: Trainer) -> bool:
    """Validation loss and panel, if they are due after this update; returns True if any was. Collective."""
    loss, panel = shown_after(trainer.run.config, trainer.updates_done)
    if loss:
        validate(trainer)
    if panel:
        show_panel(trainer)
    return loss or panel


def validate(trainer: Trainer) -> None:
    """Seeded validation loss, also of the weights' average where there is one (ema_loss, ...), to TensorBoard, the progress bar and
    RUN/validation.jsonl. Collective."""
    run, engine, monitor, update = trainer.run, trainer.engine, trainer.monitor, trainer.updates_done

    def measured() -> dict[str, float]:
        return validation.validation_loss(
            engine.module, run.config, trainer.models, trainer.references, run.world, run.watch.moved
        )

    with monitor.timed(Kind.VALIDATION, update):
        values = measured()
        if trainer.average.decay:
            of_average = values  # before the first update it is the weights
            if trainer.average.updates:
                with trainer.average.in_place_of_weights(engine):
                    of_average = measured()
            values = values | {f"ema_{name}": value for name, value in of_average.items()}
    monitor.scalars({f"validation/{name}": value for name, value in values.items()}, update)
    monitor.show(val=f"{values['loss']:.3f}", gap=f"{values['gap']:.2f}" if "gap" in values else "-")
    monitor.write_line("validation.jsonl", {"update": update, **values})


def show_panel(trainer: Trainer) -> None:
    """Rows [reference | variations of fixed seeds], to TensorBoard and RUN/samples. Collective.

    Rank 0 samples alone, and the others wait; under ZeRO-3 all ranks run the model together. Given up when a signal asks to
    leave (minutes of pictures must not cost the save), and skipped with a warning when the GPU has no memory for it."""
    run, monitor, update = trainer.run, trainer.monitor, trainer.updates_done
    alone = trainer.engine.zero_stage < 3
    if not run.world.is_main and alone:
        with run.watch.slow_section(waiting=True):
            barrier(run.world)
        return

    def on_step() -> None:
        run.watch.moved()
        if alone and run.watch.signal is not None:
            raise _GivenUp

    references = trainer.references
    index = range(min(run.config.validation.panel_samples, len(references.keys)))
    try:
        with monitor.timed(Kind.VALIDATION, update):
            made = pictures.variations(run.config, trainer.models, references, index, memory.PANEL, on_step=on_step)
    except _GivenUp:
        made = None
    except RuntimeError as error:
        if not (alone and is_out_of_memory(error)):
            raise
        # A panel must not end a run, whose next start would end here as well.
        made, why = None, f"the panel is left out: {one_line(error)}"
        log.warning("update %d: %s", update, why)
        run.events.fault(Fault.OUT_OF_MEMORY, update, why)
    if made is None and alone:
        release_memory()  # after the handler, whose traceback holds what the sampling had made
    if run.world.is_main and made is not None:
        monitor.picture("variations", pictures.contact_sheet(references, index, made), update)
    if alone:
        barrier(run.world)


def shown_after(config: Config, update: int) -> tuple[bool, bool]:
    """Whether a validation loss, and whether a panel, is to be shown after an update."""
    at_end = update in config.stage_ends()
    every = config.validation
    return at_end or due(update, every.every), at_end or due(update, every.panel_every)


def left_by_earlier_process(config: Config, update: int, world: distributed.World) -> tuple[bool, bool]:
    """What of `shown_after` an earlier process, killed or asked to leave, did not show after the update that it had saved.
    Collective."""
    shown = (False, False)
    if world.is_main:
        shown = (update in validated_updates(config.run.dir), pictures.picture_file(config.run.dir, update).is_file())
    there = distributed.from_main(shown, world)
    wanted = shown_after(config, update)
    return wanted[0] and not there[0], wanted[1] and not there[1]


def validated_updates(run_dir: str | Path) -> set[int]:
    """Updates that RUN/validation.jsonl has a line of; torn lines are ignored."""
    file = Path(run_dir) / "validation.jsonl"
    updates = set()
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            updates.add(json.loads(line)["update"])
        except (ValueError, KeyError, TypeError):
            continue
    return updates
