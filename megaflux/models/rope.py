"""FLUX's RoPE tables, computed once per shape."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn


class Rope:
    """FLUX's cosines and sines (S, D) of position ids, computed once per pair of ids tensors.

    Tensors are recognized by identity and version: a caller that keeps its ids (diffusers' pipelines over their steps,
    latents.image_ids by size) has its table computed once. Comparing values would wait for the GPU.
    """

    KEPT = 32  # tables: sizes of pictures times lengths of conditions

    def __init__(self, pos_embed: nn.Module):
        self.pos_embed = pos_embed
        self.tables: dict[tuple, tuple[list[weakref.ref], tuple[Tensor, Tensor]]] = {}

    def __call__(self, txt_ids: Tensor, img_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(T, 3) and (L, 3) -> two (T + L, D), float32."""
        ids = txt_ids, img_ids
        if any(part.is_inference() for part in ids):  # they have no versions, so a change would go unnoticed
            return self.pos_embed(torch.cat(ids))
        key = tuple((id(part), part._version) for part in ids)
        if key in self.tables:
            refs, table = self.tables[key]
            if all(ref() is part for ref, part in zip(refs, ids, strict=True)):  # else the address was used again
                return table
        with torch.inference_mode(False), torch.no_grad():
            table = self.pos_embed(torch.cat(ids))
        self.tables[key] = [weakref.ref(part) for part in ids], table
        if len(self.tables) > self.KEPT:
            self.tables.pop(next(iter(self.tables)))
        return table
