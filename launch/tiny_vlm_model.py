"""The model of launch/train_tiny_vlm.py: the preset's Qwen2-VL, its turns in batches, and what is read off its states.

Shapes: B pictures of one size, N image tokens, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.config.presets import tiny
from megaflux.models.positions import mrope_position_ids
from megaflux.models.scratch import build_vlm, tokenizer_of
from megaflux.models.vlm import Trunk

from safetensors.torch import load_file  # isort: skip
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision  # isort: skip

PROJECTION = 128  # width in which captions and pictures are compared
SUB = 4  # colours per side of an image token's cell
COARSE = 8  # colours per side of a picture, told from its caption
HANDS = 8  # most styles of drawing
MOST_SIDE = 16  # rows or columns of image tokens
DEPTHS = ("trunk", "whole")


@dataclass
class States:
    """Hidden states (B, S, D) of a turn: after the trunk's layers, and after the last layer and the norm."""

    trunk: Tensor
    whole: Tensor

    def each(self) -> tuple[Tensor, Tensor]:
        return self.trunk, self.whole


class Heads(nn.Module):
    """What is read off hidden states of one depth, by linear maps."""

    def __init__(self, width: int):
        super().__init__()
        self.projection = nn.Linear(width, PROJECTION, bias=False)
        self.colours = nn.Linear(width, 3 * SUB * SUB)
        self.place = nn.Linear(width, 2 * MOST_SIDE)
        self.coarse = nn.Linear(width, 3 * COARSE * COARSE)
        self.told = nn.Linear(width, 3 * SUB * SUB)
        self.hand = nn.Linear(width, HANDS)
        self.temperature = nn.Parameter(torch.tensor(0.1).log())

    def project(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.projection(pooled), dim=-1)


