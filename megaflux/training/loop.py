"""READ FIRST: the whole of training. One update is eight steps, numbered in `train`.

batch -> VAE latents -> Qwen2-VL trunk -> x_t at t -> Qwen layer, connector, FLUX -> velocity loss
      -> engine.backward -> engine.step -> monitor
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megaflux.config import Config
from megaflux.data.loader import Batch, build_loader
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models, load_models
from megaflux.models.vlm import Condition
from megaflux.training import checkpoint, distributed, memory, noise, validation
from megaflux.training.cache import cached_dataset
from megaflux.training.distributed import World
from megaflux.training.ds_config import accumulation_steps, compute_dtype, uses_kernels
from megaflux.training.engine import Carried, StageEngine
from megaflux.training.monitor import Monitor
from megaflux.training.setup import prepare_data, prepare_run_folder
from megaflux.training.stages import trainable_names
from megaflux.training.validation import References

log = logging.getLogger("megaflux")


def train(config: Config, ds_config: dict[str, Any]) -> None:
    """Train through all stages, or go on where the run folder's newest checkpoint stands.

    Collective: every rank calls it. Raises UserError for input that a person can mend.
    """
    world = distributed.start()
    config = config.for_world(world.size)
    resumed = checkpoint.resolve(config, ds_config, world)
    prepare_run_folder(config, ds_config, world)
    prepare_data(config, world)
    distributed.seed_everything(config.run.seed + world.rank)

    models = load_models(config).to(world.device, compute_dtype(ds_config))
    models.trainable.train()  # transformers recomputes activations in training mode only
    references = validation.load_references(config, models)
    loader = build_loader(
        cached_dataset(config, models, world), remote=config.data.remote, cache_limit=config.data.cache_limit,
        micro_batch_size=config.train.micro_batch_size, seed=config.run.seed, num_workers=config.data.num_workers,
    )  # fmt: skip
    if resumed:
        checkpoint.load_weights(resumed.path, resumed.manifest, config, models)
        loader.load_state_dict(resumed.data)
        log.info("resuming %s at update %d", config.run.dir, resumed.update)
    batches = iter(loader)
    done = resumed.update if resumed else 0
    monitor = Monitor(config, world, models.trainable, done)
    accumulation = accumulation_steps(config, world.size)
    last = config.train.stop_after or config.train.updates
    skipped, carried = 0, Carried()

    for stage in range(resumed.stage if resumed else 0, len(config.stages)):
        if done >= last:
            break
        with _not_counted(monitor):
            engine = StageEngine(models.trainable, config, ds_config, stage, world.size, carried)
            if resumed and stage == resumed.stage:
                checkpoint.load_training_state(resumed, engine, world)
            policies = memory.choose_policies(config, ds_config, world, models, config.stages[stage])
            models.trainable.configure(uses_kernels(config, ds_config), policies)
            log.info("stage %s: %d parameters train; %s; computed again in the backward pass, %s",
                     config.stages[stage].name, engine.num_trainable, models.trainable.describe(),
                     memory.counted(policies))  # fmt: skip
            if done == 0:
                _validate(engine, config, models, references, monitor, world, done)
        stage_end = config.stage_ends()[stage]

        while done < min(stage_end, last):
            learning_rate, seen = engine.set_learning_rate(done), Counter()
            for micro in range(accumulation):
                # 1. a batch of one bucket, the same bucket on every rank
                waiting = time.perf_counter()
                batch = next(batches).to(world.device)
                monitor.data_wait += time.perf_counter() - waiting
                # 2. VAE latents
                latents = _latents(config, models, batch, done, micro)
                # 3. the condition, as far as nothing trains: the frozen trunk of Qwen2-VL
                condition = _condition(config, models, batch, done, micro)
                # 4. t and noise, which make x_t
                t, n = noise.draw_time_and_noise(config.flow, config.run.seed, done, batch.keys, seen, latents)
                # 5. Qwen's last layer, connector and FLUX predict the velocity; mean squared error per sample
                losses = validation.denoising_loss(engine, config, models, batch.bucket, latents, n, condition, t)
                # 6. gradients
                engine.backward(losses.mean())
                if micro == accumulation - 1 and _due(done + 1, config.monitor.grad_norms_every):
                    monitor.scalars({f"grad_norm/{k}": v for k, v in engine.grad_norms().items()}, done + 1)
                # 7. at the last micro-batch: clip, AdamW
                engine.step()
                monitor.micro_batch(losses, t, batch.bucket, stage)
            done += 1
            # 8. what a person sees
            monitor.update(done, learning_rate, engine.grad_norm(), skipped + engine.skipped_steps)

            with _not_counted(monitor):
                at_end = done == stage_end
                if at_end or _due(done, config.validation.every):
                    _validate(engine, config, models, references, monitor, world, done)
                if at_end or _due(done, config.validation.panel_every):
                    _panel(engine, config, models, references, monitor, world, done)
                if at_end or done == last or _due(done, config.train.checkpoint_every):
                    checkpoint.save(config, engine, done, loader.state_dict(), models.base, world)

        skipped += engine.skipped_steps
        if stage + 1 < len(config.stages):
            carried = engine.carry(set(trainable_names(models.trainable, config.stages[stage + 1])))
        engine.close()

    monitor.close()
    loader.close()
    distributed.stop()


def _latents(config: Config, models: Models, batch: Batch, update: int, micro: int) -> torch.Tensor:
    """Latents (B, C, h, w) of a batch, from the cache or the VAE."""
    if batch.latents is not None:
        return batch.latents
    generator = None
    if config.data.sample_posterior:
        generator = distributed.generator_for(config.run.seed, "posterior", update, micro, *batch.keys)
    return latent_ops.encode(models.vae, batch.pixel_values, generator)


def _condition(config: Config, models: Models, batch: Batch, update: int, micro: int) -> Condition:
    """The condition of a batch, from the cache or the trunk; its kind is drawn alike on all ranks."""
    if batch.hidden_states is not None:
        return models.trunk.from_cache(batch.hidden_states, batch.bucket.height, batch.bucket.width)
    mode = noise.draw_mode(config.data.condition, config.run.seed, update, micro)
    return models.trunk.encode(batch.pixel_values, batch.captions, mode)


def _validate(
    engine: StageEngine, config: Config, models: Models, references: References, monitor: Monitor, world: World,
    update: int,
) -> None:  # fmt: skip
    """Seeded validation loss, to TensorBoard, the bar and RUN/validation.jsonl. Collective."""
    values = validation.validation_loss(engine.module, config, models, references, world)
    monitor.scalars({f"validation/{name}": value for name, value in values.items()}, update)
    monitor.show(val=f"{values['loss']:.3f}", gap=f"{values['gap']:.2f}")
    if world.is_main:
        with (Path(config.run.dir) / "validation.jsonl").open("a") as file:
            file.write(json.dumps({"update": update, **values}) + "\n")


def _panel(
    engine: StageEngine, config: Config, models: Models, references: References, monitor: Monitor, world: World,
    update: int,
) -> None:  # fmt: skip
    """Rows [reference | variations of fixed seeds]; under ZeRO-3 all ranks must run the model together."""
    if not world.is_main and engine.zero_stage < 3:
        return
    index = list(range(min(config.validation.panel_samples, len(references.keys))))
    pictures = validation.variations(config, models, references, index, per_reference=4)
    if world.is_main:
        sheet = validation.panel(references, index, pictures)
        monitor.picture("variations", sheet, update)
        validation.save_picture(sheet, Path(config.run.dir) / "samples" / f"update-{update:07d}.png")


def _due(update: int, every: int) -> bool:
    return every > 0 and update % every == 0


@contextmanager
def _not_counted(monitor: Monitor) -> Iterator[None]:
    started = time.perf_counter()
    yield
    monitor.excluded(time.perf_counter() - started)
