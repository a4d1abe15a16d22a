"""gate_residual in plain torch: the definition, and the path on CPUs. Shapes: residual, x (B, S, W); others (B, W)."""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.modulate import reference as modulate


def definition(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The op as a model writes it; the other paths must equal it."""
    hidden = residual + gate[:, None] * x
    if scale is None or shift is None:
        return hidden
    return hidden, modulate.definition(hidden, scale, shift, eps)


def forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """hidden."""
    return torch.addcmul(residual, gate[:, None], x)


def forward_modulate(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, out, mean (B, S), rstd (B, S))."""
    hidden = forward(residual, x, gate)
    return hidden, *modulate.forward(hidden, scale, shift, eps)


def backward(dhidden: Tensor, gate: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dx, dgate); empty dgate without x."""
    # torch sums 16-bit numbers in float32 and rounds once.
    dgate = gate.new_empty(0) if x is None else (dhidden * x).sum(1)
    return dhidden * gate[:, None], dgate


def backward_modulate(
    dhidden: Tensor | None,
    dout: Tensor,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    gate: Tensor,
    x: Tensor | None,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dresidual, dx, dgate, dscale, dshift); what is not needed is empty."""
    total, dscale, dshift = modulate.backward(dout, hidden, mean, rstd, scale, dhidden, need_modulation)
    return total, *backward(total, gate, x), dscale, dshift
