"""Matrix products of FLUX's fused blocks and their gradients, without copies where the tensors' layout allows it.

Shapes: B batch, S tokens, W width, N output features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.models.packing import columns, packed, side_by_side


def products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """x (B, S, W) times all the weights, plus biases: (B, S, N), the outputs side by side."""
    if torch.compiler.is_compiling() or (side_by_side(weights) and side_by_side(biases)):
        return F.linear(x, packed(weights), packed(biases))
    # Not side by side: one product per weight into one result costs less than joining the weights first.
    out = x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))
    parts = out.flatten(0, 1).split([weight.shape[0] for weight in weights], dim=1)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        torch.addmm(bias, x.flatten(0, 1), weight.t(), out=part)
    return out


def input_gradient(douts: Sequence[Tensor | None], groups: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """Gradient (B, S, W) of the input of products with groups of weights, from the gradients of the outputs; None where
    all of those are None."""
    weights = [weight for group in groups for weight in group]
    dout = columns(douts)
    if dout is not None and (torch.compiler.is_compiling() or side_by_side(weights)):
        return dout @ packed(weights)
    pairs: list[tuple[Tensor, Tensor]] = []
    for dout, group in zip(douts, groups, strict=True):
        if dout is None:
            continue
        if torch.compiler.is_compiling() or side_by_side(group):
            pairs.append((dout.flatten(0, 1), packed(group)))
        else:
            pairs += zip(dout.flatten(0, 1).split([weight.shape[0] for weight in group], dim=1), group, strict=True)
    if not pairs:
        return None
    dn = pairs[0][0] @ pairs[0][1]
    for part, weight in pairs[1:]:
        dn = torch.addmm(dn, part, weight, out=None if torch.compiler.is_compiling() else dn)
    shape = next(dout for dout in douts if dout is not None).shape
    return dn.view(*shape[:-1], -1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of rows x (B, L, W) of a longer tensor, without copying them: one product per sample."""
    if len(x) == 1 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for rows, part in zip(x, out):
        torch.addmm(bias, rows, weight.t(), out=part)
    return out


def product_into(dout: Tensor | None, weight: Tensor, out: Tensor) -> None:
    """out = dout @ weight, written into rows (B, L, W) of a longer tensor; zeros where dout is None."""
    if dout is None:
        out.zero_()
        return
    for rows, part in zip(dout, out):
        torch.mm(rows, weight, out=part)


def weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """(N, W): gradient of a weight from its output's gradient (B, S, N) and its input (B, S, W)."""
    return dout.flatten(0, 1).t() @ x.flatten(0, 1)


def grouped(items: Sequence, groups: Sequence) -> Iterator[Sequence]:
    """The items in consecutive parts, one per group, each as long as its group (or as its number)."""
    start = 0
    for group in groups:
        end = start + (group if isinstance(group, int) else len(group))
        yield items[start:end]
        start = end


def halves(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(weights, biases) of what `packing.linears` returned."""
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


def split(gradient: Tensor | None, rows: Sequence[int], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of parameters of so many rows each, from their joint gradient; None where not needed."""
    if gradient is None:
        return [None] * len(rows)
    return [part if need else None for part, need in zip(gradient.split(list(rows)), needs, strict=True)]
