"""The weights that come with this package, under the name `tiny`: a VAE and a Qwen2-VL. docs/tiny-assets.md has their making."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHIPPED = "tiny"
"""`model.vae` and `model.vlm` of the shipped weights; a folder of that name is ./tiny."""
ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
VLM = ASSETS / "vlm"
_OF_SEEDS = ("initializer_range", "qk_bias_std")  # say how weights are drawn, not what they compute


def vlm_sizes() -> dict[str, Any]:
    """`model.vlm_config` of the shipped Qwen2-VL, without what only says how weights are drawn."""
    return json.loads((VLM / "sizes.json").read_text())


def vlm_problem(vlm_config: dict[str, Any]) -> str | None:
    """Why the shipped Qwen2-VL is not one of this `model.vlm_config`, one line with the remedy; None: it is."""
    for path, given, shipped in _pairs(vlm_config, vlm_sizes(), "model.vlm_config"):
        if given != shipped:
            return (
                f"{path}: {_shown(given)}, but the shipped Qwen2-VL (model.vlm: {SHIPPED}) has {_shown(shipped)}; leave "
                "vlm_config as the preset has it, or give --model.vlm null for weights drawn from the seed"
            )
    return None


def _pairs(given: Any, shipped: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(path, value, shipped value) of each field of either; a field that is missing is transformers' default."""
    if not isinstance(given, dict) or not isinstance(shipped, dict):
        yield path, given, shipped
        return
    for name in dict.fromkeys((*shipped, *given)):
        if name not in _OF_SEEDS:
            yield from _pairs(given.get(name), shipped.get(name), f"{path}.{name}")


def _shown(value: Any) -> str:
    return "transformers' default" if value is None else str(value)
