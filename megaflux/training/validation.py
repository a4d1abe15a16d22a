"""What a run shows of itself: seeded loss on held-out pictures, and panels of variations.

The loss is plain mean squared error of the velocity at t = (i + 0.5) / 8, i = 0..7, with noise seeded per picture, on
latents of unit variance; once with each picture's own condition (matched) and once with another picture's (shuffled).
gap = shuffled / matched - 1 says how much the model uses its reference: 0 is not at all.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaflux import flow
from megaflux.common.errors import UserError
from megaflux.config.parse import Config
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import read_dataset_info, squarest_bucket
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_image
from megaflux.generation.sampling import flux_pipeline, generate
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition
from megaflux.training.distributed import World, from_main, generator_for, sum_over_ranks
from megaflux.training.frozen import vae_at_hand

TIMES = [(i + 0.5) / 8 for i in range(8)]


@dataclass
class References:
    """Held-out pictures of one bucket, encoded once."""

    keys: list[str]
    pixel_values: Tensor
    """uint8 (N, 3, H, W)."""
    latents: Tensor
    """(N, C, h, w)."""
    hidden_states: Tensor
    """(N, S, D): trunk output of mode image."""
    bucket: Bucket

    def condition(self, models: Models, index: list[int]) -> Condition:
        return models.trunk.from_cache(self.hidden_states[index], self.bucket.height, self.bucket.width)


@torch.no_grad()
def load_references(config: Config, models: Models) -> References:
    """The first `validation.samples` held-out pictures by hash of their key, from the bucket nearest to a square.

    UserError where the dataset holds none back.
    """
    bucket = squarest_bucket(read_dataset_info(config.data.path), "held_out")
    if bucket is None:
        raise UserError(f"{config.data.path}: no held-out pictures; prepare the data with --held-out over 0")
    rows = read_split(config.data.path, "held_out", bucket)
    rows = heapq.nsmallest(config.validation.samples, rows, key=lambda row: _hash(row["key"]))
    pixel_values = torch.stack([from_image(row["image"]) for row in rows])
    encoded = [
        (latent_ops.encode(models.vae, chunk).cpu(), models.trunk.encode(chunk).hidden_states.cpu())
        for chunk in pixel_values.to(models.trunk.device).split(config.train.micro_batch_size)
    ]
    latents, hidden_states = (torch.cat(parts) for parts in zip(*encoded))
    return References([row["key"] for row in rows], pixel_values, latents, hidden_states, bucket)


@torch.no_grad()
def validation_loss(
    model,
    config: Config,
    models: Models,
    references: References,
    world: World,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """{"loss", "shuffled", "gap", "loss_t0".."loss_t7", "shuffled_t0"..}. Collective: each rank takes its share of the pictures.

    on_batch: called after each batch."""
    n, device, micro = len(references.keys), world.device, config.train.micro_batch_size
    sums = torch.zeros(2, len(TIMES), dtype=torch.float64, device=device)
    # Ranks take equally many forward passes, as ZeRO-3 needs it: the last ones repeat a picture with weight 0.
    share = -(-n // world.size)
    mine = [(i % n, float(i < n)) for i in range(world.rank * share, (world.rank + 1) * share)]
    for chunk in (mine[start : start + micro] for start in range(0, share, micro)):
        index, weights = [i for i, _ in chunk], torch.tensor([w for _, w in chunk], device=device)
        latents = references.latents[index].to(device)
        noise = torch.stack([_noise(config, references.keys[i], latents.shape[1:]) for i in index]).to(device)
        others = [(i + 1) % n for i in index]
        for which, source in enumerate((index, others)):
            condition = references.condition(models, source)
            for j, t in enumerate(TIMES):
                times = torch.full((len(index),), t, device=device)
                loss = denoising_loss(model, config, models, references.bucket, latents, noise, condition, times)
                sums[which, j] += (loss * weights).double().sum()
        on_batch()
    sums = sum_over_ranks(sums, world).cpu() / n
    matched, shuffled = sums.mean(1).tolist()
    result = {"loss": matched, "shuffled": shuffled, "gap": shuffled / matched - 1}
    names = [f"{name}_t{j}" for name in ("loss", "shuffled") for j in range(len(TIMES))]
    return result | dict(zip(names, sums.flatten().tolist()))


def denoising_loss(
    model,
    config: Config,
    models: Models,
    bucket: Bucket,
    latents: Tensor,
    noise: Tensor,
    condition: Condition,
    t: Tensor,
) -> Tensor:
    """Mean squared velocity error per sample (B,): the objective itself.

    model: Qwen2VLFlux or the engine around it; latents, noise: (B, C, h, w); t: (B,) in [0, 1].
    """
    x, n = latent_ops.pack(latents.float()), latent_ops.pack(noise.float())  # rounded once, as the model's input
    B, dtype = x.shape[0], models.trainable.connector.weight.dtype
    guidance = None
    if models.trainable.transformer.config.guidance_embeds:
        guidance = torch.full((B,), config.flow.guidance, device=x.device)
    velocity = model(
        condition,
        flow.interpolate(x, n, t).to(dtype),
        t,
        latent_ops.image_ids(bucket.height, bucket.width, x.device),
        models.pooled_projections.expand(B, -1),
        guidance,
    )
    return flow.velocity_loss(velocity, flow.velocity_target(x, n))


@torch.no_grad()
def variations(
    config: Config,
    models: Models,
    references: References,
    index: list[int],
    per_reference: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Variations with seeds seed, seed + 1, ...: uint8 (len(index), per_reference, 3, H, W). on_step: called after each
    step of each batch; what it raises ends them."""
    with vae_at_hand(models):
        return _variations(config, models, references, index, per_reference, seed, on_step)


