"""Seeded loss on held-out pictures.

Mean squared velocity error at t = (i + 0.5) / 8, i = 0..7, with noise seeded per picture, on latents of unit variance;
once with each picture's own condition (matched) and once with another picture's (shuffled, its caption included where captions are
read). gap = shuffled / matched - 1 says how much the model uses its condition: 0 is not at all.

Both at the guidance value of training (the middle of its range), and matched once more at generation's.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.schema import GENERATION_GUIDANCE, Config
from megaflux.data.buckets import Bucket
from megaflux.data.captions import split
from megaflux.data.reference_size import COLUMN
from megaflux.data.references import ReferencePicture, decoded
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

_CPU = torch.device("cpu")
TIMES = [(i + 0.5) / 8 for i in range(8)]
AT_GENERATIONS = f"loss_guidance_{GENERATION_GUIDANCE:g}"


@dataclass
class References:
    """Held-out samples of one bucket, encoded once."""

    keys: list[str]
    pixel_values: Tensor
    """uint8 (N, 3, H, W): the targets, which are their own references where `given` is None."""
    latents: Tensor
    """(N, C, h, w)."""
    conditions: Condition
    """Of all N, on the CPU."""
    bucket: Bucket
    captions: list[str]
    """The first caption of each, "" where it has none; read by Qwen2-VL in mode image_text."""
    mode: Literal["image", "image_text"] = "image"
    given: list[list[ReferencePicture]] | None = None
    """The references of each."""

    def condition(self, models: Models, index: list[int]) -> Condition:
        """The condition of the samples `index`."""
        return self.conditions.rows(index).to(models.trunk.device)


@torch.no_grad()
def load_references(config: Config, models: Models) -> References:
    """The first `validation.samples` held-out pictures, ordered by hash of their key, from the bucket nearest to a square.

    A picture is its own reference and its caption is not read, whatever kinds of condition are drawn. Only in data that have
    references is a sample seen with its first data.references.max ones, and with its caption if image_text is drawn more often than
    image. UserError if the dataset has no held-out pictures.
    """
    bucket = validation_bucket(read_dataset_info(config.data.path), "held_out")
    if bucket is None:
        raise UserError(f"{config.data.path}: no held-out pictures; prepare the data again with a larger --held-out")
    held_out = read_split(config.data.path, "held_out", bucket)
    rows = heapq.nsmallest(config.validation.samples, held_out, key=lambda row: _hash(row["key"]))
    pixel_values = torch.stack([from_image(row["image"]) for row in rows])
    captions = [(split(row["caption"]) or ("",))[0] for row in rows]
    mode, given = _seen_with(config, rows, pixel_values)
    device, micro = models.trunk.device, batch_sizes(config).micro
    latents = torch.cat([latent_ops.encode(models.vae, chunk).cpu() for chunk in pixel_values.to(device).split(micro)])
    if given is None:
        chunks = pixel_values.to(device).split(micro)
        states = torch.cat([models.trunk.encode(chunk).hidden_states.cpu() for chunk in chunks])
        whole = models.trunk.from_cache(states, bucket.height, bucket.width).to(_CPU)
    else:
        pictures = [[one.pixel_values.to(device) for one in each] for each in given]
        strengths = [[one.strength for one in each] for each in given]
        whole = models.trunk.encode_references(pictures, captions, mode, strengths, at_once=micro).to(_CPU)
    return References([row["key"] for row in rows], pixel_values, latents, whole, bucket, captions, mode, given)


def _seen_with(
    config: Config, rows: list[dict[str, Any]], targets: Tensor
) -> tuple[Literal["image", "image_text"], list[list[ReferencePicture]] | None]:
    """(the mode of the chat turns, the references of each sample or None: the targets)."""
    most = config.data.references.max
    if not most or not rows or COLUMN not in rows[0]:
        return "image", None
    given = [decoded(row[COLUMN])[:most] for row in rows]
    given = [each or [ReferencePicture(targets[i], 1.0, rows[i]["key"])] for i, each in enumerate(given)]
    modes = config.data.condition
    return "image_text" if modes.image_text > modes.image else "image", given


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
