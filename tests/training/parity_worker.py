"""One update on a fixed global batch, by however many ranks the launcher starts; writes gradients and weights.

torchrun --nproc_per_node N tests/training/parity_worker.py OUT DS_CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megaflux.config import build_config, merge
from megaflux.models.pretrained import load_models
from megaflux.presets import tiny
from megaflux.training import distributed, validation
from megaflux.training.engine import StageEngine
from tests.training.runs import small_config

GLOBAL, MICROS = 4, 2  # samples per global micro-batch, accumulation


def main(out: str, ds_config: str) -> None:
    world = distributed.start()
    values = small_config(None, None, run__dir=out, data__path=out)
    values["train"] |= {"global_batch_size": GLOBAL * MICROS, "micro_batch_size": GLOBAL // world.size}
    config = build_config(merge(tiny(), values))
    models = load_models(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the zeros of a fresh model, where most gradients vanish
        for parameter in models.trainable.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    engine = StageEngine(models.trainable, config, json.loads(Path(ds_config).read_text()), 0, world.size)
    from deepspeed.utils import safe_get_full_grad

    bucket = validation.Bucket("1:1", 64, 64)
    for _ in range(MICROS):
        pixel_values = torch.randint(0, 256, (GLOBAL, 3, 64, 64), generator=generator, dtype=torch.uint8)
        latents = torch.randn(GLOBAL, 8, 8, 8, generator=generator)
        noise, t = torch.randn(latents.shape, generator=generator), torch.rand(GLOBAL, generator=generator)
        mine = slice(world.rank * GLOBAL // world.size, (world.rank + 1) * GLOBAL // world.size)
        condition = models.trunk.encode(pixel_values[mine])
        losses = validation.denoising_loss(
            engine, config, models, bucket, latents[mine], noise[mine], condition, t[mine]
        )
        engine.backward(losses.mean())
        if _ < MICROS - 1:
            engine.step()
    gradients = {
        name: safe_get_full_grad(p).clone() for name, p in models.trainable.named_parameters() if p.requires_grad
    }
    engine.set_learning_rate(0)
    engine.step()
    weights = {name: p.detach().clone() for name, p in models.trainable.named_parameters()}
    if world.is_main:
        torch.save({"gradients": gradients, "weights": weights, "norm": engine.grad_norm(), "size": world.size}, out)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
