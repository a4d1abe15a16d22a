"""How the judge learns to tell hands: from training cells as they are, through a VAE, and decoded from latents that are not quite right,
since what is judged is made of such; by the palette also from cells that are blurred and a little off.

Shapes: N pictures, M of a version, T hands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.data.tensors import from_image
from megaflux.evaluate import augment, ink
from megaflux.evaluate.hands import Convolution, Hands, halved
from megaflux.evaluate.making import Change

PALETTE_BATCH, PALETTE_RATE = 256, 2e-3
LOOK_BATCH, LOOK_RATE = 64, 4e-3
MUON_RATE, MUON_DECAY = 0.04, 0.01  # of inner convolutions: in as many updates they learn much more than by AdamW
DECAY = 0.05
TINT, SHIFT = 0.015, 4  # of a look: most that a colour is off, of 1, and that pictures are moved, px of 64
THROUGH_VAE = 5000  # pictures at most
SEED = 0


RoundTrip = Callable[[Tensor, Change | None], Tensor]
"""uint8 pictures (B, 3, H, W) and what changes their latents -> the same encoded and decoded."""


@dataclass
class Version:
    """Pictures in one form."""

    palettes: Tensor
    """(M, 4118) of ink.palette."""
    small: Tensor | None
    """(M, 3, 64, 64) of hands.halved, in float16; None: only the palettes are learned from."""
    whose: Tensor
    """(M,) int64: which pictures."""


class Drawings:
    """Collects the versions of pictures, some at a time, because all at full size would take gigabytes."""

    def __init__(self) -> None:
        self._palettes: list[list[Tensor]] = [[], [], [], []]
        self._small: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(SEED)

    def add(self, whole: Tensor) -> None:
        """The next pictures' ink (B, 3, 128, 128)."""
        forms = (
            whole,
            augment.off(whole, self._generator),
            augment.off(F.avg_pool2d(whole, 3, 1, 1), self._generator),
            augment.off(augment.soft(whole), self._generator),
        )
        for parts, form in zip(self._palettes, forms, strict=True):
            parts.append(ink.palette(form))
        self._small.append(halved(whole).half())

    def versions(self) -> list[Version]:
        """As they are, a little off, blurred and soft."""
        palettes = [torch.cat(parts) for parts in self._palettes]
        all_of_them = torch.arange(len(palettes[0]))
        plain = Version(palettes[0], torch.cat(self._small), all_of_them)
        return [plain, *(Version(palette, None, all_of_them) for palette in palettes[1:])]


def through_vae(images: Sequence[bytes], round_trip: RoundTrip) -> list[Version]:
    """Some of the pictures after encoding and decoding, and of these twice with disturbed latents, as a model makes them."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:THROUGH_VAE]
    generator = torch.Generator().manual_seed(SEED)
    disturbed = partial(augment.disturbed, generator=generator)
    changes: tuple[Change | None, ...] = (None, disturbed, disturbed)
    palettes: list[list[Tensor]] = [[] for _ in changes]
    small: list[list[Tensor]] = [[] for _ in changes]
    for part in chosen.split(32):
        pictures = [from_image(images[i])[None] for i in part.tolist()]
        if all(picture.shape == pictures[0].shape for picture in pictures):
            pictures = [torch.cat(pictures)]
        for change, palette, pictures_of in zip(changes, palettes, small, strict=True):
            (whole,) = ink.inks([one for batch in pictures for one in round_trip(batch, change)])
            palette.append(ink.palette(whole))
            pictures_of.append(halved(whole).half())
    return [
        Version(torch.cat(palette), torch.cat(pictures_of), chosen)
        for palette, pictures_of in zip(palettes, small, strict=True)
    ]


def learn_palettes(hands: Hands, versions: Sequence[Version], style: Tensor, steps: int, device: torch.device) -> None:
    """Tell the hand, style (N,), by the palette; the versions take turns. Keeps the hands' shares, too."""
    hands.shares.copy_(torch.bincount(style, minlength=len(hands.shares)).clamp_min(1) / len(style))
    plain, generator = versions[0].palettes, torch.Generator().manual_seed(SEED)
    hands.palette_mean.copy_(plain.mean(dim=0))
    hands.palette_scale.copy_(1 / (plain.std(dim=0) + 0.01))
    optimizer = torch.optim.AdamW(hands.by_palette.parameters(), lr=PALETTE_RATE, weight_decay=DECAY)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PALETTE_RATE * (1 - step / steps) + 1e-5
        version = versions[step % len(versions)]
        index = torch.randint(0, len(version.palettes), (PALETTE_BATCH,), generator=generator)
        scores = hands.palettes(version.palettes[index].to(device))
        loss = F.cross_entropy(scores, style[version.whose[index]].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def learn_looks(
    hands: Hands,
    versions: Sequence[Version],
    style: Tensor,
    steps: int,
    device: torch.device,
    fast: bool,
    on_step: Callable[[], object],
) -> None:
    """Tell the hand, style (N,), by the whole picture; each of a batch in one of the versions that have pictures, so that their
    BatchNorm sees what it will see. fast: products in bfloat16 are; where not, AdamW takes the place of Muon, which computes in it."""
    generator = torch.Generator().manual_seed(SEED)
    _, *inner = (part.weight for part in hands.look if isinstance(part, Convolution))
    taken = {id(weight) for weight in inner}
    others = [p for part in (hands.look, hands.of_look) for p in part.parameters() if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer]
    if fast:
        optimizers = [
            torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=MUON_DECAY),
            torch.optim.AdamW(others, lr=LOOK_RATE, weight_decay=DECAY),
        ]
    else:
        optimizers = [torch.optim.AdamW([*inner, *others], lr=LOOK_RATE, weight_decay=DECAY)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    shown = [(version.small, version.whose) for version in versions if version.small is not None]
    for step in range(steps):
        done = step / steps
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min(1.0, done / 0.1 + 0.01) * (1 - done)
        forms = torch.randint(0, len(shown), (LOOK_BATCH,), generator=generator).tolist()
        picked = [(form, int(len(shown[form][1]) * torch.rand((), generator=generator))) for form in forms]
        pictures = torch.stack([shown[form][0][i] for form, i in picked]).float()
        wanted = style[torch.stack([shown[form][1][i] for form, i in picked])]
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            scores = hands.looks(_varied(pictures, generator).to(device))
        loss = F.cross_entropy(scores, wanted.to(device))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        on_step()


def _varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each mirrored or not and a little tinted, all moved alike: like pictures (B, 3, H, W)."""
    count = len(pictures)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    down, across = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
    tint = TINT * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    height, width = pictures.shape[2:]
    framed = F.pad(torch.where(mirrored, pictures.flip(-1), pictures), (SHIFT,) * 4)  # by paper
    return framed[..., SHIFT + down :, SHIFT + across :][..., :height, :width] + tint
