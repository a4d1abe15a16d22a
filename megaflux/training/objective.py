"""The objective: flow matching on latents, conditioned by Qwen2-VL, and all that an update draws at random for it.

    x_t = (1 - t) latents + t noise     the model's input; t = 0 is data, t = 1 is noise
    loss = mean((velocity(x_t, t, condition) - (noise - latents))^2)     per sample

What is drawn (t, noise, the guidance value, the kind of condition, which caption) is a function of the run's seed, the update and
the sample, which is its key and how often the rank has met it before in the same update: a bucket that is smaller than a batch
repeats samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megaflux import flow
from megaflux.common.transfer import pins, to_device
from megaflux.config.data import ConditionModes, Kind
from megaflux.config.schema import Config, Flow
from megaflux.data.batches import Batch
from megaflux.data.buckets import Bucket
from megaflux.data.captions import split
from megaflux.models import latents as latent_ops
from megaflux.models.latents import PACK
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition
from megaflux.training.distributed import generator_for
from megaflux.training.references import draw_references


@dataclass(frozen=True)
class Denoising:
    """What the model has to denoise: B samples of one bucket, each with a time, noise and a condition."""

    bucket: Bucket
    latents: Tensor
    """(B, C, h, w), unit variance."""
    condition: Condition
    t: Tensor
    """(B,) in [0, 1]; 0 is data."""
    noise: Tensor
    """(B, C, h, w)."""
    guidance: Tensor | float
    """(B,), or one value for all: for FLUX's guidance embedding; ignored where it has none."""


class Sample(NamedTuple):
    """A sample of an update."""

    key: str
    nth: int
    """How often this rank has met the key before in this update."""


def count_up(keys: list[str], times_seen: Counter[str]) -> list[Sample]:
    """The samples of a micro-batch. times_seen: by key, in this update; counted up here."""
    samples = []
    for key in keys:
        samples.append(Sample(key, times_seen[key]))
        times_seen[key] += 1
    return samples


def denoising_loss(model: Callable[..., Tensor], models: Models, inputs: Denoising) -> Tensor:
    """Mean squared velocity error per sample (B,), float32. model: Qwen2VLFlux, or the engine around it."""
    # Rounded once, as the model's input.
    x, n = latent_ops.pack(inputs.latents.float()), latent_ops.pack(inputs.noise.float())
    B, dtype = x.shape[0], models.trainable.connector.weight.dtype
    guidance = None
    if models.trainable.transformer.config["guidance_embeds"]:
        given = inputs.guidance
        guidance = given if isinstance(given, Tensor) else torch.full((B,), given, device=x.device)
    velocity = model(
        inputs.condition,
        flow.interpolate(x, n, inputs.t).to(dtype),
        inputs.t,
        latent_ops.image_ids(inputs.bucket.height, inputs.bucket.width, x.device),
        models.pooled_projections.expand(B, -1),
        guidance,
    )
    return flow.velocity_loss(velocity, flow.velocity_target(x, n))


def encode_latents(config: Config, models: Models, batch: Batch, update: int) -> Tensor:
    """Latents (B, C, h, w) of a batch: from the cache, or of its pixel values by the VAE."""
    if batch.latents is not None:
        return batch.latents
    generators = None
    if config.data.sample_posterior:
        generators = [generator_for(config.run.seed, "posterior", update, key) for key in batch.keys]
    assert batch.pixel_values is not None  # the loader gives pictures unless latents are cached
    return latent_ops.encode(models.vae, batch.pixel_values, generators)


