"""What a run shows: variations of held-out pictures, their contact sheet, and how often the nearest reference is the
right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from megaflux.config.schema import GENERATION_GUIDANCE, Config
from megaflux.models.pretrained import Models
from megaflux.training.ds_config import batch_sizes
from megaflux.training.frozen import vae_at_hand
from megaflux.training.validation import References


@torch.no_grad()
def variations(
    config: Config,
    models: Models,
    references: References,
    index: Sequence[int],
    per_reference: int,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
    guidance: float = GENERATION_GUIDANCE,
) -> Tensor:
    """Variations of the references `index`, with seeds seed, seed + 1, ...: uint8 (len(index), per_reference, 3, H, W).

    on_step: called after each step of each batch; what it raises ends the sampling."""
    # Here, because diffusers' pipelines would make every start half a second longer.
    from megaflux.generation.sampling import SamplingRequest, flux_pipeline, generate

    bucket, pictures = references.bucket, []
    chunk = max(1, batch_sizes(config).micro // per_reference)
    with vae_at_hand(models):
        request = SamplingRequest(bucket.height, bucket.width, config.validation.steps, guidance)
        pipeline = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)
        for start in range(0, len(index), chunk):
            part = list(index[start : start + chunk])
            condition = references.condition(models, part).repeated(per_reference)
            seeds = [seed + k for _ in part for k in range(per_reference)]
            images = generate(pipeline, models, condition, seeds, request, on_step)
            pictures.append(images.unflatten(0, (len(part), per_reference)))
    return torch.cat(pictures)


def contact_sheet(references: References, index: Sequence[int], pictures: Tensor, border: int = 4) -> Tensor:
    """Rows [reference | its variations] as one picture: uint8 (3, H', W'), grey between. Where samples have references of their own,
    rows [first reference | target | variations].

    index: the references of the rows. pictures: uint8 (rows, columns, 3, H, W)."""
    rows = torch.cat([references.pixel_values[list(index)][:, None], pictures], dim=1)
    if references.given is not None:
        size = rows.shape[-2:]
        first = [_within(references.given[i][0].pixel_values, *size) for i in index]
        rows = torch.cat([torch.stack(first)[:, None], rows], dim=1)
    R, K, _, H, W = rows.shape
    sheet = torch.full((3, R * (H + border) + border, K * (W + border) + 2 * border), 128, dtype=torch.uint8)
    for r in range(R):
        for k in range(K):
            top, left = border + r * (H + border), border + k * (W + border) + (border if k else 0)
            sheet[:, top : top + H, left : left + W] = rows[r, k]
    return sheet


def _within(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture uint8 (3, h, w) scaled to lie within a white one of height x width px."""
    scale = min(height / picture.shape[-2], width / picture.shape[-1])
    h, w = (
        max(1, min(most, round(side * scale))) for side, most in zip(picture.shape[-2:], (height, width), strict=True)
    )
    small = torch.nn.functional.interpolate(picture[None].float(), (h, w), mode="bilinear", antialias=True)[0]
    canvas = torch.full((3, height, width), 255, dtype=torch.uint8)
    top, left = (height - h) // 2, (width - w) // 2
    canvas[:, top : top + h, left : left + w] = small.round().clamp(0, 255).to(torch.uint8)
    return canvas


def retrieval_top1(references: References, pictures: Tensor, size: int = 64) -> float:
    """The share of variations that lie nearest, of all references, to the one that they were made from: RGB distance at
    size x size px.

    pictures: uint8 (N, 3, H, W), one per reference. Chance is 1 / N."""
    made, given = (
        torch.nn.functional.interpolate(x.float(), (size, size), mode="area").flatten(1)
        for x in (pictures, references.pixel_values)
    )
    nearest = torch.cdist(made, given).argmin(1)
    return (nearest == torch.arange(len(nearest))).float().mean().item()


def picture_file(run_dir: str | Path, update: int) -> Path:
    """Where a run keeps the panel that it made after an update."""
    return Path(run_dir) / "samples" / f"update-{update:07d}.png"


def save_picture(sheet: Tensor, path: Path) -> None:
    """Write uint8 (3, H, W) as PNG, completely or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(unfinished, "PNG")
    unfinished.replace(path)
