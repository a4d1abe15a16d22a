"""torch's allocator on a GPU: segments that grow. Several picture sizes leave holes between fixed ones, and a run then
ends for want of memory that is there. torch reads this as it is imported, so megaflux_kernels sets it first of all, and
megaflux imports that first.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # torch reads them all


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have torch's allocator grow its segments, unless the environment already says anything about the allocator."""
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"
