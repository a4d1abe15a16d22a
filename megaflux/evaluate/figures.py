"""From pictures to figures, for each sample. Pure functions: what they say of models that copy, or that ignore their condition, is
known (tests/evaluate/test_figures.py).

Shapes: N samples, K seeds, D features of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64  # px: pictures are compared as RGB at this size, like retrieval in training


def pixels(pictures: Sequence[Tensor]) -> Tensor:
    """uint8 (3, H, W) each, of any shapes -> features (N, 3 x 64 x 64) in [0, 1]: RGB of area averages at 64 x 64."""
    small = [F.interpolate(one[None].float(), (SIDE, SIDE), mode="area").flatten() for one in pictures]
    return torch.stack(small) / 255


def distances(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square difference of features (N, D) and (M, D): (N, M)."""
    return torch.cdist(first.double(), second.double()) / first.shape[1] ** 0.5


def nearest_is_own(made: Tensor, given: Tensor) -> np.ndarray:
    """(N,) 1 where, of all `given` (N, D), the nearest to picture i of `made` (N, D) is the i-th. Where several are equally near, each
    counts by its share, so that a model whose pictures are all alike scores 1 / N."""
    d = distances(made, given)
    near = d <= d.min(dim=1, keepdim=True).values + 1e-9
    return (near.diagonal() / near.sum(dim=1)).numpy()


def copying(made: Tensor, references: Tensor) -> np.ndarray:
    """(N,) 1 - d(made, its reference) / d(made, the others' references): 1 for a copy, 0 where the reference is no nearer than any
    other sample's. made, references: (N, D), N at least 2."""
    d = distances(made, references)
    n = len(d)
    mean_of_others = (d.sum(dim=1) - d.diagonal()) / max(1, n - 1)
    return torch.where(mean_of_others > 0, 1 - d.diagonal() / mean_of_others, torch.zeros(n, dtype=d.dtype)).numpy()


def between_seeds(made: Tensor) -> np.ndarray:
    """(N,) mean distance between two pictures of one condition. made: (N, K, D), K at least 2."""
    K = made.shape[1]
    found = [distances(one, one).sum() / (K * (K - 1)) for one in made]
    return torch.stack(found).numpy()


def between_conditions(made: Tensor) -> np.ndarray:
    """(N,) mean distance of a picture to those of other conditions, at the first seed. made: (N, K, D)."""
    d = distances(made[:, 0], made[:, 0])
    return (d.sum(dim=1) / max(1, len(d) - 1)).numpy()


def nearer_to_reference(made: Tensor, references: Tensor) -> np.ndarray:
    """(N,) 1 where the first picture is at most as far from its reference as from the next seed's picture: a sign of copying where the
    reference is not the target. made: (N, K, D); references: (N, D)."""
    to_reference = (made[:, 0].double() - references.double()).norm(dim=1)
    to_seed = (made[:, 0].double() - made[:, 1].double()).norm(dim=1)
    return (to_reference <= to_seed).double().numpy()


def is_in(judged: Sequence[str], wanted: Sequence[Sequence[str]]) -> np.ndarray:
    """(N,) 1 where what was judged is one of what is wanted."""
    return np.array([float(one in some) for one, some in zip(judged, wanted, strict=True)])
