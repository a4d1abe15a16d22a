"""Limits of reference pictures, the same in training data and in generation, and the name of their column. Imports neither torch
nor Pillow."""

from __future__ import annotations

COLUMN = "references"
"""Of a sample's reference pictures (megaflux.data.references)."""

MAX_ASPECT = 100.0
"""Most times that one side of a reference may be the other. Qwen2-VL refuses more than 200 of the resized picture, and rounding
to whole tokens can double a ratio."""


def reference_size(size: tuple[int, int], longest_side: int) -> tuple[int, int]:
    """(width, height) in px at which a reference of that size goes to Qwen2-VL's processor: scaled down to the longest side of
    training, never up."""
    scale = longest_side / max(size)
    if scale >= 1:
        return size
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height
