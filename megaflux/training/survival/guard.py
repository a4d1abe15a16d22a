"""Which updates are dropped: those whose gradient is not finite, or far larger than the ones before it, or has too many large
values.

The spike rule follows OLMo-core's SkipStepAdamW: an update is dropped if its gradient norm lies more than `sigma`
standard deviations above the mean of the last `window` norms. The norm is the same number on all ranks, so they drop
alike. A spike enters the window as the limit that it exceeded: norms that have risen for good, by less than about two
times, are accepted after a few drops, and a run that diverges is not.

Large values follow Playground v3 (arXiv 2409.10695), which discards an update when more gradient values than a
limit are above a threshold, because clipping alone did not prevent spikes of the loss. Such an update's norm is not kept.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megaflux.config.schema import Config

FEWEST = 64  # norms needed before the rule applies: a run's first norms fall fast, and a mean of three says nothing
LEAST = 0.1  # of the mean: the smallest deviation assumed, or nearly equal norms would make every next one a spike


class DropReason(Enum):
    NOT_FINITE = "not finite"
    SPIKE = "spike"
    LARGE_VALUES = "large values"


@dataclass(frozen=True)
class Drop:
    """A dropped update."""

    reason: DropReason
    text: str
    """The reason as a clause for messages."""


NOT_FINITE = Drop(DropReason.NOT_FINITE, "its gradient is not finite")


class Guard:
    """Judges one gradient norm per update and keeps the last ones.

    sigma: 0 switches the spike rule off. window: norms kept. patience: consecutive drops after which the run returns to
    its last checkpoint. most_large: the largest share of large gradient values that is taken; None: any.
    """

    def __init__(self, sigma: float, window: int, patience: int, most_large: float | None = None):
        self.sigma, self.patience, self.most_large = sigma, patience, most_large
        self.norms: deque[float] = deque(maxlen=window)
        self.in_a_row = 0
        """Updates dropped since the last one that was taken."""
        self.dropped = 0
        """Updates dropped since the run began."""

    @classmethod
    def of(cls, config: Config) -> Guard:
        """The guard that a run's configuration asks for."""
        optim = config.optim
        return cls(optim.spike_sigma, optim.spike_window, config.train.bad_updates, optim.large_gradient_share)

    def judge(self, norm: float, large_share: float = 0.0) -> Drop | None:
        """None: take the update; else why to drop it. Counts either way. large_share: of the gradient's values, in [0, 1]."""
        drop = self._problem(norm, large_share)
        if drop is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.dropped += 1
        return drop

    def _problem(self, norm: float, large_share: float) -> Drop | None:
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed reports an invalid norm as -1
            return NOT_FINITE
        if self.most_large is not None and large_share > self.most_large:
            text = f"{large_share:.3g} of its gradient's values are large, more than {self.most_large:g} (optim.large_gradient_share)"
            return Drop(DropReason.LARGE_VALUES, text)
        if not self.sigma or len(self.norms) < min(FEWEST, self.norms.maxlen or FEWEST):
            return None
        mean = math.fsum(self.norms) / len(self.norms)
        deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in self.norms) / len(self.norms))
        limit = mean + self.sigma * max(deviation, LEAST * mean)
        if norm > limit:
            self.norms.append(limit)
            text = f"its gradient norm {norm:.3g} is a spike: the last {len(self.norms)} allow {limit:.3g}"
            return Drop(DropReason.SPIKE, text)
        return None

    @property
    def exhausted(self) -> bool:
        """Whether too many consecutive updates were dropped (train.bad_updates)."""
        return self.in_a_row >= self.patience

    def new_stage(self) -> None:
        """Forget the norms: other parameters train now, whose norms are not comparable."""
        self.norms.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """state: from `state_dict`; {} from checkpoints written before there was a guard."""
        self.norms.extend(state.get("norms", []))
        self.in_a_row, self.dropped = state.get("in_a_row", 0), state.get("dropped", 0)
