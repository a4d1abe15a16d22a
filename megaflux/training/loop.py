"""READ FIRST: the whole of training. One update is eight steps, numbered in `train`.

batch -> VAE latents -> Qwen2-VL trunk -> x_t at t -> Qwen layer, connector, FLUX -> velocity loss
      -> engine.backward -> engine.step -> monitor
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from megaflux.common.errors import STOPPED, UserError, is_out_of_memory
from megaflux.common.ranks import World, barrier, gathered
from megaflux.config.parse import Config
from megaflux.data.batches import Batch, pieces
from megaflux.data.loader import BucketLoader, build_loader
from megaflux.data.reading.options import LoaderOptions
from megaflux.data.reading.position import Position
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models, load_models
from megaflux.models.vlm import Condition
from megaflux.training import distributed, frozen, noise, validation
from megaflux.training.cache import cached_dataset
from megaflux.training.checkpoint import elastic, space
from megaflux.training.checkpoint import state as checkpoint
from megaflux.training.checkpoint import weights as trained
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.ds_config import compute_dtype
from megaflux.training.engine import Carried, StageEngine, release_memory
from megaflux.training.monitor import Monitor
from megaflux.training.planning import memory
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.out_of_memory import Plan
from megaflux.training.setup import lock_run_folder, prepare_data, prepare_run_folder
from megaflux.training.stages import trainable_names
from megaflux.training.survival.events import Events
from megaflux.training.survival.guard import Guard
from megaflux.training.survival.watch import Watch
from megaflux.training.validation import References

log = logging.getLogger("megaflux")


def train(
    config: Config,
    ds_config: dict[str, Any],
    watch: Watch,
    load: Callable[..., Models] = load_models,
    assumed: Assumed | None = None,
) -> int:
    """Train through all stages, or go on where the run folder's newest whole checkpoint stands.

    load: makes the models: (config, device, dtype) -> Models, the same weights each time. assumed: what a person says of the
    GPUs, for the choice of the micro-batch.
    Collective: every rank calls it. Returns the exit code: 0 when done, STOPPED when a signal asked to leave and all is
    saved. Raises UserError for input that a person can mend.
    """
    world = distributed.start(deterministic=config.train.deterministic)
    # Each rank has read the run's folder for itself, which on network storage may not look alike everywhere.
    config, ds_config = distributed.from_main((config, ds_config), world)
    events = Events(config.run.dir, enabled=world.is_main)
    lock_run_folder(config, world)
    resumed = checkpoint.resolve(config, ds_config, world)
    prepare_run_folder(config, ds_config, world)  # as given: what the number of ranks makes of it is for this start
    choose_micro_batch = config.train.micro_batch_size == "auto"
    config = elastic.fit(config, resumed, world.size)
    began = psutil.Process().create_time()
    events.record(
        "start",
        time=began,
        update=resumed.update if resumed else 0,
        world_size=world.size,
        pid=os.getpid(),
        host=socket.gethostname(),
    )
    watch.on_hang = lambda why: events.record("fault", what="hang", update=-1, detail=why)
    for line in resumed.refused if resumed else ():
        events.record("fault", what="checkpoint_refused", update=resumed.update, detail=line)
    prepare_data(config, world)

    plan = Plan(config, ds_config, world, choose_micro_batch, assumed)
    went_back_to, behind = set(), None
    try:
        while True:
            outcome = _run(config, ds_config, world, watch, events, plan, resumed, behind, load)
            if not isinstance(outcome, Diverged):
                break
            # The models are loaded anew, for a checkpoint has no weights that later stages changed; never beside the old.
            release_memory()
            # The state is as the last update left it, and that one may be the cause: back to the last checkpoint, and
            # on behind the data that was dropped.
            watch.pause()
            resumed, behind = checkpoint.resolve(config, ds_config, world, sound=True), outcome
            if resumed is None or resumed.update in went_back_to:
                back = (
                    f"going back to update {resumed.update} did not help" if resumed else "there is no checkpoint yet"
                )
                raise UserError(
                    f"{config.train.bad_updates} updates in a row were dropped, the last because {outcome.why}; "
                    f"{back}; lower optim.lr, or look at the samples in {config.run.dir}/events.jsonl",
                    agreed=True,
                )
            went_back_to.add(resumed.update)
            if world.is_main:
                log.warning(
                    "%d updates in a row were dropped; back to update %d, leaving their data out",
                    config.train.bad_updates,
                    resumed.update,
                )
            events.record("fault", what="rollback", update=resumed.update, detail=outcome.why)
    except UserError as error:
        if isinstance(error, space.NoRoom):
            events.record("fault", what="disk", update=-1, detail=str(error))
        events.record("stop", update=-1, why="error", detail=str(error))
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        plan.leave(error)
    watch.close()
    distributed.stop()
    return outcome


@dataclass(frozen=True)
class Diverged:
    """A run that must go back: as many updates in a row were dropped as it puts up with."""

    why: str
    position: dict[str, Any]
    """Of the loader, behind the data that was dropped."""
    dropped: int
    """Updates dropped since the run began."""


def _run(
    config: Config,
    ds_config: dict[str, Any],
    world: World,
    watch: Watch,
    events: Events,
    plan: Plan,
    resumed: Checkpoint | None,
    behind: Diverged | None,
    load: Callable[..., Models],
) -> int | Diverged:
    """From a checkpoint, or the start, to the end, a signal, or divergence. behind: what sent the run back to it; its data
    are left out."""
    distributed.seed_everything(config.run.seed + world.rank)
    models = load(config, world.device, compute_dtype(ds_config))
    models.trainable.train()  # transformers recomputes activations in training mode only
    references = validation.load_references(config, models)
    dataset = cached_dataset(config, models, world)
    frozen.send_away(config, models)
    loader = build_loader(
        dataset,
        LoaderOptions(
            remote=config.data.remote,
            cache_limit=config.data.cache_limit,
            micro_batch_size=config.train.drawn_per_rank,
            seed=config.run.seed,
            num_workers=config.data.num_workers,
            verify=behind is None,
            run_folder=config.run.dir,
            replace_damaged=resumed is not None,
            computed_from=config.data.path if config.data.cache else None,
        ),
        world,
    )
    for name in loader.stale:
        events.record("fault", what="stale_shared_memory", update=resumed.update if resumed else 0, detail=name)
    guard = Guard(config.optim.spike_sigma, config.optim.spike_window, config.train.bad_updates)
    if resumed:
        trained.load_weights(resumed.path, resumed.manifest, config, models)
        position = Position.from_state_dict(behind.position if behind else resumed.data)
        loader.load_state_dict(position.for_world(world.size).state_dict())
        guard.load_state_dict(resumed.manifest.get("guard", {}))
        guard.dropped = max(guard.dropped, behind.dropped if behind else 0)
        plan.load_state_dict(resumed.manifest.get("plan", {}))
        log.info("resuming %s at update %d", config.run.dir, resumed.update)
    drawn = iter(loader)
    done = plan.update = resumed.update if resumed else 0
    monitor = Monitor(config, world, models.trainable, done, events)
    last = config.train.stop_after or config.train.updates
    carried, outcome = Carried(), 0
    # What the start before was to show after its last save, and was killed or asked to leave before it had.
    owes_loss, owes_panel = validation.owed(config, done, world) if resumed else (False, False)

    for stage in range(resumed.stage if resumed else 0, len(config.stages)):
        if (done >= last and not (owes_loss or owes_panel)) or outcome != 0:
            break
        with _not_counted(monitor):
            if not (resumed and stage == resumed.stage):
                guard.new_stage()
            plan.enter(config.stages[stage])
            engine = StageEngine(models.trainable, config, ds_config, stage, world.size, carried, guard.judge)
            if resumed and stage == resumed.stage:
                checkpoint.load_training_state(resumed, engine, world)
            count = trained.count_trained(config, models.trainable, stage)
            if done < last:  # else only what is owed is shown
                space.check(config, engine, count, world, checkpoint.most_at_once(config, done))
            plan.choose(models, engine)
            batches, accumulation = pieces(drawn, plan.micro_batch_size), engine.accumulation_steps
            log.info(
                "stage %s: %d parameters train; %s; %s",
                config.stages[stage].name,
                engine.num_trainable,
                models.trainable.describe(),
                plan.describe(),
            )
            monitor.scalars(plan.scalars(), done)
            stage_end = config.stage_ends()[stage]
            if done == 0 or owes_loss:
                _validate(engine, config, models, references, monitor, world, done, watch)
            if owes_panel:
                _panel(engine, config, models, references, monitor, world, done, watch)
            owes_loss = owes_panel = False
        watch.ready()
        events.record(
            "ready",
            update=done,
            plan=memory.counted(plan.policies),
            micro_batch_size=plan.micro_batch_size,
            why=plan.why,
            limit=plan.limit,
        )

        while done < min(stage_end, last):
            learning_rate, seen, keys = engine.set_learning_rate(done), Counter(), []
            with plan.one_update():
                for micro in range(accumulation):
                    # 1. a batch of one bucket, the same bucket on every rank
                    waiting = time.perf_counter()
                    batch = next(batches).to(world.device)
                    turn = micro * plan.micro_batch_size * world.size // loader.global_batch
                    monitor.data_wait += time.perf_counter() - waiting
                    keys += batch.keys
                    # 2. VAE latents
                    latents = _latents(config, models, batch, done)
                    # 3. the condition, as far as nothing trains: the frozen trunk of Qwen2-VL
                    condition = _condition(config, models, batch, done, turn)
                    # 4. t and noise, which make x_t
                    t, n = noise.draw_time_and_noise(config.flow, config.run.seed, done, batch.keys, seen, latents)
                    # 5. Qwen's last layer, connector and FLUX predict the velocity; mean squared error per sample
                    losses = validation.denoising_loss(engine, config, models, batch.bucket, latents, n, condition, t)
                    # 6. gradients
                    engine.backward(losses.mean())
                    if micro == accumulation - 1 and _due(done + 1, config.monitor.grad_norms_every):
                        monitor.scalars({f"grad_norm/{k}": v for k, v in engine.grad_norms().items()}, done + 1)
                    # 7. at the last micro-batch: clip, AdamW; or nothing, where the guard refuses the gradient
                    engine.step()
                    monitor.micro_batch(losses, t, batch, stage, done)
            done += 1
            watch.moved()
            # 8. what a person sees
            monitor.update(done, learning_rate, engine.grad_norm(), guard.dropped)
            if engine.dropped:
                monitor.dropped(done, engine.dropped, gathered(keys, world))

            if guard.exhausted:
                outcome = Diverged(engine.dropped, loader.state_dict(), guard.dropped)
                break
            at_end, saved, shown = done == stage_end, False, False
            leaving = distributed.any_over_ranks(watch.signal is not None, world)
            with _not_counted(monitor), watch.unhurried():
                # Between dropped updates nothing has changed since the last save.
                if (
                    at_end
                    or done == last
                    or leaving
                    or (_due(done, config.train.checkpoint_every) and not guard.in_a_row)
                ):
                    saved = _save(
                        engine,
                        config,
                        done,
                        loader,
                        models,
                        guard,
                        plan,
                        resumed,
                        monitor,
                        world,
                        events,
                        must=at_end or done == last or leaving,
                    )
                loss_due, panel_due = validation.due(config, done)
                if not leaving and loss_due:
                    _validate(engine, config, models, references, monitor, world, done, watch)
                    shown = True
                if not leaving and panel_due:
                    _panel(engine, config, models, references, monitor, world, done, watch)
                    shown = True
                if shown and distributed.any_over_ranks(watch.signal is not None, world):
                    leaving = True
                    saved or _save(
                        engine, config, done, loader, models, guard, plan, resumed, monitor, world, events, must=True
                    )
            if leaving:
                outcome = STOPPED
                break

        if outcome == 0:  # saved at its end
            watch.pause()
        if outcome == 0 and stage + 1 < len(config.stages):
            carried = engine.carry(set(trainable_names(models.trainable, config.stages[stage + 1])))
        losses = condition = latents = n = t = batch = None  # what its last micro-batch left on the device
        engine.close()

    monitor.close()
    loader.close()
    if outcome == 0:
        if world.is_main:
            log.info("done: %d of %d updates", done, config.train.updates)
        events.record("stop", update=done, why="done" if done == config.train.updates else "stop_after")
    elif outcome == STOPPED:
        why = next(name for name in gathered(watch.signal, world) if name)
        if world.is_main:
            log.warning("%s: saved after update %d; the same command goes on from there", why, done)
        events.record("stop", update=done, why=f"signal {why}")
    return outcome


def _save(
    engine: StageEngine,
    config: Config,
    update: int,
    loader: BucketLoader,
    models: Models,
    guard: Guard,
    plan: Plan,
    resumed: Checkpoint | None,
    monitor: Monitor,
    world: World,
    events: Events,
    must: bool,
) -> bool:
    """Whether there is a checkpoint now. A disk that refuses one ends the run only where there must be one. Collective."""
    try:
        space.check(config, engine, trained.count_trained(config, engine.module, engine.stage), world, None)
        with monitor.timed("save", update):
            checkpoint.save(
                config,
                engine,
                update,
                loader.state_dict(),
                models.base,
                world,
                guard.state_dict(),
                resumed.update if resumed else None,
                plan.state_dict(),
            )
    except space.NoRoom as error:
        if must:
            raise
        if world.is_main:
            log.error("error, going on without this checkpoint: %s", error)
        events.record("fault", what="disk", update=update, detail=str(error))
        return False
    return True


def _latents(config: Config, models: Models, batch: Batch, update: int) -> torch.Tensor:
    """Latents (B, C, h, w) of a batch, from the cache or the VAE."""
    if batch.latents is not None:
        return batch.latents
    generators = None
    if config.data.sample_posterior:
        generators = [distributed.generator_for(config.run.seed, "posterior", update, key) for key in batch.keys]
    return latent_ops.encode(models.vae, batch.pixel_values, generators)


def _condition(config: Config, models: Models, batch: Batch, update: int, turn: int) -> Condition:
    """The condition of a batch, from the cache or the trunk; its kind is drawn alike on all ranks.

    turn: which of the update's drawn batches it is of; micro-batches may be smaller, on other ranks than the run's first.
    """
    if batch.hidden_states is not None:
        return models.trunk.from_cache(batch.hidden_states, batch.bucket.height, batch.bucket.width)
    mode = noise.draw_mode(config.data.condition, config.run.seed, update, turn)
    return models.trunk.encode(batch.pixel_values, batch.captions, mode)


def _validate(
    engine: StageEngine,
    config: Config,
    models: Models,
    references: References,
    monitor: Monitor,
    world: World,
    update: int,
    watch: Watch,
) -> None:
    """Seeded validation loss, to TensorBoard, the bar and RUN/validation.jsonl. Collective."""
    with monitor.timed("validation", update):
        values = validation.validation_loss(engine.module, config, models, references, world, watch.moved)
    monitor.scalars({f"validation/{name}": value for name, value in values.items()}, update)
    monitor.show(val=f"{values['loss']:.3f}", gap=f"{values['gap']:.2f}")
    monitor.write_line("validation.jsonl", {"update": update, **values})


def _panel(
    engine: StageEngine,
    config: Config,
    models: Models,
    references: References,
    monitor: Monitor,
    world: World,
    update: int,
    watch: Watch,
) -> None:
    """Rows [reference | variations of fixed seeds]; under ZeRO-3 all ranks must run the model together. Given up where a
    signal asks to leave: minutes of pictures must not cost the save."""
    alone = engine.zero_stage < 3
    if not world.is_main and alone:
        with watch.unhurried(waiting=True):
            barrier(world)
        return

    def on_step() -> None:
        watch.moved()
        if alone and watch.signal is not None:
            raise InterruptedError

    index = list(range(min(config.validation.panel_samples, len(references.keys))))
    try:
        with monitor.timed("validation", update):
            pictures = validation.variations(config, models, references, index, memory.PANEL, on_step=on_step)
    except InterruptedError:
        pictures = None
    except RuntimeError as error:
        if not (alone and is_out_of_memory(error)):
            raise
        # Pictures are worth no run, and the next start would end here as well.
        pictures, why = None, f"the panel is left out: {' '.join(str(error).split())[:200]}"
        log.warning("update %d: %s", update, why)
        monitor.events.record("fault", what="out_of_memory", update=update, detail=why)
    if pictures is None and alone:
        release_memory()  # past the handler, whose traceback holds what the pictures had made
    if world.is_main and pictures is not None:
        monitor.picture("variations", validation.panel(references, index, pictures), update)
    if alone:
        barrier(world)


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


@contextmanager
def _not_counted(monitor: Monitor) -> Iterator[None]:
    started = time.perf_counter()
    yield
    monitor.excluded(time.perf_counter() - started)
