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
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for launch/, which is not installed

from launch.tiny_assets import replaced
from launch.tiny_flux_lessons import BATCH, EMPTY_SHARE, Examples, Lesson, batch_of, chunks, drawn_lesson, encode
from launch.tiny_vlm_pictures import Collection, load_pictures, write_seen
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
