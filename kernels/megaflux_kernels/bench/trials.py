"""Accuracy and times of a case of an op: its results and every gradient against float64.

An op is right if no result's error exceeds twice the eager reference's plus FLOOR, the error of a result that is rounded
once: a reference may be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaflux_kernels.bench import timing
from megaflux_kernels.bench.cases import Case

# In units of rounding (eps).
FLOOR = {torch.bfloat16: 0.25, torch.float16: 0.25, torch.float32: 4}


@dataclass(frozen=True)
class Error:
    """Errors of one result, an output or the gradient of an input: norms of the difference, relative to the true norm."""

    index: int
    """Outputs first, then gradients."""
    ours: float
    eager: float
    floor: float

    @property
    def of_allowed(self) -> float:
        """At most 1 where the op is right; NaN is not."""
        return self.ours / (2 * self.eager + self.floor)

    def __str__(self) -> str:
        return f"result {self.index} is off by {self.ours:.2e}, the eager reference by {self.eager:.2e}"


def errors(case: Case, dtype: torch.dtype) -> list[Error]:
    """The errors of all results, in order."""
    exact = results(case, case.reference, torch.float64)
    ours, eager = (results(case, run, dtype) for run in (case.ours, case.reference))
    floor, found = FLOOR[dtype] * torch.finfo(dtype).eps, []
    for index, (mine, theirs, true) in enumerate(zip(ours, eager, exact, strict=True)):
        size = true.norm().clamp(min=1e-30)
        off, eagers = ((x.double() - true).norm().div(size).item() for x in (mine, theirs))
        found.append(Error(index, off, eagers, floor))
    return found


def times(case: Case, run: Callable, device: torch.device, samples: int) -> tuple[float, float]:
    """Median milliseconds of (forward without gradients, forward and backward)."""
    inputs = leaves(case.inputs, case.timed)
    with torch.no_grad():
        outs = outputs(run(*inputs))
        forward = timing.kernel_ms(lambda: run(*inputs), device, samples)
    douts = [torch.randn_like(out) for out in outs]
    wanted = [inputs[i] for i in case.timed]
    both = timing.kernel_ms(
        lambda: torch.autograd.grad(outputs(run(*inputs)), wanted, douts, allow_unused=True), device, samples
    )
    return timing.median(forward), timing.median(both)


def results(case: Case, run: Callable, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients. For float64 all inputs are cast; otherwise inputs wider than dtype stay as they are."""
    inputs = case.inputs
    if dtype == torch.float64:
        inputs = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    inputs = leaves(inputs, case.differentiable)
    outs = outputs(run(*inputs))
    generator = torch.Generator(outs[0].device).manual_seed(1)
    douts = [
        torch.randn(o.shape, generator=generator, device=o.device).to(case.inputs[0].dtype).to(o.dtype) for o in outs
    ]
    return [*outs, *torch.autograd.grad(outs, [inputs[i] for i in case.differentiable], douts)]


def leaves(inputs: Sequence[Any], differentiable: Sequence[int]) -> list[Any]:
    """The inputs as leaves, those at these places requiring gradients."""
    return [
        x.detach().requires_grad_(i in differentiable) if isinstance(x, Tensor) else x for i, x in enumerate(inputs)
    ]


def outputs(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of an op as a list."""
    return [out] if isinstance(out, Tensor) else list(out)
