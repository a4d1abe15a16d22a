"""Tensors that lie side by side in memory, so that the layers or gradients of one product need no copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def linears(*layers: nn.Linear) -> list[Tensor]:
    """Weights, then biases, of the layers of one product."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along their first dimension as one: a view where they lie side by side in memory (`pack`), else a
    copy."""
    if not side_by_side(tensors):
        return torch.cat(list(tensors))
    first = tensors[0].detach()
    size = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors fill one stretch of one storage, in order. Never under torch.compile, which sees no storage."""
    if torch.compiler.is_compiling():
        return False
    first, offset = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage()._cdata
    for tensor in tensors:
        alike = tensor.untyped_storage()._cdata == storage and tensor.dtype == first.dtype
        if not (alike and tensor.storage_offset() == offset and tensor.is_contiguous()):
            return False
        offset += tensor.numel()
    return True


@torch.inference_mode(False)  # memory made inside it would make the parameters useless for training
@torch.no_grad()
def pack(*layers: nn.Linear) -> None:
    """Lay frozen weights, and biases, of the layers side by side, so that one product needs no copy. Names, values
    and parameters stay; a layer that trains is left to its optimizer."""
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if any(p.requires_grad for p in parameters) or side_by_side(parameters):
            continue
        joined, start = torch.cat([p.data for p in parameters]), 0
        for parameter in parameters:
            parameter.data = joined[start : start + parameter.shape[0]]
            start += parameter.shape[0]


@torch.inference_mode(False)
@torch.no_grad()
def unpack(layer: nn.Linear) -> None:
    """Give frozen parameters of a layer memory of their own, where their neighbours train and have moved to an
    optimizer's buffer: what `pack` made would else be kept whole for one part."""
    for parameter in (layer.weight, layer.bias):
        if not parameter.requires_grad and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


def columns(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors (..., N) as one, a view, where they are neighbouring columns of one tensor in this order; else None."""
    first = parts[0]
    if len(parts) == 1 or first is None or torch.compiler.is_compiling():
        return first if len(parts) == 1 else None
    offset, storage = first.storage_offset(), first.untyped_storage()._cdata
    for part in parts:
        if part is None or part.untyped_storage()._cdata != storage or part.dtype != first.dtype:
            return None
        where = part.storage_offset(), part.stride(), part.shape[:-1]
        if where != (offset, first.stride(), first.shape[:-1]):
            return None
        offset += part.shape[-1]
    size = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
    return first.as_strided(size, first.stride(), first.storage_offset())
