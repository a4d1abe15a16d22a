"""Bytes alive while code runs on fake tensors: what a GPU would have to hold at the worst moment, without one.

Tracked are the storages that operations make, from their making to their end, as torch's allocator would see them; what
is inside an operation (cuDNN's workspace, cuBLAS's) is not seen. Attention's backward is the exception: flash kernels add
up dQ in float32, as large as two hidden states in 16 bits, so that is counted in.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULE = 512  # bytes: the caching allocator gives no less, and multiples of it
FLASH_BACKWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default,
)


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory:` counts what is made inside: `memory.live` and `memory.peak`, in bytes.

    What was made before (weights) is not counted, however it is used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf, before)
        inside = 0
        if func in FLASH_BACKWARD:
            inside = 4 * math.prod(args[1].shape)  # grad_out, query, ...
        self.peak = max(self.peak, self.live + inside)
        return result

    def _see(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in before or key in self._known:  # a view, or an operation in place
            return
        size = -(-storage.nbytes() // GRANULE) * GRANULE
        self.live += size
        self._known[key] = weakref.ref(storage, lambda _, key=key, size=size: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
