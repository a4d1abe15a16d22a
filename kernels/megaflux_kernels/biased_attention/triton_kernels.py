"""biased_attention in Triton, as FlashAttention-2 (2307.08691) splits it: forward with online softmax; backward with
one kernel that owns tiles of keys (dk, dv) and one that owns tiles of queries (dq), so nothing is added atomically and
every run gives the same bits.

Exponentials are powers of 2: `qk_scale` is scale * log2(e), biases are multiplied by log2(e) when loaded, and so is
lse by the kernel that sums delta. A key past the end has bias -inf, and in the backward pass a query past the end or
without keys has lse2 +inf: both then weigh exp2(-inf) = 0.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
DELTA_ROWS = 32  # queries of one delta program


@triton.jit
def biased_attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    lse_ptr,
    H,
    Sq,
    Sk,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_bias,
    qk_scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    column = tl.arange(0, D)
    query = tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    mask_q = query < Sq - start
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + start * stride_qs + query[:, None] * stride_qs + column[None, :]
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + key[None, :] * stride_ks + column[:, None]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + key[:, None] * stride_vs + column[None, :]
    bias_ptrs = bias_ptr + b * stride_bias + key
    q = tl.load(q_ptrs, mask=mask_q[:, None], other=0.0)
    top = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    acc = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    for first in range(0, Sk, BLOCK_K):
        mask_k = key < Sk - first
        k = tl.load(k_ptrs, mask=mask_k[None, :], other=0.0)
        bias = tl.load(bias_ptrs, mask=mask_k, other=float("-inf")) * LOG2E
        scores = tl.dot(q, k, input_precision="ieee") * qk_scale + bias[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Before the first key that takes part the maximum is -inf, and -inf - -inf is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        v = tl.load(v_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
        k_ptrs += BLOCK_K * stride_ks
        v_ptrs += BLOCK_K * stride_vs
        bias_ptrs += BLOCK_K
    total = tl.where(top == float("-inf"), 1.0, total)  # no key: acc is 0, and so is out; lse is -inf
    out = acc / total[:, None]
    out_ptrs = out_ptr + ((b * Sq + start + query[:, None]) * H + h) * D + column[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_q[:, None])
    tl.store(lse_ptr + bh * Sq + start + query, (top + tl.log2(total)) * LN2, mask=mask_q)


@triton.jit
def biased_attention_delta(
    dout_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    H,
    Sq,
    stride_db,
    stride_dh,
    stride_ds,
    stride_ob,
    stride_oh,
    stride_os,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    column = tl.arange(0, D)
    query = start + tl.arange(0, BLOCK_Q)
    mask = query < Sq
    dout_ptrs = dout_ptr + b * stride_db + h * stride_dh + query[:, None] * stride_ds + column[None, :]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + query[:, None] * stride_os + column[None, :]
    dout = tl.load(dout_ptrs, mask=mask[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_ptrs, mask=mask[:, None], other=0.0).to(tl.float32)
    tl.store(delta_ptr + bh * Sq + query, tl.sum(dout * out, 1), mask=mask)
    lse = tl.load(lse_ptr + bh * Sq + query, mask=mask, other=0.0)
    tl.store(lse2_ptr + bh * Sq + query, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), mask=mask)


@triton.jit
def biased_attention_dkdv(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    H,
    Sq,
    Sk,
    stride_db,
    stride_dh,
    stride_ds,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_bias,
    qk_scale,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_K
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    column = tl.arange(0, D)
    query = tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    mask_k = key < Sk - start
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + start * stride_ks + key[:, None] * stride_ks + column[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + start * stride_vs + key[:, None] * stride_vs + column[None, :]
    k = tl.load(k_ptrs, mask=mask_k[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=mask_k[:, None], other=0.0)
    bias = tl.load(bias_ptr + b * stride_bias + start + key, mask=mask_k, other=float("-inf")) * LOG2E
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + query[:, None] * stride_qs + column[None, :]
    dout_ptrs = dout_ptr + b * stride_db + h * stride_dh + query[:, None] * stride_ds + column[None, :]
    lse2_ptrs = lse2_ptr + bh * Sq + query
    delta_ptrs = delta_ptr + bh * Sq + query
    dk = tl.zeros([BLOCK_K, D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_K, D], dtype=tl.float32)
    for first in range(0, Sq, BLOCK_Q):
        mask_q = query < Sq - first
        q = tl.load(q_ptrs, mask=mask_q[:, None], other=0.0)
        lse2 = tl.load(lse2_ptrs, mask=mask_q, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * qk_scale + bias[:, None]
        weights = tl.exp2(scores - lse2[None, :])
        dout = tl.load(dout_ptrs, mask=mask_q[:, None], other=0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = tl.load(delta_ptrs, mask=mask_q, other=0.0)
        dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
        q_ptrs += BLOCK_Q * stride_qs
        dout_ptrs += BLOCK_Q * stride_ds
        lse2_ptrs += BLOCK_Q
        delta_ptrs += BLOCK_Q
    to = ((b * Sk + start + key[:, None]) * H + h) * D + column[None, :]
    tl.store(dk_ptr + to, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_k[:, None])
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask_k[:, None])


@triton.jit
def biased_attention_dq(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    H,
    Sq,
    Sk,
    stride_db,
    stride_dh,
    stride_ds,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_bias,
    qk_scale,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    column = tl.arange(0, D)
    query = tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    mask_q = query < Sq - start
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + start * stride_qs + query[:, None] * stride_qs + column[None, :]
    dout_ptrs = dout_ptr + b * stride_db + h * stride_dh + start * stride_ds + query[:, None] * stride_ds
    q = tl.load(q_ptrs, mask=mask_q[:, None], other=0.0)
    dout = tl.load(dout_ptrs + column[None, :], mask=mask_q[:, None], other=0.0)
    lse2 = tl.load(lse2_ptr + bh * Sq + start + query, mask=mask_q, other=float("inf"))
    delta = tl.load(delta_ptr + bh * Sq + start + query, mask=mask_q, other=0.0)
    k_ptrs = k_ptr + b * stride_kb + h * stride_kh + key[:, None] * stride_ks + column[None, :]
    v_ptrs = v_ptr + b * stride_vb + h * stride_vh + key[:, None] * stride_vs + column[None, :]
    bias_ptrs = bias_ptr + b * stride_bias + key
    dq = tl.zeros([BLOCK_Q, D], dtype=tl.float32)
    for first in range(0, Sk, BLOCK_K):
        mask_k = key < Sk - first
        k = tl.load(k_ptrs, mask=mask_k[:, None], other=0.0)
        bias = tl.load(bias_ptrs, mask=mask_k, other=float("-inf")) * LOG2E
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale + bias[None, :]
        weights = tl.exp2(scores - lse2[:, None])
        v = tl.load(v_ptrs, mask=mask_k[:, None], other=0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
        k_ptrs += BLOCK_K * stride_ks
        v_ptrs += BLOCK_K * stride_vs
        bias_ptrs += BLOCK_K
    to = ((b * Sq + start + query[:, None]) * H + h) * D + column[None, :]
    tl.store(dq_ptr + to, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q[:, None])


def tiles(kernel: str, wide: bool) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a tile. wide: float32, which runs on plain FMAs.

    Chosen from the cubins for D = 128: shared memory within the 99 KB of compute capability 8.6 too, and no spill but
    one loop counter of dkdv on 8.0. 128 owned rows give each of 8 warps whole rows of the scores, so that they stay in
    registers between products; with 64 they pass through shared memory on 8.0 and are computed twice on 9.0.
    """
    if wide:
        return {"forward": (64, 16, 8, 2), "dkdv": (32, 32, 8, 2), "dq": (64, 16, 8, 2)}[kernel]
    return {"forward": (128, 64, 8, 3), "dkdv": (32, 128, 8, 3), "dq": (128, 64, 8, 2)}[kernel]


