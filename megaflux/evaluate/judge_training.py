"""How the judge is trained: from training pictures alone, in minutes on two cores, seeded.

Two pictures of one content by different hands are brought together, and apart from the other contents of the batch (the contrast of
CLIP, Radford et al. 2103.00020, section 2.3, with pictures on both sides), so that what the hands have in common is what counts. Each is
also to find its content among all, by the mean features of the content's other cells as they were last seen: what the judge is asked
afterwards (prototypes: Snell et al. 1703.05175; kept from batch to batch: Wang et al. 1912.06798). The words of the caption are predicted
from the features as well. Where there is no grid the two are one picture, differently cut and tinted.

Shapes: N pictures, B pairs of a batch, C contents, F numbers of a descriptor, E directions.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.data.tensors import from_image
from megaflux.evaluate import augment, ink
from megaflux.evaluate.hands_training import Drawings, RoundTrip, Version, learn_looks, learn_palettes, through_vae
from megaflux.evaluate.judge import Judge, JudgeNetwork, hubs, joined, prototypes, viewed
from megaflux.evaluate.samples import Grid

GRID_STEPS, OTHER_STEPS = 1300, 100
PALETTE_STEPS, LOOK_STEPS = 2, 3  # of the readers of hands, for each of contents
PLAIN = 1024  # pictures of which the edges' main directions are taken, where there is no grid
PAIRS = 64
RATE, DECAY, TEMPERATURE = 3e-3, 0.05, 0.07
COMPONENTS, KEPT, RIDGE = 400, 350, 0.6  # of the descriptor: before and after the discriminant analysis
WORDS, RARE = 512, 3  # most words that are predicted, and how often one has to appear
WORD_WEIGHT = 0.5
FROM = 40  # updates after which contents are looked for among those seen before
SEED = 0


@dataclass
class Lesson:
    """Training pictures as a judge reads them."""

    centred: Tensor
    """(N, 3, 64, 64) ink."""
    versions: list[Version]
    """As hands are told by; [] without styles."""
    content: Tensor
    """(N,) int64: which content each picture shows; without a grid each its own."""
    style: Tensor | None
    """(N,) int64."""
    words: Tensor | None
    """(N, W): which words its caption has, as shares."""
    contents: list[str]
    styles: list[str]


def of_grid(grid: Grid, round_trip: RoundTrip | None = None) -> Lesson:
    """The training cells of a grid. round_trip: `Maker.round_trip`, so that styles are told through a VAE as well, and from latents that
    are not quite right: what is judged is made of such."""
    cells = list(grid.train)
    contents = sorted({cell.content for cell in cells})
    place = {content: i for i, content in enumerate(contents)}
    images = [grid.train[cell] for cell in cells]
    drawings = Drawings()
    centred = _seen(images, drawings)
    versions = drawings.versions()
    if round_trip is not None:
        versions += through_vae(images, round_trip)
    content = torch.tensor([place[cell.content] for cell in cells])
    style = torch.tensor([grid.styles.index(cell.style) for cell in cells])
    words = word_shares([re.sub(r"[-_]", " ", cell.content) for cell in cells], RARE * len(grid.styles))
    return Lesson(centred, versions, content, style, words, contents, list(grid.styles))


def of_pictures(images: Sequence[bytes], captions: Sequence[str]) -> Lesson:
    """Any training pictures (image files) with their captions."""
    centred = _seen(images, None)
    return Lesson(centred, [], torch.arange(len(images)), None, word_shares(captions), [], [])


def word_shares(captions: Sequence[str], rare: int = RARE) -> Tensor | None:
    """(N, W): for each caption 1 / k at its k known words, the most frequent ones of those that appear `rare` times; None if there are
    none."""
    split = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    counted = Counter(word for words in split for word in words)
    ordered = sorted((word for word, count in counted.items() if count >= rare), key=lambda w: (-counted[w], w))
    place = {word: i for i, word in enumerate(ordered[:WORDS])}
    if not place:
        return None
    shares = torch.zeros(len(captions), len(place))
    for row, words in zip(shares, split, strict=True):
        known = [place[word] for word in words if word in place]
        row[known] = 1 / max(1, len(known))
    return shares


def updates(steps: int, styles: bool) -> int:
    """How often `train` calls on_step."""
    return steps * (1 + LOOK_STEPS) if styles else steps


def train(
    lesson: Lesson,
    facts: dict[str, Any],
    steps: int,
    device: torch.device | str = "cpu",
    on_step: Callable[[], object] = lambda: None,
) -> Judge:
    """A judge of the lesson. steps: of contents. facts: kept with it. on_step: called `updates` times."""
    device = torch.device(device)
    # Products in bfloat16 are several times as fast where the CPU has units for them, and no slower elsewhere.
    fast = device.type == "cuda" or _fast_half()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)  # of the first weights and of dropout
        words = 0 if lesson.words is None else lesson.words.shape[1]
        network = JudgeNetwork(len(lesson.styles), words).to(device).train()
        maps = torch.cat([ink.maps(part) for part in lesson.centred.split(256)])
        _learn(network, lesson, maps, steps, device, fast, on_step)
        if lesson.style is not None and network.hands is not None:
            learn_palettes(network.hands, lesson.versions, lesson.style, PALETTE_STEPS * steps, device)
            looks = LOOK_STEPS * steps
            learn_looks(network.hands, lesson.versions, lesson.style, looks, device, fast, on_step)
    network.eval()
    edge = [ink.descriptor(part) for part in (lesson.centred if lesson.styles else lesson.centred[:PLAIN]).split(256)]
    descriptors = torch.cat(edge)
    centre = descriptors.mean(dim=0)
    directions = discriminant(descriptors - centre, lesson.content if lesson.styles else None)
    known, common = torch.zeros(0, network.sizes["features"] + directions.shape[1]), torch.zeros(0)
    if lesson.contents:
        own = torch.cat([viewed(network, part.to(device)) for part in maps.split(128)]).cpu()
        features = joined(own, (descriptors - centre) @ directions)
        known = prototypes(features, lesson.content, len(lesson.contents))
        common = hubs(features, lesson.content, known)
    parts = network, directions.to(device), centre.to(device)
    return Judge(*parts, lesson.contents, lesson.styles, known, common, dict(facts))


def discriminant(descriptors: Tensor, group: Tensor | None) -> Tensor:
    """(F, E): directions of centred descriptors (N, F) in which groups differ most, for how much a group differs within itself (Fisher;
    Hastie et al., The Elements of Statistical Learning, section 4.3.3), with a ridge, after a projection to the principal components.
    group None: the principal components alone, each of variance 1 but for the ridge."""
    n = len(descriptors)
    count = min(COMPONENTS, descriptors.shape[1], max(1, n - 1))
    basis = _principal(descriptors, count)
    z = descriptors @ basis
    if group is None:
        scale = z.square().mean(dim=0)
        return basis / (scale + RIDGE * scale.mean()).sqrt()
    groups = int(group.max()) + 1
    sizes = torch.bincount(group, minlength=groups).clamp_min(1).float()

    def means(of: Tensor) -> Tensor:
        return of.new_zeros(groups, of.shape[1]).index_add_(0, group, of) / sizes[:, None]

    within = z - means(z)[group]
    scatter = within.T @ within / n
    scatter += RIDGE * scatter.diagonal().mean().clamp_min(1e-8) * torch.eye(count)
    spread, axes = torch.linalg.eigh(scatter)
    whiten = axes / spread.sqrt()
    between = means(z @ whiten)
    variance, axes = torch.linalg.eigh(between.T @ between / groups)
    kept = min(KEPT, count)
    variance, axes = variance[-kept:], axes[:, -kept:]
    # what a mean of so few pictures varies by is not all the contents' own
    own = ((variance - 1 / sizes.mean()).clamp_min(0.01) / variance.clamp_min(0.02)).sqrt()
    return basis @ whiten @ (axes * own)


def _principal(descriptors: Tensor, count: int) -> Tensor:
    """(F, count): the directions in which centred descriptors (N, F) vary most, by the smaller of their two products."""
    n, numbers = descriptors.shape
    if n >= numbers:
        return torch.linalg.eigh(descriptors.T @ descriptors)[1][:, -count:]
    return F.normalize(descriptors.T @ torch.linalg.eigh(descriptors @ descriptors.T)[1][:, -count:], dim=0)


def _learn(
    network: JudgeNetwork,
    lesson: Lesson,
    maps: Tensor,
    steps: int,
    device: torch.device,
    fast: bool,
    on_step: Callable[[], object],
) -> None:
    draw, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    trained = [p for name, p in network.named_parameters() if not name.startswith("hands.")]
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    shown: list[list[int]] = [[] for _ in range(int(lesson.content.max()) + 1)]
    for i, content in enumerate(lesson.content.tolist()):
        shown[content].append(i)
    pairs = min(PAIRS, len(shown))
    order: list[int] = []
    memory = Memory(lesson, network.sizes["features"], device) if lesson.styles else None
    for step in range(steps):
        if len(order) < pairs:
            order = torch.randperm(len(shown), generator=generator).tolist()
        contents, order = order[:pairs], order[pairs:]
        two = [draw.sample(shown[c], 2) if len(shown[c]) > 1 else shown[c] * 2 for c in contents]
        index = [pair[0] for pair in two] + [pair[1] for pair in two]
        for group in optimizer.param_groups:
            group["lr"] = RATE * _warmed(step / steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            features = network(augment.varied(maps[index], generator).to(device)).float()
        logits = features[:pairs] @ features[pairs:].T / TEMPERATURE
        own = torch.arange(pairs, device=device)
        loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
        if memory is not None:
            if step >= FROM:
                loss = loss + memory.loss(features, index)
            memory.keep(features, index)
        if lesson.words is not None:
            scores = network.words(features) / TEMPERATURE
            loss = loss + WORD_WEIGHT * F.cross_entropy(scores, lesson.words[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        on_step()


class Memory:
    """The features of each training picture of a grid as they were last seen."""

    def __init__(self, lesson: Lesson, features: int, device: torch.device):
        self.content = lesson.content.to(device)
        self.features = torch.zeros(len(self.content), features, device=device)
        self.sums = torch.zeros(len(lesson.contents), features, device=device)

    def loss(self, features: Tensor, index: Sequence[int]) -> Tensor:
        """How hard it is to find the contents of pictures `index` among all by their features (N, D): the own content's mean leaves
        the picture itself out. Contents of which nothing else was seen do not count."""
        content = self.content[index]
        logits = features @ F.normalize(self.sums, dim=1).T / TEMPERATURE
        others = self.sums[content] - self.features[index]
        own = (features * F.normalize(others, dim=1)).sum(dim=1, keepdim=True) / TEMPERATURE
        known = others.square().sum(dim=1) > 1e-6
        if not known.any():
            return features.sum() * 0
        return F.cross_entropy(logits.scatter(1, content[:, None], own)[known], content[known])

    def keep(self, features: Tensor, index: Sequence[int]) -> None:
        """Remember the features (N, D) of pictures `index`."""
        latest = features.detach()
        for i, one in zip(index, latest, strict=True):  # a picture may come twice in a batch
            self.sums[self.content[i]] += one - self.features[i]
            self.features[i] = one


def _fast_half() -> bool:
    supported = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and supported


def _warmed(done: float) -> float:
    """The rate's factor: a tenth of the updates up, then half a cosine down."""
    return done / 0.1 + 1e-3 if done < 0.1 else 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)) + 1e-3


def _seen(images: Sequence[bytes], drawings: Drawings | None) -> Tensor:
    """Centred ink, decoded 256 at a time: all of them at full size would take gigabytes. drawings: gets the whole ink."""
    centred: list[Tensor] = []
    for start in range(0, len(images), 256):
        (whole,) = ink.inks([from_image(data) for data in images[start : start + 256]])
        centred.append(ink.centred(whole))
        if drawings is not None:
            drawings.add(whole)
    return torch.cat(centred)
