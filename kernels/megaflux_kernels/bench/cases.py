"""What the op bench runs: each op with inputs of FLUX's sizes (small ones on a CPU), beside its reference.

Bytes are the minimum: forward, every input read and every output written once; backward, the output's gradient and the
inputs that it depends on read, the input's gradient written. Timed are the gradients of a frozen block: those of
activations, not of weights and modulations. The gate checks all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megaflux_kernels.qk_norm_rope.streams import Stream


@dataclass(frozen=True)
class Sizes:
    """FLUX.1-dev's at 1024 x 1024 px on a GPU."""

    batch: int = 1
    text: int = 512
    image: int = 4096
    heads: int = 24
    head_dim: int = 128
    qwen_width: int = 3584
    joint_dim: int = 4096

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.text + self.image


SMALL = Sizes(text=64, image=256, heads=8, head_dim=64, qwen_width=384, joint_dim=512)


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    shape: str
    ours: Callable
    reference: Callable
    inputs: Sequence[Any]
    differentiable: Sequence[int]
    """Inputs whose gradients the gate compares."""
    timed: Sequence[int]
    """Inputs whose gradients the backward computes while it is timed."""
    bytes: tuple[int, int] | None = None
    """Moved by forward, and by forward and backward; None: limited by matrix products."""
    flops: tuple[int, int] = (0, 0)
    """Of forward, and of forward and backward, where bytes are None."""
    others: dict[str, Callable] = field(default_factory=dict)
    """Further arms, by name."""


def make(op: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """The cases of an op."""
    module = importlib.import_module(f"megaflux_kernels.{op}")
    reference = importlib.import_module(f"megaflux_kernels.{op}.reference")
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    made = CASES[op](getattr(module, op), reference.definition, sizes, randn, dtype.itemsize)
    return made if isinstance(made, list) else [made]


def _modulate(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> Case:
    inputs = [randn(s.batch, s.tokens, s.width), randn(s.batch, s.width), randn(s.batch, s.width)]
    part = s.batch * s.tokens * s.width * item
    # forward: x -> out; backward: dout, x -> dx
    return Case(
        "modulate", f"{s.batch}x{s.tokens}x{s.width}", ours, reference, inputs, (0, 1, 2), (0,), (2 * part, 5 * part)
    )


def _gate_residual(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> list[Case]:
    shape, vector = (s.batch, s.tokens, s.width), (s.batch, s.width)
    inputs = [randn(*shape), randn(*shape), randn(*vector)]
    with_modulation = [*inputs, randn(*vector), randn(*vector)]
    part, name = s.batch * s.tokens * s.width * item, "x".join(map(str, shape))
    return [
        # residual, x -> hidden; dhidden -> dx (the residual's gradient is dhidden itself)
        Case("gate_residual", name, ours, reference, inputs, (0, 1, 2), (0, 1), (3 * part, 5 * part)),
        # residual, x -> hidden, out; dhidden, dout, hidden -> dresidual, dx
        Case(
            "gate_residual",
            f"{name}+modulate",
            ours,
            reference,
            with_modulation,
            (0, 1, 2, 3, 4),
            (0, 1),
            (4 * part, 9 * part),
        ),
    ]


def _gelu_concat(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> Case:
    inputs = [randn(s.batch, s.tokens, s.width), randn(s.batch, s.tokens, 4 * s.width)]
    part = s.batch * s.tokens * s.width * item
    # 1 + 4 -> 5; dout's 4 of GELU and the 4 before it -> 4; attention's part of the gradient is a view
    return Case(
        "gelu_concat",
        f"{s.batch}x{s.tokens}x({s.width}+{4 * s.width})",
        ours,
        reference,
        inputs,
        (0, 1),
        (0, 1),
        (10 * part, 22 * part),
    )


def _of_streams(op: Callable) -> Callable:
    """qk_norm_rope as a function of tensors alone, so that inputs have numbers."""

    def run(qkv: Tensor, norm_q: Tensor, norm_k: Tensor, cos: Tensor, sin: Tensor, heads: int, *text: Tensor) -> Any:
        return op(Stream(qkv, norm_q, norm_k), (cos, sin), heads, Stream(*text) if text else None)

    return run


def _qk_norm_rope(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> list[Case]:
    ours, reference = _of_streams(ours), _of_streams(reference)
    weights = [1 + 0.1 * randn(s.head_dim) for _ in range(4)]
    angles = torch.rand(s.tokens, s.head_dim // 2, device=weights[0].device).mul(6.28).repeat_interleave(2, dim=1)
    rope = [angles.cos(), angles.sin()]  # (S, D) float32, in pairs
    part = s.batch * s.tokens * s.width * item
    moved = (6 * part + 2 * rope[0].nbytes, 14 * part + 4 * rope[0].nbytes)  # qkv -> q, k, v; dq, dk, dv, q, k -> dqkv
    image, text = randn(s.batch, s.image, 3 * s.width), randn(s.batch, s.text, 3 * s.width)
    joint = torch.cat([text, image], dim=1)
    return [
        Case(
            "qk_norm_rope",
            f"{s.batch}x({s.text}+{s.image})x{s.heads}x{s.head_dim}",
            ours,
            reference,
            [image, *weights[:2], *rope, s.heads, text, *weights[2:]],
            (0, 1, 2, 6, 7, 8),
            (0, 6),
            moved,
        ),
        Case(
            "qk_norm_rope",
            f"{s.batch}x{s.tokens}x{s.heads}x{s.head_dim}",
            ours,
            reference,
            [joint, *weights[:2], *rope, s.heads],
            (0, 1, 2),
            (0,),
            moved,
        ),
    ]


def _rmsnorm_linear(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> Case:
    x, norm = randn(s.batch, s.text, s.qwen_width), 1 + 0.1 * randn(s.qwen_width)
    weight, bias = randn(s.joint_dim, s.qwen_width) * s.qwen_width**-0.5, 0.1 * randn(s.joint_dim)
    product = 2 * s.batch * s.text * s.qwen_width * s.joint_dim
    # the connector is trainable: dX and dW
    return Case(
        "rmsnorm_linear",
        f"{s.batch}x{s.text}x{s.qwen_width}->{s.joint_dim}",
        ours,
        reference,
        [x, norm, weight, bias],
        (0, 1, 2, 3),
        (0, 2, 3),
        flops=(product, 3 * product),
    )


def _biased_attention(ours: Callable, reference: Callable, s: Sizes, randn: Callable, item: int) -> Case:
    q, k, v = (randn(s.batch, s.heads, s.tokens, s.head_dim) for _ in range(3))
    bias = torch.rand(s.batch, s.tokens, device=q.device).log()  # weights of keys, 0 to 1
    bias[:, s.text // 2 : s.text] = float("-inf")
    product = 4 * s.batch * s.heads * s.tokens**2 * s.head_dim
    return Case(
        "biased_attention",
        f"{s.batch}x{s.heads}x{s.tokens}x{s.head_dim}",
        ours,
        reference,
        [q, k, v, bias],
        (0, 1, 2),
        (0, 1, 2),
        flops=(product, 3 * product),
        others={"sdpa-mask": sdpa_mask},
    )


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same by scaled_dot_product_attention with a mask."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :].to(q.dtype))


CASES: dict[str, Callable] = {
    "rmsnorm_linear": _rmsnorm_linear,
    "qk_norm_rope": _qk_norm_rope,
    "modulate": _modulate,
    "gate_residual": _gate_residual,
    "gelu_concat": _gelu_concat,
    "biased_attention": _biased_attention,
}
