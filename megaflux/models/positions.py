"""Positions and masks of Qwen2-VL's chat turns and image patches."""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_position_ids(length: int, image_start: int, grid: tuple[int, int] | None) -> Tensor:
    """Positions of one turn with at most one image: (3, length) int64. grid: its rows and columns of image tokens.

    Text counts up on all three axes; image tokens share one time step and count rows and columns from it; the text
    after them continues from the largest position used (Qwen2-VL, 2409.12191, section 2.1).
    """
    positions = torch.arange(length).expand(3, length).clone()
    if grid is not None:
        rows, columns = grid
        end = image_start + rows * columns
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[0, image_start:end] = image_start
        positions[1, image_start:end] = image_start + row.flatten()
        positions[2, image_start:end] = image_start + column.flatten()
        positions[:, end:] = torch.arange(length - end) + image_start + max(rows, columns)
    return positions


def patch_positions(rows: int, columns: int, merge: int) -> Tensor:
    """(rows x columns, 2) int64: row and column of each patch of an image in the order of Qwen2-VL's ViT, which puts the
    merge x merge patches of one image token next to each other."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    blocks = (side.unflatten(1, (-1, merge)).unflatten(0, (-1, merge)).transpose(1, 2) for side in (row, column))
    return torch.stack([block.flatten() for block in blocks], dim=-1)


def causal_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What Qwen's decoder adds to the scores of turns padded on the right: (B, 1, S, S) of 0 and -inf; None: no padding.

    attention_mask: (B, S), 0 at the padding. transformers would make the same mask of it, but asks the GPU first whether
    there is any padding, and waits for the answer.
    """
    if attention_mask is None:
        return None
    S = attention_mask.shape[1]
    visible = attention_mask.new_ones(S, S, dtype=torch.bool).tril() & attention_mask.bool()[:, None, None, :]
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def length_mask(lengths: list[int]) -> Tensor:
    """(B, longest) bool: True at the first lengths[b] places of row b."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
