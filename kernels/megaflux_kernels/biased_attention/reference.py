"""biased_attention in plain torch: the definition, and the path on CPUs and in float64.

Shapes: q (B, H, Sq, D); k, v (B, H, Sk, D); bias (B, Sk). A bias belongs to keys, so the queries of one batch item
either all see a key or none does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def definition(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None = None) -> Tensor:
    """The op as a model writes it; the other paths must equal it. 0 where no key takes part."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias, dead = _living(bias)
    scores = q @ k.transpose(-1, -2) * scale + bias[:, None, None, :].to(q.dtype)
    return (torch.softmax(scores, -1) @ v).masked_fill(dead[:, None, None, None], 0)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, Sq, H, D), lse (B, H, Sq)); lse is float32 (float64 for float64), -inf where no key takes part."""
    bias, dead = _living(bias)
    if _fused(q, k):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias[:, None, None, :], scale=scale
        )
    else:
        scores = _scores(q, k, bias, scale)
        lse = torch.logsumexp(scores, -1)
        weights = scores.sub_(lse[..., None]).exp_()
        out = torch.matmul(weights.to(v.dtype), v).transpose(1, 2).contiguous().transpose(1, 2)
    out = out.masked_fill_(dead[:, None, None, None], 0)
    return out.transpose(1, 2), lse.masked_fill_(dead[:, None, None], float("-inf"))


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each (B, S, H, D); out and lse of `forward`."""
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # rows without keys: every weight exp(-inf) = 0
    out = out.transpose(1, 2)
    if _fused(q, k):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False, attn_mask=bias[:, None, None, :], scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    weights = _scores(q, k, bias, scale).sub_(lse[..., None]).exp_()
    delta = (out.to(lse.dtype) * dout).sum(-1, keepdim=True)
    dscores = torch.matmul(dout, v.transpose(-1, -2)).to(lse.dtype).sub(delta).mul_(weights).mul_(scale).to(q.dtype)
    dv = torch.matmul(weights.to(dout.dtype).transpose(-1, -2), dout)
    dq, dk = torch.matmul(dscores, k), torch.matmul(dscores.transpose(-1, -2), q)
    dq, dk, dv = (g.transpose(1, 2).contiguous() for g in (dq, dk, dv))
    return dq, dk, dv


def _living(bias: Tensor) -> tuple[Tensor, Tensor]:
    """(bias with 0 in batch items whose keys are all -inf, those items (B,)): a softmax there would be NaN."""
    dead = (bias == float("-inf")).all(-1)
    return bias.masked_fill(dead[:, None], 0), dead


def _fused(q: Tensor, k: Tensor) -> bool:
    """Whether torch's CPU flash attention, the one fused kernel that takes a float32 mask in any dtype, can run."""
    return q.device.type == "cpu" and q.numel() > 0 and k.numel() > 0


def _scores(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).to(bias.dtype)
    return scores.mul_(scale).add_(bias[:, None, None, :])
