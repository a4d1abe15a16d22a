"""Trains the shipped Qwen2-VL of the preset `tiny`: python launch/train_tiny_vlm.py [--grid DIR]

The preset's sizes, begun from its seeded weights. One update looks at a batch of pictures and learns to
- write the caption behind the picture (next-token loss, head tied to the embeddings);
- tell which picture belongs to a caption that stands alone (contrastive loss between the caption's tokens in a turn of
  text and the image tokens in a turn with a picture);
- keep in every image token the colours of its cell and its place, in turns of `image` and `image_text`;
- tell the coarse colours of a picture from its caption.
All but the first hold for what the trunk gives (all layers but the last, which FLUX's training goes on with) and for
the whole. Writes config.json, bf16 weights without lm_head, the projections of the contrastive loss (retrieval.safetensors,
for measuring only) and the list of what was seen.

Pictures: OpenMoji as the demo has them and, with --grid, the shared names of five icon sets. See docs/tiny-assets.md for
their licences and for what is never seen.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megaflux
from megaflux.common.paths import path_option
from megaflux.config.presets import tiny
from megaflux.models.positions import mrope_position_ids
from megaflux.models.scratch import build_vlm, tokenizer_of
from megaflux.models.vlm import Trunk

from launch.tiny_vlm_pictures import Collection, Pictures, load_pictures, write_seen  # isort: skip
from launch.train_tiny_vae import Muon  # isort: skip

from safetensors.torch import load_file, save_file  # isort: skip
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision  # isort: skip

OUT = Path(megaflux.__file__).parent / "assets" / "tiny" / "vlm"
BATCH = 64  # pictures of one size per update
PROJECTION = 128  # width in which captions and pictures are compared
SUB = 4  # colours per side of an image token's cell
COARSE = 5  # colours per side of a picture, told from its caption
MOST_SIDE = 16  # rows or columns of image tokens
CONTRASTIVE, COLOURS, PLACE, COARSE_COLOURS = 0.5, 3.0, 0.1, 1.5  # weights; the caption's loss has 1
UNMIRRORED = (
    "left",
    "right",
    "letter",
    "flag",
    "keycap",
    "clock",
    "button",
    "sign",
    "symbol",
    "digit",
    "number",
    "mark",
)
"""A caption with one of these is not true of the mirrored picture."""


# --- pictures -----------------------------------------------------------------------------------------------


def vary(images: np.ndarray, captions: Sequence[str], rng: np.random.Generator) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) uint8: other sizes and places on the white canvas, mirrored where the caption stays
    true, other shades; white stays white."""
    pixels = 255 - torch.from_numpy(images).permute(0, 3, 1, 2).float()
    height, width = pixels.shape[2:]
    scale = rng.uniform(0.8, 1.05)
    small = F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True, recompute_scale_factor=True)
    pad = max(8, (max(height, width) - min(small.shape[2:])) // 2 + 8)
    small = F.pad(small, (pad, pad, pad, pad))
    free = [small.shape[2] - height, small.shape[3] - width]
    out = torch.empty_like(pixels)
    for i, caption in enumerate(captions):
        reach = [max(4, round(abs(1 - scale) * side / 2)) for side in (height, width)]
        top, left = (
            int(np.clip(space // 2 + rng.integers(-far, far + 1), 0, space)) for space, far in zip(free, reach)
        )
        one = small[i, :, top : top + height, left : left + width]
        if rng.random() < 0.3 and not any(word in caption for word in UNMIRRORED):
            one = one.flip(-1)
        gain = torch.from_numpy(rng.uniform(0.9, 1.08) * rng.uniform(0.96, 1.04, (3, 1, 1))).float()
        out[i] = one * gain
    return (255 - out.clamp(0, 255)).round().to(torch.uint8)


class Draw:
    """Batches of one size; within an epoch each picture of that size once. Other sizes than the square in proportion."""

    def __init__(self, pictures: dict[str, Pictures], rng: np.random.Generator):
        self.pictures, self.rng = pictures, rng
        self.queues: dict[str, list[int]] = {name: [] for name in pictures}

    def __call__(self) -> tuple[Tensor, list[str]]:
        names = list(self.pictures)
        sizes = np.array([len(self.pictures[name].captions) for name in names], dtype=float)
        name = names[self.rng.choice(len(names), p=sizes / sizes.sum())]
        pictures, queue = self.pictures[name], self.queues[name]
        while len(queue) < BATCH:
            queue += self.rng.permutation(len(pictures.captions)).tolist()
        chosen, self.queues[name] = queue[:BATCH], queue[BATCH:]
        captions = [pictures.captions[i] for i in chosen]
        return vary(pictures.images[chosen], captions, self.rng), captions


def cell_colours(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """uint8 (B, 3, H, W) -> (B, rows x columns, 3 x SUB x SUB) in [0, 1]: mean colours within each image token's cell."""
    rows, columns = grid
    means = F.adaptive_avg_pool2d(pixels.float() / 255, (rows * SUB, columns * SUB))
    cells = means.unflatten(3, (columns, SUB)).unflatten(2, (rows, SUB))  # B, 3, rows, SUB, columns, SUB
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


# --- the model ----------------------------------------------------------------------------------------------


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


# --- losses -------------------------------------------------------------------------------------------------


def token_losses(heads: Heads, states: Tensor, colours: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colours and place of each image token. states: (B, N, D)."""
    rows, columns = grid
    place = torch.arange(rows * columns)
    logits = heads.place(states).unflatten(-1, (2, MOST_SIDE)).flatten(0, 1)
    targets = torch.stack([place // columns, place % columns], dim=-1).repeat(len(states), 1)
    error = F.mse_loss(heads.colours(states), colours)
    return COLOURS * error + PLACE * F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def contrastive_loss(heads: Heads, pictures: Tensor, captions: Tensor, texts: Sequence[str]) -> Tensor:
    """Both ways, (B, D) each; pictures of the same caption are all right."""
    logits = heads.project(pictures) @ heads.project(captions).T / heads.temperature.exp().clamp(0.02, 1)
    same = torch.tensor([[one == other for other in texts] for one in texts]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def losses(model: TinyVlm, pixels: Tensor, texts: Sequence[str], with_image_text: bool) -> dict[str, Tensor]:
    """All losses of a batch, weighted. with_image_text: also a quarter of the batch in turns of mode image_text."""
    words = [model.turns.chat.caption(text) for text in texts]
    grid = model.turns.grid(*pixels.shape[-2:])
    tokens, colours = model.see(pixels), cell_colours(pixels, grid)
    states, image, answer = model.picture_turn(tokens, grid, [[*row, model.end] for row in words])
    alone, start = model.text_turn(words)
    logits, targets = caption_logits(model, states.whole, answer, words)
    found = {"caption": F.cross_entropy(logits, targets)}
    coarse = F.adaptive_avg_pool2d(pixels.float() / 255, COARSE).flatten(1)
    found["contrastive"] = found["tokens"] = found["coarse"] = torch.zeros(())
    for heads, seen, said in zip(model.heads, states.each(), alone.each()):
        pictured = seen[:, image : image + tokens.shape[1]]
        caption = pooled_words(said, start, words)
        found["contrastive"] = found["contrastive"] + CONTRASTIVE * contrastive_loss(
            heads, pictured.mean(1), caption, texts
        )
        found["tokens"] = found["tokens"] + token_losses(heads, pictured, colours, grid)
        found["coarse"] = found["coarse"] + COARSE_COLOURS * F.mse_loss(heads.coarse(caption), coarse)
    if with_image_text:
        few = slice(None, None, 4)
        for heads, pictured in zip(model.heads, model.image_text_turn(tokens[few], grid, words[few])):
            found["tokens"] = found["tokens"] + 0.5 * token_losses(heads, pictured, colours[few], grid)
    return found


def caption_logits(
    model: TinyVlm, states: Tensor, answer: int, words: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """(tokens of all captions and their ends, vocabulary), and the tokens themselves."""
    rows = [i for i, row in enumerate(words) for _ in range(len(row) + 1)]
    places = [answer - 1 + i for row in words for i in range(len(row) + 1)]
    targets = torch.tensor([token for row in words for token in (*row, model.end)])
    return states[rows, places] @ model.vlm.get_input_embeddings().weight.T, targets


# --- training -----------------------------------------------------------------------------------------------


def make_optimizers(model: TinyVlm, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices; AdamW for embeddings, patches, norms, biases and heads."""
    inner = [
        p
        for name, p in model.vlm.named_parameters()
        if p.ndim == 2 and (".layers." in name or ".blocks." in name or ".mlp." in name)
    ]
    taken = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers = [Muon(inner, lr=lr), torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(collection: Collection, args: argparse.Namespace) -> TinyVlm:
    """`args.updates` updates; writes the asset every `args.save_every` of them."""
    torch.manual_seed(args.seed)
    draw = Draw(collection.train, np.random.default_rng(args.seed))
    model = TinyVlm(args.seed)
    optimizers = make_optimizers(model, args.lr)
    start, sums, since = time.monotonic(), dict[str, float](), 0
    for update in range(args.updates):
        fraction = update / args.updates
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min(1.0, (update + 1) / 50, (1 - fraction) / 0.6)
        pixels, texts = draw()
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(model, pixels, texts, with_image_text=update % 2 == 0)
        model.zero_grad()
        loss: Tensor = sum(found.values(), torch.zeros(()))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for optimizer in optimizers:
            optimizer.step()
        since += 1
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in found.items()}
        if (update + 1) % 50 == 0:
            line = ", ".join(f"{name} {value / since:.3f}" for name, value in sums.items())
            print(f"update {update + 1}: {line}; {time.monotonic() - start:.0f} s", flush=True)
            sums, since = {}, 0
        if (update + 1) % args.save_every == 0 and update + 1 < args.updates:
            save(model, args.out)
            report(model, collection)
    return model


# --- the asset ----------------------------------------------------------------------------------------------


def save(model: TinyVlm, out: Path) -> None:
    """config.json, bf16 weights, and the projections of the contrastive loss."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.bfloat16().contiguous() for name, value in model.vlm.state_dict().items()}
    heads = {
        f"{depth}.weight": head.projection.weight.detach().bfloat16().contiguous()
        for depth, head in zip(("trunk", "whole"), model.heads)
    }
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        model.vlm.config.save_pretrained(folder)
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        save_file(heads, Path(folder) / "retrieval.safetensors", metadata={"format": "pt"})
        for name in ("model.safetensors", "retrieval.safetensors", "config.json"):
            os.chmod(Path(folder) / name, 0o644)
            os.replace(Path(folder) / name, out / name)  # readers see the old file or the new one


def load(out: Path, seed: int) -> TinyVlm:
    """The asset, in float32."""
    model = TinyVlm(seed)
    model.vlm.load_state_dict({name: value.float() for name, value in load_file(out / "model.safetensors").items()})
    projections = load_file(out / "retrieval.safetensors")
    for depth, head in zip(("trunk", "whole"), model.heads):
        head.projection.weight.data = projections[f"{depth}.weight"].float()
    return model


# --- report -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: TinyVlm, pictures: Pictures) -> dict[str, float]:
    """Held-out figures. Retrieval: a caption alone -> the nearest of all the pictures; right is one of this caption."""
    right = tokens = exact = 0
    seen: list[list[Tensor]] = [[], []]
    for part in np.array_split(np.arange(len(pictures.captions)), -(-len(pictures.captions) // BATCH)):
        pixels = torch.from_numpy(pictures.images[part]).permute(0, 3, 1, 2).contiguous()
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
    for name, side, head, state in zip(("trunk", "whole"), seen, model.heads, states.each()):
        near = (head.project(pooled_words(state, start, words)) @ torch.cat(side).T).argmax(1)
        result[f"retrieval_{name}"] = float(np.mean([pictures.captions[i] == text for i, text in zip(near, texts)]))
    return result


def report(model: TinyVlm, collection: Collection) -> None:
    for name, pictures in collection.held_out.items():
        figures = measure(model, pictures)
        print(name, json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path_option, default=str(OUT), help="folder of the asset")
    parser.add_argument(
        "--grid", type=path_option, help="folder of five icon sets: SET/icons.json, openmoji/chars.json"
    )
    parser.add_argument("--updates", type=int, default=1800)
    parser.add_argument("--save-every", type=int, default=300, help="updates between interim assets")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--report-only", action="store_true", help="measure the asset that is there")
    args = parser.parse_args()
    args.out = Path(args.out)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    collection, grid = load_pictures(Path(args.grid) if args.grid else None)
    print(
        f"{ {name: len(side.keys) for name, side in collection.train.items()} }, drawn in {time.monotonic() - start:.0f} s"
    )
    if not args.report_only:
        model = train(collection, args)
        save(model, args.out)
        write_seen(args.out / "seen.txt.gz", [key for side in collection.train.values() for key in side.keys], grid)
        print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes")
    report(load(args.out, args.seed), collection)


if __name__ == "__main__":
    main()
