"""The weights that come with this package, under the name `tiny`: VAEs, a Qwen2-VL, and the FLUX, connector and
last Qwen layer that a tiny run may begin with. docs/tiny-assets.md has their making."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflux.common.paths import SHIPPED, SHIPPED_ICONS

ASSETS = Path(__file__).parent.parent / "assets" / "tiny"
VAES = {SHIPPED: ASSETS / "vae", SHIPPED_ICONS: ASSETS / "vae-icons"}
"""By `model.vae`; the second is the first, trained further on five icon sets."""
VLM = ASSETS / "vlm"
START = ASSETS / "start"
"""FLUX, connector and Qwen layers (`model.init`): model.safetensors, by the names of `models.parameters.beginnings`."""
START_WEIGHTS = START / "model.safetensors"
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


def start_sizes() -> dict[str, Any]:
    """`model.flux_config` of the shipped FLUX."""
    return json.loads((START / "sizes.json").read_text())


def start_problem(model: Any) -> str | None:
    """Why a configuration's `model` section cannot begin from the shipped FLUX, one line with the remedy; None: it can."""
    for field, wanted in (("flux", None), ("vlm", SHIPPED), ("vae", SHIPPED_ICONS)):
        if (given := getattr(model, field)) != wanted:
            return (
                f"model.init: {SHIPPED} was trained with model.{field} {wanted or 'null'}, but model.{field} is "
                f"{given or 'null'}; give --model.{field} {wanted or 'null'}, or --model.init null"
            )
    for path, given, shipped in _pairs(model.flux_config, start_sizes(), "model.flux_config"):
        if given != shipped:
            return (
                f"{path}: {_shown(given)}, but the shipped FLUX (model.init: {SHIPPED}) has {_shown(shipped)}; leave flux_config "
                "as the preset has it, or give --model.init null for weights drawn from the seed"
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
    return "the library's default" if value is None else str(value)
