"""Where the picture looked: the attention mass that its tokens put on each token of the condition.

Only a run that asks pays for it: each block's softmax is computed a second time, in slices, beside the attention that
gives the picture, which is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.models.flux import all_blocks, is_fused

SLICE = 2**24  # scores computed at a time: 64 MB in float32


class AttentionMass:
    """Collects, over blocks and steps, the mean over heads and picture tokens of softmax(q k^T / sqrt(D) + bias)."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """q, k: (B, H, S, D), the condition's tokens first; bias: (B, S) or None."""
        T, scale = self.num_tokens, q.shape[-1] ** -0.5
        queries, (B, H, S, _) = q[:, :, T:], k.shape
        rows = max(1, SLICE // (B * H * S))
        mass = torch.zeros(B, T, dtype=torch.float32, device=q.device)
        for start in range(0, queries.shape[2], rows):
            scores = (queries[:, :, start : start + rows].float() * scale) @ k.float().transpose(-1, -2)
            if bias is not None:
                scores = scores + bias[:, None, None].float()
            mass += scores.softmax(-1)[..., :T].sum((1, 2))
        mass /= H * queries.shape[2]
        self.total = mass if self.total is None else self.total + mass
        self.count += 1

    @property
    def mean(self) -> Tensor:
        """(B, T) float32: of all that a picture token attends to, the share on each condition token."""
        return self.total / self.count


@contextmanager
def attention_mass(transformer, num_tokens: int) -> Iterator[AttentionMass]:
    """Collect while inside. UserError on diffusers' own path, which shows no q and k."""
    if not is_fused(transformer):
        raise UserError(
            "attention map: needs megaflux's own path; leave out --kernels off, --quantize and sequential offload"
        )
    mass, blocks = AttentionMass(num_tokens), all_blocks(transformer)
    try:
        for block in blocks:
            block.attention_probe = mass
        yield mass
    finally:
        for block in blocks:
            del block.attention_probe
