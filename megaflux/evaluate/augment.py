"""How training pictures of the judge are altered: their maps for contents, their ink and latents for styles.

Shapes: N pictures, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def varied(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Moved, tinted and with a hole: like maps (N, 8 + 3, H, W)."""
    n, side = len(maps), maps.shape[-1]

    def between(low: float, high: float, *size: int) -> Tensor:
        return torch.empty(n, *size).uniform_(low, high, generator=generator)

    maps = _moved(maps, generator, 0.05)
    mix = torch.eye(3) + between(-0.2, 0.2, 3, 3)
    grey = (between(0, 1, 1, 1) < 0.1).float()
    mix = (mix * (1 - grey) + grey / 3) * between(0.7, 1.3, 1, 1)
    colour = torch.bmm(mix, maps[:, -3:].flatten(2)).view(n, 3, side, side)
    edges = maps[:, :-3] * between(0.8, 1.2, maps.shape[1] - 3, 1, 1)
    y, x = (torch.rand(2, n, generator=generator) * side).long()
    places, reach = torch.arange(side), side // 8
    hole = ((places.view(1, -1, 1) - y.view(-1, 1, 1)).abs() <= reach) & (
        (places.view(1, 1, -1) - x.view(-1, 1, 1)).abs() <= reach
    )
    hole &= between(0, 1, 1, 1) < 0.5
    return torch.cat([edges, colour], dim=1).masked_fill(hole[:, None], 0.0)


def off(ink_of: Tensor, generator: torch.Generator) -> Tensor:
    """Ink (N, 3, H, W) with each picture's colours and each pixel a little off, as a VAE leaves them."""

    def drawn(amount: float, *shape: int) -> Tensor:
        return amount * torch.randn(*shape, generator=generator)

    n, channels, height, width = ink_of.shape
    patches = F.interpolate(drawn(0.04, n, channels, height // 8, width // 8), (height, width), mode="bilinear")
    off = ink_of * (1 + drawn(0.04, n, channels, 1, 1) + patches) + drawn(0.02, *ink_of.shape) + drawn(0.01, n, 1, 1, 1)
    return off.clamp(0, 1)


def soft(ink_of: Tensor) -> Tensor:
    """Ink (N, 3, H, W) at half its size and back."""
    return F.interpolate(F.avg_pool2d(ink_of, 2), scale_factor=2, mode="bilinear")


def disturbed(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents (B, C, h, w), unit variance, as a model that is not quite right makes them: of each picture a share blurred, and
    noise, both fine and of the whole layout, of any strength up to about half of their own deviation."""

    def strength(most: float) -> Tensor:
        return most * torch.rand(len(latents), 1, 1, 1, generator=generator)

    def noise(*side: int) -> Tensor:
        return torch.randn(*latents.shape[:2], *side, generator=generator)

    size = latents.shape[-2:]
    blurred = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)
    fine, coarse = noise(*size), F.interpolate(noise(4, 4), size, mode="bilinear")
    amount, share = strength(0.6).to(latents), strength(0.6).to(latents)
    return latents.lerp(blurred, share) + amount * fine.to(latents) + strength(0.5).to(latents) * coarse.to(latents)


def _moved(maps: Tensor, generator: torch.Generator, shift: float) -> Tensor:
    """Turned, stretched and shifted a little: like maps (N, C, H, W)."""
    n = len(maps)

    def between(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    angle, scale, aspect = between(-0.1, 0.1), between(-0.1, 0.1).exp(), between(-0.08, 0.08).exp()
    cos, sin = angle.cos(), angle.sin()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale * aspect, -sin * scale
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale, cos * scale / aspect
    theta[:, 0, 2], theta[:, 1, 2] = between(-2 * shift, 2 * shift), between(-2 * shift, 2 * shift)
    return F.grid_sample(maps, F.affine_grid(theta, list(maps.shape), align_corners=False), align_corners=False)
