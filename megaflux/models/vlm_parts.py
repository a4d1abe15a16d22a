"""Qwen2-VL cut into a frozen trunk and a trainable tail, and joined again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megaflux.common.errors import UserError

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from transformers import Qwen2VLModel, Qwen2VLTextModel


def split_vlm(vlm: Qwen2VLModel, layers: int = 1) -> tuple[Qwen2VLModel, Qwen2VLTextModel]:
    """Cut a Qwen2-VL into (trunk, tail): all layers but the last ones, without final norm; the last ones and the norm.

    Both keep transformers' own classes and forward: the trunk is the given model with its last layers taken off, the
    tail a Qwen2VLTextModel of these without token embeddings. layers: how many, 0 to all; UserError for more than there are.
    Uses up the given model.
    """
    text = vlm.language_model
    cut = len(text.layers) - layers
    if cut < 0:
        raise UserError(
            f"model.vlm_layers: {layers} of Qwen2-VL's last layers, but it has {len(text.layers)}; lower it"
        )
    config = copy.deepcopy(text.config)
    config.num_hidden_layers = layers
    config.layer_types = text.config.layer_types[cut:]
    with torch.device("meta"):
        tail = type(text)(config)
    tail.embed_tokens = None
    tail.layers = nn.ModuleList(text.layers[cut:])
    _number(tail.layers, 0)
    tail.norm = text.norm
    tail.rotary_emb = copy.deepcopy(text.rotary_emb)
    text.layers = text.layers[:cut]
    text.norm = nn.Identity()
    vlm.requires_grad_(False).eval()
    return vlm, tail


def join_vlm(trunk_model: Qwen2VLModel, tail: Qwen2VLTextModel) -> Qwen2VLModel:
    """The inverse of `split_vlm`: the trunk with the tail's layers and norm in their places.

    Uses up both parts: the trunk now gives another output, so its holder must not encode with it any more.
    """
    text = trunk_model.language_model
    _number(tail.layers, len(text.layers))
    text.layers.extend(tail.layers)
    defer_norm(tail, False)
    text.norm = tail.norm
    return trunk_model


def _number(layers: Any, start: int) -> None:
    for index, layer in enumerate(layers, start):
        layer.self_attn.layer_idx = index


def defer_norm(tail: Qwen2VLTextModel, defer: bool) -> None:
    """Skip the tail's final norm, because the connector's kernel applies it, or apply it in the tail again. The norm
    keeps its place and its weight."""
    if defer:
        vars(tail.norm)["forward"] = _unchanged
    else:
        vars(tail.norm).pop("forward", None)


def _unchanged(hidden_states: Tensor) -> Tensor:
    return hidden_states
