"""Qwen2-VL cut into a frozen trunk and a trainable tail, and joined again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from transformers import Qwen2VLModel, Qwen2VLTextModel


def split_vlm(vlm: Qwen2VLModel) -> tuple[Qwen2VLModel, Qwen2VLTextModel]:
    """Cut a Qwen2-VL into (trunk, tail): all layers but the last, without final norm; the last layer and the norm.

    Both keep transformers' own classes and forward: the trunk is the given model with its last layer taken off, the
    tail a Qwen2VLTextModel of one layer without token embeddings. Uses up the given model.
    """
    text = vlm.language_model
    config = copy.deepcopy(text.config)
    config.num_hidden_layers = 1
    config.layer_types = [text.config.layer_types[-1]]
    with torch.device("meta"):
        tail = type(text)(config)
    tail.embed_tokens = None
    tail.layers = nn.ModuleList([text.layers[-1]])
    tail.layers[0].self_attn.layer_idx = 0
    tail.norm = text.norm
    tail.rotary_emb = copy.deepcopy(text.rotary_emb)
    text.layers = text.layers[:-1]
    text.norm = nn.Identity()
    vlm.requires_grad_(False).eval()
    return vlm, tail


def join_vlm(trunk_model: Qwen2VLModel, tail: Qwen2VLTextModel) -> Qwen2VLModel:
    """The inverse of `split_vlm`: the trunk with the tail's layer and norm in their places.

    Uses up both parts: the trunk now gives another output, so its holder must not encode with it any more.
    """
    text = trunk_model.language_model
    layer: Any = tail.layers[0]
    layer.self_attn.layer_idx = len(text.layers)
    text.layers.append(layer)
    defer_norm(tail, False)
    text.norm = tail.norm
    return trunk_model


def defer_norm(tail: Qwen2VLTextModel, defer: bool) -> None:
    """Skip the tail's final norm, because the connector's kernel applies it, or apply it in the tail again. The norm
    keeps its place and its weight."""
    if defer:
        vars(tail.norm)["forward"] = _unchanged
    else:
        vars(tail.norm).pop("forward", None)


def _unchanged(hidden_states: Tensor) -> Tensor:
    return hidden_states
