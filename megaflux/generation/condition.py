"""References and a prompt -> what FLUX is conditioned on: tokens and a log-bias for each.

Each reference is encoded alone, so another one beside it changes none of its tokens. Its weights (dots, strength,
variety) become a bias on attention's keys; tokens of weight 0 are taken out, which is the same.

Shapes: B batch, T condition tokens, n = H W tokens of a reference, C the tokens' width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.generation.dots import griddot
from megaflux.generation.dots.dots import NEUTRAL, Dot, Weighting, check_weighting
from megaflux.generation.inputs import reference_tensor
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition

T5_IMAGE_TOKENS = 256  # of a reference beside a T5 prompt, in the released weights


@dataclass(frozen=True)
class Reference:
    """One reference picture: any PIL picture, how much it counts beside others and the prompt, and its dots."""

    image: Image.Image
    strength: float = 1.0
    """Factor of all its tokens' weights: above 0; 1 is as trained."""
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class ReferenceTokens:
    """A reference past Qwen2-VL and the connector."""

    hidden_states: Tensor
    """(1, n, C)"""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    weights: Tensor
    """(H, W) float64, of the dots alone."""
    strength: float


@dataclass(frozen=True)
class Encoded:
    """Everything that the seed does not change."""

    references: list[ReferenceTokens]
    text: Tensor | None
    """(1, m, C): the caption's tokens out of Qwen2-VL."""
    t5: Tensor | None
    """(1, 256, J): T5's tokens; they pass a linear of their own, after the others."""
    embedded: bool
    """Whether the tokens are past FLUX's context_embedder."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens each part has, for people."""
        counts = {f"reference {i}": part.hidden_states.shape[1] for i, part in enumerate(self.references, start=1)}
        return counts | {
            name: part.shape[1] for name, part in (("prompt", self.text), ("T5", self.t5)) if part is not None
        }


@dataclass(frozen=True)
class PromptEmbeds:
    """What diffusers calls prompt_embeds, for a batch, and what attention must know of it."""

    prompt_embeds: Tensor
    """(B, T, C)"""
    bias: Tensor | None
    """(B, T) float64 log-weight of each token; None: all weights are 1."""
    embedded: bool
    num_own_tokens: int
    """Tokens of Qwen2-VL; those after them are T5's."""

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """A batch of conditions of equal length."""
        first = parts[0]
        bias = None
        if any(part.bias is not None for part in parts):
            bias = torch.cat(
                [
                    part.prompt_embeds.new_zeros(part.prompt_embeds.shape[:2], dtype=torch.float64)
                    if part.bias is None
                    else part.bias
                    for part in parts
                ]
            )
        tokens = torch.cat([part.prompt_embeds for part in parts])
        return PromptEmbeds(tokens, bias, first.embedded, first.num_own_tokens)

    def attention_bias(self, num_image_tokens: int, dtype: torch.dtype) -> Tensor | None:
        """diffusers' attention_mask: (B, 1, 1, T + num_image_tokens), 0 on the picture's own keys. None: no bias."""
        if self.bias is None:
            return None
        return F.pad(self.bias, (0, num_image_tokens))[:, None, None].to(dtype)


@torch.no_grad()
def encode(
    models: Models,
    longest_side: int,
    references: Sequence[Reference],
    prompt: str = "",
    text_encoder: str = "qwen",
    weighting: Weighting = NEUTRAL,
    embedded: bool = False,
    reference_tokens: int | None = None,
) -> Encoded:
    """Run Qwen2-VL (and T5) once. prompt: "" for none; text_encoder: qwen or t5, which reads the prompt;
    reference_tokens: most tokens of a reference (None: as trained). UserError for what cannot be."""
    trunk, model = models.trunk, models.trainable
    check_weighting(weighting)
    qwen_prompt, t5, notes = prompt, None, []
    limits = None
    if text_encoder == "t5" and prompt:
        if models.t5 is None:
            raise UserError(
                "text encoder t5: these weights have no T5; use qwen, or weights of python -m megaflux.convert"
            )
        qwen_prompt, t5 = "", models.t5.encode([prompt])
        limits = t5_limits(trunk)
        notes += models.t5.notes(prompt)
    if reference_tokens is not None:
        if reference_tokens < 4:
            raise UserError(f"reference tokens: {reference_tokens}; use at least 4")
        limits = (min(reference_tokens, trunk.min_image_tokens), reference_tokens)
    count = trunk.caption_tokens(qwen_prompt) if qwen_prompt else 0
    if count > trunk.max_caption_tokens:
        notes.append(f"prompt: {count} tokens, cut to the first {trunk.max_caption_tokens}")

    if references and weighting.background != 1 and not any(reference.dots for reference in references):
        raise UserError(f"background: {weighting.background:g} without a dot; give a reference dots, or a strength")

    text, encoded = None, []
    if not references and t5 is None:
        if not count:
            raise UserError("neither a reference nor a prompt; give at least one of them")
        text = model.encode_condition(trunk.encode(None, [qwen_prompt], "text"), embedded)
    for number, reference in enumerate(references, start=1):
        name = "reference" if len(references) == 1 else f"reference {number}"
        if not 0 < reference.strength < math.inf:
            raise UserError(f"{name}: strength {reference.strength}; use a number above 0, or leave it out")
        pixel_values, said = reference_tensor(reference.image, longest_side, name)
        notes += said
        condition, grid = reference_condition(trunk, pixel_values, qwen_prompt if count else "", limits)
        tokens = model.encode_condition(condition, embedded)
        own, caption = tokens.split([math.prod(grid), tokens.shape[1] - math.prod(grid)], dim=1)
        if caption.shape[1] and text is None:
            text = caption
        own, grid = downsampled(own, grid, weighting.downsample)
        weights = griddot.token_weights(reference.dots, grid, weighting.background if reference.dots else 1.0)
        griddot.check_weights(weights, name)
        encoded.append(ReferenceTokens(own, grid, weights, reference.strength))
    return Encoded(encoded, text, t5, embedded, notes)


