"""Seeded loss on held-out pictures.

Mean squared velocity error at t = (i + 0.5) / 8, i = 0..7, with noise seeded per picture, on latents of unit variance;
once with each picture's own condition (matched) and once with another picture's (shuffled). gap = shuffled / matched - 1
says how much the model uses its reference: 0 is not at all.

Both at the guidance value of training (the middle of its range), and matched once more at generation's.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import GENERATION_GUIDANCE, Config
from megaflux.data.buckets import Bucket
from megaflux.data.storage.dataset import read_dataset_info, validation_bucket
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_image
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition
from megaflux.training import objective
from megaflux.training.distributed import generator_for, sum_over_ranks
from megaflux.training.ds_config import batch_sizes
from megaflux.training.objective import Denoising

TIMES = [(i + 0.5) / 8 for i in range(8)]
AT_GENERATIONS = f"loss_guidance_{GENERATION_GUIDANCE:g}"


@dataclass
class References:
    """Held-out pictures of one bucket, encoded once."""

    keys: list[str]
    pixel_values: Tensor
    """uint8 (N, 3, H, W)."""
    latents: Tensor
    """(N, C, h, w)."""
    hidden_states: Tensor
    """(N, S, D): output of the trunk in mode image."""
    bucket: Bucket

    def condition(self, models: Models, index: list[int]) -> Condition:
        """The condition of the pictures `index`."""
        return models.trunk.from_cache(self.hidden_states[index], self.bucket.height, self.bucket.width)


@torch.no_grad()
def load_references(config: Config, models: Models) -> References:
    """The first `validation.samples` held-out pictures, ordered by hash of their key, from the bucket nearest to a square.

    UserError if the dataset has no held-out pictures.
    """
    bucket = validation_bucket(read_dataset_info(config.data.path), "held_out")
    if bucket is None:
        raise UserError(f"{config.data.path}: no held-out pictures; prepare the data again with a larger --held-out")
    held_out = read_split(config.data.path, "held_out", bucket)
    rows = heapq.nsmallest(config.validation.samples, held_out, key=lambda row: _hash(row["key"]))
    pixel_values = torch.stack([from_image(row["image"]) for row in rows])
    encoded = [
        (latent_ops.encode(models.vae, chunk).cpu(), models.trunk.encode(chunk).hidden_states.cpu())
        for chunk in pixel_values.to(models.trunk.device).split(batch_sizes(config).micro)
    ]
    latents, hidden_states = (torch.cat(parts) for parts in zip(*encoded))
    return References([row["key"] for row in rows], pixel_values, latents, hidden_states, bucket)


@torch.no_grad()
def validation_loss(
    model: Callable[..., Tensor],
    config: Config,
    models: Models,
    references: References,
    world: World,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """{"loss", "shuffled", "gap", "loss_guidance_3.5", "loss_t0".."loss_t7", "shuffled_t0"..}, without the shuffled ones and the
    gap if there is one reference only, and without loss_guidance_3.5 for a FLUX without guidance embedding. Collective: each rank
    computes its share.

    on_batch: called after each batch."""
    n, device, micro = len(references.keys), world.device, batch_sizes(config).micro
    passes = _passes(config, n > 1, models.trainable.transformer.config["guidance_embeds"])
    sums = torch.zeros(len(passes), len(TIMES), dtype=torch.float64, device=device)
    # Under ZeRO-3 all ranks must call the model equally often: the last ones repeat a picture with weight 0.
    share = -(-n // world.size)
    mine = [(i % n, float(i < n)) for i in range(world.rank * share, (world.rank + 1) * share)]
    for chunk in (mine[start : start + micro] for start in range(0, share, micro)):
        index, weights = [i for i, _ in chunk], torch.tensor([w for _, w in chunk], device=device)
        latents = references.latents[index].to(device)
        noise = torch.stack([_noise(config, references.keys[i], latents.shape[1:]) for i in index]).to(device)
        for which, each in enumerate(passes):
            condition = references.condition(models, [(i + each.shift) % n for i in index])
            for j, t in enumerate(TIMES):
                times = torch.full((len(index),), t, device=device)
                given = Denoising(references.bucket, latents, condition, times, noise, each.guidance)
                loss = objective.denoising_loss(model, models, given)
                sums[which, j] += (loss * weights).double().sum()
        on_batch()
    sums = sum_over_ranks(sums, world).cpu() / n
    names = [each.name for each in passes]
    by_time, result = dict(zip(names, sums.tolist(), strict=True)), dict(zip(names, sums.mean(1).tolist(), strict=True))
    if "shuffled" in result:
        result["gap"] = result["shuffled"] / result["loss"] - 1
    if models.trainable.transformer.config["guidance_embeds"]:
        result.setdefault(AT_GENERATIONS, result["loss"])
    shown = ("loss", "shuffled")
    return result | {f"{name}_t{j}": loss for name in shown for j, loss in enumerate(by_time.get(name, ()))}


class _Pass(NamedTuple):
    """One loss of every picture."""

    name: str
    shift: int
    """A picture gets the condition of the one so many places after it."""
    guidance: float


def _passes(config: Config, shuffled: bool, guided: bool) -> list[_Pass]:
    """shuffled: whether there is another picture's condition. guided: whether FLUX embeds a guidance value."""
    middle = config.flow.middle_guidance
    passes = [_Pass("loss", 0, middle)]
    if shuffled:
        passes.append(_Pass("shuffled", 1, middle))
    if guided and middle != GENERATION_GUIDANCE:
        passes.append(_Pass(AT_GENERATIONS, 0, GENERATION_GUIDANCE))
    return passes


def _noise(config: Config, key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(tuple(shape), generator=generator_for(config.run.seed, "validation", key))


def _hash(key: Any) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
