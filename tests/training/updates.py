"""What one update of a tiny model is given, drawn from a generator."""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux.config.schema import Config
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import Models
from megaflux.training.engine import StageEngine
from megaflux.training.objective import Denoising, denoising_loss


def wake(models: Models, generator: torch.Generator) -> None:
    """Take FLUX away from the zeros of a fresh model, which would keep most gradients at zero."""
    with torch.no_grad():
        for parameter in models.trainable.transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def drawn_losses(engine: StageEngine, config: Config, models: Models, generator: torch.Generator) -> Tensor:
    """Losses (2,) of a micro-batch of two pictures of 64 px."""
    condition = models.trunk.encode(torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8))
    latents, noise = torch.randn(2, 2, 8, 8, 8, generator=generator)
    t = torch.tensor([0.3, 0.8])
    given = Denoising(Bucket("1:1", 64, 64), latents, condition, t, noise, config.flow.middle_guidance)
    return denoising_loss(engine, models, given)