def encode_condition(
    config: Config, models: Models, batch: Batch, samples: list[Sample], update: int, drawn_index: int
) -> Condition:
    """The frozen trunk's hidden states of a batch: from the cache, or of its references and captions by Qwen2-VL. A sample without
    references is its own.

    samples: the batch's, for which one of several captions and some of several references are drawn. drawn_index: which of the
    update's drawn batches this micro-batch was cut from. The kind of condition (image, image and text, text, none) and the number
    of references are drawn once for each, the same on all ranks and however it is cut."""
    kind = draw_kind(config.data.condition, config.run.seed, update, drawn_index)
    if kind == "none":
        return models.trunk.empty(len(batch.keys))
    if kind == "image" and batch.hidden_states is not None:
        return models.trunk.from_cache(batch.hidden_states, batch.bucket.height, batch.bucket.width)
    captions = batch.captions
    if kind != "image":
        captions = draw_captions(config.data.caption_weights, config.run.seed, update, samples, captions)
    drawn = (
        None if kind == "text" else draw_references(config.data, config.run.seed, update, samples, drawn_index, batch)
    )
    if drawn is None:
        return models.trunk.encode(batch.pixel_values, captions, kind)
    pictures = [[one.pixel_values for one in each] for each in drawn]
    return models.trunk.encode_references(pictures, captions, kind, [[one.strength for one in each] for each in drawn])


def draw_time_and_noise(
    config: Flow, seed: int, update: int, samples: list[Sample], latents: Tensor
) -> tuple[Tensor, Tensor]:
    """t (B,) and noise like latents (B, C, h, w), float32 on latents' device, one generator per sample.

    The resolution shift goes by the image tokens, h w / 4. Only the shape of latents is read, so the host draws while a GPU
    still computes them.
    """
    z = torch.empty(len(samples))
    noise = torch.empty(len(samples), *latents.shape[1:], pin_memory=pins(latents.device))
    for i, sample in enumerate(samples):
        generator = generator_for(seed, "noise", update, *sample)
        z[i].normal_(generator=generator)
        noise[i].normal_(generator=generator)
    t = flow.time_from_normal(z, config.density, config.logit_mean, config.logit_std)
    num_tokens = latents[0, 0].numel() // PACK**2
    t = flow.shift_time(t, flow.shift_factor(config.shift, num_tokens))
    return to_device(t, latents.device), noise.to(latents.device, non_blocking=True)


def draw_guidance(config: Flow, seed: int, update: int, samples: list[Sample], device: torch.device) -> Tensor | float:
    """The guidance value of training, or (B,) float32 on the device: one drawn from its range for each sample."""
    if not isinstance(config.guidance, tuple):
        return config.guidance
    least, most = config.guidance
    u = [torch.rand((), generator=generator_for(seed, "guidance", update, *sample)) for sample in samples]
    return to_device(least + (most - least) * torch.stack(u), device)


def draw_captions(
    weights: Sequence[float] | None, seed: int, update: int, samples: list[Sample], stored: list[str]
) -> list[str]:
    """One caption of each sample; "" where it has none.

    stored: the samples' column `caption`. weights: data.caption_weights, of an image's captions in order; those without a
    weight are never drawn, and where no caption has one above 0, all are alike. A sample with one caption draws nothing.
    """
    drawn = []
    for sample, text in zip(samples, stored, strict=True):
        texts = split(text)
        if len(texts) > 1:
            u = torch.rand((), dtype=torch.float64, generator=generator_for(seed, "caption", update, *sample)).item()
            text = texts[_chosen(u, shares_of(weights, len(texts)))]
        drawn.append(text)
    return drawn


def shares_of(weights: Sequence[float] | None, captions: int) -> list[float]:
    """How often each of an image's captions is drawn, relative to its others."""
    shares = list(weights or ())[:captions]
    if not any(shares):
        return [1.0] * captions
    return shares + [0.0] * (captions - len(shares))


def _chosen(u: float, shares: list[float]) -> int:
    """The place that u in [0, 1) falls on, where each place is as wide as its share."""
    reached, total = 0.0, math.fsum(shares)
    places = [place for place, share in enumerate(shares) if share > 0]
    for place in places[:-1]:
        reached += shares[place]
        if u * total < reached:
            return place
    return places[-1]


def draw_kind(modes: ConditionModes, seed: int, update: int, drawn_index: int) -> Kind:
    """The kind of condition of one global batch as it was drawn, the same on all ranks, so that no rank skips a parameter."""
    u = torch.rand((), generator=generator_for(seed, "mode", update, drawn_index)).item()
    reached = 0.0
    for kind in modes.drawn[:-1]:
        reached += modes.probabilities[kind]
        if u < reached:
            return kind
    return modes.drawn[-1]
