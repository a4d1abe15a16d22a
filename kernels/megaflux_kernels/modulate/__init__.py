"""modulate: LayerNorm without weights, then scale and shift, in one pass.

    out = (x - mean) / sqrt(var + eps) * (1 + scale) + shift

AdaLN-Zero of DiT (2212.09748, section 3.2) as diffusers' AdaLayerNormZero computes it. Shapes: B batch, S tokens,
W width; x (B, S, W), scale and shift (B, W). The backward pass keeps x and float32 statistics, never the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.dispatch import check, rows, torch_path, use_triton
from megaflux_kernels.modulate import reference

EPS = 1e-6


@torch.library.custom_op("megaflux::modulate", mutates_args=())
def _triton_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from megaflux_kernels.modulate import triton_kernels

    return triton_kernels.forward(x, scale, shift, eps)


@_triton_forward.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[:2], dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), statistics, torch.empty_like(statistics)


@torch.library.custom_op("megaflux::modulate_backward", mutates_args=())
def _triton_backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, residual: Tensor | None, need_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from megaflux_kernels.modulate import triton_kernels

    return triton_kernels.backward(dout, x, mean, rstd, scale, residual, need_modulation)


@_triton_backward.register_fake
def _(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, residual: Tensor | None, need_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    modulation = scale.shape if need_modulation else (0,)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, scale.new_empty(modulation), scale.new_empty(modulation)


def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, S, W), mean (B, S), rstd (B, S)), without autograd; the statistics are float32, float64 for float64."""
    check("modulate", x, scale, shift, dims=3)
    run = _triton_forward if use_triton(x) else reference.forward
    return run(rows(x), rows(scale), rows(shift), eps)


def backward(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    residual: Tensor | None = None,
    need_modulation: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dscale, dshift) of `forward`. residual: a gradient (B, S, W) of x from elsewhere, added in the same pass.
    need_modulation False: no dscale and dshift (None)."""
    run = _triton_backward if use_triton(x) else reference.backward
    residual = None if residual is None else rows(residual)
    dx, dscale, dshift = run(rows(dout), x, mean, rstd, scale, residual, need_modulation)
    return (dx, dscale, dshift) if need_modulation else (dx, None, None)


def _setup(ctx, inputs, output) -> None:
    x, scale, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, scale)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dmean, drstd):
    if dout is None:
        return None, None, None, None
    need = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    x, mean, rstd, scale = ctx.saved_tensors
    return *backward(dout, x, mean, rstd, scale, None, need), None


_triton_forward.register_autograd(_backward, setup_context=_setup)

_reference = torch_path(reference.forward, _setup, _backward)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, differentiable in all three.

    x: (B, S, W), any strides over B and S; scale, shift: (B, W), slices of one modulation tensor too; all of one
    dtype: bfloat16, float16 or float32 (float64 on the torch path). Statistics and arithmetic are float32, the result
    is rounded once. ValueError for other input.
    """
    check("modulate", x, scale, shift, dims=3)
    run = _triton_forward if use_triton(x) else _reference
    return run(rows(x), rows(scale), rows(shift), eps)[0]