class TinyVlm(nn.Module):
    """Qwen2-VL of the preset with what its training needs."""

    def __init__(self, seed: int):
        super().__init__()
        settings = tiny()["model"]
        self.vlm, processor = build_vlm(settings["vlm_config"], seed)
        self.turns = Trunk(self.vlm, processor, settings["vlm_max_tokens"])
        self.vlm.train().requires_grad_(True)
        self.vlm.language_model.config._attn_implementation = "eager"  # see the remark on bf16 below
        width = self.vlm.config.text_config.hidden_size
        self.trunk_heads, self.whole_heads = Heads(width), Heads(width)
        self.end = tokenizer_of(processor).convert_tokens_to_ids("<|im_end|>")

    @property
    def heads(self) -> tuple[Heads, Heads]:
        """As `States.each`."""
        return self.trunk_heads, self.whole_heads

    def see(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> image tokens (B, N, D). As `vlm.visual`, whose attention goes picture by picture: half as
        fast in a batch of one size."""
        visual, turns = self.vlm.visual, self.turns
        rows, columns = (side * turns.merge for side in turns.grid(*pixels.shape[-2:]))
        patches = turns.processor.image_processor(images=list(pixels), return_tensors="pt", **turns.limits)
        states = patches["pixel_values"] @ visual.patch_embed.proj.weight.flatten(1).T
        states = states.unflatten(0, (len(pixels), -1))  # B, P, E
        angles = visual.rot_pos_emb(torch.tensor([[1, rows, columns]])).repeat(len(pixels), 2)
        for block in visual.blocks:
            query, key, value = (
                block.attn.qkv(block.norm1(states)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            )
            query, key = apply_rotary_pos_emb_vision(query.flatten(0, 1), key.flatten(0, 1), angles.cos(), angles.sin())
            query, key, value = (side.reshape(value.shape).transpose(1, 2).float() for side in (query, key, value))
            with torch.autocast("cpu", enabled=False):  # in bf16 its backward takes longer than all the rest
                mixed = F.scaled_dot_product_attention(query, key, value)
            states = states + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            states = states + block.mlp(block.norm2(states))
        return visual.merger(states.flatten(0, 1)).unflatten(0, (len(pixels), -1))

    def read(self, embeds: Tensor, positions: Tensor) -> States:
        """Padding is on the right, where causal attention does not look."""
        out = self.vlm.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False, output_hidden_states=True, return_dict=True
        )
        return States(out.hidden_states[-2], out.last_hidden_state)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.turns.pad_token_id] * (longest - len(row))] for row in rows])
        return self.vlm.get_input_embeddings()(ids)

    def picture_turn(
        self, tokens: Tensor, grid: tuple[int, int], words: Sequence[Sequence[int]]
    ) -> tuple[States, int, int]:
        """A turn of mode image and the caption as its answer. Returns states, the image's place and the answer's."""
        before, _, after = self.turns.chat.surroundings("image")
        answers = self.embed([[*after, *row] for row in words])
        batch, count = tokens.shape[:2]
        embeds = torch.cat([self.embed([before]).expand(batch, -1, -1), tokens, answers], dim=1)
        positions = mrope_position_ids(embeds.shape[1], len(before), grid)[:, None].expand(-1, batch, -1)
        return self.read(embeds, positions), len(before), len(before) + count + len(after)

    def text_turn(self, words: Sequence[Sequence[int]]) -> tuple[States, int]:
        """A turn of mode text. Returns states and the caption's place."""
        before = self.turns.chat.surroundings("text")[0]
        embeds = self.embed([[*before, *row] for row in words])
        positions = torch.arange(embeds.shape[1]).expand(3, len(words), -1)
        return self.read(embeds, positions), len(before)

    def image_text_turn(self, tokens: Tensor, grid: tuple[int, int], words: Sequence[Sequence[int]]) -> list[Tensor]:
        """States of the image tokens, (B, N, D) of both depths, in turns of mode image_text."""
        before, between, _ = self.turns.chat.surroundings("image_text")
        batch, count = tokens.shape[:2]
        starts = [len(before) + len(row) + len(between) for row in words]
        head = self.embed([[*before, *row, *between] for row in words])
        length = max(starts) + count
        embeds = F.pad(head, (0, 0, 0, length - head.shape[1])).clone()
        positions = torch.stack([mrope_position_ids(length, start, grid) for start in starts], dim=1)
        for i, start in enumerate(starts):
            embeds[i, start : start + count] = tokens[i]
        states = self.read(embeds, positions)
        return [torch.stack([row[start : start + count] for row, start in zip(side, starts)]) for side in states.each()]


def pooled_words(states: Tensor, start: int, words: Sequence[Sequence[int]]) -> Tensor:
    """Means over the captions' tokens: (B, D)."""
    lengths = torch.tensor([len(row) for row in words])[:, None]
    mask = torch.arange(states.shape[1] - start)[None] < lengths
    return (states[:, start:] * mask[..., None]).sum(1) / lengths


def cell_colours(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, rows x columns, 3 x SUB x SUB) in [0, 1]: mean colours within each image token's cell."""
    rows, columns = grid
    means = F.adaptive_avg_pool2d(pixels.float() / 255, (rows * SUB, columns * SUB))
    cells = means.unflatten(3, (columns, SUB)).unflatten(2, (rows, SUB))  # B, 3, rows, SUB, columns, SUB
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def caption_logits(
    model: TinyVlm, states: Tensor, answer: int, words: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """(tokens of all captions and their ends, vocabulary), and the tokens themselves."""
    rows = [i for i, row in enumerate(words) for _ in range(len(row) + 1)]
    places = [answer - 1 + i for row in words for i in range(len(row) + 1)]
    targets = torch.tensor([token for row in words for token in (*row, model.end)])
    return states[rows, places] @ model.vlm.get_input_embeddings().weight.T, targets


def load(out: Path, seed: int) -> TinyVlm:
    """The asset, in float32."""
    model = TinyVlm(seed)
    model.vlm.load_state_dict({name: value.float() for name, value in load_file(out / "model.safetensors").items()})
    projections = load_file(out / "retrieval.safetensors")
    for depth, head in zip(DEPTHS, model.heads):
        head.projection.weight.data = projections[f"{depth}.weight"].float()
    return model
