"""What an update draws at random: t, noise and the kind of condition; each a function of seed, update and sample."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from megaflux import flow
from megaflux.common.transfer import pins, to_device
from megaflux.config.schema import ConditionModes, Flow
from megaflux.models.latents import PACK
from megaflux.models.vlm import Mode
from megaflux.training.distributed import generator_for


def draw_time_and_noise(
    config: Flow, seed: int, update: int, keys: list[str], seen: Counter[str], latents: Tensor
) -> tuple[Tensor, Tensor]:
    """t (B,) and noise like latents (B, C, h, w), float32 on latents' device, one generator per sample.

    keys: the samples' names. seen: how often this rank has met each key in this update, counted on here, so that a
    repeated one (a bucket smaller than a batch) gets other draws. The resolution shift goes by the image tokens, h w / 4.
    Nothing here waits for latents, which need only be asked for: the host draws while a GPU still makes them.
    """
    z = torch.empty(len(keys))
    noise = torch.empty(len(keys), *latents.shape[1:], pin_memory=pins(latents.device))
    for i, key in enumerate(keys):
        generator = generator_for(seed, "noise", update, key, seen[key])
        seen[key] += 1
        z[i].normal_(generator=generator)
        noise[i].normal_(generator=generator)
    t = flow.time_from_normal(z, config.density, config.logit_mean, config.logit_std)
    num_tokens = latents[0, 0].numel() // PACK**2
    t = flow.shift_time(t, flow.shift_factor(config.shift, num_tokens))
    return to_device(t, latents.device), noise.to(latents.device, non_blocking=True)


def draw_mode(modes: ConditionModes, seed: int, update: int, micro: int) -> Mode:
    """The kind of condition of one global micro-batch, alike on all ranks, so that no rank skips a parameter."""
    u = torch.rand((), generator=generator_for(seed, "mode", update, micro)).item()
    if u < modes.image:
        return "image"
    return "image_text" if u < modes.image + modes.image_text else "text"
