"""Heat maps: token weights or attention mass shown over a reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megaflux.generation.dots.dots import Dot

SIDE = 768  # px: longer side of a heat map, large enough for the grid's lines to be seen
# Tokens below the neutral weight are tinted with OUT, those above it with BOOSTED.
OUT, BOOSTED = np.array([20, 24, 60]), np.array([255, 120, 0])


def heat_map(
    picture: Image.Image, weights: np.ndarray, dots: Sequence[Dot] = (), neutral: float = 1.0, side: int = SIDE
) -> Image.Image:
    """The picture with its tokens' weights (H, W), grid lines and the dots' circles over it: RGB, longer side `side` px.

    A token of the neutral weight keeps its colours; below it, tokens darken towards weight 0; above it, they turn orange
    towards the largest weight.
    """
    weights = np.asarray(weights, dtype=float)
    scale = side / max(picture.size)
    width, height = (max(1, round(length * scale)) for length in picture.size)
    base = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=float)
    rows, columns = weights.shape
    cells = weights[(np.arange(height) * rows // height)[:, None], (np.arange(width) * columns // width)[None, :]]
    below = np.clip((neutral - cells) / neutral, 0, 1)[..., None] if neutral > 0 else np.zeros((*cells.shape, 1))
    top = max(float(weights.max()) - neutral, 1e-9)
    above = np.clip((cells - neutral) / top, 0, 1)[..., None]
    shaded = base * (1 - 0.85 * below) + OUT * 0.85 * below
    shaded = shaded * (1 - 0.6 * above) + BOOSTED * 0.6 * above
    image = Image.fromarray(shaded.round().clip(0, 255).astype(np.uint8))
    draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(18)
    for fill, shift in (((255, 255, 255, 60), 0), ((0, 0, 0, 70), 1)):  # light and dark, visible on any picture
        for row in range(1, rows):
            draw.line([(0, row * height / rows + shift), (width, row * height / rows + shift)], fill=fill)
        for column in range(1, columns):
            draw.line([(column * width / columns + shift, 0), (column * width / columns + shift, height)], fill=fill)
    for dot in dots:
        x, y, radius = dot.x * width, dot.y * height, dot.radius * min(width, height)
        colour = (255, 160, 0) if dot.weight >= neutral else (90, 140, 255)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour, width=3)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        draw.text(
            (x + 8, y - 9), f"{dot.weight:g}", fill=(255, 255, 255), stroke_width=2, stroke_fill=(0, 0, 0), font=font
        )
    return image


def attention_picture(picture: Image.Image, mass: np.ndarray, side: int = SIDE) -> Image.Image:
    """The picture, bright where the generated picture attended. mass: (H, W), at least 0; the largest keeps its colours."""
    mass = np.asarray(mass, dtype=float)
    return heat_map(picture, mass / max(float(mass.max()), 1e-30), neutral=1.0, side=side)
