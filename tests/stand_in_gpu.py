"""A GPU that is not there: real tensors on the CPU that say they are on cuda:0, and a count of what would wait for it.

Under FakeTensorMode, tensors on the host have no values either, and Qwen2-VL's ViT reads its grid on the host; a build
of torch without CUDA moreover refuses the backward pass of fake CUDA tensors. So here the arithmetic is real and only
the place is made up: results are those of the CPU, bit for bit, and the count is of what really ran.

Counted are a tensor's value read by the host (`_local_scalar_dense`, and what reads whole tensors), what has as many
elements as its input's values say (`nonzero`, masks as indices), and copies that are not asynchronous, which are all but
those from pinned memory with non_blocking. Also noted is an operation on tensors of both places, which a GPU refuses.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
T = TypeVar("T")
ROOT = Path(__file__).parents[1]
READS = {"tolist", "numpy", "__array__", "cpu"}  # whole tensors, above the dispatcher
WAITS = {  # below it; the size or the value of the result depends on the input's values
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "_linalg_check_errors",
}


class OnGpu(Tensor):
    """A CPU tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)


class StandInGpu:
    """While inside, "cuda" is a device. `waits`: (what, where in this repository, innermost code) of each wait, in
    order; `mixed`: the operations on tensors of both places."""

    def __init__(self):
        self.waits: list[tuple[str, str, str]] = []
        self.mixed: list[tuple[str, str, str]] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used again
        self.pinned: dict[int, torch.UntypedStorage] = {}
        self.everything = False
        """Set it where all tensors are the GPU's, whatever they say: code that asks for the device puts them on the CPU."""
        self.on_host = False
        self.within = False  # a function of tensors on the GPU: what it makes on the way is there too
        self.modes = _Calls(self), _Operations(self)

    def __enter__(self) -> StandInGpu:
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def put(self, module: nn.Module) -> nn.Module:
        """A module's parameters and buffers on the GPU, for good; `module.to` of a subclass would ask torch how."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(self.on_gpu(parameter.detach()), parameter.requires_grad)
                    part._parameters[name] = moved
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.on_gpu(buffer)
        return module

    def on_gpu(self, tensor: Tensor) -> Tensor:
        """The same memory, said to be on the GPU."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor if isinstance(tensor, OnGpu) else tensor.as_subclass(OnGpu)

    def holds(self, tensor: object) -> bool:
        """Whether a tensor is on the GPU; what autograd has saved has lost its class, not its memory."""
        if not isinstance(tensor, Tensor) or torch._C._functorch.is_batchedtensor(tensor):
            return False  # torch.vmap's have no memory of their own
        return self.everything or isinstance(tensor, OnGpu) or tensor.untyped_storage()._cdata in self.storages

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = storage
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def note(self, what: str, to: list | None = None) -> None:
        frames = [f for f in traceback.extract_stack() if Path(f.filename) != Path(__file__)]
        inner = next(f for f in reversed(frames) if "/torch/" not in f.filename or "/site-packages/" not in f.filename)
        ours = next(
            (
                f
                for f in reversed(frames)
                if Path(f.filename).is_relative_to(ROOT / "megaflux")
                or Path(f.filename).is_relative_to(ROOT / "kernels")
            ),
            inner,
        )
        (self.waits if to is None else to).append((what, *(f"{Path(f.filename).name}:{f.name}" for f in (ours, inner))))

    def read(self, tensor: Tensor, how: Callable[[Tensor], T]) -> T:
        """What the host makes of a tensor's values, which are there already."""
        self.on_host = True
        try:
            return how(tensor.detach().as_subclass(Tensor))
        finally:
            self.on_host = False

    def moved(self, tensor: Tensor, device: torch.device, dtype: torch.dtype | None, non_blocking: bool) -> Tensor:
        """Tensor.to between the places."""
        if device.type == "cpu":
            self.note("copy to the host")
            return self.read(tensor, lambda plain: plain.to(dtype or plain.dtype, copy=True))
        if not (non_blocking and self.is_pinned(tensor)):
            self.note("copy from pageable memory" if not self.is_pinned(tensor) else "copy that blocks")
        tensor = tensor.to(dtype) if dtype not in (None, tensor.dtype) else tensor.clone()
        return self.on_gpu(tensor)


