"""Lengths of one picture's sequences: FLUX's image tokens, Qwen2-VL's condition tokens, chat turn and patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megaflux.models.latents import TOKEN_PIXELS

TURN_PREFIX = 15  # tokens of Qwen2-VL's chat template before the image


@dataclass(frozen=True)
class Tokens:
    """Lengths of the sequences of one picture of a bucket with its references."""

    image: int
    """L, FLUX's image tokens of 16 x 16 px."""
    condition: int
    """T, image tokens of Qwen2-VL, of all turns."""
    turn: int
    """S, those of one turn with the chat template before them."""
    patches: int
    """P, patches of the ViT of one turn."""
    turns: int = 1
    """R, chat turns: one for each reference."""


def count_tokens(
    height: int, width: int, max_tokens: int = 512, patch: int = 14, merge: int = 2, references: int = 1
) -> Tokens:
    """Lengths for a picture of height x width px with so many references of its own size. max_tokens: most image tokens of Qwen2-VL
    a reference; patch: side of a ViT patch, px; merge: side of one image token, patches."""
    rows, columns = condition_grid(height, width, max_tokens, patch * merge)
    image = (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    seen = rows * columns
    return Tokens(image, seen * references, seen + TURN_PREFIX, seen * merge**2, references)


def condition_grid(height: int, width: int, max_tokens: int, cell: int = 28, min_tokens: int = 4) -> tuple[int, int]:
    """Rows and columns of image tokens of a reference of height x width px: Qwen2-VL's `smart_resize` to
    multiples of `cell` px, between min_tokens and max_tokens tokens."""
    rows, columns = round(height / cell), round(width / cell)  # 0 below half a cell: it grows
    if rows * columns > max_tokens:
        shrink = math.sqrt(height * width / (max_tokens * cell**2))
        rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
    elif rows * columns < min_tokens:
        grow = math.sqrt(min_tokens * cell**2 / (height * width))
        rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
    return rows, columns
