"""GridDot: dots mark what matters in a reference. Dots -> a weight per token -> a log-bias per attention key.

Token (j, k) of a reference's H x W grid is centred at ((k + .5) / W, (j + .5) / H) of the picture. With the background
bg, the dots' weights w_i and f_i = max(0, 1 - d / (r_i min(pw, ph))), where d is the distance from the dot's centre in
pixels of the encoder's pw x ph input, the weight of a token is

    w = max(0, bg + max_{w_i >= bg} f_i (w_i - bg) - max_{w_i < bg} f_i (bg - w_i))

and attention adds log w to the scores of its key. FLUX gives all condition tokens the same position, so w = 1 changes
nothing, w = 2 equals the token given twice, and w = 0 equals the token left out (and it is left out). The dot tool of
Qwen2VL-Flux multiplies tokens before a biased linear instead: there, too, w = 1 changes nothing, but w = 2 is another token,
and w = 0 leaves the linear's bias as a token, which keeps its share of the attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.generation.dots.dots import Dot


def token_weights(dots: Sequence[Dot], grid: tuple[int, int], background: float = 1.0) -> Tensor:
    """(H, W) float64: the weight of each token, at least 0. grid: (H, W), rows and columns of square tokens."""
    rows, columns = grid
    y = (torch.arange(rows, dtype=torch.float64) + 0.5)[:, None]
    x = (torch.arange(columns, dtype=torch.float64) + 0.5)[None, :]
    up, down = torch.zeros(rows, columns, dtype=torch.float64), torch.zeros(rows, columns, dtype=torch.float64)
    for dot in dots:  # distances in tokens, which are square
        distance = ((x - dot.x * columns) ** 2 + (y - dot.y * rows) ** 2).sqrt()
        f = (1 - distance / (dot.radius * min(rows, columns))).clamp_min(0)
        if dot.weight >= background:
            up = torch.maximum(up, f * (dot.weight - background))
        else:
            down = torch.maximum(down, f * (background - dot.weight))
    return (background + up - down).clamp_min(0)


def drop(weights: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`weights` with a random fraction `share` (below 1) of its positive entries, rounded down, set to 0.

    At least one entry stays positive.
    """
    kept = weights.flatten().nonzero().flatten()
    gone = kept[torch.randperm(len(kept), generator=generator)[: int(share * len(kept))]]
    dropped = weights.flatten().clone()
    dropped[gone] = 0
    return dropped.view_as(weights)


def preserve_mass(weights: Tensor) -> Tensor:
    """The weights scaled to a mean of 1: w n / sum(w)."""
    return weights * (weights.numel() / weights.sum())


def check_weights(weights: Tensor, name: str = "reference") -> Tensor:
    """The weights. UserError if none is above 0."""
    if not (weights > 0).any():
        raise UserError(f"{name}: its dots leave no token; widen a dot, raise a weight or the background")
    return weights
