"""qk_norm_rope in Triton: one launch per stream. A program holds one token's q, k and v of a few heads, which lie side by
side in memory, and splits the pairs in registers.

The backward pass works on rotated values where it can: a rotation changes no inner product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu
from megaflux_kernels.qk_norm_rope.streams import Saved, Stream

HEADS = 8  # heads of one program
ROWS = 16  # tokens that one backward program sums over where the norm weights train


@triton.jit
def _halves(x, H: tl.constexpr, D: tl.constexpr):
    """[H, D] -> the first and the second of each pair, [H, D / 2] twice."""
    return tl.split(tl.reshape(x, (H, D // 2, 2)))


@triton.jit
def _whole(a, b, H: tl.constexpr, D: tl.constexpr):
    return tl.reshape(tl.join(a, b), (H, D))


@triton.jit
def _norm_turn(x, norm_ptr, cos, sin, eps, H: tl.constexpr, D: tl.constexpr):
    """(rotated [H, D], rstd [H]) of one token's heads."""
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    weight = tl.load(norm_ptr + tl.arange(0, D)).to(tl.float32)
    a, b = _halves(x * rstd[:, None] * weight[None, :], H, D)
    return _whole(a * cos - b * sin, b * cos + a * sin, H, D), rstd


@triton.jit
def qk_norm_rope_forward(
    qkv_ptr,
    norm_q_ptr,
    norm_k_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    rstd_ptr,
    S,
    start,
    heads,
    stride_b,
    stride_s,
    statistics,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    column = head[:, None] * D + tl.arange(0, D)[None, :]
    mask = (head < heads)[:, None]
    packed = qkv_ptr + b * stride_b + s * stride_s + column
    token = b * S + start + s  # in the joint layout
    out = token * heads * D + column
    pair = (start + s) * D + 2 * tl.arange(0, D // 2)
    cos = tl.load(cos_ptr + pair).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + pair).to(tl.float32)[None, :]
    q = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(packed + heads * D, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(packed + 2 * heads * D, mask=mask, other=0.0)
    q, rstd_q = _norm_turn(q, norm_q_ptr, cos, sin, eps, H, D)
    k, rstd_k = _norm_turn(k, norm_k_ptr, cos, sin, eps, H, D)
    tl.store(q_ptr + out, q.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(k_ptr + out, k.to(k_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + out, v, mask=mask)
    tl.store(rstd_ptr + token * heads + head, rstd_q, mask=head < heads)
    tl.store(rstd_ptr + statistics + token * heads + head, rstd_k, mask=head < heads)


@triton.jit
def _back(dy, y, x, rstd, wa, wb, cos, sin, KEPT: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """(dx [H, D], gradient of the norm weight [D / 2] twice) from dy and y in the turned frame. x: the input, read if
    KEPT; wa, wb: the norm weights of the pairs."""
    along = (tl.sum(dy * y, axis=1) / D)[:, None]
    da, db = _halves(dy, H, D)
    ua, ub = da * cos + db * sin, db * cos - da * sin
    if KEPT:
        na, nb = _halves(x * rstd[:, None], H, D)
    else:
        a, b = _halves(y, H, D)
        length = cos * cos + sin * sin  # 1 but for rounding of the tables
        na = tl.where(wa == 0.0, 0.0, (a * cos + b * sin) / (length * tl.where(wa == 0.0, 1.0, wa)))
        nb = tl.where(wb == 0.0, 0.0, (b * cos - a * sin) / (length * tl.where(wb == 0.0, 1.0, wb)))
    dx = _whole(ua * wa - na * along, ub * wb - nb * along, H, D) * rstd[:, None]
    return dx, tl.sum(ua * na, axis=0), tl.sum(ub * nb, axis=0)


@triton.jit
def qk_norm_rope_backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    rstd_ptr,
    norm_q_ptr,
    norm_k_ptr,
    cos_ptr,
    sin_ptr,
    qkv_ptr,
    dqkv_ptr,
    partial_ptr,
    L,
    S,
    start,
    heads,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_b,
    stride_s,
    stride_ob,
    stride_os,
    statistics,
    KEPT: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
):
    part, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = group * H + tl.arange(0, H)
    d = tl.arange(0, D)[None, :]
    column = head[:, None] * D + d
    mask = (head < heads)[:, None]
    half = 2 * tl.arange(0, D // 2)
    qa, qb = tl.load(norm_q_ptr + half).to(tl.float32)[None, :], tl.load(norm_q_ptr + half + 1).to(tl.float32)[None, :]
    ka, kb = tl.load(norm_k_ptr + half).to(tl.float32)[None, :], tl.load(norm_k_ptr + half + 1).to(tl.float32)[None, :]
    sum_qa = tl.zeros([D // 2], dtype=tl.float32)
    sum_qb = tl.zeros([D // 2], dtype=tl.float32)
    sum_ka = tl.zeros([D // 2], dtype=tl.float32)
    sum_kb = tl.zeros([D // 2], dtype=tl.float32)
    # A constant 1 leaves no loop.
    for i in range(0, tl.minimum(ROWS, L - part * ROWS) if ROWS > 1 else 1):
        s = part * ROWS + i
        at = start + s
        token = b * S + at
        saved = token * heads * D + column
        cos = tl.load(cos_ptr + at * D + half).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + at * D + half).to(tl.float32)[None, :]
        x_q = tl.zeros([H, D], dtype=tl.float32)
        x_k = tl.zeros([H, D], dtype=tl.float32)
        if KEPT:
            packed = qkv_ptr + b * stride_b + s * stride_s + column
            x_q = tl.load(packed, mask=mask, other=0.0).to(tl.float32)
            x_k = tl.load(packed + heads * D, mask=mask, other=0.0).to(tl.float32)
        out = dqkv_ptr + b * stride_ob + s * stride_os + column

        dy = tl.load(dq_ptr + b * stride_qb + at * stride_qs + head[:, None] * stride_qh + d, mask=mask, other=0.0)
        y = tl.load(q_ptr + saved, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + token * heads + head, mask=head < heads, other=0.0)
        dx, da, db = _back(dy.to(tl.float32), y, x_q, rstd, qa, qb, cos, sin, KEPT, H, D)
        tl.store(out, dx.to(dqkv_ptr.dtype.element_ty), mask=mask)
        sum_qa += da
        sum_qb += db

        dy = tl.load(dk_ptr + b * stride_kb + at * stride_ks + head[:, None] * stride_kh + d, mask=mask, other=0.0)
        y = tl.load(k_ptr + saved, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + statistics + token * heads + head, mask=head < heads, other=0.0)
        dx, da, db = _back(dy.to(tl.float32), y, x_k, rstd, ka, kb, cos, sin, KEPT, H, D)
        tl.store(out + heads * D, dx.to(dqkv_ptr.dtype.element_ty), mask=mask)
        sum_ka += da
        sum_kb += db

        dv = tl.load(dv_ptr + b * stride_vb + at * stride_vs + head[:, None] * stride_vh + d, mask=mask, other=0.0)
        tl.store(out + 2 * heads * D, dv, mask=mask)
    if NORMS:
        first = ((b * tl.num_programs(0) + part) * tl.num_programs(1) + group) * 2 * D
        tl.store(partial_ptr + first + half, sum_qa)
        tl.store(partial_ptr + first + half + 1, sum_qb)
        tl.store(partial_ptr + first + D + half, sum_ka)
        tl.store(partial_ptr + first + D + half + 1, sum_kb)


@on_its_gpu
def forward(
    image: Stream, cos: Tensor, sin: Tensor, heads: int, text: Stream | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v (B, S, H, D), rstd (2, B, S, H))."""
    qkv = image.qkv
    B, T = qkv.shape[0], 0 if text is None else text.qkv.shape[1]
    S, D = T + qkv.shape[1], image.norm_q.shape[0]
    q, k, v = (torch.empty((B, S, heads, D), dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    rstd = torch.empty((2, B, S, heads), dtype=torch.float32, device=qkv.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    H = min(HEADS, triton.next_power_of_2(heads))
    for stream, start in ((text, 0), (image, T)):
        if stream is None or not stream.qkv.numel():
            continue
        packed, weight_q, weight_k = stream
        qk_norm_rope_forward[(packed.shape[1], triton.cdiv(heads, H), B)](
            packed,
            weight_q,
            weight_k,
            cos,
            sin,
            q,
            k,
            v,
            rstd,
            S,
            start,
            heads,
            packed.stride(0),
            packed.stride(1),
            B * S * heads,
            eps,
            H=H,
            D=D,
            num_warps=4,
        )
    return q, k, v, rstd


@on_its_gpu
def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, saved: Saved, need_norms: bool, dqkv: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, dtxt_qkv, dnorms (2, D), dtxt_norms (2, D)); what is not needed is empty. dqkv: where to write the image's
    gradient, (B, L, 3 H D) of unit last stride; None: a new tensor."""
    q, k, rstd = saved[:3]
    B, S, heads, D = q.shape
    cos, sin = saved.cos.contiguous(), saved.sin.contiguous()
    H, T = min(HEADS, triton.next_power_of_2(heads)), saved.text_tokens
    step = ROWS if need_norms else 1
    found: list[tuple[Tensor, Tensor]] = []
    for packed, weight_q, weight_k, start, L, grad in (
        (saved.qkv, saved.norm_q, saved.norm_k, T, S - T, dqkv),
        (saved.txt_qkv, saved.txt_norm_q, saved.txt_norm_k, 0, T, None),
    ):
        if grad is None:
            grad = torch.empty((B, L, 3 * heads * D), dtype=q.dtype, device=q.device)
        grid = (triton.cdiv(L, step), triton.cdiv(heads, H), B)
        partial = torch.empty((B, grid[0] * grid[1] * need_norms, 2, D), dtype=torch.float32, device=q.device)
        kept = q if packed is None else packed
        if grad.numel():
            qk_norm_rope_backward[grid](
                dq,
                dk,
                dv,
                q,
                k,
                rstd,
                weight_q,
                weight_k,
                cos,
                sin,
                kept,
                grad,
                partial,
                L,
                S,
                start,
                heads,
                dq.stride(0),
                dq.stride(1),
                dq.stride(2),
                dk.stride(0),
                dk.stride(1),
                dk.stride(2),
                dv.stride(0),
                dv.stride(1),
                dv.stride(2),
                kept.stride(0),
                kept.stride(1),
                grad.stride(0),
                grad.stride(1),
                B * S * heads,
                KEPT=packed is not None,
                NORMS=need_norms,
                ROWS=step,
                H=H,
                D=D,
                num_warps=4,
            )
        wanted = need_norms and (T > 0 or not found)  # without text, the image's only: the first
        found.append((grad, partial.sum((0, 1)).to(saved.norm_q.dtype) if wanted else saved.norm_q.new_empty(0)))
    (dqkv, dnorms), (dtxt_qkv, dtxt_norms) = found
    return dqkv, dtxt_qkv, dnorms, dtxt_norms


_FORWARD = {
    "qkv_ptr": "*D", "norm_q_ptr": "*D", "norm_k_ptr": "*D", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "q_ptr": "*D",
    "k_ptr": "*D", "v_ptr": "*D", "rstd_ptr": "*fp32", "S": "i32", "start": "i32", "heads": "i32",
    "stride_b": "i64", "stride_s": "i32", "statistics": "i32", "eps": "fp32", "H": HEADS, "D": 128,
}  # fmt: skip
_BACKWARD = {
    "dq_ptr": "*D", "dk_ptr": "*D", "dv_ptr": "*D", "q_ptr": "*D", "k_ptr": "*D", "rstd_ptr": "*fp32",
    "norm_q_ptr": "*D", "norm_k_ptr": "*D", "cos_ptr": "*fp32", "sin_ptr": "*fp32", "qkv_ptr": "*D",
    "dqkv_ptr": "*D", "partial_ptr": "*fp32", "L": "i32", "S": "i32", "start": "i32", "heads": "i32",
    "stride_qb": "i64", "stride_qs": "i32", "stride_qh": "i32", "stride_kb": "i64", "stride_ks": "i32",
    "stride_kh": "i32", "stride_vb": "i64", "stride_vs": "i32", "stride_vh": "i32", "stride_b": "i64",
    "stride_s": "i32", "stride_ob": "i64", "stride_os": "i32", "statistics": "i32",
}  # fmt: skip
AOT = [
    (qk_norm_rope_forward, _FORWARD, 4),
    (qk_norm_rope_forward, _FORWARD | {"D": 32}, 4),
    (qk_norm_rope_backward, _BACKWARD | {"KEPT": False, "NORMS": True, "ROWS": ROWS, "H": HEADS, "D": 128}, 4),
    (qk_norm_rope_backward, _BACKWARD | {"KEPT": False, "NORMS": True, "ROWS": ROWS, "H": HEADS, "D": 64}, 4),
    (qk_norm_rope_backward, _BACKWARD | {"KEPT": False, "NORMS": False, "ROWS": 1, "H": HEADS, "D": 128}, 4),
    (qk_norm_rope_backward, _BACKWARD | {"KEPT": True, "NORMS": True, "ROWS": ROWS, "H": HEADS, "D": 128}, 4),
]