class _Calls(TorchFunctionMode):
    """What names a device, and what reads whole tensors: above the dispatcher."""

    def __init__(self, gpu: StandInGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if name in ("to", "cuda") and isinstance(first, Tensor):
            return self._to(func, name, args, kwargs)
        if name in READS and gpu.holds(first):
            gpu.note(name)
            if name == "cpu":
                return gpu.read(first, Tensor.clone)
            return gpu.read(first, lambda plain: getattr(plain, name)(*args[1:], **kwargs))
        if name == "backward":  # called as any other, it would run with this mode off
            with self:
                run = torch.autograd.graph._engine_run_backward
                return run(
                    (first,), (torch.ones_like(first),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        if name == "pin_memory":
            return gpu.pin(first.clone())
        if name == "is_pinned":
            return gpu.is_pinned(first)
        pinned, place = kwargs.pop("pin_memory", False), kwargs.get("device")
        if place is not None and torch.device(place).type == "cuda":
            kwargs["device"] = CPU
            made = func(*args, **kwargs)
            if name in ("tensor", "as_tensor", "asarray") and not gpu.holds(
                first
            ):  # made on the host first, wherever they shall be
                gpu.note("copy from pageable memory")
            return gpu.on_gpu(made)
        before, gpu.within = gpu.within, any(gpu.holds(x) for x in tree_iter((args, kwargs)))
        try:
            made = func(*args, **kwargs)
        finally:
            gpu.within = before
        return gpu.pin(made) if pinned else made

    def _to(self, func, name, args, kwargs):
        gpu, (tensor, *rest) = self.gpu, args
        if name == "cuda":
            rest = [GPU, *rest]
        other = next((x for x in [*rest, kwargs.get("other")] if isinstance(x, Tensor)), None)
        if other is not None:
            device, dtype, non_blocking = other.device, other.dtype, kwargs.get("non_blocking", False)
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
        here = GPU if gpu.holds(tensor) else CPU
        if device is None or device.type == here.type:
            dtype = tensor.dtype if dtype is None else dtype
            return func(tensor, dtype, copy=kwargs.get("copy", False))
        return gpu.moved(tensor, device, dtype, non_blocking)


class _Operations(TorchDispatchMode):
    """Every operation, those of the backward pass too: where its result is, and whether it waits."""

    def __init__(self, gpu: StandInGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, name = self.gpu, func.overloadpacket.__name__
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        inside = [gpu.holds(x) for x in tensors]
        if gpu.within and not tensors:
            return tree_map_only(Tensor, gpu.on_gpu, func(*args, **kwargs or {}))
        if not any(inside) or gpu.on_host:
            return func(*args, **kwargs or {})
        outside = [x for x, on_gpu in zip(tensors, inside, strict=True) if not on_gpu and x.ndim]
        if name in WAITS and not (name == "repeat_interleave" and kwargs and kwargs.get("output_size") is not None):
            gpu.note(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            indices = [x for x in args[1] if x is not None]
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    gpu.note("nonzero of a mask")
                elif not gpu.holds(index):
                    gpu.note("copy of an index")
        elif name in ("copy_", "_to_copy"):
            if outside and not (name == "copy_" and gpu.is_pinned(args[1]) and (args[2:] or [False])[0]):
                gpu.note("copy")
        elif outside:
            gpu.note(name, gpu.mixed)
        out = func(*args, **kwargs or {})
        if name == "_local_scalar_dense" or (name == "copy_" and not gpu.holds(args[0])):
            return out
        return tree_map_only(Tensor, gpu.on_gpu, out)
