"""Means of held-out samples, and how sure they are.

Intervals are percentile bootstraps (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13): what is drawn with
replacement are clusters of samples, those that share a content in a grid, else single samples. Draws are seeded, so the same values
give the same interval.

Shapes: n samples, k clusters, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Measured:
    """One figure: sum(values) / sum(over) + offset."""

    values: np.ndarray
    """(n,) float64, of each sample."""
    clusters: np.ndarray
    """(n,) what each sample belongs to; samples of one cluster are drawn together."""
    over: np.ndarray | None = None
    """(n,) float64; None: ones, so that the figure is the mean."""
    offset: float = 0.0
    keys: tuple[str, ...] = ()
    """Of the samples, by which two checkpoints are compared; () for a figure that is not compared."""

    def figure(self, weights: np.ndarray | None = None) -> Any:
        """The figure, or with weights (R, n) one for each draw."""
        values = self.values.astype(np.float64)
        over = np.ones_like(values) if self.over is None else self.over.astype(np.float64)
        if weights is None:
            return float(values.sum() / over.sum() + self.offset) if over.sum() else None  # NaN is no JSON
        return weights @ values / (weights @ over) + self.offset


def measured(
    values: Any, clusters: Any = None, keys: tuple[str, ...] = (), over: Any = None, offset: float = 0.0
) -> Measured:
    """Values of samples as a figure; clusters None: each sample is its own."""
    values = np.asarray(values, dtype=np.float64)
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    return Measured(values, clusters, None if over is None else np.asarray(over, dtype=np.float64), offset, keys)


def gap(loss: Any, other: Any, clusters: Any = None, keys: tuple[str, ...] = ()) -> Measured:
    """mean(other) / mean(loss) - 1: by how much a loss grows under another condition."""
    return measured(other, clusters, keys, loss, -1.0)


def summary(figure: Measured, seed: int = 0) -> dict[str, Any]:
    """{"value", "interval": [low, high], "n"}, with "clusters" where they are fewer than the samples. The interval is None for
    fewer than two clusters."""
    n, kinds = len(figure.values), len(np.unique(figure.clusters))
    content: dict[str, Any] = {"value": figure.figure(), "interval": None, "n": n}
    if kinds > 1:
        content["interval"] = _ends(figure.figure(draws(figure.clusters, seed)))
    return content | ({"clusters": kinds} if kinds < n else {})


def difference(first: Measured, second: Measured, seed: int = 0) -> dict[str, Any] | None:
    """second - first over the samples that both have, each drawn together with its counterpart; as `summary`. None where they share
    no sample."""
    place = {key: i for i, key in enumerate(second.keys)}
    pairs = [(i, place[key]) for i, key in enumerate(first.keys) if key in place]
    if not pairs:
        return None
    a, b = (_rows(figure, [pair[side] for pair in pairs]) for side, figure in enumerate((first, second)))
    content: dict[str, Any] = {"value": b.figure() - a.figure(), "interval": None, "n": len(pairs)}
    if len(np.unique(a.clusters)) > 1:
        weights = draws(a.clusters, seed)
        content["interval"] = _ends(b.figure(weights) - a.figure(weights))
    return content


def draws(clusters: np.ndarray, seed: int, count: int = DRAWS) -> np.ndarray:
    """How often each draw takes each sample: (count, n) float64. clusters: (n,)."""
    _, inverse = np.unique(clusters, return_inverse=True)
    kinds = int(inverse.max()) + 1
    random = np.random.default_rng(seed)
    taken = random.multinomial(kinds, np.full(kinds, 1 / kinds), size=count)
    return taken[:, inverse].astype(np.float64)


def _rows(figure: Measured, index: list[int]) -> Measured:
    over = None if figure.over is None else figure.over[index]
    return Measured(figure.values[index], figure.clusters[index], over, figure.offset)


def _ends(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]
