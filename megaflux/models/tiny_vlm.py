"""The shipped Qwen2-VL (`model.vlm: tiny`), which launch/train_tiny_vlm.py trained; docs/tiny-assets.md has its figures."""

from __future__ import annotations

from typing import Any

import torch

from megaflux.common import compat  # noqa: F401  (before transformers)

from transformers import Qwen2VLModel, Qwen2VLProcessor  # isort: skip  (after compat)

from megaflux.models.loading_errors import named
from megaflux.models.reading import Target, fill, without_weights
from megaflux.models.scratch import tiny_processor, tokenizer_of, vlm_configuration
from megaflux.models.shipped import VLM


def load_tiny_vlm(
    vlm_config: dict[str, Any],
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    target: Target | None = None,
) -> tuple[Qwen2VLModel, Qwen2VLProcessor]:
    """The shipped Qwen2-VL and its processor, as pretrained.load_vlm loads a folder's. vlm_config: that of the shipped one
    (shipped.vlm_problem)."""
    processor = tiny_processor()
    with named("model.vlm_config"):
        config = vlm_configuration(vlm_config, tokenizer_of(processor))
        config._attn_implementation = attention
        with without_weights():
            vlm = Qwen2VLModel(config)
        fill(vlm, [VLM / "model.safetensors"], dtype, target or Target(), str(VLM))
    return vlm.eval(), processor
