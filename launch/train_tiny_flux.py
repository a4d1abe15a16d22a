"""Trains the FLUX that `model.init: tiny` begins from: python launch/train_tiny_flux.py --grid DIR

What FLUX.1-dev is to the published recipe: a picture model that can draw before a run begins. The preset's FLUX, connector and
last Qwen layer, begun from the seed, learn as rectified flow, on the shipped Qwen2-VL and the VAE `tiny-icons`, a batch at a time: a
picture -> itself, its name -> the picture and, with --grid, a name and four other pictures by one hand -> the picture by
that hand. In a tenth of the batches the condition is empty.

Pictures: OpenMoji as the demo has them and the shared names of five icon sets, squares only, mirrored where the caption stays true; the
same ones as launch/train_tiny_vlm.py, so that nothing that the demo or the grid holds out is seen. See docs/tiny-assets.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for launch/, which is not installed

from launch.tiny_assets import replaced
from launch.tiny_vlm_pictures import Collection, Pictures, hand_of, load_pictures, write_seen
from launch.train_tiny_vlm import UNMIRRORED
from megaflux import flow
from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import SHIPPED_ICONS, path_option
from megaflux.config.parse import build_config
from megaflux.config.presets import tiny
from megaflux.config.schema import Config
from megaflux.models import latents as latent_ops
from megaflux.models import shipped
from megaflux.models.parameters import beginnings
from megaflux.models.pretrained import Models, load_models
from megaflux.models.reading import shapes
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


def make_optimizers(trained: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of FLUX's blocks and the Qwen layer, AdamW for embedders, connector, norms and biases."""
    inner = [p for name, p in trained.named_parameters() if p.ndim == 2 and ("blocks." in name or ".layers." in name)]
    taken = {id(p) for p in inner}
    rest = [p for p in trained.parameters() if p.requires_grad and id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, lr=muon_lr, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(models: Models, examples: Examples, args: argparse.Namespace) -> None:
    """`args.updates` updates, the learning rate constant for the first 40% and then falling to 0; writes the asset every
    `args.save_every` of them."""
    trained, draw = models.trainable, torch.Generator().manual_seed(args.seed)
    trained.requires_grad_(False)
    for parameter in started(models).values():
        parameter.requires_grad_(True)
    trained.configure(kernels=False)
    if not args.eager:
        trained.transformer.compile(dynamic=False)
    ids = ids_of(examples.latents)
    shift = flow.shift_factor(build_config(tiny()).flow.shift, examples.latents.shape[1])
    optimizers = make_optimizers(trained, args.lr, args.muon_lr)
    began, sums = time.monotonic(), []
    for update in range(args.updates):
        left = 1 - update / args.updates
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min(1.0, (update + 1) / 50, left / 0.6)
        u = torch.rand((), generator=draw).item()
        lesson = drawn_lesson(examples, u)
        chosen = torch.randint(len(lesson.targets), (BATCH,), generator=draw).tolist()
        x, condition = batch_of(examples, lesson, chosen, torch.rand(BATCH, generator=draw) < 0.5)
        if u > 1 - EMPTY_SHARE:
            condition = examples.empty
        t = flow.shift_time(torch.rand(BATCH, generator=draw), shift)
        noise = torch.randn(x.shape, generator=draw)
        # Any vector in CLIP's place and any guidance, so that neither CLIP's seed nor the run's guidance value matters.
        pooled = torch.randn(BATCH, models.pooled_projections.shape[-1], generator=draw)
        guidance = 1 + 3 * torch.rand(BATCH, generator=draw)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = trained(condition, flow.interpolate(x, noise, t), t, ids, pooled, guidance)
        loss = flow.velocity_loss(velocity, flow.velocity_target(x, noise)).mean()
        trained.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        sums.append(loss.item())
        if (update + 1) % 100 == 0:
            print(
                f"update {update + 1}: loss {sum(sums) / len(sums):.4f}; {time.monotonic() - began:.0f} s", flush=True
            )
            sums = []
        if (update + 1) % args.save_every == 0:
            save(models, args.out)


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


@torch.no_grad()
def report(models: Models, collection: Collection, seed: int) -> None:
    """Print the losses of held-out pictures beside their own conditions and beside those of others, and how much higher these are."""
    training = collection.train["1:1"]
    for name, pictures in collection.held_out.items():
        examples = encode(models, pictures, seed, training)
        lessons = {"pictures": examples.pictures, "words": examples.words, "words and references": examples.pairs}
        for kind, lesson in lessons.items():
            if lesson is not None:
                own, other = (mean_loss(models, examples, lesson, seed, away) for away in (0, len(lesson.targets) // 2))
                print(
                    f"{name} from {kind}: {len(lesson.targets)}, {own:.3f}, {other:.3f}, gap {other / own - 1:.3f}",
                    flush=True,
                )


def mean_loss(models: Models, examples: Examples, lesson: Lesson, seed: int, away: int) -> float:
    """Of all targets, each beside the condition of the one that is `away` places on, at times spread over (0, 1)."""
    draw, count, total = torch.Generator().manual_seed(seed), len(lesson.targets), 0.0
    shift = flow.shift_factor(build_config(tiny()).flow.shift, examples.latents.shape[1])
    times = flow.shift_time((torch.randperm(count, generator=draw) + 0.5) / count, shift)
    for some in chunks(count):
        x, t = examples.latents[[lesson.targets[i] for i in some]], times[list(some)]
        noise = torch.randn(x.shape, generator=draw)
        condition = lesson.conditions.rows([lesson.rows[(i + away) % count] for i in some])
        pooled, guidance = models.pooled_projections.expand(len(x), -1), torch.ones(len(x))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = models.trainable(
                condition, flow.interpolate(x, noise, t), t, ids_of(examples.latents), pooled, guidance
            )
        total += flow.velocity_loss(velocity, flow.velocity_target(x, noise)).sum().item()
    return total / count


def ids_of(packed: Tensor) -> Tensor:
    """Position ids of square pictures, (L, 3)."""
    side = round(packed.shape[1] ** 0.5) * latent_ops.TOKEN_PIXELS
    return latent_ops.image_ids(side, side)


def started(models: Models) -> dict[str, nn.Parameter]:
    """What is trained and written, by the names of `beginnings`. Qwen2-VL's final norm, which no run begins with, is not among it."""
    trained = {id(p) for p in models.trainable.parameters()}
    return {name: p for name, p in beginnings(models.trainable, models.trunk.vlm).items() if id(p) in trained}


def configuration() -> Config:
    """Of the models that the asset is trained with, and that `model.init: tiny` asks for."""
    values = tiny()
    values["model"]["vae"] = SHIPPED_ICONS
    return build_config(values)


def read(models: Models, folder: Path) -> None:
    """Lay an asset over the models. UserError where it is none, or of other models."""
    parameters, file = started(models), folder / "model.safetensors"
    if not file.is_file() or shapes(file) != {name: tuple(p.shape) for name, p in parameters.items()}:
        raise UserError(f"{file}: is missing or is not of the tiny preset's FLUX; give a folder that this script wrote")
    for name, tensor in load_file(file).items():
        parameters[name].data.copy_(tensor)


def save(models: Models, out: Path) -> None:
    """bf16 weights and the `flux_config` they belong to."""
    weights = {name: p.detach().bfloat16().contiguous() for name, p in started(models).items()}
    with replaced(out) as folder:
        (folder / "sizes.json").write_text(json.dumps(tiny()["model"]["flux_config"], indent=2) + "\n")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = Parser(
        prog="launch/train_tiny_flux.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path_option, default=str(shipped.START), help="folder of the asset")
    parser.add_argument(
        "--grid", type=path_option, help="folder of five icon sets: SET/icons.json, openmoji/chars.json"
    )
    parser.add_argument(
        "--begin", type=path_option, help="folder of an asset to go on from; default: the seed's weights"
    )
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--save-every", type=int, default=1000, help="updates between interim assets")
    parser.add_argument("--lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--report-only", action="store_true", help="measure the asset that is there")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    args.out = Path(args.out)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_flash_sdp(False)  # its backward pass on CPUs is slow in bf16
    began = time.monotonic()
    collection, grid = load_pictures(Path(args.grid) if args.grid else None)
    models = load_models(configuration())
    if args.report_only:
        read(models, args.out)
        return report(models, collection, args.seed)
    if args.begin:
        read(models, Path(args.begin))
    examples = encode(models, collection.train["1:1"], args.seed)
    print(f"{len(examples.keys)} pictures, encoded in {time.monotonic() - began:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_seen(args.out / "seen.txt.gz", examples.keys, grid)
    train(models, examples, args)
    save(models, args.out)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")
    report(models, collection, args.seed)


if __name__ == "__main__":
    exit_on_user_error(main)
