"""How the judge learns to tell hands: from training cells as they are, a little off, through a VAE, and decoded from latents that are
not quite right, since what is judged is made of such.

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
TINT, SHIFT = 0.015, 4  # of a look: most that a colour is off, of 1, and that the picture is moved, of 64 px
THROUGH_VAE = 5000  # pictures at most
SEED = 0


RoundTrip = Callable[[Tensor, Change | None], Tensor]
"""uint8 pictures (B, 3, H, W) and what changes their latents -> the same encoded and decoded."""


@dataclass
class Version:
    """Pictures in one form."""

    palettes: Tensor
    """(M, 4118) of ink.palette."""
    halves: Tensor | None
    """(M, 3, 64, 64) of hands.halved, in float16; None: only the palettes are learned from."""
    whose: Tensor
    """(M,) int64: which pictures."""


class Drawings:
    """Collects the versions of pictures, some at a time, because all at full size would take gigabytes."""

    def __init__(self) -> None:
        self._palettes: list[list[Tensor]] = [[], [], [], []]
        self._halves: list[Tensor] = []
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
        self._halves.append(halved(whole).half())

    def versions(self) -> list[Version]:
        """As they are, a little off, blurred and soft."""
        palettes = [torch.cat(parts) for parts in self._palettes]
        all_of_them = torch.arange(len(palettes[0]))
        plain = Version(palettes[0], torch.cat(self._halves), all_of_them)
        return [plain, *(Version(palette, None, all_of_them) for palette in palettes[1:])]


def through_vae(images: Sequence[bytes], round_trip: RoundTrip) -> list[Version]:
    """Some of the pictures after encoding and decoding, and of these twice with disturbed latents, as a model makes them."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))[:THROUGH_VAE]
    generator = torch.Generator().manual_seed(SEED)
    disturbed = partial(augment.disturbed, generator=generator)
    changes: tuple[Change | None, ...] = (None, disturbed, disturbed)
    palettes: list[list[Tensor]] = [[] for _ in changes]
    halves: list[list[Tensor]] = [[] for _ in changes]
    for part in chosen.split(32):
        pictures = [from_image(images[i])[None] for i in part.tolist()]
        if all(picture.shape == pictures[0].shape for picture in pictures):
            pictures = [torch.cat(pictures)]
        for change, palette, half in zip(changes, palettes, halves, strict=True):
            (whole,) = ink.inks([one for batch in pictures for one in round_trip(batch, change)])
            palette.append(ink.palette(whole))
            half.append(halved(whole).half())
    return [
        Version(torch.cat(palette), torch.cat(half), chosen) for palette, half in zip(palettes, halves, strict=True)
    ]


def learn_palettes(hands: Hands, versions: Sequence[Version], style: Tensor, steps: int, device: torch.device) -> None:
    """Tell the hand, style (N,), by the palette; the versions take turns."""
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
    half: torch.autocast,
    on_step: Callable[[], object],
) -> None:
    """Tell the hand, style (N,), by the whole picture, mirrored or not; the versions that have pictures take turns. half: the
    autocast of the convolutions."""
    generator = torch.Generator().manual_seed(SEED)
    _, *inner = (part.weight for part in hands.look if isinstance(part, Convolution))
    taken = {id(weight) for weight in inner}
    others = [p for part in (hands.look, hands.of_look) for p in part.parameters() if id(p) not in taken]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=MUON_DECAY),
        torch.optim.AdamW(others, lr=LOOK_RATE, weight_decay=DECAY),
    )
    shown = [(version.halves, version.whose) for version in versions if version.halves is not None]
    for step in range(steps):
        done = step / steps
        for optimizer, rate in zip(optimizers, (MUON_RATE, LOOK_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, done / 0.1 + 0.01) * (1 - done)
        pictures, whose = shown[step % len(shown)]
        index = torch.randint(0, len(pictures), (LOOK_BATCH,), generator=generator)
        looked = _varied(pictures[index].float(), generator).to(device)
        with half:
            scores = hands.looks(looked)
        loss = F.cross_entropy(scores, style[whose[index]].to(device))
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
    return torch.where(mirrored, pictures.flip(-1), pictures).roll((down, across), (2, 3)) + tint
