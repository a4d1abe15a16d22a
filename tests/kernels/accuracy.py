"""The 2x rule: against float64, an op errs at most twice as much as plain PyTorch does in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Below this many units in the last place of the largest value, both are right.
FLOOR = {torch.float32: 4, torch.float16: 1, torch.bfloat16: 1, torch.float64: 8}


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Seeded normal numbers, the same values on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(function: Callable, inputs: Sequence, douts: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of function(*inputs) and the gradients of every input that asks for one, inputs cast to dtype first.

    None of douts: no backward. Non-tensors pass as they are; outputs count in order, then gradients in order.
    """
    leaves = [
        x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple | list) else [out]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grads = []
    if douts is not None and wanted:
        grads = torch.autograd.grad(outs, wanted, [d.to(dtype) for d in douts], allow_unused=True)
    return [x.detach() for x in outs] + [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted)]


def assert_within_twice(
    ours: Callable, plain: Callable, inputs: Sequence, douts: Sequence[Tensor] | None, dtype: torch.dtype
) -> None:
    """Outputs and gradients of `ours`, each against `plain` in float64, at most twice as far off as `plain` in dtype.

    inputs, douts: in dtype already, so that all three start from the same numbers.
    """
    exact = run(plain, inputs, douts, torch.float64)
    reference = run(plain, inputs, douts, dtype)
    found = run(ours, inputs, douts, dtype)
    assert len(found) == len(exact)
    for i, (mine, theirs, true) in enumerate(zip(found, reference, exact)):
        assert mine.shape == true.shape and mine.dtype == dtype, f"result {i}: {mine.shape} {mine.dtype}"
        assert torch.isfinite(mine).all() == torch.isfinite(true).all(), f"result {i} is not finite"
        floor = FLOOR[dtype] * torch.finfo(dtype).eps * true.abs().max()
        for name, norm in (("largest", lambda e: e.abs().max()), ("mean square", lambda e: e.square().mean().sqrt())):
            error, allowed = norm(mine.double() - true), 2 * norm(theirs.double() - true) + floor
            assert error <= allowed, f"result {i}: {name} error {error:.3g}, plain torch's {(allowed - floor) / 2:.3g}"
