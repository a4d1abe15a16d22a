"""modulate in Triton: one program per token. Only where scale and shift train, one per few tokens backward, so that the
sums over tokens have a first stage in registers and a second, deterministic one over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu

ROWS = 16  # tokens that one backward program sums over, where scale and shift train


@triton.jit
def modulate_forward(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    S,
    W,
    stride_xb,
    stride_xs,
    stride_scale,
    stride_shift,
    eps,
    BLOCK: tl.constexpr,
):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * S + s
    column = tl.arange(0, BLOCK)
    mask = column < W
    x = tl.load(x_ptr + b * stride_xb + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / W
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / W + eps)
    scale = tl.load(scale_ptr + b * stride_scale + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shift + column, mask=mask, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + row * W + column, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _norm_gradient(dout, x, mean, rstd, scale, mask, W):
    """(gradient of x, x normalised) of one token, [BLOCK] float32 each. scale: 1 + that of the modulation."""
    normalized = tl.where(mask, (x - mean) * rstd, 0.0)
    dnormalized = dout * scale
    along = tl.sum(dnormalized * normalized, axis=0) / W
    return (dnormalized - tl.sum(dnormalized, axis=0) / W - normalized * along) * rstd, normalized


@triton.jit
def modulate_backward(
    dout_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    residual_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    S,
    W,
    stride_db,
    stride_ds,
    stride_xb,
    stride_xs,
    stride_scale,
    stride_rb,
    stride_rs,
    RESIDUAL: tl.constexpr,
    MODULATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * ROWS
    start = b * S + first
    column = tl.arange(0, BLOCK)
    mask = column < W
    dout_ptr += b * stride_db + first * stride_ds
    x_ptr += b * stride_xb + first * stride_xs
    residual_ptr += b * stride_rb + first * stride_rs
    dx_ptr += start * W
    mean_ptr += start
    rstd_ptr += start
    scale = 1.0 + tl.load(scale_ptr + b * stride_scale + column, mask=mask, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    # A constant 1 leaves no loop.
    for s in range(0, tl.minimum(ROWS, S - part * ROWS) if ROWS > 1 else 1):
        dout = tl.load(dout_ptr + s * stride_ds + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + s)
        rstd = tl.load(rstd_ptr + s)
        if RESIDUAL:  # before the sums over columns, whose barriers a load does not pass
            residual = tl.load(residual_ptr + s * stride_rs + column, mask=mask, other=0.0).to(tl.float32)
        dx, normalized = _norm_gradient(dout, x, mean, rstd, scale, mask, W)
        if RESIDUAL:
            dx += residual
        tl.store(dx_ptr + s * W + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if MODULATION:
            dscale += dout * normalized
            dshift += dout
    if MODULATION:
        sums = (b * tl.num_programs(0) + part) * W
        tl.store(dscale_ptr + sums + column, dscale, mask=mask)
        tl.store(dshift_ptr + sums + column, dshift, mask=mask)


def num_warps(block: int) -> int:
    """8 elements or so per thread: 4 warps up to a width of 1024, 8 beyond."""
    return 4 if block <= 1024 else 8


@on_its_gpu
def forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, S, W = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty((B, S), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, S), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(W)
    if out.numel():
        modulate_forward[(S, B)](
            x,
            scale,
            shift,
            out,
            mean,
            rstd,
            S,
            W,
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            shift.stride(0),
            eps,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return out, mean, rstd


@on_its_gpu
def backward(
    dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, residual: Tensor | None, need_modulation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, W = x.shape
    step = ROWS if need_modulation else 1  # without sums as many programs as there are tokens
    parts = triton.cdiv(S, step)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty((2, B, parts, W) if need_modulation else (2, 0), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(W)
    add = dout if residual is None else residual
    if dx.numel():
        modulate_backward[(parts, B)](
            dout,
            x,
            mean,
            rstd,
            scale,
            add,
            dx,
            sums[0],
            sums[1],
            S,
            W,
            dout.stride(0),
            dout.stride(1),
            x.stride(0),
            x.stride(1),
            scale.stride(0),
            add.stride(0),
            add.stride(1),
            RESIDUAL=residual is not None,
            MODULATION=need_modulation,
            ROWS=step,
            BLOCK=block,
            num_warps=num_warps(block),
            enable_fp_fusion=False,  # or a - b * c is not 0 where the product is a
        )
    if not need_modulation:
        return dx, x.new_empty(0), x.new_empty(0)
    dscale, dshift = sums.sum(2).to(scale.dtype)
    return dx, dscale.clone(), dshift.clone()


# What `python -m megaflux_kernels.aot` compiles: (kernel, {argument: type or constant}, warps) at FLUX's width; a
# type `D` stands for each of the dtypes in use.
AOT = [
    (
        modulate_forward,
        {"x_ptr": "*D", "scale_ptr": "*D", "shift_ptr": "*D", "out_ptr": "*D", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
         "S": "i32", "W": "i32", "stride_xb": "i64", "stride_xs": "i32", "stride_scale": "i32", "stride_shift": "i32",
         "eps": "fp32", "BLOCK": 4096},
        8,
    ),
    (
        modulate_backward,
        {"dout_ptr": "*D", "x_ptr": "*D", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "scale_ptr": "*D",
         "residual_ptr": "*D", "dx_ptr": "*D", "dscale_ptr": "*fp32", "dshift_ptr": "*fp32", "S": "i32", "W": "i32",
         "stride_db": "i64", "stride_ds": "i32", "stride_xb": "i64", "stride_xs": "i32", "stride_scale": "i32",
         "stride_rb": "i64", "stride_rs": "i32", "RESIDUAL": True, "MODULATION": True, "ROWS": ROWS, "BLOCK": 4096},
        8,
    ),
]  # fmt: skip
_FROZEN = AOT[1][1] | {"MODULATION": False, "ROWS": 1}
AOT += [(modulate_backward, _FROZEN | {"RESIDUAL": residual}, 8) for residual in (True, False)]
