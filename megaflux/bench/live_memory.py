"""Bytes alive while code runs on fake tensors: what a GPU would have to hold at the peak, without a GPU.

Tracked are the storages that operations create, for as long as they live, as torch's allocator would see them; memory
inside an operation (cuDNN's workspace, cuBLAS's) is not seen. Attention's backward is the exception: flash kernels sum dQ
in float32, as large as two hidden states in 16 bits, which is counted.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRANULE = 512  # bytes: the caching allocator rounds up to multiples of it
FLASH_BACKWARD = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default,
)


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory() as memory:` counts what is created inside: `memory.live` and `memory.peak`, in bytes.

    What existed before (weights) is not counted.
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

        def gone(_: object) -> None:
            self._gone(key, size)

        self._known[key] = weakref.ref(storage, gone)

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]
