"""`train.deterministic`: bit-identical runs on a GPU too.

On a CPU every operation of a run adds in a fixed order anyway. On a GPU the backward pass of attention does not: flash
attention adds the gradient of the queries atomically, memory-efficient attention splits the keys, and cuDNN's has no
deterministic version. torch's deterministic mode selects the first's deterministic backward and one split for the second,
and never uses the third (aten/src/ATen/native/transformers/cuda/attention_backward.cu and sdp_utils.cpp); convolutions and
cuBLAS have switches of their own. megaflux's Triton kernels use no atomic operations and add partial sums in a fixed order.

An operation without a deterministic version raises torch's RuntimeError, which names it.
"""

from __future__ import annotations

import os

import torch

from megaflux.common.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # cuBLAS is deterministic with these (its documentation, "Results reproducibility")


def make_deterministic() -> None:
    """Make torch, cuDNN and cuBLAS use only deterministic algorithms in this process. Call it before the first matrix product
    on a GPU, when cuBLAS reads the environment. Raises UserError if CUBLAS_WORKSPACE_CONFIG is set to another value."""
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise UserError(
            f"{WORKSPACE}: {given!r}, but train.deterministic needs {' or '.join(WORKSPACES)}; leave the variable out"
        )
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's stubs lack it
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
