"""torch's allocator on a GPU: expandable segments. With fixed ones, several picture sizes leave holes between them, and a
run fails for lack of memory although enough is free. torch reads this setting when it is imported, so megaflux_kernels
sets it before that, and megaflux imports megaflux_kernels first.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # torch reads them all


def expand_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set expandable segments in the environment, unless it already configures the allocator."""
    if not any(name in environment for name in NAMES):
        environment[NAMES[0]] = "expandable_segments:True"
