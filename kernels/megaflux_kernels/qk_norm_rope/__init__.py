"""qk_norm_rope: packed q, k, v of FLUX's streams -> RMSNorm per head -> RoPE -> joint [text; image] layout.

    n = x / sqrt(mean(x^2) + eps) * norm_weight            per head, for q and k
    (a, b) -> (a cos - b sin, b cos + a sin)               pairs of neighbours: FLUX's RoPE is interleaved

as diffusers' FluxAttnProcessor and apply_rotary_emb compute it. Shapes: B batch, L image tokens, T text tokens (0
without a text stream), S = T + L, H heads, D head_dim.

The backward pass recovers the normalized values from the rotated q and k, which attention keeps anyway, and float32
statistics: it rotates back and divides by the norm weight. Where a weight is 0, or far smaller than its neighbour, that
loses digits; with `keep_input` the packed q, k and v are kept instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaflux_kernels.dispatch import check, rows, torch_path, use_triton
from megaflux_kernels.qk_norm_rope import reference
from megaflux_kernels.qk_norm_rope.streams import Saved, Stream

EPS = 1e-6
HEAD_DIMS = (32, 64, 128)
SMALLEST_RATIO = 1 / 8  # of a norm weight to its neighbour in the pair: costs at most three bits


# Operators and autograd functions take flat arguments; everything else takes a Stream or Saved.
@torch.library.custom_op("megaflux::qk_norm_rope", mutates_args=())
def _triton_forward(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    txt_qkv: Tensor | None,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    eps: float,
    keep_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megaflux_kernels.qk_norm_rope import triton_kernels

    image, text = Stream(qkv, norm_q, norm_k), _text(txt_qkv, txt_norm_q, txt_norm_k)
    return triton_kernels.forward(image, cos, sin, heads, text, eps)


@_triton_forward.register_fake
def _(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    txt_qkv: Tensor | None,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    eps: float,
    keep_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = qkv.shape[1] + (0 if txt_qkv is None else txt_qkv.shape[1])
    q, k, v = (qkv.new_empty((qkv.shape[0], tokens, heads, norm_q.shape[0])) for _ in range(3))
    return q, k, v, qkv.new_empty((2, qkv.shape[0], tokens, heads), dtype=torch.float32)


def _torch_forward(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    txt_qkv: Tensor | None,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    eps: float,
    keep_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    image, text = Stream(qkv, norm_q, norm_k), _text(txt_qkv, txt_norm_q, txt_norm_k)
    return reference.forward(image, cos, sin, heads, text, eps)


def _text(qkv: Tensor | None, norm_q: Tensor | None, norm_k: Tensor | None) -> Stream | None:
    return None if qkv is None or norm_q is None or norm_k is None else Stream(qkv, norm_q, norm_k)


@torch.library.custom_op("megaflux::qk_norm_rope_backward", mutates_args=())
def _triton_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
    text_tokens: int,
    need_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megaflux_kernels.qk_norm_rope import triton_kernels

    saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, qkv, txt_qkv, text_tokens)
    return triton_kernels.backward(dq, dk, dv, saved, need_norms)


@_triton_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
    text_tokens: int,
    need_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, H, D = q.shape
    dqkv = q.new_empty((B, S - text_tokens, 3 * H * D))
    return dqkv, *_new_gradients(q, norm_q, text_tokens, need_norms)


@torch.library.custom_op("megaflux::qk_norm_rope_backward_out", mutates_args=("out",))
def _triton_backward_out(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
    text_tokens: int,
    need_norms: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from megaflux_kernels.qk_norm_rope import triton_kernels

    saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, qkv, txt_qkv, text_tokens)
    return triton_kernels.backward(dq, dk, dv, saved, need_norms, out)[1:]


@_triton_backward_out.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    txt_norm_q: Tensor | None,
    txt_norm_k: Tensor | None,
    qkv: Tensor | None,
    txt_qkv: Tensor | None,
    text_tokens: int,
    need_norms: bool,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_gradients(q, norm_q, text_tokens, need_norms)


def _new_gradients(q: Tensor, norm_q: Tensor, text_tokens: int, need_norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, _, H, D = q.shape
    norms = (2, D) if need_norms else (0,)
    return (
        q.new_empty((B, text_tokens, 3 * H * D)),
        norm_q.new_empty(norms),
        norm_q.new_empty(norms if text_tokens else (0,)),
    )


def forward(
    image: Stream, rope: tuple[Tensor, Tensor], heads: int, text: Stream | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, rstd), without autograd: q, k, v (B, S, H, D) contiguous; rstd (2, B, S, H), 1 / rms of q and of k,
    float32 (float64 for float64). Arguments and errors as in `qk_norm_rope`."""
    _check(image, rope, heads, text)
    run: Callable = _triton_forward if use_triton(image.qkv) else _torch_forward
    return run(*_flat(image, rope, heads, text), eps, False)


