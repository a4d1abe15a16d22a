"""Rectified flow as FLUX uses it.

Time: t = 0 is data, t = 1 is noise; x_t = (1 - t) x + t n; velocity = dx_t/dt = n - x.
Sources: Liu et al. 2022 (2209.03003) for the flow; Esser et al. 2024 (2403.03206), sections 3.1 and 5.3.2, for the
logit-normal density and the resolution shift; FLUX's `time_shift` and `get_lin_function` (black-forest-labs/flux,
sampling.py) for the line mu(tokens).

Shapes: B batch, L image tokens, C packed channels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t n. latents, noise: (B, ...); t: (B,) in [0, 1]. Returns latents' shape and dtype."""
    t = t.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
    return (1 - t) * latents + t * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: n - x, the same at every t."""
    return noise - latents


def velocity_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, in float32: (B, ...) twice -> (B,)."""
    return (velocity.float() - target.float()).square().flatten(1).mean(1)


def resolution_mu(num_tokens: int) -> float:
    """FLUX's mu: the line through (256 tokens, 0.5) and (4096 tokens, 1.15)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return 0.5 + slope * (num_tokens - 256)


def shift_time(t: Tensor, factor: float) -> Tensor:
    """Move t towards noise: factor t / (1 + (factor - 1) t); FLUX's exp(mu) / (exp(mu) + 1/t - 1). Keeps 0 and 1."""
    return factor * t / (1 + (factor - 1) * t)


def shift_factor(shift: Literal["resolution", "none"] | float, num_tokens: int) -> float:
    """The factor of `shift_time` that a configuration's `flow.shift` names; 1 changes nothing."""
    if shift == "none":
        return 1.0
    return math.exp(resolution_mu(num_tokens)) if shift == "resolution" else float(shift)


def time_from_normal(z: Tensor, density: Literal["logit_normal", "uniform"], mean: float, std: float) -> Tensor:
    """Standard normal draws (B,) -> t in (0, 1) with the density named. Uniform takes them through the normal's CDF,
    so that either density uses up the same random numbers."""
    if density == "logit_normal":
        return torch.sigmoid(mean + std * z)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))