def t5_limits(trunk) -> tuple[int, int]:
    """(fewest, most) tokens of a reference beside T5's."""
    return min(T5_IMAGE_TOKENS, trunk.min_image_tokens), T5_IMAGE_TOKENS


def reference_condition(
    trunk, pixel_values: Tensor, prompt: str = "", limits: tuple[int, int] | None = None
) -> tuple[Condition, tuple[int, int]]:
    """(Condition of one picture (uint8 (1, 3, H, W)) and perhaps a prompt, its token grid): training's own."""
    mode = "image_text" if prompt else "image"
    condition = trunk.encode(pixel_values, [prompt] if prompt else None, mode, limits)
    return condition, trunk.grid(*pixel_values.shape[-2:], limits)


def downsampled(tokens: Tensor, grid: tuple[int, int], factor: int) -> tuple[Tensor, tuple[int, int]]:
    """Tokens (1, H W, C) averaged over `factor` rows and columns, and their grid; 1: as they are.

    What follows the norm is linear, so the average here is the linear's result of averaged tokens."""
    if factor == 1:
        return tokens, grid
    rows, columns = (-(-side // factor) for side in grid)
    plane = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, H W, C) -> (1, C, H, W)
    pooled = F.adaptive_avg_pool2d(plane, (rows, columns))
    return pooled.flatten(2).transpose(1, 2), (rows, columns)


@torch.no_grad()
def prompt_embeds(encoded: Encoded, weighting: Weighting, seed: int, t5_embedder=None) -> PromptEmbeds:
    """The condition of one seed (batch 1): `variety` drops tokens by it. t5_embedder: T5's linear, applied here
    where the other tokens are embedded already."""
    weights, tokens = [], []
    for number, reference in enumerate(encoded.references):
        w = token_weights(reference, weighting, seed, number)
        kept = w > 0
        tokens.append(reference.hidden_states[:, kept.to(reference.hidden_states.device)])
        weights.append(w[kept] * reference.strength)
    if encoded.text is not None:
        tokens.append(encoded.text)
        weights.append(torch.ones(encoded.text.shape[1], dtype=torch.float64))
    num_own = sum(part.shape[1] for part in tokens)
    if encoded.t5 is not None:
        tokens.append(t5_embedder(encoded.t5) if encoded.embedded else encoded.t5)
        weights.append(torch.ones(encoded.t5.shape[1], dtype=torch.float64))
    bias = torch.cat(weights).log()[None].to(tokens[0].device)
    return PromptEmbeds(torch.cat(tokens, dim=1), bias if bool((bias != 0).any()) else None, encoded.embedded, num_own)


def token_weights(reference: ReferenceTokens, weighting: Weighting, seed: int, number: int = 0) -> Tensor:
    """(n,) float64 weights of a reference for one seed, without its strength."""
    w = reference.weights
    if weighting.variety:
        digest = hashlib.blake2b(f"variety/{seed}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        w = griddot.drop(w, weighting.variety, generator)
    return (griddot.preserve_mass(w) if weighting.preserve_mass else w).flatten()


def spread(mass: Tensor, encoded: Encoded, weighting: Weighting, seed: int) -> list[np.ndarray]:
    """Attention mass (T,) of one picture -> (H, W) per reference; tokens that were taken out have none."""
    maps, first = [], 0
    for number, reference in enumerate(encoded.references):
        kept = token_weights(reference, weighting, seed, number) > 0
        grid = torch.zeros(kept.numel(), dtype=torch.float32)
        grid[kept] = mass[first : first + int(kept.sum())].cpu()
        first += int(kept.sum())
        maps.append(grid.view(reference.grid).numpy())
    return maps
