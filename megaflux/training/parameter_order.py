"""The order of parameters in the optimizer's groups. A leaf: benches import it without a run's configuration."""

from __future__ import annotations

import re


def products_together(names: list[str]) -> list[str]:
    """Parameter names reordered so that a block's q, k and v weights are adjacent, and so are their biases. ZeRO lays out
    parameters in one buffer in the order of their group, and adjacent weights need no copy to be one matrix product
    (models.flux_functions)."""
    place: dict[str, int] = {}
    keys = []
    for i, name in enumerate(names):
        found = re.fullmatch(r"(.+\.attn\.)(to_[qkv]|add_[qkv]_proj)\.(weight|bias)", name)
        if found:
            first = place.setdefault(found[1] + found[2][:2], i)
            keys.append((first, found[3] == "bias", i))
        else:
            keys.append((i, False, i))
    return [name for _, name in sorted(zip(keys, names, strict=True))]
