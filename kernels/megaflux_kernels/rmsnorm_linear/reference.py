"""rmsnorm_linear in plain torch: the definition, and the path on CPUs. Shapes: x (rows, K), weight (N, K)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def definition(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The op as a model writes it, with transformers' Qwen2RMSNorm: normalized in float32, rounded, times the weight. The
    other paths must equal it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return F.linear(norm_weight * normalized.to(x.dtype), weight, bias)


def forward(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(out (rows, N), rstd (rows,)); the statistic is at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=wide)  # one pass, without a copy of x
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = (x * rstd[:, None]).mul_(norm_weight).to(weight.dtype)
    return F.linear(normed, weight, bias), rstd


def backward(
    dout: Tensor,
    x: Tensor | None,
    rstd: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dnorm_weight, dweight, dbias), None for what is not needed. x may be None for dbias alone. The backward pass
    of both paths."""
    need_x, need_norm, need_weight, need_bias = need
    dx = dnorm = dweight = None
    if x is None or not (need_x or need_norm or need_weight):
        return None, None, None, dout.sum(0) if need_bias else None
    n = x * rstd[:, None]  # promoted to the statistic's dtype
    if need_weight:
        dweight = dout.t() @ (n * norm_weight).to(weight.dtype)
    if need_x or need_norm:
        dnormed = (dout @ weight).to(rstd.dtype)  # (rows, K)
        if need_norm:
            dnorm = (dnormed * n).sum(0).to(norm_weight.dtype)
        if need_x:
            dn = dnormed.mul_(norm_weight)
            along = (dn * n).mean(-1, keepdim=True)
            dx = dn.sub_(n.mul_(along)).mul_(rstd[:, None]).to(x.dtype)
    return dx, dnorm, dweight, dout.sum(0) if need_bias else None
