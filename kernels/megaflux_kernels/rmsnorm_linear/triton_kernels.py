"""rmsnorm_linear in Triton: a tiled matrix product whose row scale is known at its end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaflux_kernels.dispatch import on_its_gpu

GROUP = 8  # tiles of rows that go over the columns together, so that weight tiles are found in L2
PROGRAMS = 128  # about the multiprocessors of a GPU: 108 on an A100, 132 on an H100


@triton.jit
def rmsnorm_linear_forward(
    x_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rstd_ptr,
    M,
    N,
    K,
    stride_x,
    stride_w,
    eps,
    BIAS: tl.constexpr,
    SCALE_X: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Past the edge the first rows are read again, never stored: cheaper than a mask on every load.
    x = x_ptr + (m % M).to(tl.int64)[:, None] * stride_x + k[None, :]
    weight = weight_ptr + (n % N).to(tl.int64)[:, None] * stride_w + k[None, :]
    norm = norm_ptr + k
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    squares = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, K, BK):
        inside = k < K - start
        a = tl.load(x, mask=inside[None, :], other=0.0)
        b = tl.load(weight, mask=inside[None, :], other=0.0)
        scale = tl.load(norm, mask=inside, other=0.0).to(tl.float32)
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        if SCALE_X:  # the smaller operand, which Hopper's products read from registers
            a = (wide * scale[None, :]).to(a.dtype)
        else:  # float16: x not yet normalised times the norm's weight could leave its range
            b = (b.to(tl.float32) * scale[None, :]).to(b.dtype)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
        x += BK
        weight += BK
        norm += BK
    rstd = 1.0 / tl.sqrt(squares / K + eps)
    acc = acc * rstd[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    if tile_n == 0:
        tl.store(rstd_ptr + m, rstd, mask=m < M)


def tiles(dtype: torch.dtype, M: int, N: int) -> tuple[int, int, int, int, int]:
    """(rows, columns, K per step, warps, stages) of a program.

    Chosen by counting instructions in cubins, not by times: wide tiles leave the fewest beside the tensor cores.
    Narrower where that would leave multiprocessors idle. float32 takes the plain units and twice the space.
    """
    if dtype == torch.float32:
        return 128, 64, 32, 8, 2
    full = triton.cdiv(M, 128) * triton.cdiv(N, 256) >= PROGRAMS
    return 128, 256 if full else 128, 64, 8, 3


@on_its_gpu
def forward(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(out (M, N), rstd (M,))."""
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    rstd = torch.empty((M,), dtype=torch.float32, device=x.device)
    BM, BN, BK, warps, stages = tiles(x.dtype, M, N)
    if out.numel():
        rmsnorm_linear_forward[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x,
            norm_weight,
            weight,
            weight if bias is None else bias,
            out,
            rstd,
            M,
            N,
            K,
            x.stride(0),
            weight.stride(0),
            eps,
            BIAS=bias is not None,
            SCALE_X=x.dtype != torch.float16,
            GROUP=GROUP,
            BM=BM,
            BN=BN,
            BK=BK,
            num_warps=warps,
            num_stages=stages,
        )
    return out, rstd


def _aot(dtype: torch.dtype, name: str, M: int) -> tuple:
    """An entry for `python -m megaflux_kernels.aot`: M rows into 4096 columns."""
    BM, BN, BK, warps, stages = tiles(dtype, M, 4096)
    arguments = {
        "x_ptr": "*D",
        "norm_ptr": "*D",
        "weight_ptr": "*D",
        "bias_ptr": "*D",
        "out_ptr": "*D",
        "rstd_ptr": "*fp32",
        "M": "i32",
        "N": "i32",
        "K": "i32",
        "stride_x": "i32",
        "stride_w": "i32",
        "eps": "fp32",
        "BIAS": True,
        "SCALE_X": dtype != torch.float16,
        "GROUP": GROUP,
        "BM": BM,
        "BN": BN,
        "BK": BK,
    }
    return rmsnorm_linear_forward, arguments, warps, stages, (name,)


_NAMES = ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
AOT = [*(_aot(*names, M) for names in _NAMES for M in (512, 4096)), _aot(torch.float32, "fp32", 4096)]
