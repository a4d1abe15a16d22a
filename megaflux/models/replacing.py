"""A module's forward, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, calls of the module run `make(forward)`, where `forward` is what they ran before: the class's own method, or
    another one in its place, such as megaflux's or accelerate's."""
    forward, replaced = module.forward, "forward" in vars(module)
    vars(module)["forward"] = make(forward)
    try:
        yield
    finally:
        if replaced:
            vars(module)["forward"] = forward
        else:
            del vars(module)["forward"]
