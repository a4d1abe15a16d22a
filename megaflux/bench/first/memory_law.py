"""Step memory: what a step of FLUX holds beside its weights, and the formula that activation policies are chosen by."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

import torch

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.bench.activations import freeze, trainable_flux
from megaflux.bench.arms import random_flux, random_inputs
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting, grid
from megaflux.bench.live_memory import LiveMemory
from megaflux.models.flux import Policy, fuse
from megaflux.training.planning.activations import flux_bytes
from megaflux.training.stages import PlainStage

POINTS: tuple[tuple[int, Policy], ...] = ((1, "none"), (2, "mlp"), (4, "mlp"), (8, "full"))
MIXED = 2  # images; two thirds of the blocks in policy none, the others in mlp
ROUNDS = 3  # of all buckets, shuffled


def run(recorder: Recorder, setting: Setting) -> None:
    sizes, device, pictures = setting.flux(), setting.device, setting.pictures()
    config = sizes.flux_config()
    transformer = random_flux(config, setting.dtype, device)
    freeze(transformer, trainable_flux(config, sizes.train_blocks, sizes.components))
    for parameter in transformer.parameters():  # each gradient is dropped once complete, as ZeRO does
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop)
    blocks = sizes.double + sizes.single

    def step(batch: int, order: Sequence[int]) -> None:
        for index in order:
            bucket, tokens = pictures[index]
            given = random_inputs(transformer, batch, grid(bucket), tokens.condition, device)
            transformer(**given, return_dict=False)[0].float().square().mean().backward()

    def law(batch: int, policies: list[Policy]) -> float:
        stage = PlainStage(sizes.train_blocks, sizes.components)
        kept = (
            flux_bytes(transformer, stage, tokens, setting.dtype.itemsize, policies, True) for _, tokens in pictures
        )
        return batch * max(kept) / 1e9

    def measure(name: str, policies: list[Policy], batch: int, order: Sequence[int]) -> None:
        _measure(recorder, name, transformer, policies, partial(step, batch, order), law(batch, policies), device)

    for batch, policy in POINTS:
        measure(f"batch {batch}, {policy}", [policy] * blocks, batch, [0])
    mixed: list[Policy] = ["none" if i < 2 * blocks // 3 else "mlp" for i in range(blocks)]
    order = [
        index for seed in range(ROUNDS) for index in random.Random(seed).sample(range(len(pictures)), len(pictures))
    ]
    name = f"batch {MIXED}, two thirds none, mlp, {len(order)} steps over {len(pictures)} buckets"
    measure(name, mixed, MIXED, order)


def _measure(
    recorder: Recorder,
    name: str,
    transformer: FluxTransformer2DModel,
    policies: list[Policy],
    step: Callable[[], None],
    formula: float,
    device: torch.device,
) -> None:
    facts = [f"{name}: allocated", *([f"{name}: reserved", f"{name}: retries"] if device.type == "cuda" else ())]
    if not recorder.missing(*facts):
        return
    with recorder.measuring(*facts):
        fuse(transformer, policies)
        step()  # compiles, and packs what lies apart
        if device.type != "cuda":
            with LiveMemory() as memory:
                step()
            recorder.add(facts[0], memory.peak / 1e9, "GB", formula)
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        step()
        recorder.add(facts[0], (torch.cuda.max_memory_allocated(device) - allocated) / 1e9, "GB", formula)
        recorder.add(facts[1], (torch.cuda.max_memory_reserved(device) - reserved) / 1e9, "GB", formula)
        recorder.add(facts[2], torch.cuda.memory_stats(device).get("num_alloc_retries", 0) - retries, predicted=0)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
