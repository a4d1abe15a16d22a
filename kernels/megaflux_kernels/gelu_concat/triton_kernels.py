"""gelu_concat in Triton: tiles of a few tokens by a block of columns, which either copy attn_output or apply GELU, so
that each tile reads and writes whole aligned vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu

ROWS = 4  # tokens of a tile
BLOCK = 1024  # columns of a tile: 16 bytes per thread and token in 16 bits, with 4 warps


@triton.jit
def _sigmoid_twice(x):
    # GELU's tanh is 2 sigmoid(2 u) - 1, u = sqrt(2 / pi) (x + 0.044715 x^3). Returns sigmoid(2 u) and sigmoid(-2 u),
    # both without cancellation; exp of a negative number cannot overflow.
    u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    small = tl.exp(-tl.abs(u))
    inverse = 1.0 / (1.0 + small)
    return tl.where(u >= 0.0, 1.0, small) * inverse, tl.where(u >= 0.0, small, 1.0) * inverse


@triton.jit
def gelu_concat_forward(
    attn_ptr,
    hidden_ptr,
    out_ptr,
    S,
    W,
    M,
    stride_ab,
    stride_as,
    stride_hb,
    stride_hs,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row = b * S + s
    copies = tl.cdiv(W, BLOCK)  # column blocks of attn_output come first
    block = tl.program_id(1)
    if block < copies:
        column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (s < S) & (column < W)
        attn = tl.load(attn_ptr + b * stride_ab + s * stride_as + column, mask=mask)
        tl.store(out_ptr + row * (W + M) + column, attn, mask=mask)
    else:
        column = (block - copies) * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (s < S) & (column < M)
        x = tl.load(hidden_ptr + b * stride_hb + s * stride_hs + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid, _ = _sigmoid_twice(x)
        out = x * sigmoid
        tl.store(out_ptr + row * (W + M) + W + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_concat_backward(
    dgelu_ptr,
    hidden_ptr,
    dhidden_ptr,
    S,
    M,
    stride_db,
    stride_ds,
    stride_hb,
    stride_hs,
    stride_ob,
    stride_os,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # dhidden may be dgelu: an element is read and written by one thread.
    b = tl.program_id(2).to(tl.int64)
    s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (s < S) & (column < M)
    dgelu = tl.load(dgelu_ptr + b * stride_db + s * stride_ds + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(hidden_ptr + b * stride_hb + s * stride_hs + column, mask=mask, other=0.0).to(tl.float32)
    # Beyond 30 the derivative is 0 or 1 to the last bit, and x * x could overflow; where() leaves NaN alone, unlike
    # minimum().
    x = tl.where(x > 30.0, 30.0, tl.where(x < -30.0, -30.0, x))
    sigmoid, rest = _sigmoid_twice(x)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    dhidden = dgelu * (sigmoid + x * slope * sigmoid * rest)
    out = dhidden_ptr + b * stride_ob + s * stride_os + column
    tl.store(out, dhidden.to(dhidden_ptr.dtype.element_ty), mask=mask)


@on_its_gpu
def forward(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    B, S, M = hidden_states.shape
    W = 0 if attn_output is None else attn_output.shape[-1]
    attn = hidden_states if attn_output is None else attn_output
    out = torch.empty((B, S, W + M), dtype=hidden_states.dtype, device=hidden_states.device)
    block = min(BLOCK, triton.next_power_of_2(max(W, M)))
    if out.numel():
        gelu_concat_forward[(triton.cdiv(S, ROWS), triton.cdiv(W, block) + triton.cdiv(M, block), B)](
            attn,
            hidden_states,
            out,
            S,
            W,
            M,
            attn.stride(0),
            attn.stride(1),
            hidden_states.stride(0),
            hidden_states.stride(1),
            ROWS=ROWS,
            BLOCK=block,
            num_warps=4,
        )
    return out


@on_its_gpu
def backward(dgelu: Tensor, hidden_states: Tensor, dhidden: Tensor | None = None) -> Tensor:
    """dhidden: where to write it, dgelu itself too; None: a new tensor."""
    B, S, M = hidden_states.shape
    if dhidden is None:
        dhidden = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    block = min(BLOCK, triton.next_power_of_2(M))
    if dhidden.numel():
        gelu_concat_backward[(triton.cdiv(S, ROWS), triton.cdiv(M, block), B)](
            dgelu,
            hidden_states,
            dhidden,
            S,
            M,
            dgelu.stride(0),
            dgelu.stride(1),
            hidden_states.stride(0),
            hidden_states.stride(1),
            dhidden.stride(0),
            dhidden.stride(1),
            ROWS=ROWS,
            BLOCK=block,
            num_warps=4,
        )
    return dhidden


# What `python -m megaflux_kernels.aot` compiles: (kernel, {argument: type or constant}, warps) at FLUX's sizes; a
# type `D` stands for each of the dtypes in use.
AOT = [
    (
        gelu_concat_forward,
        {"attn_ptr": "*D", "hidden_ptr": "*D", "out_ptr": "*D", "S": "i32", "W": "i32", "M": "i32",
         "stride_ab": "i64", "stride_as": "i32", "stride_hb": "i64", "stride_hs": "i32", "ROWS": ROWS, "BLOCK": BLOCK},
        4,
    ),
    (
        gelu_concat_backward,
        {"dgelu_ptr": "*D", "hidden_ptr": "*D", "dhidden_ptr": "*D", "S": "i32", "M": "i32",
         "stride_db": "i64", "stride_ds": "i32", "stride_hb": "i64", "stride_hs": "i32", "stride_ob": "i64",
         "stride_os": "i32", "ROWS": ROWS, "BLOCK": BLOCK},
        4,
    ),
]  # fmt: skip
