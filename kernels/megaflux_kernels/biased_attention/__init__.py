"""biased_attention: attention with a log-bias on every key, which flash attention refuses (it takes no mask).

    out = softmax(q k^T * scale + bias[:, None, None, :]) v

A bias of log n weighs a key as if it were there n times; -inf masks it. FlashAttention-2 (2307.08691) with the
bias added to the scores. Shapes: B batch, H heads, Sq queries, Sk keys, D head width; q (B, H, Sq, D), k and v
(B, H, Sk, D), bias (B, Sk). The backward pass keeps the inputs, the output and one float32 per query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.biased_attention import reference
from megaflux_kernels.dispatch import check, rows, torch_path, use_triton

HEAD_DIMS = (32, 64, 128)  # of the Triton kernels


# The raw ops give (B, S, H, D) tensors, the layout that linears around attention read and write; views made of them
# outside are (B, H, S, D), since an op's result must not be a view.
@torch.library.custom_op("megaflux::biased_attention", mutates_args=())
def _triton_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from megaflux_kernels.biased_attention import triton_kernels

    return triton_kernels.forward(q, k, v, bias, scale)


@_triton_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, S, D = q.shape
    return q.new_empty((B, S, H, D)), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("megaflux::biased_attention_backward", mutates_args=())
def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from megaflux_kernels.biased_attention import triton_kernels

    return triton_kernels.backward(dout, q, k, v, out, lse, bias, scale)


@_triton_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])) for x in (q, k, v))
    return dq, dk, dv


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out (B, H, Sq, D), a view of (B, Sq, H, D) memory; lse (B, H, Sq)), without autograd.

    lse: natural log of the sum of exponentials, float32 (float64 for float64), -inf where no key takes part.
    """
    bias, scale = _checked(q, k, v, bias, scale)
    run = _triton_forward if use_triton(q) else reference.forward
    out, lse = run(rows(q), rows(k), rows(v), bias, scale)
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `forward`, each (B, H, S, D), a view of (B, S, H, D) memory. q, k, v, bias and scale as they
    were given to `forward`, out and lse as it returned them."""
    bias, scale = _checked(q, k, v, bias, scale)
    run = _triton_backward if use_triton(q) else reference.backward
    dq, dk, dv = run(rows(dout), rows(q), rows(k), rows(v), out.transpose(1, 2), lse, bias, scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _setup(ctx, inputs, output) -> None:
    q, k, v, bias, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, bias)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dout is None:
        return None, None, None, None, None
    q, k, v, out, lse, bias = ctx.saved_tensors
    grads = backward(dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, bias, ctx.scale)
    return *grads, None, None


_triton_forward.register_autograd(_backward, setup_context=_setup)

_reference = torch_path(reference.forward, _setup, _backward)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale + bias[:, None, None, :]) v, differentiable in q, k and v.

    q: (B, H, Sq, D); k, v: (B, H, Sk, D); transposed views of (B, S, H, D) memory, and other strides, are read where
    they lie if the last stride is 1. One dtype: bfloat16, float16 or float32 (float64 on the torch path). The Triton
    path has D = 32, 64 and 128, the torch path any. scale: 1 / sqrt(D) by default.
    bias: (B, Sk), any float dtype, used in float32 (float64 where q is). Natural log of each key's weight: 0 changes
    nothing, log 2 counts the key twice, -inf masks it; finite or -inf. It carries no gradient.
    Returns (B, H, Sq, D), a view of (B, Sq, H, D) memory. A batch item whose keys are all -inf (or Sk = 0) gives
    output 0 and gradients 0. ValueError for other input, and for a bias that requires a gradient.
    """
    bias, scale = _checked(q, k, v, bias, scale)
    run = _triton_forward if use_triton(q) else _reference
    return run(rows(q), rows(k), rows(v), bias, scale)[0].transpose(1, 2)


def _checked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """bias as the paths read it, and scale; ValueError for what is not supported."""
    check("biased_attention", q, k, v, dims=4)
    B, H, _, D = q.shape
    if k.ndim != 4 or k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (B, H, D):
        raise ValueError(
            f"biased_attention: want q (B, H, Sq, D) and k, v (B, H, Sk, D), got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if bias.shape != (B, k.shape[2]):
        raise ValueError(f"biased_attention: want bias (B, Sk) = {(B, k.shape[2])}, got {tuple(bias.shape)}")
    if not bias.is_floating_point() or bias.device != q.device:
        raise ValueError(f"biased_attention: want a float bias on {q.device}, got {bias.dtype} on {bias.device}")
    if bias.requires_grad:
        raise ValueError("biased_attention: bias carries no gradient, got one that requires it; detach it")
    if use_triton(q) and D not in HEAD_DIMS:
        raise ValueError(f"biased_attention: the Triton path supports head_dim 32, 64 and 128, got {D}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return rows(bias.to(wide)), D**-0.5 if scale is None else float(scale)
