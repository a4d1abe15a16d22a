"""rmsnorm_linear in Triton: a tiled matrix product whose row scale is known at its end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # tiles of rows that go over the columns together, so that weight tiles are found in L2


@triton.jit
def rmsnorm_linear_forward(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, rstd_ptr, M, N, K, stride_x, stride_w, eps,
    BIAS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    tile_m = first + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x = x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :]
    weight = weight_ptr + n.to(tl.int64)[:, None] * stride_w + k[None, :]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    squares = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, K, BK):
        inside = (start + k)[None, :] < K
        a = tl.load(x + start, mask=(m < M)[:, None] & inside, other=0.0)
        b = tl.load(weight + start, mask=(n < N)[:, None] & inside, other=0.0)
        scale = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        wide = a.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        # The norm's weight goes to the linear's side: x not yet normalised times it could leave float16's range.
        b = (b.to(tl.float32) * scale[None, :]).to(b.dtype)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    rstd = 1.0 / tl.sqrt(squares / K + eps)
    acc = acc * rstd[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    if tile_n == 0:
        tl.store(rstd_ptr + m, rstd, mask=m < M)


def tiles(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """(rows, columns, K per step, warps, stages) of a program: float32 takes the slower units and twice the space."""
    return (64, 64, 32, 8, 2) if dtype == torch.float32 else (64, 128, 64, 4, 3)


def forward(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    rstd = torch.empty((M,), dtype=torch.float32, device=x.device)
    BM, BN, BK, warps, stages = tiles(x.dtype)
    if out.numel():
        rmsnorm_linear_forward[(triton.cdiv(M, BM) * triton.cdiv(N, BN),)](
            x, norm_weight, weight, weight if bias is None else bias, out, rstd, M, N, K, x.stride(0),
            weight.stride(0), eps, BIAS=bias is not None, GROUP=GROUP, BM=BM, BN=BN, BK=BK,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, rstd


_SIGNATURE = {
    "x_ptr": "*D", "norm_ptr": "*D", "weight_ptr": "*D", "bias_ptr": "*D", "out_ptr": "*D", "rstd_ptr": "*fp32",
    "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32", "stride_w": "i32", "eps": "fp32", "BIAS": True,
    "GROUP": GROUP,
}  # fmt: skip
AOT = [
    (
        rmsnorm_linear_forward,
        _SIGNATURE | dict(zip(("BM", "BN", "BK"), tiles(dtype))),
        *tiles(dtype)[3:],
        names,
    )
    for dtype, names in ((torch.bfloat16, ("bf16", "fp16")), (torch.float32, ("fp32",)))
]
