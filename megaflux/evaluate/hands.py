"""Which hand drew a picture, told in two ways: by its palette, and by a convolutional network that sees the whole picture.

Exact colours tell hands of real pictures best, but a made picture whose colours are a little off has another hand's palette, or
nobody's. The network goes by outlines, shades and rough colours, tells fewer of the real ones, and is hardly misled. The two are joined as
witnesses of whom the first is astray now and then:

    score(hand) = log((1 - ASTRAY) p_palette(hand) + ASTRAY / T) + log p_look(hand) - log share(hand)

so that a palette, however sure, outweighs the look by log(1 + T (1 - ASTRAY) / ASTRAY) at most. share: of the training cells, which both
have learned.

Shapes: N pictures, T hands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.evaluate import ink

ASTRAY = 0.3  # about the share of pictures from disturbed latents whose palette is mistaken for another hand's
HIDDEN = 512  # units that read a palette
WIDTH = 32


class Convolution(nn.Module):
    """3 x 3, without bias. weight: (out, 9 in), a matrix as Muon wants it."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.before, self.stride = before, stride
        self.weight = nn.Parameter(nn.Conv2d(before, width, 3).weight.detach().flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.unflatten(1, (self.before, 3, 3)), None, self.stride, 1)


class Hands(nn.Module):
    """Ink of whole pictures -> log probabilities of hands."""

    def __init__(self, hands: int):
        super().__init__()
        self.by_palette = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(ink.PALETTE, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, hands)
        )
        self.palette_mean = nn.Buffer(torch.zeros(ink.PALETTE))
        self.palette_scale = nn.Buffer(torch.ones(ink.PALETTE))
        self.shares = nn.Buffer(torch.full((hands,), 1 / hands))
        self.look = nn.Sequential(
            *_convolution(3, WIDTH, 2),
            *_convolution(WIDTH, 2 * WIDTH, 1),
            *_convolution(2 * WIDTH, 2 * WIDTH, 2),
            *_convolution(2 * WIDTH, 4 * WIDTH, 2),
            *_convolution(4 * WIDTH, 4 * WIDTH, 1),
        )
        self.of_look = nn.Sequential(nn.Dropout(0.2), nn.Linear(8 * WIDTH, hands))

    def palettes(self, palette: Tensor) -> Tensor:
        """palette: (N, 4118) of ink.palette. Returns scores (N, T)."""
        return self.by_palette((palette - self.palette_mean) * self.palette_scale)

    def looks(self, small: Tensor) -> Tensor:
        """small: ink (N, 3, 64, 64) of `halved`; the convolutions read it as colours in [-1, 1]. Returns scores (N, T)."""
        x = self.look((1 - 2 * small).contiguous(memory_format=torch.channels_last)).float()
        return self.of_look(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)).float()

    def forward(self, whole: Tensor) -> Tensor:
        """whole: ink (N, 3, 128, 128) of ink.inks, on any device. Returns log probabilities (N, T)."""
        device = self.palette_mean.device
        palette = self.palettes(ink.palette(whole).to(device)).softmax(dim=1)
        sure = torch.log((1 - ASTRAY) * palette + ASTRAY / palette.shape[1])
        look = self.looks(halved(whole).to(device)).log_softmax(dim=1)
        return (sure + look - self.shares.log()).log_softmax(dim=1)


def halved(whole: Tensor) -> Tensor:
    """Ink (N, 3, 128, 128) at half its size."""
    return F.avg_pool2d(whole, 2)


def _convolution(before: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    return Convolution(before, width, stride), nn.BatchNorm2d(width), nn.SiLU()
