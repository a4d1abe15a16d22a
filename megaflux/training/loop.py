"""READ FIRST: one update, stage by stage. `update` below is one, in eight steps; `train_stage` repeats it, and
`train_stages` goes through the run's stages.

    batch -> VAE latents -> Qwen2-VL's frozen trunk -> x_t at t
          -> Qwen's last layers, connector, FLUX -> velocity loss -> engine.backward -> engine.step

    pixel_values  uint8 (B, 3, H, W)         latents   (B, 16, H / 8, W / 8)
    condition     (B, tokens, 3584)          t         (B,), 0 is data, 1 is noise
    losses        (B,) float32

What surrounds an update is elsewhere: trainer.py holds the state, objective.py the mathematics of steps 2 to 5, upkeep.py
what follows each update (curves, saves, validation), session.py how a run starts, resumes, returns to a checkpoint and ends.

Signals: SIGTERM, SIGUSR1, Ctrl-C and SIGHUP only set a flag (survival/watch.py). Upkeep.after_update reads it on all ranks,
saves and returns Verdict.LEAVE. Before `watch.ready()` and after `watch.pause()` there is nothing to save, and a signal
exits at once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from megaflux.data.batches import pieces
from megaflux.training import objective
from megaflux.training.checkpoint import resume, retention, space, weights
from megaflux.training.engine import StageEngine
from megaflux.training.objective import Denoising
from megaflux.training.planning import memory
from megaflux.training.stages import trainable_names
from megaflux.training.survival.events import Kind
from megaflux.training.trainer import Trainer, Verdict, due
from megaflux.training.update_result import MicroBatch, UpdateResult
from megaflux.training.upkeep import Upkeep

log = logging.getLogger("megaflux")


def update(trainer: Trainer) -> UpdateResult:
    """One update of the active stage: every rank computes its micro-batches, then all take the same step. Collective."""
    config, models, engine = trainer.run.config, trainer.models, trainer.engine
    number, seed, device = trainer.updates_done, config.run.seed, trainer.run.world.device  # number: from 0
    learning_rates = engine.set_learning_rates(number)
    computed: list[MicroBatch] = []
    times_seen: Counter[str] = Counter()
    data_wait, grad_norms = 0.0, {}
    for micro in range(engine.accumulation_steps):
        # 1. A batch of one bucket, the same bucket on every rank.
        waiting = time.perf_counter()
        batch = next(trainer.batches).to(device)
        data_wait += time.perf_counter() - waiting
        samples = objective.count_up(batch.keys, times_seen)
        # 2. Latents: the frozen VAE's, or cached.
        latents = objective.encode_latents(config, models, batch, number)
        # 3. The frozen part of the condition: hidden states of Qwen2-VL's trunk, or cached.
        condition = objective.encode_condition(config, models, batch, samples, number, trainer.drawn_index(micro))
        cut = condition.cut_captions
        # 4. Time, noise and guidance value, functions of seed, update and sample.
        t, noise = objective.draw_time_and_noise(config.flow, seed, number, samples, latents)
        guidance = objective.draw_guidance(config.flow, seed, number, samples, device)
        # 5. Qwen's last layers, connector and FLUX predict the velocity at x_t.
        inputs = Denoising(batch.bucket, latents, condition, t, noise, guidance)
        losses = objective.denoising_loss(engine, models, inputs)
        del inputs, latents, condition, noise  # freed before the next micro-batch is encoded
        # 6. Gradients of the mean over all micro-batches and ranks.
        engine.backward(losses.mean())
        if micro == engine.accumulation_steps - 1 and due(number + 1, config.monitor.grad_norms_every):
            grad_norms = engine.grad_norms()
        # 7. Called after every backward; the last call of an update clips and steps, or drops the gradient.
        engine.step()
        computed.append(MicroBatch(batch.keys, batch.bucket, batch.replaced, losses.detach(), t, cut))
    # 8. The average of the weights moves towards them, if the update was taken.
    trainer.average.follow(engine)
    norm, large = engine.grad_norm(), engine.large_gradient_share
    return UpdateResult(learning_rates, norm, large, engine.dropped, computed, data_wait, grad_norms)


def train_stage(trainer: Trainer, upkeep: Upkeep) -> Verdict:
    """Updates of the active stage, until its end, the run's end, or a verdict that ends it earlier. Collective."""
    while trainer.updates_done < min(trainer.stage_end, trainer.last_update):
        with trainer.run.plan.one_update():
            result = update(trainer)
        trainer.updates_done += 1
        verdict = upkeep.after_update(trainer, result)
        if verdict is not Verdict.CONTINUE:
            return verdict
    return Verdict.CONTINUE


def train_stages(trainer: Trainer, upkeep: Upkeep) -> Verdict:
    """All stages from the trainer's on; CONTINUE when the run is done. Collective."""
    config = trainer.run.config
    for stage in range(trainer.stage, len(config.stages)):
        if trainer.updates_done >= trainer.last_update and not upkeep.pending:
            break
        begin_stage(trainer, upkeep, stage)
        verdict = train_stage(trainer, upkeep)
        if verdict is Verdict.CONTINUE:
            trainer.run.watch.pause()  # saved at its end: a signal exits at once, also one that has come already
            if stage + 1 < len(config.stages):
                names = set(trainable_names(trainer.models.trainable, config.stages[stage + 1]))
                trainer.carried = trainer.engine.carry(names)
                trainer.average.leave_stage(trainer.engine)
        trainer.engine.close()
        if verdict is not Verdict.CONTINUE:
            return verdict
    return Verdict.CONTINUE


def begin_stage(trainer: Trainer, upkeep: Upkeep, stage: int) -> None:
    """Build the stage's engine, load into it what a checkpoint or the stage before left, and plan its micro-batch.
    UserError, the same on all ranks, if the GPUs or the disk have no room for it. Collective."""
    run, models = trainer.run, trainer.models
    config, world, plan = run.config, run.world, run.plan
    resumed = trainer.resumed if trainer.resumed and trainer.resumed.progress.stage == stage else None
    trainer.stage = stage
    with trainer.monitor.not_counted():
        if resumed is None:
            trainer.guard.new_stage()
        plan.enter(config.stages[stage])
        engine = StageEngine(
            models.trainable, config, run.ds_config, stage, world.size, trainer.carried, trainer.guard.judge
        )
        trainer.engine = engine
        if resumed:
            resume.load_training_state(resumed, engine, world)
        trainer.average.begin_stage(engine)
        if resumed:
            trainer.average.load(resumed.path, resumed.manifest, engine)
        if trainer.updates_done < trainer.last_update:  # otherwise only a validation or panel is pending
            trained = weights.count_trained(config, models.trainable, stage)
            space.check(config, engine, trained, world, retention.most_at_once(config, trainer.updates_done))
        plan.choose(models, engine)
        trainer.batches = pieces(trainer.drawn_batches, plan.micro_batch_size)
        name, policies = config.stages[stage].name, models.trainable.describe()
        log.info("stage %s: %d parameters train; %s; %s", name, engine.num_trainable, policies, plan.describe())
        upkeep.before_stage(trainer)
    run.watch.ready()  # from here on a signal waits for the end of the update
    run.events.record(
        Kind.READY,
        update=trainer.updates_done,
        plan=memory.counted(plan.policies),
        micro_batch_size=plan.micro_batch_size,
        why=plan.why,
        limit=plan.limit,
    )
