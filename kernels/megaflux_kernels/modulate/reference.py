"""modulate in plain torch: the definition, and the path of CPUs. Shapes: x (B, S, W); scale, shift (B, W)."""

from __future__ import annotations

import torch
from torch import Tensor


def definition(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The op as it is written in a model; what the other paths must equal."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean (B, S), rstd (B, S)); the statistics are at least float32."""
    normalized, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *_identity(x), eps)
    out = torch.addcmul(shift[:, None], normalized, 1 + scale[:, None])
    return out, mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, residual: Tensor | None, need_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx + residual, dscale, dshift); empty dscale and dshift unless need_modulation."""
    statistics = mean[..., None], rstd[..., None]
    dnormalized = dout * (1 + scale[:, None])
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormalized, x, x.shape[-1:], *statistics, *_identity(x), [True, False, False]
    )
    if residual is not None:
        dx = dx.add_(residual)
    if not need_modulation:
        return dx, x.new_empty(0), x.new_empty(0)
    wide = mean.dtype  # sums over thousands of tokens, in float32
    normalized = (x.to(wide) - statistics[0]) * statistics[1]
    dscale = (dout.to(wide) * normalized).sum(1)
    return dx, dscale.to(scale.dtype), dout.sum(1, dtype=wide).to(scale.dtype)


def _identity(x: Tensor) -> tuple[Tensor, Tensor]:
    # Weights of a wider type make torch keep the statistics in it; with none they would be rounded to x's.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ones(x.shape[-1], dtype=wide, device=x.device), torch.zeros(x.shape[-1], dtype=wide, device=x.device)
