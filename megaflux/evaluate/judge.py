"""The judge: small networks that say which thing a picture shows and which hand drew it, and how alike pictures are.

It is trained on the spot from training pictures alone (judge_training.py). A picture's features are two vectors, joined: the network's,
averaged over a few shifts and scales, and its edge histograms in the directions that tell contents apart best (linear discriminant
analysis). On a grid the content is that whose prototype, the mean feature of its real cells, is the most similar, less what is
similar to all (a half of a prototype's mean similarity to its nearest training cells of other contents, against hubs, as in CSLS: Conneau
et al. 1710.04087, section 2.3); the style is what hands.py says. Elsewhere the features alone are used.

Shapes: N pictures, D network features, E features of edges, C contents, T styles.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megaflux.common.errors import UserError, one_line
from megaflux.evaluate import ink
from megaflux.evaluate.hands import Hands

FORMAT = "2"  # 1 told styles by the palette alone
WIDTH, FEATURES = 64, 256
NAME = "judge.safetensors"
VIEWS = (
    (0.0, 0.0, 1.0),
    (0.06, 0.0, 1.0),
    (-0.06, 0.0, 1.0),
    (0.0, 0.06, 1.0),
    (0.0, -0.06, 1.0),
    (0.0, 0.0, 0.92),
    (0.0, 0.0, 1.08),
)
"""Shifts across and down, and scales, over which the network's features are averaged."""
EDGES = 0.2**0.5  # length of the features of edges, where the network's are 1
HUB_NEIGHBOURS, HUB_WEIGHT = 10, 0.5
AT_ONCE = 128  # pictures


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.second_norm.weight)
        past: list[nn.Module] = []
        if stride > 1:
            past.append(nn.AvgPool2d(stride))
        if before != width:
            past += [nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.past = nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.past(x) + self.second_norm(self.second(F.relu(self.first_norm(self.first(x))))))


