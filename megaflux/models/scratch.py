"""Models built from nothing: published classes at a preset's sizes, with seeded weights and the shipped tokenizers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
from diffusers.models import FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorFast,
    Qwen2VLModel,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from megaflux.models.draws import Way, seeded
from megaflux.models.loading_errors import named
from megaflux.models.shipped import ASSETS

TINY = ASSETS


def build_transformer(flux_config: dict[str, Any], seed: int, way: Way = "portable") -> FluxTransformer2DModel:
    """FLUX with seeded weights, to be trained from nothing.

    proj_out is zero, so that the first velocity is 0; the AdaLN modulations are zero too, so that each block starts
    as the identity (DiT, 2212.09748, section 3.2); linears are Xavier-uniform. way: how numbers are drawn (draws.py).
    """
    with named("model.flux_config"), seeded(seed, "transformer", way):
        transformer = FluxTransformer2DModel(**flux_config)
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if name == "proj_out" or name.rpartition(".")[2] == "linear":
                    nn.init.zeros_(module.weight)
    return transformer


def build_vlm(vlm_config: dict[str, Any], seed: int, way: Way = "portable") -> tuple[Qwen2VLModel, Qwen2VLProcessor]:
    """Qwen2-VL of the given sizes with seeded random weights, and the shipped tokenizer in Qwen's format.

    `qk_bias_std` in vlm_config, the only key that is not transformers': standard deviation of the query and key biases
    of the frozen layers (transformers starts them at 0); they make attention depend on position. way: how numbers are
    drawn (draws.py).
    """
    processor = tiny_processor()
    with named("model.vlm_config"), seeded(seed, "vlm", way), torch.no_grad():
        vlm = Qwen2VLModel(vlm_configuration(vlm_config, tokenizer_of(processor)))
        for name, parameter in vlm.language_model.layers[:-1].named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                parameter.normal_(std=vlm_config.get("qk_bias_std", 0.0))
    return vlm, processor


def vlm_configuration(vlm_config: dict[str, Any], tokenizer: Any = None) -> Qwen2VLConfig:
    """Qwen2VLConfig from the two nested dicts of `model.vlm_config`; a tokenizer sets vocabulary and special ids."""
    values = copy.deepcopy(vlm_config)
    values.pop("qk_bias_std", None)
    special: dict[str, int] = {}
    if tokenizer is not None:
        values["text_config"].setdefault("vocab_size", len(tokenizer))
        names = {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }
        special = {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}
    return Qwen2VLConfig(**values, **special)


def tiny_processor() -> Qwen2VLProcessor:
    """Qwen2-VL's processor around the shipped tokenizer."""
    tokenizer = Qwen2TokenizerFast.from_pretrained(TINY / "tokenizer")
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorFast(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer, which transformers' types do not tell."""
    return processor.tokenizer


def build_clip(clip_config: dict[str, Any], seed: int, way: Way = "portable") -> tuple[CLIPTextModel, CLIPTokenizer]:
    """CLIP's text model of the given sizes with seeded random weights, and the shipped byte tokenizer.

    way: how numbers are drawn (draws.py)."""
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "clip_tokenizer")
    with named("model.clip_config"), seeded(seed, "clip", way):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **clip_config,
        )
        clip = CLIPTextModel(config).eval()
    return clip, tokenizer
