"""gate_residual in Triton: one program per token, and per tile of columns where there is no norm. Only where gate or
modulation trains, one per few tokens backward, so that the sums over tokens have a first stage in registers and a
second, deterministic one over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu
from megaflux_kernels.modulate.triton_kernels import _norm_gradient, num_warps

ROWS = 16  # tokens that one backward program sums over, where something is summed
BLOCK = 1024  # columns of a tile where there is no norm: 16 bytes per thread in 16 bits, with 4 warps


@triton.jit
def gate_residual_forward(
    residual_ptr,
    x_ptr,
    gate_ptr,
    hidden_ptr,
    S,
    W,
    stride_rb,
    stride_rs,
    stride_xb,
    stride_xs,
    stride_gate,
    BLOCK: tl.constexpr,
):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * S + s
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = column < W
    residual = tl.load(residual_ptr + b * stride_rb + s * stride_rs + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * stride_xb + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    hidden = residual + gate * x
    tl.store(hidden_ptr + row * W + column, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gate_residual_modulate_forward(
    residual_ptr,
    x_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    hidden_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    S,
    W,
    stride_rb,
    stride_rs,
    stride_xb,
    stride_xs,
    stride_gate,
    stride_scale,
    stride_shift,
    eps,
    BLOCK: tl.constexpr,
):
    s, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = b * S + s
    column = tl.arange(0, BLOCK)
    mask = column < W
    residual = tl.load(residual_ptr + b * stride_rb + s * stride_rs + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * stride_xb + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    stored = (residual + gate * x).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * W + column, stored, mask=mask)
    # From here on as modulate_forward, line by line and with its warps: it must give the same bits.
    hidden = stored.to(tl.float32)
    mean = tl.sum(hidden, axis=0) / W
    centred = tl.where(mask, hidden - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / W + eps)
    scale = tl.load(scale_ptr + b * stride_scale + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shift + column, mask=mask, other=0.0).to(tl.float32)
    out = centred * rstd * (1.0 + scale) + shift
    tl.store(out_ptr + row * W + column, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def gate_residual_backward(
    dhidden_ptr,
    gate_ptr,
    x_ptr,
    dx_ptr,
    dgate_ptr,
    S,
    W,
    stride_db,
    stride_ds,
    stride_gate,
    stride_xb,
    stride_xs,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * ROWS
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = column < W
    dhidden_ptr += b * stride_db + first * stride_ds
    x_ptr += b * stride_xb + first * stride_xs
    dx_ptr += (b * S + first) * W
    gate = tl.load(gate_ptr + b * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    # A constant 1 leaves no loop.
    for s in range(0, tl.minimum(ROWS, S - part * ROWS) if ROWS > 1 else 1):
        dhidden = tl.load(dhidden_ptr + s * stride_ds + column, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            x = tl.load(x_ptr + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + s * W + column, (gate * dhidden).to(dx_ptr.dtype.element_ty), mask=mask)
        if GATE:
            dgate += dhidden * x
    if GATE:
        tl.store(dgate_ptr + (b * tl.num_programs(0) + part) * W + column, dgate, mask=mask)


@triton.jit
def gate_residual_modulate_backward(
    dhidden_ptr,
    dout_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    gate_ptr,
    x_ptr,
    dresidual_ptr,
    dx_ptr,
    dgate_ptr,
    dscale_ptr,
    dshift_ptr,
    S,
    W,
    stride_hb,
    stride_hs,
    stride_ob,
    stride_os,
    stride_scale,
    stride_gate,
    stride_xb,
    stride_xs,
    HIDDEN: tl.constexpr,
    GATE: tl.constexpr,
    MODULATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = part.to(tl.int64) * ROWS
    column = tl.arange(0, BLOCK)
    mask = column < W
    dhidden_ptr += b * stride_hb + first * stride_hs
    dout_ptr += b * stride_ob + first * stride_os
    x_ptr += b * stride_xb + first * stride_xs
    start = b * S + first
    hidden_ptr += start * W
    dresidual_ptr += start * W
    dx_ptr += start * W
    mean_ptr += start
    rstd_ptr += start
    scale = 1.0 + tl.load(scale_ptr + b * stride_scale + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + b * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    # A constant 1 leaves no loop.
    for s in range(0, tl.minimum(ROWS, S - part * ROWS) if ROWS > 1 else 1):
        dout = tl.load(dout_ptr + s * stride_os + column, mask=mask, other=0.0).to(tl.float32)
        hidden = tl.load(hidden_ptr + s * W + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + s)
        rstd = tl.load(rstd_ptr + s)
        if HIDDEN:  # before the sums over columns, whose barriers a load does not pass
            dhidden = tl.load(dhidden_ptr + s * stride_hs + column, mask=mask, other=0.0).to(tl.float32)
        if GATE:
            x = tl.load(x_ptr + s * stride_xs + column, mask=mask, other=0.0).to(tl.float32)
        total, normalized = _norm_gradient(dout, hidden, mean, rstd, scale, mask, W)
        if HIDDEN:
            total += dhidden
        tl.store(dresidual_ptr + s * W + column, total.to(dresidual_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + s * W + column, (gate * total).to(dx_ptr.dtype.element_ty), mask=mask)
        if GATE:
            dgate += total * x
        if MODULATION:
            dscale += dout * normalized
            dshift += dout
    sums = (b * tl.num_programs(0) + part) * W
    if GATE:
        tl.store(dgate_ptr + sums + column, dgate, mask=mask)
    if MODULATION:
        tl.store(dscale_ptr + sums + column, dscale, mask=mask)
        tl.store(dshift_ptr + sums + column, dshift, mask=mask)


@on_its_gpu
def forward(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    B, S, W = residual.shape
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    block = min(BLOCK, triton.next_power_of_2(W))
    if hidden.numel():
        gate_residual_forward[(S, B, triton.cdiv(W, block))](
            residual,
            x,
            gate,
            hidden,
            S,
            W,
            residual.stride(0),
            residual.stride(1),
            x.stride(0),
            x.stride(1),
            gate.stride(0),
            BLOCK=block,
            num_warps=4,
        )
    return hidden


@on_its_gpu
def forward_modulate(
    residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, S, W = residual.shape
    hidden, out = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    mean, rstd = (torch.empty((B, S), dtype=torch.float32, device=residual.device) for _ in range(2))
    block = triton.next_power_of_2(W)
    if out.numel():
        gate_residual_modulate_forward[(S, B)](
            residual,
            x,
            gate,
            scale,
            shift,
            hidden,
            out,
            mean,
            rstd,
            S,
            W,
            residual.stride(0),
            residual.stride(1),
            x.stride(0),
            x.stride(1),
            gate.stride(0),
            scale.stride(0),
            shift.stride(0),
            eps,
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return hidden, out, mean, rstd


@on_its_gpu
def backward(dhidden: Tensor, gate: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    B, S, W = dhidden.shape
    step = ROWS if x is not None else 1  # without sums as many programs as there are tokens
    parts = triton.cdiv(S, step)
    dx = torch.empty(dhidden.shape, dtype=dhidden.dtype, device=dhidden.device)
    dgate = _partial(x is not None, B, parts, W, dx)
    block = min(BLOCK, triton.next_power_of_2(W))
    read = dhidden if x is None else x
    if dx.numel():
        gate_residual_backward[(parts, B, triton.cdiv(W, block))](
            dhidden,
            gate,
            read,
            dx,
            dgate,
            S,
            W,
            dhidden.stride(0),
            dhidden.stride(1),
            gate.stride(0),
            read.stride(0),
            read.stride(1),
            GATE=x is not None,
            ROWS=step,
            BLOCK=block,
            num_warps=4,
        )
    return dx, _sum(dgate, gate)


@on_its_gpu
def backward_modulate(
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
    B, S, W = hidden.shape
    step = ROWS if x is not None or need_modulation else 1
    parts = triton.cdiv(S, step)
    hidden = hidden.contiguous()
    dresidual, dx = (torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2))
    dgate, dscale, dshift = (
        _partial(need, B, parts, W, dx) for need in (x is not None, need_modulation, need_modulation)
    )
    block = triton.next_power_of_2(W)
    add, read = dout if dhidden is None else dhidden, dout if x is None else x
    if dx.numel():
        gate_residual_modulate_backward[(parts, B)](
            add,
            dout,
            hidden,
            mean,
            rstd,
            scale,
            gate,
            read,
            dresidual,
            dx,
            dgate,
            dscale,
            dshift,
            S,
            W,
            add.stride(0),
            add.stride(1),
            dout.stride(0),
            dout.stride(1),
            scale.stride(0),
            gate.stride(0),
            read.stride(0),
            read.stride(1),
            HIDDEN=dhidden is not None,
            GATE=x is not None,
            MODULATION=need_modulation,
            ROWS=step,
            BLOCK=block,
            num_warps=16 if block > 2048 else num_warps(block),  # three sums in registers
        )
    return dresidual, dx, _sum(dgate, gate), _sum(dscale, scale), _sum(dshift, scale)


def _partial(need: bool, B: int, parts: int, W: int, like: Tensor) -> Tensor:
    return torch.empty((B, parts, W) if need else (0,), dtype=torch.float32, device=like.device)


def _sum(partial: Tensor, like: Tensor) -> Tensor:
    return partial.sum(1).to(like.dtype) if partial.ndim == 3 else like.new_empty(0)


# What `python -m megaflux_kernels.aot` compiles: (kernel, {argument: type or constant}, warps) at FLUX's width; a
# type `D` stands for each of the dtypes in use.
AOT = [
    (
        gate_residual_forward,
        {"residual_ptr": "*D", "x_ptr": "*D", "gate_ptr": "*D", "hidden_ptr": "*D", "S": "i32", "W": "i32",
         "stride_rb": "i64", "stride_rs": "i32", "stride_xb": "i64", "stride_xs": "i32", "stride_gate": "i32",
         "BLOCK": BLOCK},
        4,
    ),
    (
        gate_residual_modulate_forward,
        {"residual_ptr": "*D", "x_ptr": "*D", "gate_ptr": "*D", "scale_ptr": "*D", "shift_ptr": "*D",
         "hidden_ptr": "*D", "out_ptr": "*D", "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "S": "i32", "W": "i32",
         "stride_rb": "i64", "stride_rs": "i32", "stride_xb": "i64", "stride_xs": "i32", "stride_gate": "i32",
         "stride_scale": "i32", "stride_shift": "i32", "eps": "fp32", "BLOCK": 4096},
        8,
    ),
    (
        gate_residual_backward,
        {"dhidden_ptr": "*D", "gate_ptr": "*D", "x_ptr": "*D", "dx_ptr": "*D", "dgate_ptr": "*fp32", "S": "i32",
         "W": "i32", "stride_db": "i64", "stride_ds": "i32", "stride_gate": "i32", "stride_xb": "i64",
         "stride_xs": "i32", "GATE": True, "ROWS": ROWS, "BLOCK": BLOCK},
        4,
    ),
    (
        gate_residual_modulate_backward,
        {"dhidden_ptr": "*D", "dout_ptr": "*D", "hidden_ptr": "*D", "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
         "scale_ptr": "*D", "gate_ptr": "*D", "x_ptr": "*D", "dresidual_ptr": "*D", "dx_ptr": "*D",
         "dgate_ptr": "*fp32", "dscale_ptr": "*fp32", "dshift_ptr": "*fp32", "S": "i32", "W": "i32",
         "stride_hb": "i64", "stride_hs": "i32", "stride_ob": "i64", "stride_os": "i32", "stride_scale": "i32",
         "stride_gate": "i32", "stride_xb": "i64", "stride_xs": "i32", "HIDDEN": True, "GATE": True,
         "MODULATION": True, "ROWS": ROWS, "BLOCK": 4096},
        16,
    ),
]  # fmt: skip
AOT += [  # frozen blocks
    (gate_residual_backward, AOT[2][1] | {"GATE": False, "ROWS": 1}, *AOT[2][2:]),
    (gate_residual_modulate_backward, AOT[3][1] | {"GATE": False, "MODULATION": False, "ROWS": 1}, *AOT[3][2:]),
]
