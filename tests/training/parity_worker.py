"""One update on a fixed global batch, by however many ranks the launcher starts, once for each of DeepSpeed's files given;
writes gradients, weights and what was sent, by the file's name.

tests/training/parity_worker.py OUT DS_CONFIG...
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import load_models
from megaflux.training import distributed
from megaflux.training.ds_config import compute_dtype, load_ds_config
from megaflux.training.engine import StageEngine
from megaflux.training.objective import Denoising, denoising_loss
from tests.training.runs import small_config

GLOBAL, MICROS = 4, 2  # samples per global micro-batch, accumulation


class Sent(TorchDispatchMode):
    """Counts what torch.distributed is given to send: every collective, whoever calls it, comes by here."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        """(operation, dtype) -> calls."""
        self.bytes: Counter[tuple[str, str]] = Counter()
        """(operation, dtype) -> bytes of the largest tensor of each call: what is summed, or what all have at the end."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)]
            if tensors:
                largest = max(tensors, key=lambda tensor: tensor.nbytes)
                key = func.name().removeprefix("c10d::").strip("_"), str(largest.dtype).removeprefix("torch.")
                self.calls[key] += 1
                self.bytes[key] += largest.nbytes
        return func(*args, **(kwargs or {}))


def update(world: World, out: str, ds_config: dict[str, Any]) -> dict[str, Any]:
    values = small_config(None, None, run__dir=out, data__path=out)
    values["train"] |= {"global_batch_size": GLOBAL * MICROS, "micro_batch_size": GLOBAL // world.size}
    config = build_config(merge(tiny(), values))
    models = load_models(config).to(world.device, compute_dtype(ds_config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the zeros of a fresh model, where most gradients vanish
        for parameter in models.trainable.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    engine = StageEngine(models.trainable, config, ds_config, 0, world.size)
    from deepspeed.utils import safe_get_full_grad

    bucket = Bucket("1:1", 64, 64)
    sent = Sent()
    for micro in range(MICROS):
        pixel_values = torch.randint(0, 256, (GLOBAL, 3, 64, 64), generator=generator, dtype=torch.uint8)
        latents = torch.randn(GLOBAL, 8, 8, 8, generator=generator)
        noise, t = torch.randn(latents.shape, generator=generator), torch.rand(GLOBAL, generator=generator)
        mine = slice(world.rank * GLOBAL // world.size, (world.rank + 1) * GLOBAL // world.size)
        condition = models.trunk.encode(pixel_values[mine])
        with sent:
            given = Denoising(bucket, latents[mine], condition, t[mine], noise[mine], config.flow.middle_guidance)
            losses = denoising_loss(engine, models, given)
            engine.backward(losses.mean())
            if micro < MICROS - 1:
                engine.step()
    gradients = {
        name: safe_get_full_grad(p).clone() for name, p in models.trainable.named_parameters() if p.requires_grad
    }
    engine.set_learning_rates(0)
    with sent:
        engine.step()
    weights = {name: p.detach().clone() for name, p in models.trainable.named_parameters()}
    # In the optimizer each group is filled up to whole partitions.
    trained = sum(flat.numel() for _, flat in engine.flat_groups()) * world.size
    result = {
        "gradients": gradients,
        "weights": weights,
        "norm": engine.grad_norm(),
        "size": world.size,
        "sent": dict(sent.bytes),
        "calls": dict(sent.calls),
        "trained": trained,
    }
    engine.close()
    return result


def main(out: str, *ds_configs: str) -> None:
    world = distributed.start()
    results = {Path(path).stem: update(world, out, load_ds_config(path)) for path in ds_configs}
    if world.is_main:
        torch.save(results, out)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
