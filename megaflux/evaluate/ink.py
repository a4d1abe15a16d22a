"""What the judge sees of a picture: its ink, brought to one size and place, as edges by direction and as colour.

Ink is 1 - colour, so that white is 0. The box that holds all but a sliver of it is scaled to a square, because hands draw one thing at
different sizes, and what a thing is does not depend on that. A hand is told by the whole picture and its palette. Edges by
direction (histograms of oriented gradients: Dalal and Triggs, CVPR 2005) are much the same whether a hand fills shapes or outlines
them.

Shapes: N pictures, S = 64 px.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
CANVAS = 128  # px: the square in which the box is looked for
DIRECTIONS = 8
LEVELS = 16  # of each colour in a palette: hands that look alike differ in exact colours
STEPS = (
    0.0,
    0.004,
    0.01,
    0.02,
    0.04,
    0.08,
    0.15,
    0.25,
    0.4,
    0.6,
    0.8,
    2.0,
)  # between neighbouring pixels, in a palette
PALETTE = LEVELS**3 + 2 * (len(STEPS) - 1)
SLIVER = 0.004  # share of the ink that may lie outside the box, at each of its sides
FAINT = 0.06  # ink below this is paper: made pictures are not perfectly white
FILLS = 0.94  # of the square, by the box


def on_square(picture: Tensor) -> Tensor:
    """uint8 (3, H, W) -> ink (3, 128, 128) in [0, 1], the picture's shape kept."""
    _, height, width = picture.shape
    ink = 1 - picture[None].float() / 255
    if height != width:
        side = max(height, width)
        across, down = side - width, side - height
        ink = F.pad(ink, (across // 2, across - across // 2, down // 2, down - down // 2))
    return (F.interpolate(ink, (CANVAS, CANVAS), mode="area") if ink.shape[-1] != CANVAS else ink)[0]


def centred(ink: Tensor) -> Tensor:
    """Ink (N, 3, 128, 128) -> (N, 3, 64, 64): the box with the ink, as large as fits; half of its elongation is taken away."""
    mass = (ink.amax(dim=1) - FAINT).clamp_min(0)
    top, bottom = _ends(mass.sum(dim=2))
    left, right = _ends(mass.sum(dim=1))
    half = torch.stack([(right - left) / 2, (bottom - top) / 2], dim=1).clamp_min(2 / CANVAS)
    half = (half * half.amax(dim=1, keepdim=True)).sqrt() / FILLS
    theta = torch.zeros(len(ink), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = half[:, 0], half[:, 1]
    theta[:, 0, 2], theta[:, 1, 2] = (left + right) / 2, (top + bottom) / 2
    grid = F.affine_grid(theta, [len(ink), 3, 2 * SIDE, 2 * SIDE], align_corners=False)
    return F.avg_pool2d(F.grid_sample(ink, grid, align_corners=False), 2)


def inks(pictures: Sequence[Tensor], chunk: int = 256) -> Iterator[Tensor]:
    """Ink (at most `chunk`, 3, 128, 128) at a time of uint8 pictures of any shapes."""
    for start in range(0, len(pictures), chunk):
        yield torch.stack([on_square(picture) for picture in pictures[start : start + chunk]])


def edges(ink: Tensor, directions: int = DIRECTIONS) -> Tensor:
    """How strongly ink (N, 3, H, W) changes in each direction: (N, directions, H, W), of the channel that changes most."""
    across = F.pad(ink[..., 2:] - ink[..., :-2], (1, 1))
    down = F.pad(ink[..., 2:, :] - ink[..., :-2, :], (0, 0, 1, 1))
    strength, channel = (across.square() + down.square()).sqrt().max(dim=1, keepdim=True)
    across, down = across.gather(1, channel), down.gather(1, channel)
    angle = torch.atan2(down, across) % torch.pi / torch.pi * directions
    low = angle.floor()
    share, low = angle - low, low.long()
    found = ink.new_zeros(len(ink), directions, *ink.shape[2:])
    found.scatter_add_(1, low % directions, strength * (1 - share))
    return found.scatter_add_(1, (low + 1) % directions, strength * share)


def maps(ink: Tensor) -> Tensor:
    """Ink (N, 3, 64, 64) -> what the network reads: (N, 8 + 3, 32, 32), edges relative to those around, and ink."""
    strength = F.avg_pool2d(edges(ink), 2)
    around = F.avg_pool2d(strength.sum(dim=1, keepdim=True), 9, 1, 4)
    return torch.cat([strength / (around + 0.03), 2 * F.avg_pool2d(ink, 2)], dim=1)


def descriptor(ink: Tensor) -> Tensor:
    """Ink (N, 3, 64, 64) -> (N, 1792): edges in cells of 8 and 4 px (at half the size) and of 16 px, ink and its brightness, each of
    them of length 1."""
    half = F.avg_pool2d(ink, 2)
    parts = [
        _cells(edges(ink, 9), 8),
        _cells(edges(half, 9), 4),
        _cells(edges(ink, 12), 16),
        F.avg_pool2d(ink, 8).flatten(1),
        F.avg_pool2d(ink.mean(dim=1, keepdim=True), 4).flatten(1),
    ]
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


def palette(ink: Tensor) -> Tensor:
    """Ink (N, 3, H, W) -> (N, 4118): square roots of how much there is of each colour, pixels shared among the 8 nearest of 4096, and of
    each step between neighbours, across and down."""
    ink = ink * (ink.amax(dim=1, keepdim=True) > FAINT)  # paper that a VAE left not quite white is paper
    n, pixels = len(ink), ink.shape[2] * ink.shape[3]
    place = ink.flatten(2) * (LEVELS - 1)
    low = place.floor().clamp(0, LEVELS - 2)
    share, low = place - low, low.long()
    found = ink.new_zeros(n, LEVELS**3)
    for red, green, blue in itertools.product((0, 1), repeat=3):
        weight = torch.ones_like(share[:, 0])
        for channel, above in enumerate((red, green, blue)):
            weight = weight * (share[:, channel] if above else 1 - share[:, channel])
        index = ((low[:, 0] + red) * LEVELS + low[:, 1] + green) * LEVELS + low[:, 2] + blue
        found.scatter_add_(1, index, weight)
    steps = [found / pixels]
    for change in (ink[..., 1:] - ink[..., :-1], ink[..., 1:, :] - ink[..., :-1, :]):
        largest = change.abs().amax(dim=1).flatten(1)
        steps += [
            ((largest >= a) & (largest < b)).float().mean(dim=1, keepdim=True) for a, b in itertools.pairwise(STEPS)
        ]
    return torch.cat(steps, dim=1).clamp_min(0).sqrt()


def _cells(strength: Tensor, side: int) -> Tensor:
    summed = F.avg_pool2d(strength, 2 * side, side, padding=side // 2)
    return (summed / (summed.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 1e-3)).sqrt().flatten(1)


def _ends(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's mass (N, M) begins and ends, in [-1, 1]."""
    upto = mass.cumsum(dim=1) / mass.sum(dim=1, keepdim=True).clamp_min(1e-6)
    places = mass.shape[1]
    begin = (upto < SLIVER).sum(dim=1).float()
    end = (upto < 1 - SLIVER).sum(dim=1).float() + 1
    return begin / places * 2 - 1, end.clamp_max(places) / places * 2 - 1