def backward(
    gradients: tuple[Tensor, Tensor, Tensor], saved: Saved, need_norms: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dqkv (B, L, 3 H D), dtxt_qkv (B, T, 3 H D), dnorm_q, dnorm_k, dtxt_norm_q, dtxt_norm_k (D,)) of `forward`.

    The gradients of norm weights are None unless need_norms, the text's without text. gradients: dq, dk, dv,
    (B, S, H, D), any strides but the last, which is 1. out: where dqkv is written, with any strides but the last,
    which is 1 (a slice of a wider gradient); None: a new tensor. ValueError for another out.
    """
    dq, dk, dv = (rows(d) for d in gradients)
    saved = saved.rows()
    if out is not None:
        _check_out(out, saved)
    if not use_triton(saved.q):
        dqkv, dtxt_qkv, dnorms, dtxt_norms = reference.backward(dq, dk, dv, saved, need_norms, out)
    elif out is None:
        dqkv, dtxt_qkv, dnorms, dtxt_norms = _triton_backward(dq, dk, dv, *saved, need_norms)
    else:
        dqkv, (dtxt_qkv, dnorms, dtxt_norms) = out, _triton_backward_out(dq, dk, dv, *saved, need_norms, out)
    text = saved.text_tokens > 0
    none = (None, None)
    dnorm_q, dnorm_k = dnorms.clone() if need_norms else none
    dtxt_norm_q, dtxt_norm_k = dtxt_norms.clone() if need_norms and text else none
    return dqkv, dtxt_qkv if text else None, dnorm_q, dnorm_k, dtxt_norm_q, dtxt_norm_k


def _check_out(out: Tensor, saved: Saved) -> None:
    check("qk_norm_rope", saved.q, out)
    B, S, H, D = saved.q.shape
    want = (B, S - saved.text_tokens, 3 * H * D)
    if out.shape != want or rows(out) is not out:
        raise ValueError(
            f"qk_norm_rope: want out {want} of unit stride in the last dimension, got {tuple(out.shape)} of strides "
            f"{out.stride()}"
        )


def invertible(*norm_weights: Tensor) -> bool:
    """Whether the backward pass can recover its input from rotated q and k: no weight is 0, and none is below an eighth
    of its neighbour in the rotation's pair. Waits for the GPU."""
    return all(bool(in_proportion(weight)) for weight in norm_weights)


def in_proportion(weight: Tensor) -> Tensor:
    """`invertible` of one norm weight (D,) as a tensor () of bool on its device, without waiting for the GPU."""
    pairs = weight.detach().float().abs().unflatten(0, (-1, 2))
    return ((pairs.amin(1) > 0) & (pairs.amin(1) >= SMALLEST_RATIO * pairs.amax(1))).all()


def _setup(ctx, inputs, output) -> None:
    qkv, norm_q, norm_k, cos, sin, _, txt_qkv, txt_norm_q, txt_norm_k, _, keep_input = inputs
    q, k, _, rstd = output
    ctx.text_tokens = 0 if txt_qkv is None else txt_qkv.shape[1]
    kept = (qkv, txt_qkv) if keep_input else (None, None)
    ctx.save_for_backward(q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, *kept)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # no zeros of rstd's size, which has no gradient


