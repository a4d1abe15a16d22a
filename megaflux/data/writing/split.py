"""Which items are kept from training: a draw by hash of each item's split key."""

from __future__ import annotations

import hashlib

DRAWS = 2**64


def draw(split_key: str) -> int:
    """A number in [0, DRAWS) that depends on the split key only: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(split_key.encode()).digest()[:8], "big")


def is_held_out(split_key: str, fraction: float) -> bool:
    """Whether items with this split key are kept from training.

    A larger fraction holds out the items of a smaller one, and more.
    """
    return draw(split_key) < fraction * DRAWS
