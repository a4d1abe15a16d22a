"""References and a prompt -> FLUX's condition: tokens, and an attention bias for each token.

`encode` runs Qwen2-VL (and T5) once per request; `prompt_embeds` then applies what depends on a picture's seed. Each
reference is encoded alone, so others beside it do not change its tokens. A token's weight (dots, strength, variety) is
a factor on its attention: log(weight) is added to the scores of its key. Tokens of weight 0 are removed, which is
equivalent.

Shapes: B batch, T condition tokens, n = H W tokens of a reference, m tokens of a caption, C width of a token,
J width of T5's tokens, k image tokens that a ControlNet is given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from megaflux.common.errors import UserError
from megaflux.generation import release
from megaflux.generation.dots import griddot
from megaflux.generation.dots.dots import Weighting
from megaflux.generation.inputs import reference_tensor
from megaflux.generation.request import ConditionRequest, Reference, check_condition, reference_name
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition, Trunk

T5_IMAGE_TOKENS = 256  # most tokens of a reference beside a T5 prompt, in the released weights


@dataclass(frozen=True)
class ReferenceTokens:
    """A reference as tokens."""

    hidden_states: Tensor
    """(1, n, C): output of Qwen2-VL and the connector."""
    grid: tuple[int, int]
    """(H, W): rows and columns of tokens."""
    weights: Tensor
    """(H, W) float64: the weights of the dots alone."""
    strength: float
    """Factor on all weights."""


@dataclass(frozen=True)
class Encoded:
    """The part of a condition that is the same for every seed."""

    references: list[ReferenceTokens]
    text: Tensor | None
    """(1, m, C): the prompt's tokens, read by Qwen2-VL."""
    t5: Tensor | None
    """(1, 256, J): the prompt's tokens, read by T5, before T5's own linear."""
    embedded: bool
    """Whether `references` and `text` are past FLUX's context_embedder."""
    notes: list[str] = field(default_factory=list)
    """What was done to the inputs, human-readable."""
    as_released: bool = False
    """Whether a ControlNet is given T5's tokens as well."""
    control: Tensor | None = None
    """(1, k, C): the image tokens that a ControlNet is given; None: the references'."""


@dataclass(frozen=True)
class ControlText:
    """A ControlNet's own prompt_embeds, where it is not given FLUX's."""

    tokens: Tensor
    """(B, k + m, J)"""
    num_own_tokens: int
    """k: the first tokens are Qwen2-VL's; those from this index on are T5's."""


