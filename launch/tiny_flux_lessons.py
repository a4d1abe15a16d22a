"""What launch/train_tiny_flux.py learns from: pictures as latents, and what stands beside them as conditions, encoded once.

Shapes: N pictures, B samples of an update, L image tokens of C channels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.tiny_vlm_pictures import Pictures, hand_of
from launch.train_tiny_vlm import UNMIRRORED
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition

BATCH = 32
MOST_TOKENS = 12  # of a caption; the few longer ones are left out, so that batches have few shapes
PAIRS_SHARE, PICTURES_SHARE, EMPTY_SHARE = 0.6, 0.12, 0.1  # of the batches; the rest, with the empty ones, are words
REFERENCES, DRAWS = 4, 2  # pictures by the same hand beside a name, and how often they are drawn for a cell
REFERENCE_TOKENS = 9  # of each
ENCODED = 64  # samples at once


@dataclass
class Lesson:
    """Which pictures are learned from which conditions."""

    targets: list[int]
    """Rows of the latents."""
    rows: list[int]
    """Of each, its row of `conditions`."""
    conditions: Condition
    mirrored_rows: list[int] | None = None
    """The same of the mirrored pictures; None: `rows`, since neither words nor hands change by it."""


@dataclass
class Examples:
    """Pictures as the networks see them."""

    latents: Tensor
    """(N, L, C), packed."""
    mirrored: Tensor
    """The same of the mirrored pictures; as they are where the caption would not stay true."""
    words: Lesson
    pictures: Lesson
    pairs: Lesson | None
    empty: Condition
    """Of a whole batch, padded as `words`."""
    keys: list[str]


def alike(parts: Sequence[Condition]) -> Condition:
    """Conditions of as many turns each in one, padded to the longest turn and the most tokens, in bf16."""
    most, turns = max(one.hidden_states.shape[1] for one in parts), parts[0].turns
    tokens = max(one.select.shape[1] for one in parts)

    def padded(one: Condition) -> Condition:
        length = one.hidden_states.shape[1]
        more, free = most - length, tokens - one.select.shape[1]
        mask = torch.ones(one.hidden_states.shape[:2], dtype=torch.long)
        chosen = torch.ones(one.select.shape, dtype=torch.bool)
        return Condition(
            F.pad(one.hidden_states.bfloat16(), (0, 0, 0, more)),
            F.pad(one.position_ids, (0, more)),
            F.pad(one.select // length * most + one.select % length, (0, free)),  # counted over all turns
            F.pad(mask if one.attention_mask is None else one.attention_mask, (0, more)),
            F.pad(chosen if one.select_mask is None else one.select_mask, (0, free)),
            turns=turns,
        )

    rows = [padded(one) for one in parts]

    def joined(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(one, name) for one in rows], dim)

    fields = joined("hidden_states"), joined("position_ids", 1), joined("select"), joined("attention_mask")
    return Condition(*fields, joined("select_mask"), turns=turns)


def chunks(count: int) -> list[range]:
    return [range(i, min(i + ENCODED, count)) for i in range(0, count, ENCODED)]


@torch.no_grad()
def encode(models: Models, pictures: Pictures, seed: int, training: Pictures | None = None) -> Examples:
    """Latents and conditions of all pictures whose captions are short enough. training: what references are taken from; None: these
    pictures themselves."""
    trunk = models.trunk
    chosen = [i for i, text in enumerate(pictures.captions) if trunk.caption_tokens(text) <= MOST_TOKENS]
    captions, keys = [pictures.captions[i] for i in chosen], [pictures.keys[i] for i in chosen]
    pixels = torch.from_numpy(pictures.images[chosen]).permute(0, 3, 1, 2).contiguous()
    turned = [i for i, text in enumerate(captions) if not any(word in text for word in UNMIRRORED)]
    mirrored_pixels = pixels.clone()
    mirrored_pixels[turned] = pixels[turned].flip(-1)
    with torch.autocast("cpu", torch.bfloat16):
        plain, mirrored = (latent_ops.encode(models.vae, each).float() for each in (pixels, mirrored_pixels))
    texts = sorted(set(captions))
    conditions = [trunk.encode(None, [texts[i] for i in some], "text") for some in chunks(len(texts))]
    words = Lesson(list(range(len(keys))), [texts.index(text) for text in captions], alike(conditions))
    count = len(keys)
    seen = [trunk.encode(each[list(some)]) for each in (pixels, mirrored_pixels) for some in chunks(count)]
    shown = Lesson(list(range(count)), list(range(count)), alike(seen), list(range(count, 2 * count)))
    empty = alike([words.conditions.rows([0]), trunk.empty(1)]).rows([1] * BATCH)
    return Examples(
        latent_ops.pack(plain),
        latent_ops.pack(mirrored),
        words,
        shown,
        pairs_of(models, captions, keys, pictures if training is None else training, seed),
        empty,
        keys,
    )


def pairs_of(models: Models, captions: list[str], keys: list[str], shown: Pictures, seed: int) -> Lesson | None:
    """Each cell of the grid from its name and REFERENCES other cells by the same hand, DRAWS times; None: there is no grid."""
    targets = [i for i, key in enumerate(keys) if key.startswith("grid ") for _ in range(DRAWS)]
    if not targets:
        return None
    draw, of_hand = random.Random(seed), dict[str, list[int]]()
    for j, key in enumerate(shown.keys):
        if key.startswith("grid "):
            of_hand.setdefault(hand_of(key), []).append(j)
    references = [
        draw.sample([j for j in of_hand[hand_of(keys[i])] if shown.keys[j] != keys[i]], REFERENCES) for i in targets
    ]
    parts = [
        models.trunk.encode_references(
            [[torch.from_numpy(shown.images[j]).permute(2, 0, 1) for j in references[k]] for k in some],
            [captions[targets[k]] for k in some],
            "image_text",
            limits=(4, REFERENCE_TOKENS),
        )
        for some in chunks(len(targets))
    ]
    return Lesson(targets, list(range(len(targets))), alike(parts))


def drawn_lesson(examples: Examples, u: float) -> Lesson:
    """The lesson of an update by a number of [0, 1); above 1 - EMPTY_SHARE the condition is left empty."""
    if u < PICTURES_SHARE:
        return examples.pictures
    return examples.pairs if examples.pairs and u < PICTURES_SHARE + PAIRS_SHARE else examples.words


def batch_of(examples: Examples, lesson: Lesson, chosen: Sequence[int], mirror: Tensor) -> tuple[Tensor, Condition]:
    """Latents (B, L, C) and conditions of the chosen samples; mirror: of each, bool (B,)."""
    targets = [lesson.targets[i] for i in chosen]
    x = torch.where(mirror[:, None, None], examples.mirrored[targets], examples.latents[targets])
    sides = lesson.rows, lesson.mirrored_rows or lesson.rows
    return x, lesson.conditions.rows([sides[turned][i] for i, turned in zip(chosen, mirror.tolist(), strict=True)])
