"""`train.deterministic`: the same bits from the same start on a GPU too.

On a CPU every operation of a run adds in a fixed order anyway. On a GPU attention's backward pass does not: flash adds the
gradient of the queries atomically, memory-efficient attention splits the keys, cuDNN's has no other way. torch's strict
mode asks the first for its deterministic backward and the second for one split, and never chooses the third
(aten/src/ATen/native/transformers/cuda/attention_backward.cu and sdp_utils.cpp); convolutions and cuBLAS need their own
switches. megaflux's Triton kernels use no atomic operations, and their partial sums are added in a fixed order.

An operation that has no deterministic form raises torch's RuntimeError, which names it.
"""

from __future__ import annotations

import os

import torch

from megaflux.common.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic; what it says of results' reproducibility


def make_deterministic() -> None:
    """Have torch, cuDNN and cuBLAS of this process use deterministic algorithms only, or raise. Before the process's first
    matrix product on a GPU: cuBLAS reads the environment then. UserError where CUBLAS_WORKSPACE_CONFIG forbids it."""
    given = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if given not in WORKSPACES:
        raise UserError(
            f"{WORKSPACE}: {given!r}, but train.deterministic needs {' or '.join(WORKSPACES)}; leave the variable out"
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
