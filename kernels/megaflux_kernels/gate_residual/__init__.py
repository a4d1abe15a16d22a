"""gate_residual: a gated residual, and on request the next LayerNorm with scale and shift, in one pass.

    hidden = residual + gate * x
    out = (hidden - mean) / sqrt(var + eps) * (1 + scale) + shift

AdaLN-Zero of DiT (2212.09748, section 3.2) as diffusers' FluxTransformerBlock computes it. Shapes: B batch, S tokens,
W width; residual, x (B, S, W); gate, scale, shift (B, W). The backward pass keeps hidden and float32 statistics where
there is a norm, x only where gate has a gradient, never out or residual.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from megaflux_kernels.dispatch import check, rows, torch_path, use_triton
from megaflux_kernels.gate_residual import reference

EPS = 1e-6


@torch.library.custom_op("megaflux::gate_residual", mutates_args=())
def _triton_forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    from megaflux_kernels.gate_residual import triton_kernels

    return triton_kernels.forward(residual, x, gate)


@_triton_forward.register_fake
def _(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return _like(residual)


@torch.library.custom_op("megaflux::gate_residual_modulate", mutates_args=())
def _triton_forward_modulate(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megaflux_kernels.gate_residual import triton_kernels

    return triton_kernels.forward_modulate(residual, x, gate, scale, shift, eps)


@_triton_forward_modulate.register_fake
def _(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = residual.new_empty(residual.shape[:2], dtype=torch.float32)
    return _like(residual), _like(residual), statistics, torch.empty_like(statistics)


@torch.library.custom_op("megaflux::gate_residual_backward", mutates_args=())
def _triton_backward(dhidden: Tensor, gate: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    from megaflux_kernels.gate_residual import triton_kernels

    return triton_kernels.backward(dhidden, gate, x)


@_triton_backward.register_fake
def _(dhidden: Tensor, gate: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    return _like(dhidden), gate.new_empty((0,) if x is None else gate.shape)


@torch.library.custom_op("megaflux::gate_residual_modulate_backward", mutates_args=())
def _triton_backward_modulate(
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
    from megaflux_kernels.gate_residual import triton_kernels

    return triton_kernels.backward_modulate(dhidden, dout, hidden, mean, rstd, scale, gate, x, need_modulation)


@_triton_backward_modulate.register_fake
def _(
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
    dgate = gate.new_empty((0,) if x is None else gate.shape)
    modulation = scale.shape if need_modulation else (0,)
    return _like(hidden), _like(hidden), dgate, scale.new_empty(modulation), scale.new_empty(modulation)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check(x: Tensor, other: Tensor | None, *vectors: Tensor | None) -> None:
    check("gate_residual", x, other, *vectors, dims=3)
    if other is not None and other.shape != x.shape:
        raise ValueError(f"gate_residual: want tensors of one shape, got {tuple(x.shape)} and {tuple(other.shape)}")
    for vector in vectors:
        if vector is not None and vector.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"gate_residual: want gate, scale and shift of shape {(x.shape[0], x.shape[2])}, batch and width, "
                f"got {tuple(vector.shape)}"
            )


def forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """hidden (B, S, W), without autograd."""
    _check(residual, x, gate)
    run = _triton_forward if use_triton(residual) else reference.forward
    return run(rows(residual), rows(x), rows(gate))


def forward_modulate(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden (B, S, W), out (B, S, W), mean (B, S), rstd (B, S)), without autograd.

    The statistics are those of hidden as it is stored, float32 (float64 for float64), so that
    `modulate.forward(hidden, scale, shift, eps)` gives out again.
    """
    _check(residual, x, gate, scale, shift)
    run = _triton_forward_modulate if use_triton(residual) else reference.forward_modulate
    return run(rows(residual), rows(x), rows(gate), rows(scale), rows(shift), eps)


