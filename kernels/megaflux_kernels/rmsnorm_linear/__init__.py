"""rmsnorm_linear: Qwen2-VL's final RMSNorm and the connector, in one matrix product.

    out = (x / sqrt(mean(x^2) + eps) * norm_weight) @ weight.T + bias

The sum of squares is accumulated along K on the tiles that the product reads anyway, and rows are scaled at its end: x is
read once, and the normalized x is never written. Shapes: x (..., K), norm_weight (K,), weight (N, K), bias (N,). The
backward pass keeps x and a statistic per row; its matrix products are torch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.dispatch import check, rows, torch_path, use_triton
from megaflux_kernels.rmsnorm_linear import reference

EPS = 1e-6


@torch.library.custom_op("megaflux::rmsnorm_linear", mutates_args=())
def _triton_forward(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from megaflux_kernels.rmsnorm_linear import triton_kernels

    return triton_kernels.forward(x, norm_weight, weight, bias, eps)


@_triton_forward.register_fake
def _(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty(x.shape[:1], dtype=torch.float32)


def forward(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(out (..., N), rstd (...)), without autograd: rstd is 1 / rms of each row, float32 (float64 for float64)."""
    flat = _checked(x, norm_weight, weight, bias)
    run = _triton_forward if use_triton(x) else reference.forward
    out, rstd = run(flat, rows(norm_weight), rows(weight), None if bias is None else rows(bias), eps)
    return out.view(*x.shape[:-1], weight.shape[0]), rstd.view(x.shape[:-1])


def backward(
    dout: Tensor,
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    need: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dnorm_weight, dweight, dbias) of `forward`; None for what `need` leaves out."""
    flat = x.reshape(-1, x.shape[-1])
    dx, dnorm_weight, dweight, dbias = reference.backward(
        dout.reshape(-1, dout.shape[-1]), flat, rstd.reshape(-1), norm_weight, weight, need
    )
    return None if dx is None else dx.view(x.shape), dnorm_weight, dweight, dbias


def _setup(ctx, inputs, output) -> None:
    x, norm_weight, weight, bias, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x if any(ctx.needs_input_grad[:3]) else None, output[1], norm_weight, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, drstd):
    if dout is None:
        return None, None, None, None, None
    need = (*ctx.needs_input_grad[:3], ctx.has_bias and ctx.needs_input_grad[3])
    x, rstd, norm_weight, weight = ctx.saved_tensors
    return *reference.backward(dout, x, rstd, norm_weight, weight, need), None


_triton_forward.register_autograd(_backward, setup_context=_setup)

_reference = torch_path(reference.forward, _setup, _backward)


def rmsnorm_linear(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """RMSNorm(x) * norm_weight through a linear: (..., K) -> (..., N), differentiable in all four.

    x: (..., K); norm_weight: (K,); weight: (N, K); bias: (N,) or None; all of one dtype: bfloat16, float16 or float32
    (float64 on the torch path). Sums are float32. Each gradient is computed only where it is needed. ValueError for
    other input.
    """
    flat = _checked(x, norm_weight, weight, bias)
    run = _triton_forward if use_triton(x) else _reference
    out, _ = run(flat, rows(norm_weight), rows(weight), None if bias is None else rows(bias), eps)
    return out.view(*x.shape[:-1], weight.shape[0])


def _checked(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x as (rows, K). ValueError for shapes that do not match."""
    check("rmsnorm_linear", x, norm_weight, weight, bias)
    K = x.shape[-1] if x.ndim else 0
    N = weight.shape[0] if weight.ndim else 0
    fits = x.ndim >= 1 and norm_weight.shape == (K,) and weight.shape == (N, K) and K > 0 and N > 0
    if not fits or (bias is not None and bias.shape != (N,)):
        raise ValueError(
            f"rmsnorm_linear: want x (..., K), norm_weight (K,), weight (N, K), bias (N,), got {tuple(x.shape)}, "
            f"{tuple(norm_weight.shape)}, {tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)}"
        )
    return rows(x.reshape(-1, K))