@on_its_gpu
def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out (B, Sq, H, D), lse (B, H, Sq))."""
    B, H, Sq, D = q.shape
    Sk = k.shape[2]
    out = torch.empty((B, Sq, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, Sq), dtype=torch.float32, device=q.device)
    block_q, block_k, warps, stages = tiles("forward", q.dtype == torch.float32)
    if out.numel():
        biased_attention_forward[(triton.cdiv(Sq, block_q), B * H)](
            q,
            k,
            v,
            bias,
            out,
            lse,
            H,
            Sq,
            Sk,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            bias.stride(0),
            scale * LOG2E.value,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


@on_its_gpu
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each (B, S, H, D). out: (B, Sq, H, D); lse: (B, H, Sq), contiguous."""
    B, H, Sq, D = q.shape
    Sk = k.shape[2]
    dq = torch.empty((B, Sq, H, D), dtype=q.dtype, device=q.device)
    dk = torch.empty((B, Sk, H, D), dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    delta, lse2 = torch.empty((2, B, H, Sq), dtype=torch.float32, device=q.device)
    wide = q.dtype == torch.float32
    out = out.transpose(1, 2)
    if dq.numel():
        biased_attention_delta[(triton.cdiv(Sq, DELTA_ROWS), B * H)](
            dout,
            out,
            lse,
            delta,
            lse2,
            H,
            Sq,
            *dout.stride()[:3],
            *out.stride()[:3],
            D=D,
            BLOCK_Q=DELTA_ROWS,
            num_warps=4,
        )
    shared = (
        H,
        Sq,
        Sk,
        *dout.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        bias.stride(0),
        scale * LOG2E.value,
        scale,
    )
    if dk.numel():
        block_q, block_k, warps, stages = tiles("dkdv", wide)
        biased_attention_dkdv[(triton.cdiv(Sk, block_k), B * H)](
            dout,
            q,
            k,
            v,
            bias,
            lse2,
            delta,
            dk,
            dv,
            *shared,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    if dq.numel():
        block_q, block_k, warps, stages = tiles("dq", wide)
        biased_attention_dq[(triton.cdiv(Sq, block_q), B * H)](
            dout,
            q,
            k,
            v,
            bias,
            lse2,
            delta,
            dq,
            *shared,
            D=D,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
    return dq, dk, dv


def _aot(kernel, pointers: list[str], strided: str, scales: list[str], name: str | None) -> list[tuple]:
    """The entries of a kernel for `python -m megaflux_kernels.aot`, with the tiles of each dtype, at D = 128."""
    kinds = {"bias_ptr": "*fp32", "lse_ptr": "*fp32", "lse2_ptr": "*fp32", "delta_ptr": "*fp32"}
    arguments: dict[str, str | int] = {p: kinds.get(p, "*D") for p in pointers}
    arguments |= {"H": "i32", "Sq": "i32"}
    if name:
        arguments["Sk"] = "i32"
    for x in strided:
        arguments |= {f"stride_{x}b": "i64", f"stride_{x}h": "i32", f"stride_{x}s": "i32"}
    if not name:
        return [(kernel, arguments | {"D": 128, "BLOCK_Q": DELTA_ROWS}, 4)]
    arguments |= {"stride_bias": "i32"} | dict.fromkeys(scales, "fp32") | {"D": 128}
    entries = []
    for wide, dtypes in ((False, ("bf16", "fp16")), (True, ("fp32",))):
        block_q, block_k, warps, stages = tiles(name, wide)
        entries.append((kernel, arguments | {"BLOCK_Q": block_q, "BLOCK_K": block_k}, warps, stages, dtypes))
    return entries


_GRADIENT = ["dout_ptr", "q_ptr", "k_ptr", "v_ptr", "bias_ptr", "lse2_ptr", "delta_ptr"]
AOT = [
    *_aot(biased_attention_forward, ["q_ptr", "k_ptr", "v_ptr", "bias_ptr", "out_ptr", "lse_ptr"], "qkv",
          ["qk_scale"], "forward"),
    *_aot(biased_attention_delta, ["dout_ptr", "out_ptr", "lse_ptr", "delta_ptr", "lse2_ptr"], "do", [], None),
    *_aot(biased_attention_dkdv, [*_GRADIENT, "dk_ptr", "dv_ptr"], "dqkv", ["qk_scale", "scale"], "dkdv"),
    *_aot(biased_attention_dq, [*_GRADIENT, "dq_ptr"], "dqkv", ["qk_scale", "scale"], "dq"),
]  # fmt: skip
