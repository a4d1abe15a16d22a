"""Fixtures of the kernels' tests, which run on a GPU or, where there is none, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bfloat16 in the interpreter is garbage where a kernel computes in it (Triton 3.7): it is tested on GPUs.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.fixture(params=["torch", "triton"])
def path(request, monkeypatch):
    """Both paths of every op, whatever the machine."""
    from megaflux_kernels import dispatch

    monkeypatch.setattr(dispatch, "CHOICE", request.param)
    return request.param


@pytest.fixture
def triton_path(monkeypatch):
    from megaflux_kernels import dispatch

    monkeypatch.setattr(dispatch, "CHOICE", "triton")


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty and torch.empty_like give NaN: an element that a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poison(*args, plain=plain, **kwargs):
            made = plain(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() and not made.is_meta else made

        monkeypatch.setattr(torch, name, poison)