def backward(dhidden: Tensor, gate: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(dx, dgate) of `forward`; dgate None without x. The gradient of residual is dhidden itself."""
    _check(dhidden, x, gate)
    run = _triton_backward if use_triton(dhidden) else reference.backward
    dx, dgate = run(rows(dhidden), rows(gate), None if x is None else rows(x))
    return dx, None if x is None else dgate


def backward_modulate(
    dhidden: Tensor | None,
    dout: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    gate: Tensor,
    x: Tensor | None = None,
    need_modulation: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dresidual, dx, dgate, dscale, dshift) of `forward_modulate`, in one pass.

    dhidden, dout: gradients (B, S, W) of hidden and out; one may be None, which counts as zero. dgate is None without
    x, dscale and dshift are None without need_modulation. Without dout, dresidual is dhidden itself.
    """
    if dout is None:
        if dhidden is None:
            raise ValueError("gate_residual: backward_modulate got neither dhidden nor dout; give one or both")
        dscale, dshift = (torch.zeros_like(scale) if need_modulation else None for _ in range(2))
        return dhidden, *backward(dhidden, gate, x), dscale, dshift
    _check(hidden, x, gate, scale)
    _check(hidden, dout)
    _check(hidden, dhidden)
    run = _triton_backward_modulate if use_triton(hidden) else reference.backward_modulate
    dhidden, x = (None if t is None else rows(t) for t in (dhidden, x))
    dresidual, dx, dgate, dscale, dshift = run(
        dhidden, rows(dout), hidden, mean, rstd, rows(scale), rows(gate), x, need_modulation
    )
    if not need_modulation:
        dscale = dshift = None
    return dresidual, dx, None if x is None else dgate, dscale, dshift


def _setup(ctx, inputs, output) -> None:
    _, x, gate = inputs
    ctx.save_for_backward(gate, x if ctx.needs_input_grad[2] else None)
    ctx.set_materialize_grads(False)


def _backward(ctx, dhidden):
    if dhidden is None or not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        return dhidden, None, None
    return dhidden, *backward(dhidden, *ctx.saved_tensors)


def _setup_modulate(ctx, inputs, output) -> None:
    _, x, gate, scale, _, _ = inputs
    hidden, _, mean, rstd = output
    ctx.save_for_backward(hidden, mean, rstd, scale, gate, x if ctx.needs_input_grad[2] else None)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward_modulate(ctx, dhidden, dout, dmean, drstd):
    if dhidden is None and dout is None:
        return None, None, None, None, None, None
    need = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    hidden, mean, rstd, scale, gate, x = ctx.saved_tensors
    return *backward_modulate(dhidden, dout, hidden, mean, rstd, scale, gate, x, need), None


_triton_forward.register_autograd(_backward, setup_context=_setup)
_triton_forward_modulate.register_autograd(_backward_modulate, setup_context=_setup_modulate)

_reference = torch_path(reference.forward, _setup, _backward)

_reference_modulate = torch_path(reference.forward_modulate, _setup_modulate, _backward_modulate)


@overload
def gate_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor: ...


@overload
def gate_residual(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]: ...


def gate_residual(
    residual: Tensor,
    x: Tensor,
    gate: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = EPS,
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + gate * x; with scale and shift also LayerNorm of it * (1 + scale) + shift, as (hidden, out).

    Differentiable in all tensors. residual, x: (B, S, W), any strides over B and S; gate, scale, shift: (B, W), slices
    of one modulation tensor too; all of one dtype: bfloat16, float16 or float32 (float64 on the torch path).
    Statistics and arithmetic are float32, hidden and out are rounded once each, out from the rounded hidden.
    ValueError for other input, and for one of scale and shift without the other.
    """
    if (scale is None) != (shift is None):
        raise ValueError("gate_residual: got one of scale and shift; give both or neither")
    _check(residual, x, gate, scale, shift)
    residual, x, gate = rows(residual), rows(x), rows(gate)
    if scale is None or shift is None:
        return (_triton_forward if use_triton(residual) else _reference)(residual, x, gate)
    run = _triton_forward_modulate if use_triton(residual) else _reference_modulate
    hidden, out, _, _ = run(residual, x, gate, rows(scale), rows(shift), eps)
    return hidden, out
