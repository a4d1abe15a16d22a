"""Trains the shipped VAEs, `tiny` and, with --grid, `tiny-icons`: python launch/train_tiny_vae.py

An AutoencoderKL in FLUX's form (no quant convolutions, shift and scaling factor), 8 times smaller per side, 8 latent
channels, on OpenMoji at 128 px without the held-out emoji, and with --grid on five icon sets without the held-out cells. Writes
config.json and float16 weights (under 2 MB), then loads them back and prints the held-out PSNR, the distribution of the latents, and the time to encode. The seed is fixed, but the
last bits depend on the number of threads.

OpenMoji (openmoji.org) is CC BY-SA 4.0: see docs/tiny-assets.md for what that means for the weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for launch/, which is not installed

from launch import tiny_vlm_pictures
from launch.tiny_assets import replaced
from megaflux.common import compat  # noqa: F401  (before diffusers)
from megaflux.common.paths import SHIPPED, SHIPPED_ICONS, path_option
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.images import BadImage
from megaflux.data.writing.chunks import is_held_out
from megaflux.data.writing.openmoji import OpenMoji
from megaflux.data.writing.options import OPENMOJI_DEFAULTS
from megaflux.models import shipped

from diffusers.models import AutoencoderKL  # isort: skip  (after compat)

# Few channels at full resolution, where the time goes; no attention, so that any canvas works.
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    "sample_size": 128,
}
EDGE_WEIGHT = 0.25  # of the L1 distance of neighbour differences: OpenMoji consists of outlines
MSE_WEIGHT = 4.0  # of the squared error, which PSNR measures
KL_WEIGHT = 3e-4  # of the KL divergence, nats per latent element: room for the flow model's errors
HALF_WEIGHT = 0.25  # of the loss at half resolution, every second update
CROP = 64  # px, the largest side of a training crop before `FULL_FROM` of the run: more updates per minute
FULL_FROM = 0.75  # of the run; then whole pictures: GroupNorm must see what it will see in use
BATCH = 8  # crops per update, half of it for whole pictures

Images = dict[str, np.ndarray]  # bucket name -> (N, H, W, 3) uint8


# --- pictures -----------------------------------------------------------------------------------------------


def split(collection: tiny_vlm_pictures.Collection) -> tuple[Images, Images]:
    """The demo's pictures and the cells of a grid of icon sets, (training, held out): see launch/tiny_vlm_pictures.py."""
    train = {bucket: pictures.images for bucket, pictures in collection.train.items()}
    return train, {"1:1": collection.held_out["demo"].images, "cells": collection.held_out["cells"].images}


def load_pictures() -> tuple[Images, Images]:
    """The demo's pictures by bucket: (training, held out), split as megaflux.data.prepare splits them."""
    defaults: dict[str, Any] = OPENMOJI_DEFAULTS
    source = OpenMoji(make_buckets(ASPECT_RATIOS, defaults["longest_side"]))
    items = source.list_items()
    splits: tuple[dict[str, list], dict[str, list]] = ({}, {})
    for item, loaded in zip(items, source.read(items), strict=True):
        if isinstance(loaded, BadImage):
            raise ValueError(f"{item.split_key}: {loaded}")
        held_out = is_held_out(item.split_key, defaults["held_out"])
        splits[held_out].setdefault(item.where[1], []).append(np.asarray(loaded.image))
    train, held = ({name: np.stack(images) for name, images in sorted(split.items())} for split in splits)
    return train, held


