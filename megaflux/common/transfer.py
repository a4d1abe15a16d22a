"""Copies from the host to a GPU that do not wait for the GPU's running work."""

from __future__ import annotations

import torch
from torch import Tensor


def pins(device: torch.device | str) -> bool:
    """Whether tensors for a device should be in pinned memory first: true for GPUs only."""
    return torch.device(device).type == "cuda"


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of any shape and dtype on a device. From the host to a GPU it is copied through pinned memory, because a
    copy from pageable memory waits for all work that the GPU was given before.

    The pinned memory may be dropped at once: torch's allocator does not reuse it before the copy has finished.
    """
    if tensor.device.type == "cpu" and pins(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
