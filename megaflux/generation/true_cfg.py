"""True classifier-free guidance: two velocities at each step, of the condition and of a negative one.

    v = v_negative + scale (v_condition - v_negative)

as diffusers' FluxPipeline combines them (`true_cfg_scale`; Ho and Salimans, arXiv 2207.12598, equation 6). Its own pipelines
refuse conditions of unequal length, give both passes one key mask, and two of them, the ControlNet pipelines that begin at a
picture, have no such scale. So FLUX is given a forward that runs twice: all pipelines have it alike, and each pass has its own
tokens, ids and mask. As in FluxControlNetPipeline, both passes add what the ControlNet makes of the condition; the negative
one is not shown to it.

Shapes: B batch, T condition tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.generation.condition import Encoded, PromptEmbeds, caption_notes, encode, prompt_embeds
from megaflux.generation.dots.attention_map import unobserved
from megaflux.generation.dots.dots import NEUTRAL
from megaflux.generation.layout import Settings
from megaflux.generation.request import EMPTY_UNSEEN, ConditionRequest
from megaflux.models.pretrained import Models
from megaflux.models.replacing import forward_replaced


@dataclass(frozen=True)
class TrueCfg:
    """What true guidance needs beside the condition."""

    scale: float
    """How far to go from the negative condition's velocity to the condition's; 1 would be the condition alone."""
    negative: PromptEmbeds
    """B = 1: the negative condition, the same for every picture."""


@torch.no_grad()
def encode_negative(
    models: Models, settings: Settings, prompt: str, text_encoder: str, embedded: bool
) -> tuple[PromptEmbeds, list[str]]:
    """(the negative condition, notes): of a prompt alone, read as in mode text; of "" or blanks, the empty condition, which
    training draws with the probability data.condition.none and Qwen2-VL reads for weights with T5 as well.

    embedded: as for `encode`. UserError for T5 where the weights have none.
    """
    if models.trunk.caption_tokens(prompt):
        encoded = encode(models, settings.longest_side, ConditionRequest((), prompt, NEUTRAL, text_encoder), embedded)
        notes = [f"negative {note}" for note in (*encoded.notes, *caption_notes(encoded, settings.modes))]
    else:
        empty = models.trainable.encode_condition(models.trunk.empty(1), embedded)
        encoded, notes = Encoded([], empty, None, embedded), []
        if "none" not in settings.modes:
            notes.append(EMPTY_UNSEEN)
    return prompt_embeds(encoded, NEUTRAL, 0, _linear(models)), notes


def _linear(models: Models) -> nn.Linear | None:
    return None if models.t5 is None else models.t5.embedder


Embedding = Callable[[], AbstractContextManager[None]]
"""Inside its context, FLUX's context_embedder reads the tokens of one condition."""


@contextmanager
def guided(
    transformer: FluxTransformer2DModel,
    scale: float,
    negative: dict[str, Any],
    condition_embedding: Embedding,
    negative_embedding: Embedding,
) -> Iterator[None]:
    """Inside, a call of the transformer returns v_negative + scale (v_condition - v_negative).

    negative: the keyword arguments that differ for the negative condition. The call's own are the condition's; it has to be
    by keywords, with return_dict=False, as diffusers' pipelines do it.
    """

    def make(forward: Callable[..., tuple[Tensor]]) -> Callable[..., tuple[Tensor]]:
        def both(**given: Any) -> tuple[Tensor]:
            with condition_embedding():
                towards = forward(**given)[0]
            with negative_embedding(), unobserved(transformer):
                away = forward(**given | negative)[0]
            return (away + scale * (towards - away),)

        return both

    with forward_replaced(transformer, make):
        yield
