"""Which reference pictures condition a sample, and how they are altered: functions of the run's seed, the update and the
sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.config.data import Data, References
from megaflux.data.batches import Batch
from megaflux.data.references import ReferencePicture
from megaflux.training.distributed import generator_for


def draw_references(
    config: Data, seed: int, update: int, samples: Sequence[tuple[str, int]], drawn_index: int, batch: Batch
) -> list[list[ReferencePicture]] | None:
    """The pictures that condition each sample, in stored order; None: all are their own references, unaltered.

    samples: (key, how often the rank has met it before in this update). drawn_index: which of the update's drawn batches this one
    was cut from: the number of references is drawn once for each. A sample with more than that many has some of them drawn, with
    fewer it has all, without any it is its own."""
    count = draw_count(config.references, seed, update, drawn_index)
    alters = config.reference_crop < 1 or config.reference_flip > 0
    stored = batch.references if batch.references is not None and count else [[] for _ in samples]
    if not alters and not any(stored):
        return None
    chosen = []
    for i, (sample, own) in enumerate(zip(samples, stored, strict=True)):
        if len(own) > count:
            generator = generator_for(seed, "references", update, *sample)
            own = [own[place] for place in sorted(torch.randperm(len(own), generator=generator)[:count].tolist())]
        if not own:
            assert batch.pixel_values is not None  # the loader gives pictures where the trunk is not cached
            own = [ReferencePicture(batch.pixel_values[i], 1.0, sample[0])]
        if alters:
            own = [
                one._replace(pixel_values=altered(one.pixel_values, config, (seed, update, *sample, place)))
                for place, one in enumerate(own)
            ]
        chosen.append(own)
    return chosen


def draw_count(references: References, seed: int, update: int, drawn_index: int) -> int:
    """The number of references of a drawn global batch, the same on all ranks."""
    numbers = references.max - references.min + 1
    if numbers == 1:
        return references.min
    u = torch.rand((), generator=generator_for(seed, "reference_count", update, drawn_index)).item()
    return references.min + int(u * numbers)


def altered(picture: Tensor, config: Data, names: tuple[object, ...]) -> Tensor:
    """A reference uint8 (3, H, W), cropped and mirrored as data.reference_crop and reference_flip say, at the same size: the number
    of its tokens stays what it was. names: of the draw."""
    generator = generator_for("altered", *names)
    share, down, right, flip = torch.rand(4, generator=generator).tolist()
    _, H, W = picture.shape
    if config.reference_crop < 1:
        side = (config.reference_crop + (1 - config.reference_crop) * share) ** 0.5
        height, width = max(1, round(side * H)), max(1, round(side * W))
        top, left = round(down * (H - height)), round(right * (W - width))
        part = picture[None, :, top : top + height, left : left + width].float()
        whole = F.interpolate(part, (H, W), mode="bilinear", antialias=True, align_corners=False)
        picture = whole[0].round().clamp(0, 255).to(torch.uint8)
    return picture.flip(-1) if flip < config.reference_flip else picture
