"""From the host to a GPU without waiting for what the GPU still computes."""

from __future__ import annotations

import torch
from torch import Tensor


def pins(device: torch.device | str) -> bool:
    """Whether what goes to a device should lie in pinned memory first: on GPUs alone, elsewhere there is none."""
    return torch.device(device).type == "cuda"


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, any shape and dtype. From the host to a GPU it goes through pinned memory: a copy from
    pageable memory waits until the GPU is done with all it was given before.

    The pinned memory may be dropped at once: torch's allocator of it uses none again whose copy is still on its way.
    """
    if tensor.device.type == "cpu" and pins(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
