"""Attention maps: how much attention a generated picture's tokens give to each token of the condition.

Inside `attention_mass`, each block's softmax is computed a second time, in slices; the attention that makes the picture
is not changed, and calls without a map cost nothing extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.common.errors import UserError
from megaflux.models.flux import all_blocks, is_fused

SLICE = 2**24  # scores computed at a time: 64 MB in float32


class AttentionMass:
    """Sums softmax(q k^T / sqrt(D) + bias), averaged over heads and picture tokens, over blocks and steps."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        """T, tokens of the condition."""
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        """Add one attention. q, k: (B, H, S, D), the condition's T tokens first; bias: (B, S) on the keys, or None."""
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
        """(B, T) float32: the fraction of a picture token's attention that each condition token gets.

        RuntimeError before the first attention."""
        if self.total is None:
            raise RuntimeError("no attention was computed yet")
        return self.total / self.count


@contextmanager
def attention_mass(transformer: FluxTransformer2DModel, num_tokens: int) -> Iterator[AttentionMass]:
    """Inside, collect the attention of all blocks. UserError on diffusers' own path, which does not expose q and k."""
    if not is_fused(transformer):
        raise UserError(
            "attention map: needs megaflux's own path; leave out --kernels off, --quantize and sequential offload"
        )
    mass, blocks = AttentionMass(num_tokens), all_blocks(transformer)
    try:
        for block in blocks:
            vars(block)["attention_probe"] = mass  # models/flux_blocks.py calls it
        yield mass
    finally:
        for block in blocks:
            del vars(block)["attention_probe"]


@contextmanager
def unobserved(transformer: FluxTransformer2DModel) -> Iterator[None]:
    """Inside, no attention is collected, also within `attention_mass`."""
    blocks = [vars(block) for block in all_blocks(transformer) if "attention_probe" in vars(block)]
    probes = [block.pop("attention_probe") for block in blocks]
    try:
        yield
    finally:
        for block, probe in zip(blocks, probes):
            block["attention_probe"] = probe
