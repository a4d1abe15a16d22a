"""Weights from safetensors files to where they are used, one tensor at a time.

A module is built without memory for its parameters; each parameter is then allocated on its device and in its dtype,
filled from the file and registered. Beside what the module keeps, the host holds one tensor and a window of the file.
Without a given device or dtype, weights stay mapped from their files: the system can discard such memory and read it
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaflux.common.errors import UserError
from megaflux.models.safetensors_files import read_index

WINDOW = 32 * 2**20
"""Bytes read before a file is opened anew: pages of a mapped file count as resident memory until it is closed."""
SAMPLE = 1024


@dataclass(frozen=True)
class Target:
    """Where weights go as they are read, with samples of them as they were stored. By default they stay in their files."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    """What weights are cast to; None: the dtype they are loaded in."""
    samples: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """`sampled` of each parameter before that cast."""

    @property
    def mapped(self) -> bool:
        """Whether weights that need no cast stay mapped from their file."""
        return torch.device(self.device).type == "cpu" and self.dtype is None

    def place(self, tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(a host tensor moved and cast to this target, its sample). The values are rounded to `dtype` first."""
        loaded = tensor.to(dtype)
        if self.mapped:
            return loaded, sampled(loaded).clone()
        # A new allocation is aligned; memory mapped from a file need not be, and matrix products round by the alignment.
        placed = torch.empty(tensor.shape, dtype=self.dtype or dtype, device=self.device)
        return placed.copy_(loaded), sampled(loaded).clone()


def sampled(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor: (N,), all values of a tensor below 2,048, at least 1,024 of a larger one."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)]


def tensors(file: Path, names: Iterable[str], window: float = WINDOW) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, mapped from it: a tensor that is kept keeps its part of the file in memory.

    window: bytes read before the file is opened anew, which releases the pages read so far."""
    waiting = list(names)[::-1]
    while waiting:
        seen = 0
        with safe_open(file, "pt") as opened:
            while waiting and seen < window:
                name = waiting.pop()
                tensor = opened.get_tensor(name)
                seen += tensor.nbytes
                yield name, tensor
                del tensor


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header."""
    with safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}


def dtypes(file: Path) -> dict[str, str]:
    """Name and dtype (safetensors' name: F32, BF16) of every tensor of a safetensors file, from its header."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}


def weight_files(source: str, subfolder: str, names: Iterable[str]) -> list[Path]:
    """The safetensors files of a local folder or hub name (`sources.opened`). OSError or ValueError where one is missing.

    names: file names to look for, of which the first that exists is taken: one file, or an index of several."""
    from transformers.utils import cached_file  # here, because the checkpoint tool reads tensors without transformers

    def cached(name: str) -> Path:
        path = cached_file(source, name, subfolder=subfolder)
        if path is None:  # it raises instead, unless told otherwise
            raise OSError(f"{name}: missing")
        return Path(path)

    missing: OSError | None = None
    for name in names:
        try:
            found = cached(name)
        except OSError as error:
            missing = missing or error
            continue
        if not name.endswith(".index.json"):
            return [found]
        weight_map = read_index(found)
        files = [cached(part) for part in sorted(set(weight_map.values()))]
        stored = {key: file.name for file in files for key in shapes(file)}
        elsewhere = [key for key, part in weight_map.items() if key in stored and stored[key] != part]
        if absent := sorted(set(weight_map) - set(stored)) or elsewhere:
            raise ValueError(f"{weight_map[absent[0]]}: missing key {absent[0]}, which {name} says it holds")
        return files
    raise missing or ValueError("no file names")


def without_weights() -> AbstractContextManager:
    """Modules built inside have parameters without memory; buffers (RoPE's frequencies) are computed as usual."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def fill(
    module: nn.Module,
    files: Collection[Path],
    dtype: torch.dtype,
    target: Target,
    where: str,
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Fill a module built `without_weights` from safetensors files: every tensor of its state_dict, and no other.

    dtype: what the weights are loaded in, before the target's cast. rename: the file's name of a tensor -> the module's,
    None: not read. UserError beginning with `where`: before any weight is read where a key is missing, unexpected,
    duplicate or of a wrong shape; for a tensor that is not floating point when it is reached.
    """
    wanted = module.state_dict()
    sources: dict[str, tuple[Path, str]] = {}
    problems: dict[str, list[str]] = {"missing key": [], "unexpected key": [], "wrong shape": [], "key twice": []}
    for file in files:
        for key, shape in shapes(file).items():
            name = rename(key)
            if name is None:
                continue
            if name not in wanted:
                problems["unexpected key"].append(key)
            elif name in sources:
                problems["key twice"].append(key)
            elif shape != tuple(wanted[name].shape):
                problems["wrong shape"].append(key)
            sources.setdefault(name, (file, key))
    problems["missing key"] = sorted(set(wanted) - set(sources))
    refuse(where, type(module), problems)
    names = {source: name for name, source in sources.items()}
    window = math.inf if target.mapped else WINDOW
    for file in files:
        for key, tensor in tensors(file, [key for at, key in names if at == file], window):
            if not tensor.is_floating_point():
                raise UserError(f"{where}: {key} is stored as {tensor.dtype}; quantized weights are not read")
            _register(module, names[file, key], tensor, dtype, target)


def _register(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, target: Target) -> None:
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    placed, sample = target.place(tensor, dtype)
    if isinstance(getattr(part, leaf), nn.Parameter):
        parameter = nn.Parameter(placed, requires_grad=getattr(part, leaf).requires_grad)
        target.samples[parameter] = sample
        setattr(part, leaf, parameter)
    else:
        setattr(part, leaf, placed)


def refuse(where: str, cls: type, problems: dict[str, list[str]]) -> None:
    """UserError of one line unless every list of keys is empty. problems: what is wrong -> the keys it concerns."""
    found = [f"{what} {some(sorted(keys))}" for what, keys in problems.items() if keys]
    if found:
        raise UserError(
            f"{where}: {'; '.join(found)}; the files do not belong to a {cls.__name__} of their config.json"
        )


def some(items: Collection[str], most: int = 3) -> str:
    """The first few of many, for a message."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
