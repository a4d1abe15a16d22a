"""Pictures of conditions, made as a user of the pipeline would, but many conditions at a time.

Shapes: B pictures of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from megaflux.data.buckets import Bucket
from megaflux.evaluate.conditions import Given
from megaflux.generation.condition import Encoded, PromptEmbeds, prompt_embeds
from megaflux.generation.dots.dots import NEUTRAL
from megaflux.generation.pipeline import Qwen2VLFluxPipeline
from megaflux.generation.request import Reference
from megaflux.generation.sampling import SamplingRequest, decoding_in_chunks, flux_pipeline, sample, scheduler_like
from megaflux.generation.true_cfg import TrueCfg, encode_negative
from megaflux.models import latents as latent_ops

Change = Callable[[Tensor], Tensor]


class Maker(Protocol):
    """What makes pictures of conditions."""

    def length(self, given: Given) -> int:
        """How many tokens a condition has: those of one length are made together."""

    def make(self, given: Sequence[Given], seeds: Sequence[int], bucket: Bucket) -> Tensor:
        """A picture of each condition and its seed: uint8 (B, 3, H, W)."""

    def round_trip(self, pictures: Tensor, change: Change | None = None) -> Tensor:
        """uint8 (B, 3, H, W) encoded and decoded by the VAE: the best that any model of its latents can do. change: of the scaled latents
        (B, C, h, w) between."""


@dataclass
class PipelineMaker:
    """Pictures of the public pipeline: what `pipeline(references, prompt, seed=..., ...)` gives, up to the last bits, which depend on
    the batch."""

    pipeline: Qwen2VLFluxPipeline
    steps: int
    guidance: float
    cfg: float = 1.0

    def length(self, given: Given) -> int:
        trunk = self.pipeline.models.trunk
        grids = [trunk.grid(*one.pixel_values.shape[-2:]) for one in given.references]
        words = min(trunk.caption_tokens(given.words), trunk.max_caption_tokens) if given.words else 0
        return max(1, sum(rows * columns for rows, columns in grids) + words)

    @torch.no_grad()
    def make(self, given: Sequence[Given], seeds: Sequence[int], bucket: Bucket) -> Tensor:
        pipeline, models = self.pipeline, self.pipeline.models
        embedder = None if models.t5 is None else models.t5.embedder
        embeds = [prompt_embeds(self._encoded(one), NEUTRAL, seed, embedder) for one, seed in zip(given, seeds)]
        cfg = None
        if self.cfg != 1:
            encoder = pipeline.settings.text_encoders[0]
            away, _ = encode_negative(models, pipeline.settings, "", encoder, models.trainable.fused)
            cfg = TrueCfg(self.cfg, away)
        request = SamplingRequest(bucket.height, bucket.width, self.steps, self.guidance, output_type="pt", cfg=cfg)
        transformer = models.trainable.transformer
        scheduler = scheduler_like(models.scheduler, None, transformer.dtype)
        flux = flux_pipeline(transformer, models.vae, scheduler)
        made = torch.zeros(len(embeds), 3, bucket.height, bucket.width, dtype=torch.uint8)
        by_length: dict[int, list[int]] = {}
        for i, one in enumerate(embeds):
            by_length.setdefault(one.prompt_embeds.shape[1], []).append(i)
        with decoding_in_chunks(models.vae, len(embeds), bucket.height, bucket.width):
            for index in by_length.values():
                generators = [torch.Generator().manual_seed(seeds[i]) for i in index]
                images = sample(flux, models, PromptEmbeds.cat([embeds[i] for i in index]), generators, request)
                made[index] = (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
        return made

    def round_trip(self, pictures: Tensor, change: Change | None = None) -> Tensor:
        vae = self.pipeline.models.vae
        latents = latent_ops.encode(vae, pictures)
        return latent_ops.decode(vae, latents if change is None else change(latents)).cpu()

    def _encoded(self, given: Given) -> Encoded:
        if given.empty:
            models, embedded = self.pipeline.models, self.pipeline.models.trainable.fused
            return Encoded([], models.trainable.encode_condition(models.trunk.empty(1), embedded), None, embedded)
        references = [Reference(_picture(one.pixel_values), one.strength) for one in given.references]
        return self.pipeline.encode_all(references, given.words)


def _picture(pixel_values: Tensor) -> Image.Image:
    return Image.fromarray(pixel_values.permute(1, 2, 0).contiguous().cpu().numpy())
