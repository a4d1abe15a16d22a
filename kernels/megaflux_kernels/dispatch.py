"""Which path an op takes: Triton on a GPU, plain torch elsewhere.

MEGAFLUX_KERNELS decides, read once when the package is imported:

    auto    Triton for CUDA tensors where Triton is installed, else torch (default)
    triton  Triton always; CPU tensors need Triton's interpreter (TRITON_INTERPRET=1), meant for tests
    torch   torch always

Both paths give the same values within rounding, and keep the same tensors for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHOICES = ("auto", "triton", "torch")
CHOICE = os.environ.get("MEGAFLUX_KERNELS", "auto")
if CHOICE not in CHOICES:
    raise ValueError(f"MEGAFLUX_KERNELS={CHOICE}: use one of {', '.join(CHOICES)}")

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*TRITON_DTYPES, torch.float64)


_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"  # which Triton reads at import too


def triton_installed() -> bool:
    return _INSTALLED


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return _INTERPRETING


def use_triton(x: Tensor) -> bool:
    """Whether an op on x runs its Triton kernel. ValueError where MEGAFLUX_KERNELS=triton and it cannot."""
    if CHOICE == "torch":
        return False
    if CHOICE == "auto":
        return x.is_cuda and triton_installed() and x.dtype != torch.float64
    if not triton_installed():
        raise ValueError("MEGAFLUX_KERNELS=triton: triton is not installed; install it or use auto")
    if not x.is_cuda and not interpreting():
        raise ValueError(
            f"MEGAFLUX_KERNELS=triton: the tensor is on {x.device}, Triton needs a CUDA device "
            "(or TRITON_INTERPRET=1); use auto"
        )
    if x.dtype == torch.float64:
        raise ValueError("MEGAFLUX_KERNELS=triton: float64 runs on the torch path only; use auto or torch")
    return True


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, ops take the Triton path on any device. For fake tensors, whose kernels never run: what is counted are
    then a GPU's allocations, not those of the torch path."""
    global CHOICE, _INSTALLED, _INTERPRETING
    before = CHOICE, _INSTALLED, _INTERPRETING
    CHOICE, _INSTALLED, _INTERPRETING = "triton", True, True
    try:
        yield
    finally:
        CHOICE, _INSTALLED, _INTERPRETING = before


def describe(device: torch.device | str) -> str:
    """The path that ops on this device take: "triton" or "torch"."""
    on_gpu = torch.device(device).type == "cuda" and triton_installed()
    return "triton" if CHOICE == "triton" or (CHOICE == "auto" and on_gpu) else "torch"


def check(op: str, x: Tensor, *others: Tensor | None, dims: int | None = None) -> None:
    """ValueError, saying what is supported, unless x has a supported dtype and `dims` dimensions (None: any), and the
    others have its dtype and device."""
    if x.dtype not in DTYPES:
        supported = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{op}: {x.dtype} is not supported; use {supported} (float64 on the torch path only)")
    if dims is not None and x.ndim != dims:
        raise ValueError(f"{op}: want {dims} dimensions, got shape {tuple(x.shape)}")
    for other in others:
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            raise ValueError(
                f"{op}: all tensors must be {x.dtype} on {x.device}, got {other.dtype} on {other.device}; cast them"
            )


def torch_path(compute: Callable, setup: Callable, gradients: Callable) -> Callable:
    """The differentiable torch path of an op: compute(*inputs), with the setup_context and the backward of its Triton
    path. (autograd.Function's own setup_context costs 20 us a call on a CPU, more than a small op.)"""

    class TorchPath(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = compute(*inputs)
            setup(ctx, inputs, output)
            return output

        backward = staticmethod(gradients)

    def run(*inputs):
        return TorchPath.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    return run


def on_its_gpu(launch: Callable) -> Callable:
    """Make a function that launches kernels run on the GPU of its first tensor: Triton launches on the current GPU."""

    @functools.wraps(launch)
    def run(*args, **kwargs):
        first = next(x for x in args if isinstance(x, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return launch(*args, **kwargs)

    return run


def rows(x: Tensor) -> Tensor:
    """x with unit stride in its last dimension, as kernels read it; copied only where it has another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