class JudgeNetwork(nn.Module):
    """Maps of a picture -> features; `hands`: its ink -> scores of styles, None without styles."""

    def __init__(self, styles: int, words: int = 0, width: int = WIDTH, features: int = FEATURES):
        super().__init__()
        self.sizes = {"styles": styles, "words": words, "width": width, "features": features}
        self.stem = nn.Sequential(
            nn.Conv2d(ink.DIRECTIONS + 3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.body = nn.Sequential(
            Block(width, width, 1),
            Block(width, 2 * width, 2),
            Block(2 * width, 2 * width, 1),
            Block(2 * width, 4 * width, 2),
        )
        # the map's 4 x 4 places are kept: layout tells much
        self.project = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(4 * width * 17, features, bias=False), nn.BatchNorm1d(features)
        )
        self.words = nn.Linear(features, max(1, words))
        self.hands = Hands(styles) if styles else None

    def forward(self, maps: Tensor) -> Tensor:
        """maps: (N, 11, 32, 32) of ink.maps. Returns unit vectors (N, D)."""
        x = self.body(self.stem(maps.contiguous(memory_format=torch.channels_last))).float()
        pooled = torch.cat([x.mean((2, 3)), x.flatten(1)], dim=1)
        return F.normalize(self.project(pooled).float(), dim=1)


@dataclass
class Judged:
    """What a judge says of N pictures."""

    contents: list[str]
    """The likeliest content; [] without a grid."""
    styles: list[str]
    features: Tensor
    """(N, D + E), unit vectors."""


@dataclass
class Judge:
    """A trained judge."""

    network: JudgeNetwork
    directions: Tensor
    """(1792, E): descriptor of edges -> features."""
    centre: Tensor
    """(1792,): the mean descriptor."""
    contents: list[str]
    styles: list[str]
    prototypes: Tensor
    """(C, D + E), unit vectors; (0, ...) without a grid."""
    hubs: Tensor
    """(C,): what is taken from the similarity to each prototype."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The data that it was trained on, its updates, and how well it does on held-out pictures."""

    @torch.no_grad()
    def features(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(features (N, D + E), scores of styles (N, T)) of uint8 pictures (3, H, W)."""
        device = self.centre.device
        self.network.eval()
        found, scores = [], []
        for whole in ink.inks(pictures, AT_ONCE):
            centred = ink.centred(whole)
            own = viewed(self.network, ink.maps(centred).to(device))
            found.append(joined(own, self._edges(centred)))
            hands = self.network.hands
            scores.append(torch.zeros(len(whole), 0) if hands is None else hands(whole))
        return torch.cat(found).cpu(), torch.cat(scores).cpu()

    def judge(self, pictures: Sequence[Tensor]) -> Judged:
        """What uint8 pictures (3, H, W) show."""
        features, scores = self.features(pictures)
        contents = self.contents_of(features) if len(self.prototypes) else []
        styles = [self.styles[i] for i in scores.argmax(dim=1).tolist()] if self.styles else []
        return Judged(contents, styles, features)

    def contents_of(self, features: Tensor, among: Sequence[Collection[str]] | None = None) -> list[str]:
        """The likeliest content of each of features (N, D + E). among: the contents that each may be; None: all."""
        allowed = None
        if among is not None:
            allowed = torch.tensor([[content in names for content in self.contents] for names in among])
        return [self.contents[i] for i in likeliest(features, self.prototypes, self.hubs, allowed)]

    def of(self, contents: Collection[str]) -> Judge:
        """The judge that knows only these contents, as far as it knows them."""
        kept = [i for i, content in enumerate(self.contents) if content in contents]
        names = [self.contents[i] for i in kept]
        return replace(self, contents=names, prototypes=self.prototypes[kept], hubs=self.hubs[kept])

    def _edges(self, centred: Tensor) -> Tensor:
        return (ink.descriptor(centred).to(self.centre.device) - self.centre) @ self.directions

    def save(self, file: Path) -> None:
        """Write the judge, completely or not at all."""
        tensors = {f"network.{name}": value.contiguous() for name, value in self.network.state_dict().items()}
        tensors |= {
            "directions": self.directions,
            "centre": self.centre,
            "prototypes": self.prototypes,
            "hubs": self.hubs,
        }
        content = {"contents": self.contents, "styles": self.styles, "facts": self.facts, "sizes": self.network.sizes}
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.name}.unfinished")
        cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(cpu, unfinished, {"megaflux_judge": FORMAT, "content": json.dumps(content)})
        unfinished.replace(file)

    @staticmethod
    def is_current(file: Path) -> bool:
        """Whether there is a judge of this version."""
        try:
            with safe_open(file, "pt") as opened:
                return (opened.metadata() or {}).get("megaflux_judge") == FORMAT
        except (OSError, SafetensorError):
            return False

    @classmethod
    def load(cls, file: Path, device: torch.device | str = "cpu") -> Judge:
        """Read what `save` wrote. UserError for any other file."""
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                header = opened.metadata() or {}
                if header.get("megaflux_judge") != FORMAT:
                    raise UserError(f"{file}: not a judge of this version; leave --judge out, and one is trained")
                content = json.loads(header["content"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            network = JudgeNetwork(**content["sizes"])
            own = {n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")}
            network.load_state_dict(own)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{file}: cannot be read as a judge ({one_line(error)}); leave it out") from None
        network.to(device).eval()
        edges = tensors["directions"], tensors["centre"]
        known = tensors["prototypes"].cpu(), tensors["hubs"].cpu()
        return cls(network, *edges, content["contents"], content["styles"], *known, content["facts"])


@torch.no_grad()
def viewed(network: JudgeNetwork, maps: Tensor) -> Tensor:
    """The network's features of maps (N, 11, 32, 32), averaged over VIEWS: unit vectors (N, D)."""
    total: Tensor | float = 0.0
    for across, down, scale in VIEWS:
        theta = maps.new_tensor([[scale, 0.0, across], [0.0, scale, down]]).expand(len(maps), 2, 3)
        moved = F.grid_sample(maps, F.affine_grid(theta, list(maps.shape), align_corners=False), align_corners=False)
        total = total + network(moved)
    assert isinstance(total, Tensor)
    return F.normalize(total, dim=1)


def joined(own: Tensor, edge: Tensor) -> Tensor:
    """The network's features (N, D) and those of edges (N, E) as one unit vector each."""
    return F.normalize(torch.cat([F.normalize(own, dim=1), EDGES * F.normalize(edge, dim=1)], dim=1), dim=1)


def likeliest(features: Tensor, prototypes: Tensor, hubs: Tensor, allowed: Tensor | None = None) -> list[int]:
    """The place of the most similar of `prototypes` (C, F), unit vectors, less `hubs` (C,), for each of `features` (N, F). allowed:
    bool (N, C), None: all."""
    similar = features @ prototypes.T - hubs
    return (similar if allowed is None else similar.masked_fill(~allowed, -torch.inf)).argmax(dim=1).tolist()


def prototypes(features: Tensor, group: Tensor, groups: int) -> Tensor:
    """Unit vectors (groups, F): the mean features of each group; 0 for one without a picture. group: (N,) int64."""
    summed = features.new_zeros(groups, features.shape[1]).index_add_(0, group, features)
    return F.normalize(summed, dim=1)


def hubs(features: Tensor, group: Tensor, known: Tensor) -> Tensor:
    """(C,): HUB_WEIGHT times the mean similarity of prototypes `known` (C, F) to the HUB_NEIGHBOURS nearest of `features` (N, F) of
    other groups. group: (N,) int64, -1 for a picture of no prototype's group."""
    similar = features @ known.T
    rows = torch.nonzero(group >= 0).flatten()
    similar[rows, group[rows]] = -1.0
    return HUB_WEIGHT * similar.topk(min(HUB_NEIGHBOURS, len(features)), dim=0).values.mean(dim=0)