def _variations(
    config: Config,
    models: Models,
    references: References,
    index: list[int],
    per_reference: int,
    seed: int,
    on_step: Callable[[], None],
) -> Tensor:
    pipeline = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)
    bucket, pictures = references.bucket, []
    chunk = max(1, config.train.micro_batch_size // per_reference)
    for start in range(0, len(index), chunk):
        part = index[start : start + chunk]
        condition = references.condition(models, part).repeated(per_reference)
        seeds = [seed + k for _ in part for k in range(per_reference)]
        images = generate(
            pipeline,
            models.trainable,
            condition,
            models.pooled_projections,
            seeds,
            bucket.height,
            bucket.width,
            config.validation.steps,
            config.flow.guidance,
            on_step,
        )
        pictures.append(images.unflatten(0, (len(part), per_reference)))
    return torch.cat(pictures)


def panel(references: References, index: list[int], pictures: Tensor, border: int = 4) -> Tensor:
    """A sheet of rows [reference | its variations]: uint8 (3, H', W'), grey between.

    index: rows' references; pictures: (rows, columns, 3, H, W) uint8.
    """
    rows = torch.cat([references.pixel_values[index][:, None], pictures], dim=1)
    R, K, _, H, W = rows.shape
    sheet = torch.full((3, R * (H + border) + border, K * (W + border) + 2 * border), 128, dtype=torch.uint8)
    for r in range(R):
        for k in range(K):
            top, left = border + r * (H + border), border + k * (W + border) + (border if k else 0)
            sheet[:, top : top + H, left : left + W] = rows[r, k]
    return sheet


def retrieval_top1(references: References, pictures: Tensor, size: int = 64) -> float:
    """Part of references that are the nearest of all, in RGB at size x size px, to the variation made from them.

    pictures: (N, 3, H, W) uint8, one per reference. Chance is 1 / N.
    """
    small = [
        torch.nn.functional.interpolate(x.float(), (size, size), mode="area").flatten(1)
        for x in (pictures, references.pixel_values)
    ]
    nearest = torch.cdist(*small).argmin(1)
    return (nearest == torch.arange(len(nearest))).float().mean().item()


def _noise(config: Config, key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator_for(config.run.seed, "validation", key))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def due(config: Config, update: int) -> tuple[bool, bool]:
    """Whether a validation loss and a panel are to be made after an update."""
    at_end = update in config.stage_ends()
    loss, panel = (
        every > 0 and update % every == 0 for every in (config.validation.every, config.validation.panel_every)
    )
    return at_end or loss, at_end or panel


def owed(config: Config, update: int, world: World) -> tuple[bool, bool]:
    """Which of `due` an earlier start, that was killed or asked to leave, has not made after the update that it had saved.
    Collective."""
    file = Path(config.run.dir) / "validation.jsonl"
    loss = file.is_file() and f'"update": {update},' in file.read_text()
    made = from_main((loss, picture_file(config.run.dir, update).is_file()), world)
    return tuple(wanted and not there for wanted, there in zip(due(config, update), made))


def picture_file(run_dir: str | Path, update: int) -> Path:
    """Where a run keeps the panel that it made after an update."""
    return Path(run_dir) / "samples" / f"update-{update:07d}.png"


def save_picture(sheet: Tensor, path: Path) -> None:
    """Write uint8 (3, H, W) as PNG: whole, or not at all. Raises OSError."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(unfinished, "PNG")
    unfinished.replace(path)
