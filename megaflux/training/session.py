"""A training process from start to end: join the other ranks, find what to resume, run the loop, return to a checkpoint
after divergence, and leave with an exit code."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import psutil

from megaflux.common.errors import STOPPED, UserError, is_out_of_memory
from megaflux.common.ranks import gathered
from megaflux.config.schema import Config
from megaflux.data.loader import build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.position import Position
from megaflux.models.pretrained import Models, load_models
from megaflux.training import distributed, frozen, upkeep, validation
from megaflux.training.average import WeightAverage
from megaflux.training.cache import cached_dataset
from megaflux.training.checkpoint import elastic, init_weights, resume, space, weights
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.ds_config import batch_sizes, compute_dtype
from megaflux.training.engine import release_memory
from megaflux.training.loop import train_stages
from megaflux.training.monitor import Monitor
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.plan import Plan
from megaflux.training.prepare_data import prepare_data
from megaflux.training.run_folder import lock_run_folder, write_configuration
from megaflux.training.survival.events import Events, Fault, Kind
from megaflux.training.survival.guard import DropReason, Guard
from megaflux.training.survival.watch import Watch
from megaflux.training.trainer import Divergence, Run, Trainer, Verdict
from megaflux.training.upkeep import Upkeep

log = logging.getLogger("megaflux")
LoadModels = Callable[..., Models]
"""(config, device, dtype) -> the models, with the same weights each time."""


def train(
    config: Config,
    ds_config: dict[str, Any],
    watch: Watch,
    load: LoadModels = load_models,
    assumed: Assumed | None = None,
) -> int:
    """Train through all stages, from the newest complete checkpoint of the run's folder if there is one.

    assumed: what the command line says of the GPUs, for the choice of the micro-batch. Returns the exit code: 0 when done,
    STOPPED when a signal asked to leave and everything is saved. Raises UserError for invalid input. Collective: every
    rank calls it.
    """
    world = distributed.start(deterministic=config.train.deterministic)
    # Each rank has read the run's folder itself, and network storage may not look the same everywhere.
    config, ds_config = distributed.from_main((config, ds_config), world)
    events = Events(config.run.dir, enabled=world.is_main)
    lock_run_folder(config, world)
    resumed = resume.resolve(config, ds_config, world)
    write_configuration(config, ds_config, world)  # as given: batch sizes per rank are fitted for this start only
    choose_micro_batch = config.train.micro_batch_size == "auto"
    config = elastic.fit(config, resumed, world.size)
    record_start(events, resumed, world.size)
    watch.on_hang = lambda why: events.fault(Fault.HANG, -1, why)
    prepare_data(config, world)
    init_weights.prepare(config, resumed, load, world)
    plan = Plan(config, ds_config, world, choose_micro_batch, assumed)
    run = Run(config, ds_config, world, events, watch, plan)
    try:  # failures before this leave no `stop` event, only their line on stderr
        verdict = run_until_verdict(run, resumed, load)
    except UserError as error:
        if isinstance(error, space.NoRoom):
            events.fault(Fault.DISK, -1, str(error))
        events.record(Kind.STOP, update=-1, why="error", detail=str(error))
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        plan.leave(error)
    watch.close()
    distributed.stop()
    return STOPPED if verdict is Verdict.LEAVE else 0


def run_until_verdict(run: Run, resumed: Checkpoint | None, load: LoadModels) -> Verdict:
    """Run the loop; after divergence run it again from the last sound checkpoint, past the data that was dropped.

    UserError, the same on all ranks, if there is none, or returning to it has not helped before."""
    returned_to: set[int] = set()
    divergence: Divergence | None = None
    while True:
        trainer = begin(run, resumed, divergence, load)
        pending = (
            upkeep.left_by_earlier_process(run.config, trainer.updates_done, run.world) if resumed else (False, False)
        )
        verdict = train_stages(trainer, Upkeep(*pending))
        trainer.monitor.close()
        trainer.loader.close()
        if verdict is not Verdict.GO_BACK:
            record_end(trainer, verdict)
            return verdict
        divergence = trainer.divergence
        assert divergence is not None  # comes with GO_BACK
        # Models are loaded again, since a checkpoint lacks the weights that only later stages change; never two at a time.
        del trainer
        release_memory()
        run.watch.pause()
        # Not where the last update left the run: that update may be the cause.
        resumed = resume.resolve(run.config, run.ds_config, run.world, sound=True)
        if resumed is None or resumed.update in returned_to:
            raise no_way_back(run, divergence, resumed)
        returned_to.add(resumed.update)
        if run.world.is_main:
            log.warning(
                "%d consecutive updates were dropped; back to update %d, leaving their data out",
                run.config.train.bad_updates,
                resumed.update,
            )
        run.events.fault(Fault.ROLLBACK, resumed.update, divergence.drop.text)


def begin(run: Run, resumed: Checkpoint | None, divergence: Divergence | None, load: LoadModels) -> Trainer:
    """Load models, data and state. resumed: None: at update 0. divergence: what sent the run back to `resumed`; its data
    are left out. Collective."""
    config, world = run.config, run.world
    distributed.seed_everything(config.run.seed + world.rank)
    models = load(config, world.device, compute_dtype(run.ds_config))
    init_weights.lay_over(models, config.run.dir, init_weights.expected(config, resumed))
    models.trainable.train()  # transformers recomputes activations in training mode only
    references = validation.load_references(config, models)
    dataset = cached_dataset(config, models, world)
    frozen.send_away(config, models)
    options = LoaderOptions(
        batch_size=batch_sizes(config).drawn,
        seed=config.run.seed,
        num_workers=config.data.num_workers,
        remote=config.data.remote,
        cache_limit=config.data.cache_limit,
        verify=divergence is None,
        run_folder=config.run.dir,
        replace_damaged=resumed is not None,
        references=config.data.references.max > 0,
        computed_from=config.data.path if config.data.cache else None,
    )
    loader = build_loader(dataset, options, world)
    for name in loader.stale:
        run.events.fault(Fault.STALE_SHARED_MEMORY, resumed.update if resumed else 0, name)
    guard = Guard.of(config)
    stage = update = 0
    if resumed:
        progress = resumed.progress
        stage, update = progress.stage, progress.update
        weights.load_weights(resumed.path, resumed.manifest, config, models)
        position = Position.from_state_dict(divergence.data if divergence else progress.data)
        loader.load_state_dict(position.for_world(world.size).state_dict())
        guard.load_state_dict(progress.guard)
        guard.dropped = max(guard.dropped, divergence.dropped if divergence else 0)
        run.plan.load_state_dict(progress.plan)
        log.info("resuming %s at update %d", config.run.dir, update)
    average = WeightAverage(config.optim.ema_decay, world)
    drawn_batches = iter(loader)
    run.plan.update = update
    monitor = Monitor(config, world, models.trainable, update, run.events)
    return Trainer(
        run,
        models,
        references,
        loader,
        guard,
        monitor,
        average,
        drawn_batches,
        resumed,
        stage=stage,
        updates_done=update,
    )


def record_start(events: Events, resumed: Checkpoint | None, world_size: int) -> None:
    """The event `start`, dated when the process began, and one for every checkpoint that could not be used."""
    began, update = psutil.Process().create_time(), resumed.update if resumed else 0
    events.record(
        Kind.START, time=began, update=update, world_size=world_size, pid=os.getpid(), host=socket.gethostname()
    )
    for line in resumed.refused if resumed else ():
        events.fault(Fault.CHECKPOINT_REFUSED, update, line)


def record_end(trainer: Trainer, verdict: Verdict) -> None:
    """Say how the run ended, in the log and as the event `stop`. Collective."""
    run, updates = trainer.run, trainer.run.config.train.updates
    if verdict is Verdict.LEAVE:
        why = next(name for name in gathered(run.watch.signal, run.world) if name)
        if run.world.is_main:
            log.warning("%s: saved after update %d; the same command resumes from there", why, trainer.updates_done)
        run.events.record(Kind.STOP, update=trainer.updates_done, why=f"signal {why}")
        return
    if run.world.is_main:
        log.info("done: %d of %d updates", trainer.updates_done, updates)
    run.events.record(
        Kind.STOP, update=trainer.updates_done, why="done" if trainer.updates_done == updates else "stop_after"
    )


def no_way_back(run: Run, divergence: Divergence, resumed: Checkpoint | None) -> UserError:
    """The run diverged and cannot recover by itself."""
    config = run.config
    back = f"returning to update {resumed.update} did not help" if resumed else "there is no checkpoint yet"
    large = divergence.drop.reason is DropReason.LARGE_VALUES
    remedy = "raise optim.large_gradient_share, lower optim.lr" if large else "lower optim.lr"
    return UserError(
        f"{config.train.bad_updates} consecutive updates were dropped, the last because {divergence.drop.text}; "
        f"{back}; {remedy}, or look at the samples in {config.run.dir}/events.jsonl",
        agreed=True,
    )