def _backward(ctx, dq, dk, dv, drstd):
    if dq is None and dk is None and dv is None:
        return (None,) * 11
    q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, qkv, txt_qkv = ctx.saved_tensors
    saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, txt_norm_q, txt_norm_k, qkv, txt_qkv, ctx.text_tokens)
    dq, dk, dv = (torch.zeros_like(saved.q) if d is None else d for d in (dq, dk, dv))
    need = ctx.needs_input_grad
    dqkv, dtxt_qkv, dnorm_q, dnorm_k, dtxt_norm_q, dtxt_norm_k = backward(
        (dq, dk, dv), saved, need[1] or need[2] or need[7] or need[8]
    )
    return dqkv, dnorm_q, dnorm_k, None, None, None, dtxt_qkv, dtxt_norm_q, dtxt_norm_k, None, None


_triton_forward.register_autograd(_backward, setup_context=_setup)

# torch.compile (2.13) loses the storage of views between complex and real numbers: this path is not compiled.
_reference = torch.compiler.disable(torch_path(_torch_forward, _setup, _backward))


def qk_norm_rope(
    image: Stream,
    rope: tuple[Tensor, Tensor],
    heads: int,
    text: Stream | None = None,
    eps: float = EPS,
    keep_input: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as attention reads them, each (B, H, S, D), a view of (B, S, H, D) memory; text tokens first.

    image: L tokens; text: T tokens, or None. rope: cos and sin, (S, D) each, of FluxPosEmbed, each number twice, at
    least float32, without gradient. All other tensors have one dtype: bfloat16, float16 or float32 (float64 on the
    torch path). The Triton path supports D = 32, 64 and 128, the torch path any even D.
    keep_input: keep the packed q, k and v for the backward pass instead of recovering them; None: where the norm
    weights need it (`invertible`). Differentiable in the streams' tensors. ValueError for other input.
    """
    _check(image, rope, heads, text)
    if keep_input is None:
        keep_input = not invertible(*(weight for stream in (image, text) if stream for weight in stream[1:]))
    run = _triton_forward if use_triton(image.qkv) else _reference
    q, k, v, _ = run(*_flat(image, rope, heads, text), eps, keep_input)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _flat(image: Stream, rope: tuple[Tensor, Tensor], heads: int, text: Stream | None) -> list[Any]:
    """The first nine arguments of the operator."""
    return [*image.rows(), *rope, heads, *((None, None, None) if text is None else text.rows())]


def _check(image: Stream, rope: tuple[Tensor, Tensor], heads: int, text: Stream | None) -> None:
    qkv = image.qkv
    check("qk_norm_rope", *image, *(text or ()), dims=3)
    if heads < 1 or qkv.shape[-1] % (3 * heads):
        raise ValueError(f"qk_norm_rope: want qkv (B, L, 3 H D) for {heads} heads, got {tuple(qkv.shape)}")
    D = qkv.shape[-1] // (3 * heads)
    if D % 2 or (use_triton(qkv) and D not in HEAD_DIMS):
        supported = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(
            f"qk_norm_rope: head_dim {D} is not supported; use {supported} (any even one on the torch path)"
        )
    tokens = qkv.shape[1]
    if text is not None:
        if text.qkv.ndim != 3 or text.qkv.shape[::2] != qkv.shape[::2]:
            raise ValueError(
                f"qk_norm_rope: want text.qkv (B, T, 3 H D) beside image.qkv {tuple(qkv.shape)}, got "
                f"{tuple(text.qkv.shape)}"
            )
        tokens += text.qkv.shape[1]
    for stream in (image, text):
        for weight in () if stream is None else stream[1:]:
            if weight.shape != (D,):
                raise ValueError(f"qk_norm_rope: want norm weights of shape {(D,)}, got {tuple(weight.shape)}")
    for table in rope:
        if table.shape != (tokens, D) or table.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"qk_norm_rope: want cos and sin of shape {(tokens, D)} in float32, got {tuple(table.shape)} in "
                f"{table.dtype}"
            )
        if table.device != qkv.device:
            raise ValueError(f"qk_norm_rope: want cos and sin on {qkv.device}, got {table.device}; move them")
        if table.requires_grad:
            raise ValueError("qk_norm_rope: cos and sin carry no gradient; detach them")
