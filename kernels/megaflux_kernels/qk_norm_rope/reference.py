"""qk_norm_rope in plain torch: the definition, and the path on CPUs. Shapes as in the package's docstring.

A pair of neighbours is a complex number, and RoPE a product with cos + i sin; rotating back, one with its conjugate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.qk_norm_rope.streams import Saved, Stream


def definition(
    image: Stream, rope: tuple[Tensor, Tensor], heads: int, text: Stream | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The op as a model writes it; the other paths must equal it. q, k, v: (B, H, S, D)."""

    def normed(stream: Stream) -> list[Tensor]:
        q, k, v = stream.qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        shape = stream.norm_q.shape
        rms_norm = torch.nn.functional.rms_norm
        return [rms_norm(q, shape, stream.norm_q, eps), rms_norm(k, shape, stream.norm_k, eps), v]

    parts = normed(image)
    if text is not None:
        parts = [torch.cat(pair, dim=1) for pair in zip(normed(text), parts)]
    q, k, v = (part.transpose(1, 2) for part in parts)
    return _rotate(q, *rope), _rotate(k, *rope), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(-2)
    return (x.to(wide) * cos.to(wide) + turned * sin.to(wide)).to(x.dtype)


def forward(
    image: Stream, cos: Tensor, sin: Tensor, heads: int, text: Stream | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v (B, S, H, D), rstd (2, B, S, H))."""
    dtype, device = image.qkv.dtype, image.qkv.device
    B, T = image.qkv.shape[0], 0 if text is None else text.qkv.shape[1]
    S, D, wide = T + image.qkv.shape[1], image.norm_q.shape[0], torch.promote_types(dtype, torch.float32)
    out = torch.empty((3, B, S, heads, D), dtype=dtype, device=device)
    rstd = torch.empty((2, B, S, heads), dtype=wide, device=device)
    turn = _turn(cos, sin, wide)
    streams = [(slice(T, S), image)]
    if text is not None:
        streams.append((slice(0, T), text))
    for tokens, (packed, *weights) in streams:
        x = packed.unflatten(-1, (3, heads, D)).movedim(2, 0)  # (3, B, tokens, H, D)
        out[2, :, tokens] = x[2]
        x = x[:2].to(wide)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
        turned = _real(_complex(x * torch.stack(weights).to(wide)[:, None, None, None]).mul_(turn[tokens]))
        _scaled(turned, scale, out[:2, :, tokens])
        rstd[:, :, tokens] = scale[..., 0]
    q, k, v = out.unbind()
    return q, k, v, rstd


def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, saved: Saved, need_norms: bool, dqkv: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, dtxt_qkv, dnorms (2, D), dtxt_norms (2, D)); those of a missing stream or weight are empty. dqkv: where to
    write the image's; None: a new tensor."""
    q, k, rstd, norm_q, norm_k = saved[:5]
    B, S, H, D = q.shape
    T, wide = saved.text_tokens, rstd.dtype
    turn = _turn(saved.cos, saved.sin, wide)
    back, inverse = turn.conj().resolve_conj(), turn.reciprocal()  # equal but for rounding of cos and sin
    txt_norms = saved.txt_norm_q, saved.txt_norm_k
    streams = [slice(T, S), *([slice(0, T)] if T else [])]
    dqkv = torch.empty((B, S - T, 3 * H * D), dtype=q.dtype, device=q.device) if dqkv is None else dqkv
    grads = [dqkv.unflatten(-1, (3, H, D)), torch.empty((B, T, 3, H, D), dtype=q.dtype, device=q.device)]
    norms: list[list[Tensor]] = [[], []]
    for i, (y, dy, weight, txt_weight) in enumerate(zip((q, k), (dq, dk), (norm_q, norm_k), txt_norms, strict=True)):
        y, dy, scale, weight = y.to(wide), dy.to(wide), rstd[i, ..., None], weight.to(wide)
        if txt_weight is not None and T:  # a row for each token
            weight = torch.cat([txt_weight.to(wide).expand(T, D), weight.expand(S - T, D)])[:, None]
        # mean of (gradient of n) n: the rotation and the norm weights cancel in it
        along = (dy * y).sum(-1, keepdim=True).div_(D)
        du = _real(_complex(dy) * back)
        if saved.qkv is None:
            n = _real(_complex(y) * inverse).div_(weight.masked_fill(weight == 0, float("inf")))
        else:
            packed = saved.qkv if saved.txt_qkv is None else torch.cat([saved.txt_qkv, saved.qkv], dim=1)
            n = packed.unflatten(-1, (3, H, D))[:, :, i] * scale
        if need_norms:
            dweight = (du * n).sum((0, 2))  # (S, D)
            for found, tokens in zip(norms, streams):
                found.append(dweight[tokens].sum(0))
        dx = torch.addcmul(du.mul_(weight), n, along, value=-1)
        for grad, tokens in zip(grads, streams):
            _scaled(dx[:, tokens], scale[:, tokens], grad[:, :, i])
    for grad, tokens in zip(grads, streams):
        grad[:, :, 2] = dv[:, tokens]
    dnorms, dtxt_norms = (torch.stack(n).to(norm_q.dtype) if n else norm_q.new_empty(0) for n in norms)
    return grads[0].flatten(2), grads[1].flatten(2), dnorms, dtxt_norms


def _scaled(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = x * scale, in one pass where their dtypes agree."""
    if out.dtype == x.dtype:
        torch.mul(x, scale, out=out)
    else:
        out.copy_(x * scale)


def _turn(cos: Tensor, sin: Tensor, wide: torch.dtype) -> Tensor:
    """cos + i sin of each pair: (S, 1, D / 2), one row for all heads."""
    return torch.complex(cos[:, None, ::2].to(wide), sin[:, None, ::2].to(wide))


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _real(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)
