"""Tensors side by side in memory, so that one product of several layers or gradients needs no copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def linears(*layers: nn.Linear) -> list[Tensor]:
    """Weights, then biases, of the layers of one product."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors joined along their first dimension: a view where they lie side by side in memory (`pack`), else a
    copy."""
    if not side_by_side(tensors):
        return torch.cat(list(tensors))
    first = tensors[0].detach()
    size = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors fill one stretch of one storage, in order. False under torch.compile, which sees no storage."""
    if torch.compiler.is_compiling():
        return False
    first, offset = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage()._cdata
    for tensor in tensors:
        same = tensor.untyped_storage()._cdata == storage and tensor.dtype == first.dtype
        if not (same and tensor.storage_offset() == offset and tensor.is_contiguous()):
            return False
        offset += tensor.numel()
    return True


@torch.inference_mode(False)  # parameters with memory made in inference mode could not be trained
@torch.no_grad()
def pack(*layers: nn.Linear) -> None:
    """Lay the layers' frozen weights side by side, and their frozen biases. Names, values and parameters stay; a
    trainable layer is left to its optimizer."""
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
    """Give a layer's frozen parameters memory of their own, once their neighbours are trainable and have moved to an
    optimizer's buffer: otherwise all of what `pack` made would be kept for one part."""
    for parameter in (layer.weight, layer.bias):
        if not parameter.requires_grad and parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


def columns(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors (..., N) as one view, where they are neighbouring columns of one tensor in this order; else None."""
    first = parts[0]
    if len(parts) == 1 or first is None or torch.compiler.is_compiling():
        return first if len(parts) == 1 else None
    offset, storage, width = first.storage_offset(), first.untyped_storage()._cdata, 0
    for part in parts:
        if part is None or part.untyped_storage()._cdata != storage or part.dtype != first.dtype:
            return None
        where = part.storage_offset(), part.stride(), part.shape[:-1]
        if where != (offset, first.stride(), first.shape[:-1]):
            return None
        offset += part.shape[-1]
        width += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), first.stride(), first.storage_offset())
