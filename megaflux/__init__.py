"""megaflux: training and generation for FLUX conditioned by Qwen2-VL."""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"]:  # one of its programs is about to be imported (python -m megaflux.NAME)
    from megaflux.common.errors import quiet_interrupt

    quiet_interrupt()

from importlib import import_module
from typing import TYPE_CHECKING, Any

import megaflux_kernels  # noqa: F401  (first of all, so that torch's allocator is set before anything imports torch)

if TYPE_CHECKING:  # offered lazily below
    from megaflux.generation.dots.dots import Dot, Weighting
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline
    from megaflux.generation.request import Reference

__all__ = ["Dot", "Qwen2VLFluxPipeline", "Reference", "Weighting"]

_DEFINED_IN = {
    "Dot": "megaflux.generation.dots.dots",
    "Qwen2VLFluxPipeline": "megaflux.generation.pipeline",
    "Reference": "megaflux.generation.request",
    "Weighting": "megaflux.generation.dots.dots",
}


def __getattr__(name: str) -> Any:
    """The names above on first use: `import megaflux` alone does not load torch."""
    if name in _DEFINED_IN:
        return getattr(import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'megaflux' has no attribute {name!r}")