def to_pixels(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_batch(train: Images, rng: np.random.Generator, side: int, count: int) -> Tensor:
    """`count` crops of at most `side` px, of one bucket, each mirrored or not. (count, 3, h, w)"""
    names = list(train)
    sizes = np.array([len(train[name]) for name in names], dtype=float)
    images = train[names[rng.choice(len(names), p=sizes / sizes.sum())]]
    height, width = (min(length, side) for length in images.shape[1:3])
    crops = np.empty((count, height, width, 3), dtype=np.uint8)
    for crop, index in zip(crops, rng.integers(len(images), size=count), strict=True):
        top = rng.integers(images.shape[1] - height + 1)
        left = rng.integers(images.shape[2] - width + 1)
        picture = images[index, top : top + height, left : left + width]
        crop[:] = picture[:, ::-1] if rng.random() < 0.5 else picture
    return to_pixels(crops)


# --- loss ---------------------------------------------------------------------------------------------------


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + squared error + L1 of the differences between neighbouring pixels, each a mean."""
    error = output.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + MSE_WEIGHT * error.square().mean() + EDGE_WEIGHT * edges


def vae_loss(vae: AutoencoderKL, pixels: Tensor, with_half: bool) -> Tensor:
    """Reconstruction + KL; `with_half`: also halved latents must decode to the halved picture.

    The last keeps latents smooth (scale equivariance, EQ-VAE, arXiv:2502.09509), so that a flow model can
    predict them from their neighbours.
    """
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.encoder(pixels).float().clamp(-30, 20).chunk(2, dim=1)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        output = vae.decoder(latents)
        half = vae.decoder(F.avg_pool2d(latents, 2)) if with_half else None
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = reconstruction_loss(output, pixels) + KL_WEIGHT * kl
    if half is not None:
        loss = loss + HALF_WEIGHT * reconstruction_loss(half, F.avg_pool2d(pixels, 2))
    return loss


# --- training -----------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), here also
    for convolutions, seen as matrices (out, in * kh * kw). After 400 updates: 25.2 dB, AdamW 20.4 dB."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without torch's closure, which nothing here uses
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                tall = update.shape[0] > update.shape[1]
                matrix = update.T if tall else update
                matrix = matrix / (matrix.norm() + 1e-8)
                for _ in range(5):
                    gram = matrix @ matrix.T
                    matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
                update = matrix.T if tall else matrix
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)


def make_optimizers(vae: AutoencoderKL, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions; AdamW for the outer ones, whose channels are pixels or latents, for
    biases and for norms."""
    outer = ("encoder.conv_in.", "encoder.conv_out.", "decoder.conv_in.", "decoder.conv_out.")
    inner = [p for name, p in vae.named_parameters() if p.ndim == 4 and not name.startswith(outer)]
    taken = {id(p) for p in inner}
    rest = [p for p in vae.parameters() if id(p) not in taken]
    optimizers = [Muon(inner, lr=lr), torch.optim.AdamW(rest, lr=lr / 10, betas=(0.9, 0.99), weight_decay=0.0)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def train(train_set: Images, args: argparse.Namespace) -> AutoencoderKL:
    """`args.updates` updates; writes the asset every `args.save_every` of them."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = AutoencoderKL(**VAE_CONFIG)
    if args.begin:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.begin, torch_dtype=torch.float32).state_dict())
    optimizers = make_optimizers(vae, args.lr)
    start = time.monotonic()
    for update in range(args.updates):
        fraction = update / args.updates
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * min(1.0, (update + 1) / 50, (1 - fraction) / 0.6)
        whole = fraction >= FULL_FROM
        pixels = draw_batch(train_set, rng, 10_000 if whole else CROP, BATCH // 2 if whole else BATCH)
        loss = vae_loss(vae, pixels, with_half=update % 2 == 0)
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if (update + 1) % 100 == 0:
            print(f"update {update + 1}: loss {loss.item():.4f}, {time.monotonic() - start:.0f} s", flush=True)
        if (update + 1) % args.save_every == 0 and update + 1 < args.updates:
            save(vae, train_set, args.out)
    return vae.eval()


# --- the asset ----------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> posterior means (N, 8, H/8, W/8), unscaled."""
    parts = np.array_split(images, max(1, len(images) // 32))
    return torch.cat([vae.encode(to_pixels(part)).latent_dist.mode() for part in parts])


def save(vae: AutoencoderKL, train_set: Images, out: Path) -> None:
    """Shift and scaling factor from every eighth training picture, then config.json and float16 weights."""
    rounded = AutoencoderKL(**VAE_CONFIG)
    rounded.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
    values = torch.cat([encode(rounded, images[::8]).flatten() for images in train_set.values()]).double()
    shift, scale = values.mean().item(), 1 / values.std().item()
    rounded.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
    with replaced(out) as folder:
        rounded.half().save_pretrained(folder)


# --- report -------------------------------------------------------------------------------------------------


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """dB per picture, on RGB in [0, 1] over the whole canvas. (N,)"""
    results = []
    for part in np.array_split(images, max(1, len(images) // 32)):
        pixels = to_pixels(part)
        output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        results.append(((output - pixels) / 2).square().mean(dim=(1, 2, 3)))
    return -10 * torch.cat(results).log10()


def linear_velocity_error(train_latents: Tensor, held_latents: Tensor) -> float:
    """Mean squared error of the best linear guess of noise - latents on held-out latents, averaged over
    t = (i + .5) / 8: how hard the latents are for a flow model that knows only their covariance. 1.57 for
    white noise of unit variance. latents: scaled, (N, C, h, w)."""
    data = train_latents.flatten(1).double()
    mean = data.mean(0)
    covariance = torch.cov((data - mean).T)
    covariance = 0.95 * covariance + 0.05 * covariance.diagonal().diag()  # as many pictures as dimensions
    variances, basis = torch.linalg.eigh(covariance)
    clean = (held_latents.flatten(1).double() - mean) @ basis
    generator, errors = torch.Generator().manual_seed(0), []
    for t in (torch.arange(8) + 0.5).div(8).tolist():
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        guess = (1 - t) * variances / ((1 - t) ** 2 * variances + t**2) * ((1 - t) * clean + t * noise)
        # x_t fixes the noise once the latents are guessed, so its error is the guess' error over t.
        errors.append(((guess - clean) / t).square().mean().item())
    return sum(errors) / len(errors)


def encode_milliseconds(vae: AutoencoderKL, images: np.ndarray, bf16: bool) -> float:
    """Milliseconds per picture, batches of 32, the best of three."""
    pixels, times = to_pixels(images[:32]), []
    for _ in range(4):
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            vae.encode(pixels)
        times.append(time.perf_counter() - start)
    return 1000 * min(times[1:]) / len(pixels)


def report(out: Path, train_set: Images, held_set: Images) -> None:
    """Load the asset as users do and print what docs/tiny-assets.md states."""
    vae = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32).eval()
    for name, images in held_set.items():
        values = psnr(vae, images)
        height, width = images.shape[1:3]
        print(
            f"held-out PSNR {name} ({width}x{height}, {len(images)}): mean {values.mean():.2f} dB, "
            f"median {values.median():.2f}, worst {values.min():.2f}"
        )
    every = torch.cat([psnr(vae, images) for images in held_set.values()])
    print(f"held-out PSNR of all {len(every)}: mean {every.mean():.2f} dB, median {every.median():.2f}")
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents, held = ((encode(vae, images["1:1"]) - shift) * scale for images in (train_set, held_set))
    stds = ", ".join(f"{value:.2f}" for value in latents.std(dim=(0, 2, 3)).tolist())
    white = (encode(vae, np.full((1, 128, 128, 3), 255, np.uint8)) - shift) * scale
    print(f"shift {shift}, scaling {scale}; scaled latents' std per channel: {stds}")
    print(f"a white picture's latents: std over positions {white.std(dim=(2, 3)).mean():.3f}")
    print(f"linear velocity error: {linear_velocity_error(latents, held):.3f}")
    times = [encode_milliseconds(vae, held_set["1:1"], bf16) for bf16 in (False, True)]
    print(f"encode 128x128, {torch.get_num_threads()} threads: fp32 {times[0]:.1f} ms, bf16 {times[1]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=path_option, help="folder of the asset; default: the shipped one's, with --grid tiny-icons'"
    )
    parser.add_argument(
        "--grid", type=path_option, help="folder of five icon sets: SET/icons.json, openmoji/chars.json"
    )
    parser.add_argument(
        "--begin", type=path_option, help="folder of an asset to go on from; default: the seed's weights"
    )
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW's is a tenth of it")
    parser.add_argument("--save-every", type=int, default=600, help="updates between interim assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch; on a busy machine 1 is faster than 2")
    parser.add_argument("--report-only", action="store_true", help="measure the asset that is there")
    args = parser.parse_args()
    args.out = Path(args.out) if args.out else shipped.VAES[SHIPPED_ICONS if args.grid else SHIPPED]
    torch.set_num_threads(args.threads)
    if args.grid:
        collection, grid = tiny_vlm_pictures.load_pictures(Path(args.grid))
        train_set, held_set = split(collection)
    else:
        train_set, held_set = load_pictures()
    start = time.monotonic()
    if not args.report_only:
        save(train(train_set, args), train_set, args.out)
        if args.grid:
            keys = [key for pictures in collection.train.values() for key in pictures.keys]
            tiny_vlm_pictures.write_seen(args.out / "seen.txt.gz", keys, grid)
        print(f"trained in {(time.monotonic() - start) / 60:.1f} minutes")
    report(args.out, train_set, held_set)


if __name__ == "__main__":
    main()
