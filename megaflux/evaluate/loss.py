"""The loss of held-out samples by time, under their own condition and under others.

Mean squared velocity error per sample, as in training (training/objective.py), with noise that is drawn from the seed and the
sample's key alone: the same for each t and each condition. At two sets of times:

    ours    t = (i + 0.5) / 8, i = 0..7: those of validation during training
    mlperf  t = k / 8, k = 0..7: those of MLPerf Training's benchmark flux1 (t = 0 is data there as well)

What MLPerf's loss has beside these times is another thing, so the figures are not comparable with its target: there COCO's
pictures are conditioned by T5 and CLIP, each sample is taken at one t that the data set names, and its noise is not tied to it; here
each is taken at all of them. At t = 0 the model's input is the picture itself and the noise that it should name cannot be seen, so
that loss is that of an unconditional guess, near 1 plus the latents' variance if it knows nothing of them.

Shapes: B samples, 16 times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaflux.evaluate.conditions import EMPTY, Conditions, Given, encode, others
from megaflux.evaluate.samples import Sample
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.training import objective
from megaflux.training.distributed import generator_for
from megaflux.training.objective import Denoising
from megaflux.training.validation import TIMES

TIMES_OF = {"ours": TIMES, "mlperf": [k / 8 for k in range(8)]}
ALL_TIMES = [t for times in TIMES_OF.values() for t in times]


def passes(conditions: Conditions, sample: Sample, other: Sample) -> dict[str, Given]:
    """The conditions by which a sample's loss is taken, by name. other: the sample itself where there is no other."""
    found = {"matched": conditions.matched(sample)}
    if other.key != sample.key:
        found |= conditions.instead(sample, other)
    return found | {"empty": EMPTY}


def batches(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Places of samples of one bucket, at most `size` together."""
    by_bucket: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_bucket.setdefault(sample.bucket.name, []).append(i)
    return [places[start : start + size] for places in by_bucket.values() for start in range(0, len(places), size)]


@torch.no_grad()
def losses(
    models: Models, samples: Sequence[Sample], index: Sequence[int], conditions: Conditions, guidance: float, seed: int
) -> dict[str, list[list[float | None]]]:
    """The losses of a batch: name of a condition -> for each sample of `index`, all of one bucket, 16 losses, at ours and then at
    mlperf's times; null for a sample that has no such condition.

    guidance: the value that FLUX's guidance embedding gets."""
    partners = others(samples)
    here = [samples[i] for i in index]
    by_name = [passes(conditions, samples[i], samples[partners[i]]) for i in index]
    device = models.pooled_projections.device
    latents = latent_ops.encode(models.vae, torch.stack([sample.target for sample in here]).to(device))
    noise = torch.stack(
        [torch.randn(latents.shape[1:], generator=generator_for(seed, "validation", sample.key)) for sample in here]
    ).to(device)
    names = list(dict.fromkeys(name for found in by_name for name in found))
    result: dict[str, list[list[float | None]]] = {}
    for name in names:
        result[name] = [[None] * len(ALL_TIMES) for _ in here]
        rows = [row for row, found in enumerate(by_name) if name in found]
        kind = "empty" if name == "empty" else conditions.kind
        condition = encode(models.trunk, [by_name[row][name] for row in rows], kind)
        for place, t in enumerate(ALL_TIMES):
            times = torch.full((len(rows),), t, device=device)
            given = Denoising(here[0].bucket, latents[rows], condition, times, noise[rows], guidance)
            loss = objective.denoising_loss(models.trainable, models, given)
            for row, value in zip(rows, loss.tolist(), strict=True):
                result[name][row][place] = value
    return result
