"""megaflux: training and generation for FLUX conditioned by Qwen2-VL."""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"]:  # one of its programs is about to be imported (python -m megaflux.NAME)
    from megaflux.common.errors import quiet_interrupt

    quiet_interrupt()

from typing import TYPE_CHECKING, Any

import megaflux_kernels  # noqa: F401  (first of all, so that torch's allocator is set before anything imports torch)

if TYPE_CHECKING:
    from megaflux.generation.pipeline import Dot, Qwen2VLFluxPipeline, Reference, Weighting

__all__ = ["Dot", "Qwen2VLFluxPipeline", "Reference", "Weighting"]


def __getattr__(name: str) -> Any:
    """The names above on first use: `import megaflux` alone loads no torch."""
    if name in __all__:
        from megaflux.generation import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'megaflux' has no attribute {name!r}")
