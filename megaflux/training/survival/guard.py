"""Which updates are dropped: those whose gradient is not finite, or far larger than the ones before it.

The spike rule follows OLMo-core's SkipStepAdamW: an update is dropped if its gradient norm lies more than `sigma`
standard deviations above the mean of the last `window` norms. The norm is the same number on all ranks, so they drop
alike. A spike enters the window as the limit that it exceeded: norms that have risen for good, by less than about two
times, are accepted after a few drops, and a run that diverges is not.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

FEWEST = 64  # norms needed before the rule applies: a run's first norms fall fast, and a mean of three says nothing
LEAST = 0.1  # of the mean: the smallest deviation assumed, or nearly equal norms would make every next one a spike


class DropReason(Enum):
    NOT_FINITE = "not finite"
    SPIKE = "spike"


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
    its last checkpoint.
    """

    def __init__(self, sigma: float, window: int, patience: int):
        self.sigma, self.patience = sigma, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.in_a_row = 0
        """Updates dropped since the last one that was taken."""
        self.dropped = 0
        """Updates dropped since the run began."""

    def judge(self, norm: float) -> Drop | None:
        """None: take the update; else why to drop it. Counts either way."""
        drop = self._problem(norm)
        if drop is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.dropped += 1
        return drop

    def _problem(self, norm: float) -> Drop | None:
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed reports an invalid norm as -1
            return NOT_FINITE
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