@dataclass(frozen=True)
class PromptEmbeds:
    """diffusers' prompt_embeds of a batch, and what the attention needs to know about them."""

    prompt_embeds: Tensor
    """(B, T, C)"""
    bias: Tensor | None
    """(B, T) float64: log-weight of each token. None: all weights are 1."""
    embedded: bool
    """Whether the tokens are past FLUX's context_embedder."""
    num_own_tokens: int
    """The first tokens are Qwen2-VL's; those from this index on are T5's."""
    control: ControlText | None = None
    """What a ControlNet is given. None: the first num_own_tokens of prompt_embeds."""

    @staticmethod
    def cat(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """One batch of conditions of equal length."""
        first, bias = parts[0], None
        if any(part.bias is not None for part in parts):
            bias = torch.cat([part._bias_or_zeros() for part in parts])
        tokens = torch.cat([part.prompt_embeds for part in parts])
        control = first.control
        if control is not None:
            texts = [part.control.tokens for part in parts if part.control is not None]
            control = ControlText(torch.cat(texts), control.num_own_tokens)
        return PromptEmbeds(tokens, bias, first.embedded, first.num_own_tokens, control)

    def _bias_or_zeros(self) -> Tensor:
        if self.bias is not None:
            return self.bias
        return self.prompt_embeds.new_zeros(self.prompt_embeds.shape[:2], dtype=torch.float64)

    def attention_bias(self, num_image_tokens: int, dtype: torch.dtype) -> Tensor | None:
        """diffusers' attention_mask (B, 1, 1, T + num_image_tokens), 0 on the generated picture's keys. None: no bias."""
        if self.bias is None:
            return None
        return F.pad(self.bias, (0, num_image_tokens))[:, None, None].to(dtype)


@torch.no_grad()
def encode(models: Models, longest_side: int, request: ConditionRequest, embedded: bool = False) -> Encoded:
    """Run Qwen2-VL on each reference and the prompt, or T5 on the prompt.

    longest_side: references are scaled down to it, in px, unless the request is as_released. embedded: apply FLUX's
    context_embedder, too (megaflux's own path only). UserError for an invalid request, one without reference and prompt,
    and T5 where the weights have none.
    """
    check_condition(request)
    trunk, weighting, notes = models.trunk, request.weighting, []
    qwen_prompt, t5 = request.prompt, None
    if request.text_encoder == "t5" and request.prompt:
        if models.t5 is None:
            raise UserError(
                "text encoder t5: these weights have no T5; use qwen, or weights of python -m megaflux.convert"
            )
        qwen_prompt, t5 = "", models.t5.encode([request.prompt])
        notes += models.t5.notes(request.prompt)
    count = trunk.caption_tokens(qwen_prompt) if qwen_prompt else 0
    if count > trunk.max_caption_tokens:
        notes.append(f"prompt: {count} tokens, cut to the first {trunk.max_caption_tokens}")

    text: Tensor | None = None
    references: list[ReferenceTokens] = []
    if not request.references and t5 is None:
        if not count:
            raise UserError("neither a reference nor a prompt; give at least one of them")
        text = models.trainable.encode_condition(trunk.encode(None, [qwen_prompt], "text"), embedded)
    limits = _token_limits(trunk, request.reference_tokens, t5 is not None)

    def see(picture: Image.Image, name: str) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(image tokens (1, n, C), the prompt's tokens (1, m, C), grid) of a picture. Adds to `notes`."""
        within = limits
        if request.as_released:
            pixel_values, within, changes = release.reference_pixels(picture, trunk, limits, name)
        else:
            pixel_values, changes = reference_tensor(picture, longest_side, name)
        notes.extend(changes)
        condition, grid = reference_condition(trunk, pixel_values, qwen_prompt if count else "", within)
        tokens = models.trainable.encode_condition(condition, embedded)
        own, caption = tokens.split([math.prod(grid), tokens.shape[1] - math.prod(grid)], dim=1)
        return own, caption, grid

    for number, reference in enumerate(request.references, start=1):
        name = reference_name(number, len(request.references))
        own, caption, grid = see(reference.image, name)
        if caption.shape[1] and text is None:
            text = caption
        references.append(_weighted(own, grid, reference, weighting, name))
    control = None
    if request.control_reads is not None:
        own, _, grid = see(request.control_reads, "image")
        control = downsampled(own, grid, weighting.downsample)[0]
        if len(references) == 1:  # the release gives both the shorter's number; it knows no second reference
            shorter = min(control.shape[1], references[0].weights.numel())
            if longer := max(control.shape[1], references[0].weights.numel()) - shorter:
                whose = "reference" if control.shape[1] == shorter else "image"
                notes.append(f"the {whose}'s last {longer} tokens are cut, to the number of the other picture's")
            references, control = [_cut(references[0], shorter)], control[:, :shorter]
        if weighting.variety or any(reference.dots or reference.strength != 1 for reference in request.references):
            notes.append("the ControlNet reads the image's own tokens: dots, strength and variety act on FLUX alone")
    return Encoded(references, text, t5, embedded, notes, request.as_released, control)


def caption_notes(encoded: Encoded, modes: Sequence[str]) -> list[str]:
    """A note where Qwen2-VL read a prompt in a kind of condition that training never drew. modes: those that it drew."""
    needed = "image_text" if encoded.references else "text"
    if encoded.text is None or needed in modes:
        return []
    if not {"image_text", "text"} & set(modes):
        return ["prompt: these weights were trained without captions, so it may do little or harm"]
    how = "beside a picture" if encoded.references else "alone"
    return [f"prompt: these weights never read a caption {how} (data.condition.{needed}), so it may do little or harm"]


def _token_limits(trunk: Trunk, reference_tokens: int | None, beside_t5: bool) -> tuple[int, int] | None:
    """(fewest, most) image tokens of a reference. None: as trained."""
    if reference_tokens is not None:
        return min(reference_tokens, trunk.min_image_tokens), reference_tokens
    return t5_limits(trunk) if beside_t5 else None


def t5_limits(trunk: Trunk) -> tuple[int, int]:
    """(fewest, most) image tokens of a reference beside T5's tokens."""
    return min(T5_IMAGE_TOKENS, trunk.min_image_tokens), T5_IMAGE_TOKENS


def reference_condition(
    trunk: Trunk, pixel_values: Tensor, prompt: str = "", limits: tuple[int, int] | None = None
) -> tuple[Condition, tuple[int, int]]:
    """(the Condition that training would compute, the grid (H, W) of image tokens) of one reference.

    pixel_values: uint8 (1, 3, height, width). prompt: "" for none. limits: (fewest, most) image tokens.
    """
    mode: Literal["image", "image_text"] = "image_text" if prompt else "image"
    condition = trunk.encode(pixel_values, [prompt] if prompt else None, mode, limits)
    height, width = pixel_values.shape[-2:]
    return condition, trunk.grid(height, width, limits)


def _weighted(
    tokens: Tensor, grid: tuple[int, int], reference: Reference, weighting: Weighting, name: str
) -> ReferenceTokens:
    """Downsample a reference's tokens (1, n, C) and weight them by its dots. UserError if no token is left."""
    tokens, grid = downsampled(tokens, grid, weighting.downsample)
    weights = griddot.token_weights(reference.dots, grid, weighting.background if reference.dots else 1.0)
    griddot.check_weights(weights, name)
    return ReferenceTokens(tokens, grid, weights, reference.strength)


def _cut(reference: ReferenceTokens, count: int) -> ReferenceTokens:
    """The reference with its first `count` tokens, in reading order: the others get weight 0, so they are left out.
    UserError if no token is left."""
    weights = reference.weights.flatten().clone()
    weights[count:] = 0
    if not weights.any():
        raise UserError(
            f"reference: all tokens that its dots keep lie behind its first {count}, to which --release-compatible cuts it; "
            "place a dot higher, or leave --release-compatible out"
        )
    return replace(reference, weights=weights.view(reference.grid))


def downsampled(tokens: Tensor, grid: tuple[int, int], factor: int) -> tuple[Tensor, tuple[int, int]]:
    """(tokens (1, H W, C) averaged over `factor` x `factor` cells of their grid, the new grid).

    The layers after Qwen2-VL's norm are linear, so averaging their output equals averaging their input.
    """
    if factor == 1:
        return tokens, grid
    rows, columns = (-(-side // factor) for side in grid)
    plane = tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, H W, C) -> (1, C, H, W)
    pooled = F.adaptive_avg_pool2d(plane, (rows, columns))
    return pooled.flatten(2).transpose(1, 2), (rows, columns)


@torch.no_grad()
def prompt_embeds(
    encoded: Encoded, weighting: Weighting, seed: int, t5_embedder: nn.Linear | None = None
) -> PromptEmbeds:
    """The condition (B = 1) of the picture of one seed, which chooses the tokens that `variety` leaves out.

    t5_embedder: T5's linear, applied here if the other tokens are embedded. ValueError if it is needed and None.
    """
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
    control = _control_text(encoded, tokens) if encoded.as_released and not encoded.embedded else None
    if encoded.t5 is not None:
        t5 = encoded.t5
        if encoded.embedded:
            if t5_embedder is None:
                raise ValueError("T5's tokens beside embedded ones need t5_embedder")
            t5 = t5_embedder(t5)
        tokens.append(t5)
        weights.append(torch.ones(t5.shape[1], dtype=torch.float64))
    log_weights = torch.cat(weights).log()[None].to(tokens[0].device)
    bias = log_weights if bool((log_weights != 0).any()) else None
    return PromptEmbeds(torch.cat(tokens, dim=1), bias, encoded.embedded, num_own, control)


def _control_text(encoded: Encoded, own: Sequence[Tensor]) -> ControlText:
    """What the released tool gives a ControlNet: image tokens, and T5's. own: FLUX's tokens of Qwen2-VL."""
    if encoded.control is not None:
        own = [encoded.control] if encoded.text is None else [encoded.control, encoded.text]
    t5 = [] if encoded.t5 is None else [encoded.t5]
    return ControlText(torch.cat([*own, *t5], dim=1), sum(part.shape[1] for part in own))


def token_weights(reference: ReferenceTokens, weighting: Weighting, seed: int, number: int = 0) -> Tensor:
    """(n,) float64: the weights of a reference's tokens for one seed, without its strength.

    number: the reference's index, so that `variety` leaves out other tokens of each reference.
    """
    w = reference.weights
    if weighting.variety:
        digest = hashlib.blake2b(f"variety/{seed}/{number}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        w = griddot.drop(w, weighting.variety, generator)
    return (griddot.preserve_mass(w) if weighting.preserve_mass else w).flatten()


def weight_maps(encoded: Encoded, weighting: Weighting, seed: int) -> list[np.ndarray]:
    """Per reference, (H, W) float64: `token_weights` on the grid."""
    return [
        token_weights(reference, weighting, seed, number).view(reference.grid).numpy()
        for number, reference in enumerate(encoded.references)
    ]


def attention_maps(mass: Tensor, encoded: Encoded, weighting: Weighting, seed: int) -> list[np.ndarray]:
    """Per reference, (H, W) float32: the attention mass (T,) of one picture on the grid; 0 for removed tokens."""
    maps, first = [], 0
    for number, reference in enumerate(encoded.references):
        kept = token_weights(reference, weighting, seed, number) > 0
        grid = torch.zeros(kept.numel(), dtype=torch.float32)
        grid[kept] = mass[first : first + int(kept.sum())].cpu()
        first += int(kept.sum())
        maps.append(grid.view(reference.grid).numpy())
    return maps
