"""modulate in plain torch: the definition, and the path on CPUs. Shapes: x (B, S, W); scale, shift (B, W)."""

from __future__ import annotations

import torch
from torch import Tensor


def definition(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """The op as a model writes it; the other paths must equal it."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean (B, S), rstd (B, S)); the statistics are at least float32."""
    if len(x) == 1:  # torch's own weights and bias, in its one pass
        out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *_weights(scale[0], shift[0]), eps)
    else:
        normalized, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *_identity(x), eps)
        out = torch.addcmul(shift[:, None], normalized, 1 + scale[:, None])
    return out, mean.squeeze(-1), rstd.squeeze(-1)


def backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, residual: Tensor | None, need_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx + residual, dscale, dshift); empty dscale and dshift unless need_modulation."""
    statistics = mean[..., None], rstd[..., None]
    layer_norm_backward, width = torch.ops.aten.native_layer_norm_backward, x.shape[-1:]
    dscale = dshift = None
    # torch's CPU kernel sums 16-bit gradients of weights in 16 bits: 8% off after 4,580 tokens.
    in_one_pass = len(x) == 1 and (x.is_cuda or x.dtype == _weight_dtype(x))
    if len(x) == 1:
        weights, wanted = _weights(scale[0], scale[0]), need_modulation and in_one_pass
        dx, dscale, dshift = layer_norm_backward(dout, x, width, *statistics, *weights, [True, wanted, wanted])
    else:
        dx, *_ = layer_norm_backward(
            dout * (1 + scale[:, None]), x, width, *statistics, *_identity(x), [True, False, False]
        )
    if need_modulation and not in_one_pass:  # products in float32: 16-bit numbers are promoted
        dscale = (x - statistics[0]).mul_(statistics[1]).mul_(dout).sum(1)
        dshift = dout.sum(1)
    dx = dx if residual is None else dx.add_(residual)
    if dscale is None or dshift is None or not need_modulation:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, dscale.to(scale.dtype).view_as(scale), dshift.to(scale.dtype).view_as(scale)


def _weights(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """1 + scale and shift (W,) as torch's layer norm takes them."""
    wide = _weight_dtype(scale)
    return 1 + scale.to(wide), shift.to(wide)


def _identity(x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Weights that change nothing; None where torch needs none."""
    wide = _weight_dtype(x)
    if wide == x.dtype:
        return None, None
    return torch.ones(x.shape[-1], dtype=wide, device=x.device), torch.zeros(x.shape[-1], dtype=wide, device=x.device)


def _weight_dtype(x: Tensor) -> torch.dtype:
    # On a CPU torch keeps the statistics of 16-bit x in float32 only with float32 weights; on a GPU it always does, and
    # takes only weights of x's dtype.
    return x.dtype if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
