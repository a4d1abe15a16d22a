"""Figures of the tiny Qwen2-VL on held-out pictures, for docs/tiny-assets.md."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from launch.tiny_vlm_model import DEPTHS, TinyVlm, caption_logits, cell_colours, pooled_words
from launch.tiny_vlm_pictures import Collection, Pictures, hand_of

PART = 64  # pictures at a time
RIDGE = 1e-3  # of the features' mean square
PROBE = 600  # training pictures that the linear probes are fitted on


@torch.no_grad()
def measure(model: TinyVlm, pictures: Pictures) -> dict[str, float]:
    """Held-out figures. Retrieval: a caption alone -> the nearest of all the pictures; right is one of this caption."""
    right = tokens = exact = 0
    seen: list[list[Tensor]] = [[], []]
    for part in np.array_split(np.arange(len(pictures.captions)), -(-len(pictures.captions) // PART)):
        pixels = _pixels(pictures.images[part])
        words = [model.turns.chat.caption(pictures.captions[i]) for i in part]
        grid = model.turns.grid(*pixels.shape[-2:])
        image = model.see(pixels)
        states, place, answer = model.picture_turn(image, grid, [[*row, model.end] for row in words])
        logits, targets = caption_logits(model, states.whole, answer, words)
        hits = (logits.argmax(-1) == targets).split([len(row) + 1 for row in words])
        right, tokens = right + sum(int(row.sum()) for row in hits), tokens + len(targets)
        exact += sum(bool(row.all()) for row in hits)
        for side, head, state in zip(seen, model.heads, states.each()):
            side.append(head.project(state[:, place : place + image.shape[1]].mean(1)))
    texts = sorted(set(pictures.captions))
    words = [model.turns.chat.caption(text) for text in texts]
    states, start = model.text_turn(words)
    result = {"pictures": len(pictures.captions), "captions": len(texts), "token": right / tokens}
    result["exact"] = exact / len(pictures.captions)
    for name, side, head, state in zip(DEPTHS, seen, model.heads, states.each()):
        near = (head.project(pooled_words(state, start, words)) @ torch.cat(side).T).argmax(1)
        result[f"retrieval_{name}"] = float(np.mean([pictures.captions[i] == text for i, text in zip(near, texts)]))
    return result


def report(model: TinyVlm, collection: Collection) -> None:
    """Print all figures of all held-out pictures, a line of JSON for each kind."""
    for name, pictures in collection.held_out.items():
        _show(name, measure(model, pictures))
    _show("probes", probes(model, collection.train["1:1"], collection.held_out["demo"]))


def _show(name: str, figures: dict[str, float]) -> None:
    print(name, json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)


@torch.no_grad()
def told(model: TinyVlm, train: Pictures, held: Pictures) -> float:
    """R2 of the colours that the trunk's image tokens tell of held-out pictures from their captions, each beside a training picture by the
    same hand; against the mean of the hand's training pictures. Of a model in training only: the asset has not the linear map."""
    by_hand: dict[str, list[int]] = {}
    for i, key in enumerate(train.keys):
        by_hand.setdefault(hand_of(key), []).append(i)
    error = spread = 0.0
    for hand, of_hand in sorted(by_hand.items()):
        index = [i for i, key in enumerate(held.keys) if hand_of(key) == hand][:PART]
        if not index:
            continue
        pixels = _pixels(train.images[[of_hand[7 * i % len(of_hand)] for i in range(len(index))]])
        wanted = _pixels(held.images[index])
        grid = model.turns.grid(*pixels.shape[-2:])
        words = [model.turns.chat.caption(held.captions[i]) for i in index]
        states = model.image_text_turn(model.see(pixels), grid, words)[0]
        truth = cell_colours(wanted, grid)
        mean = cell_colours(_pixels(train.images[of_hand]), grid).mean(0)
        error += (model.heads[0].told(states) - truth).square().sum().item()
        spread += (truth - mean).square().sum().item()
    return 1 - error / spread


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def image_states(model: TinyVlm, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the trunk gives of the image tokens of squares, (N, 25, D), and the mean colour of each one's cell, (N, 25, 3)."""
    states, colours = [], []
    for part in np.array_split(images, -(-len(images) // PART)):
        pixels = _pixels(part)
        grid = model.turns.grid(*pixels.shape[-2:])
        tokens = model.see(pixels)
        found, place, _ = model.picture_turn(tokens, grid, [[] for _ in part])
        states.append(found.trunk[:, place : place + tokens.shape[1]])
        colours.append(cell_colours(pixels, grid).unflatten(-1, (3, -1)).mean(-1))
    return torch.cat(states), torch.cat(colours)


def probes(model: TinyVlm, train: Pictures, held: Pictures) -> dict[str, float]:
    """What linear maps, fitted on training squares, read off the trunk's image tokens of held-out ones: R2 of the cell's mean
    colour, share of right positions among the cells; and the share of the states' power that differs between pictures."""
    every = max(1, len(train.images) // PROBE)
    (fit, fit_colours), (test, test_colours) = (
        image_states(model, one) for one in (train.images[::every], held.images)
    )
    cells = fit.shape[1]
    places = torch.eye(cells).expand(len(fit), -1, -1)
    mean, spread = fit.mean((0, 1)), fit.std((0, 1)) + 1e-6
    features, tested = ((one - mean) / spread for one in (fit, test))
    wanted = torch.cat([fit_colours, places], dim=-1).flatten(0, 1).double()
    inputs = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1).flatten(0, 1).double()
    ridge = RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted)
    told = torch.cat([tested, torch.ones_like(tested[..., :1])], dim=-1).double() @ weights
    error = (told[..., :3] - test_colours).square().sum((0, 1))
    r2 = 1 - error / (test_colours - fit_colours.mean((0, 1))).square().sum((0, 1))
    right = (told[..., 3:].argmax(-1) == torch.arange(cells)).float().mean()
    differing = (test - test.mean(0)).square().sum() / test.square().sum()
    return {"colour_r2": r2.mean().item(), "place": right.item(), "differing_power": differing.item()}
