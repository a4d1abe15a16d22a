"""Trains the shipped Qwen2-VL of the preset `tiny`: python launch/train_tiny_vlm.py [--grid DIR]

The preset's sizes, begun from its seeded weights. One update looks at a batch of pictures and learns to
- write the caption behind the picture (next-token loss, head tied to the embeddings);
- tell which picture belongs to a caption that stands alone (contrastive loss between the caption's tokens in a turn of
  text and the image tokens in a turn with a picture);
- keep in every image token the colours of its cell and its place, in turns of `image` and `image_text`;
- tell in every image token which hand drew the picture: the icon set that it is of;
- tell the coarse colours of a picture from its caption;
- tell, in turns of `image_text` in which the picture shows something else by the same hand, at every image token the colours that
  the captioned picture has there.
All but the first hold for what the trunk gives (all layers but the last, which FLUX's training goes on with) and for
the whole. Writes bf16 weights without lm_head and their sizes, the projections of the contrastive loss (retrieval.safetensors,
for measuring only) and the list of what was seen.

Pictures: OpenMoji as the demo has them and, with --grid, the shared names of five icon sets. See docs/tiny-assets.md for
their licences and for what is never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for launch/, which is not installed

from launch.tiny_assets import replaced
from launch.tiny_vlm_figures import report, told
from launch.tiny_vlm_model import (
    COARSE,
    DEPTHS,
    MOST_SIDE,
    Heads,
    TinyVlm,
    caption_logits,
    cell_colours,
    load,
    pooled_words,
)
from launch.tiny_vlm_pictures import Collection, Pictures, hand_of, load_pictures, write_seen
from launch.train_tiny_vae import Muon
from megaflux.common.command import Parser
from megaflux.common.errors import exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.config.presets import tiny
from megaflux.models import shipped

BATCH = 64  # pictures of one size per update
SMALL, SMALL_SHARE = 84, 0.4  # px, of the square batches: 3 x 3 tokens, as many as `model.vlm_max_tokens: 9` leaves
# Weights of the losses; the caption's has 1.
CONTRASTIVE, COLOURS, PLACE, HAND = 0.5, 3.0, 0.1, 0.5
COARSE_COLOURS, TOLD = 3.0, 6.0
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
        gain = torch.from_numpy(rng.uniform(0.97, 1.02) * rng.uniform(0.99, 1.01, (3, 1, 1))).float()
        out[i] = one * gain
    return (255 - out.clamp(0, 255)).round().to(torch.uint8)


@dataclass
class Drawn:
    """A batch of B pictures of one size."""

    pixels: Tensor
    """uint8 (B, 3, H, W), varied; some batches smaller."""
    plain: Tensor
    """The same in full size, as they are."""
    captions: list[str]
    hands: Tensor
    """(B,) int64: which set each is of."""
    mates: list[int]
    """Of each, another one of the batch by the same hand, or itself where there is none."""


def mates(hands: Sequence[int]) -> list[int]:
    """Of each picture the next one by the same hand."""
    found = [0] * len(hands)
    for hand in set(hands):
        of_hand = [i for i, other in enumerate(hands) if other == hand]
        for i, mate in zip(of_hand, of_hand[1:] + of_hand[:1], strict=True):
            found[i] = mate
    return found


class Draw:
    """Batches of one size; within an epoch each picture of that size once. Other sizes than the square in proportion."""

    def __init__(self, pictures: dict[str, Pictures], rng: np.random.Generator):
        self.pictures, self.rng = pictures, rng
        self.queues: dict[str, list[int]] = {name: [] for name in pictures}
        self.hands = sorted({hand_of(key) for side in pictures.values() for key in side.keys})

    def __call__(self) -> Drawn:
        names = list(self.pictures)
        sizes = np.array([len(self.pictures[name].captions) for name in names], dtype=float)
        name = names[self.rng.choice(len(names), p=sizes / sizes.sum())]
        pictures, queue = self.pictures[name], self.queues[name]
        while len(queue) < BATCH:
            queue += self.rng.permutation(len(pictures.captions)).tolist()
        chosen, self.queues[name] = queue[:BATCH], queue[BATCH:]
        captions = [pictures.captions[i] for i in chosen]
        plain = torch.from_numpy(pictures.images[chosen]).permute(0, 3, 1, 2).contiguous()
        hands = [self.hands.index(hand_of(pictures.keys[i])) for i in chosen]
        varied = vary(pictures.images[chosen], captions, self.rng)
        if varied.shape[2] == varied.shape[3] and self.rng.random() < SMALL_SHARE:
            small = F.interpolate(varied.float(), (SMALL, SMALL), mode="bicubic", antialias=True)
            varied = small.round().clamp(0, 255).to(torch.uint8)
        return Drawn(varied, plain, captions, torch.tensor(hands), mates(hands))


# --- losses -------------------------------------------------------------------------------------------------


def token_losses(heads: Heads, states: Tensor, colours: Tensor, hands: Tensor, grid: tuple[int, int]) -> Tensor:
    """Colours, place and hand of each image token. states: (B, N, D); hands: (B,)."""
    rows, columns = grid
    place = torch.arange(rows * columns)
    logits = heads.place(states).unflatten(-1, (2, MOST_SIDE)).flatten(0, 1)
    targets = torch.stack([place // columns, place % columns], dim=-1).repeat(len(states), 1)
    error = F.mse_loss(heads.colours(states), colours)
    told = F.cross_entropy(heads.hand(states).transpose(1, 2), hands[:, None].expand(states.shape[:2]))
    return COLOURS * error + PLACE * F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + HAND * told


def contrastive_loss(heads: Heads, pictures: Tensor, captions: Tensor, texts: Sequence[str]) -> Tensor:
    """Both ways, (B, D) each; pictures of the same caption are all right."""
    logits = heads.project(pictures) @ heads.project(captions).T / heads.temperature.exp().clamp(0.02, 1)
    same = torch.tensor([[one == other for other in texts] for one in texts]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def losses(model: TinyVlm, batch: Drawn) -> dict[str, Tensor]:
    """All losses of a batch, weighted; half of it in turns of mode image_text as well."""
    pixels, texts = batch.pixels, batch.captions
    words = [model.turns.chat.caption(text) for text in texts]
    grid = model.turns.grid(*pixels.shape[-2:])
    tokens, colours = model.see(pixels), cell_colours(pixels, grid)
    states, image, answer = model.picture_turn(tokens, grid, [[*row, model.end] for row in words])
    alone, start = model.text_turn(words)
    logits, targets = caption_logits(model, states.whole, answer, words)
    found = {"caption": F.cross_entropy(logits, targets)}
    coarse = F.adaptive_avg_pool2d(batch.plain.float() / 255, COARSE).flatten(1)
    found["contrastive"] = found["tokens"] = found["coarse"] = found["told"] = torch.zeros(())
    for heads, seen, said in zip(model.heads, states.each(), alone.each()):
        pictured = seen[:, image : image + tokens.shape[1]]
        caption = pooled_words(said, start, words)
        found["contrastive"] = found["contrastive"] + CONTRASTIVE * contrastive_loss(
            heads, pictured.mean(1), caption, texts
        )
        found["tokens"] = found["tokens"] + token_losses(heads, pictured, colours, batch.hands, grid)
        found["coarse"] = found["coarse"] + COARSE_COLOURS * F.mse_loss(heads.coarse(caption), coarse)
    few = torch.arange(0, len(pixels), 2)
    seen_there = torch.tensor(batch.mates)[few]
    captioned = cell_colours(batch.plain[few], grid)
    turn = model.image_text_turn(tokens[seen_there], grid, words[::2])
    for heads, pictured in zip(model.heads, turn):
        own = token_losses(heads, pictured, colours[seen_there], batch.hands[few], grid)
        found["tokens"] = found["tokens"] + 0.5 * own
        found["told"] = found["told"] + TOLD * F.mse_loss(heads.told(pictured), captioned)
    return found


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
    model = load(args.begin, args.seed) if args.begin else TinyVlm(args.seed)
    optimizers = make_optimizers(model, args.lr)
    start, sums, since = time.monotonic(), dict[str, float](), 0
    for update in range(args.updates):
        fraction = update / args.updates
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min(1.0, (update + 1) / 50, (1 - fraction) / 0.6)
        batch = draw()
        with torch.autocast("cpu", torch.bfloat16):
            found = losses(model, batch)
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
            show_told(model, collection)
    return model


def show_told(model: TinyVlm, collection: Collection) -> None:
    """Print how well held-out pictures are told from their captions."""
    for name, pictures in collection.held_out.items():
        print(f"told {name}: {told(model, collection.train['1:1'], pictures):.3f}", flush=True)


# --- the asset ----------------------------------------------------------------------------------------------


def save(model: TinyVlm, out: Path) -> None:
    """bf16 weights, the `vlm_config` they belong to, and the projections of the contrastive loss."""
    weights = {name: value.bfloat16().contiguous() for name, value in model.vlm.state_dict().items()}
    heads = {
        f"{depth}.weight": head.projection.weight.detach().bfloat16().contiguous()
        for depth, head in zip(DEPTHS, model.heads)
    }
    with replaced(out) as folder:
        sizes = {name: value for name, value in tiny()["model"]["vlm_config"].items() if name != "qk_bias_std"}
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(heads, folder / "retrieval.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = Parser(
        prog="launch/train_tiny_vlm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path_option, default=str(shipped.VLM), help="folder of the asset")
    parser.add_argument(
        "--grid", type=path_option, help="folder of five icon sets: SET/icons.json, openmoji/chars.json"
    )
    parser.add_argument(
        "--begin", type=path_option, help="folder of an asset to go on from; default: the seed's weights"
    )
    parser.add_argument("--updates", type=int, default=1600)
    parser.add_argument("--save-every", type=int, default=800, help="updates between interim assets")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--report-only", action="store_true", help="measure the asset that is there")
    args = parser.parse_args()
    args.out, args.begin = Path(args.out), args.begin and Path(args.begin)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    collection, grid = load_pictures(Path(args.grid) if args.grid else None)
    print(
        f"{ {name: len(side.keys) for name, side in collection.train.items()} }, drawn in {time.monotonic() - start:.0f} s"
    )
    if not args.report_only:
        model = train(collection, args)
        save(model, args.out)
        show_told(model, collection)
        write_seen(args.out / "seen.txt.gz", [key for side in collection.train.values() for key in side.keys], grid)
        print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes")
    report(load(args.out, args.seed), collection)


if __name__ == "__main__":
    exit_on_user_error(main)
