"""Which updates are dropped: a gradient that is not finite, or one far larger than those before it.

The spike rule follows OLMo-core's SkipStepAdamW: an update is dropped where its gradient norm lies more than `sigma`
standard deviations above the mean of the last `window` norms. It judges by a number that all ranks share, so they drop
alike. A dropped norm is remembered as the limit that it broke: a run whose norms have risen for good, by less than about
two times, is let on after a few drops, and one that diverges is not.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

FEWEST = 64  # norms before the rule speaks: a run's first ones fall fast, and a mean of three says nothing
LEAST = 0.1  # of the mean, for the deviation: norms all but equal must not make every next one a spike


class Guard:
    """Judges one norm per update and remembers them.

    sigma: 0 switches the spike rule off; window: norms remembered; patience: dropped updates in a row after which the
    run goes back to its last checkpoint.
    """

    def __init__(self, sigma: float, window: int, patience: int):
        self.sigma, self.patience = sigma, patience
        self.norms: deque[float] = deque(maxlen=window)
        self.in_a_row = 0
        self.dropped = 0
        """Since the run began."""

    def judge(self, norm: float) -> str | None:
        """None: take the update; else why it is dropped. Counts either way."""
        why = self._problem(norm)
        if why is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.dropped += 1
        return why

    def _problem(self, norm: float) -> str | None:
        if not math.isfinite(norm) or norm < 0:  # DeepSpeed says -1 for a norm that is none
            return "its gradient is not finite"
        if not self.sigma or len(self.norms) < min(FEWEST, self.norms.maxlen or FEWEST):
            return None
        mean = math.fsum(self.norms) / len(self.norms)
        deviation = math.sqrt(math.fsum((n - mean) ** 2 for n in self.norms) / len(self.norms))
        limit = mean + self.sigma * max(deviation, LEAST * mean)
        if norm > limit:
            self.norms.append(limit)
            return f"its gradient norm {norm:.3g} is a spike: the last {len(self.norms)} allow {limit:.3g}"
        return None

    @property
    def exhausted(self) -> bool:
        """Whether as many updates in a row were dropped as the run puts up with."""
        return self.in_a_row >= self.patience

    def new_stage(self) -> None:
        """Other parameters train: their norms are not comparable."""
        self.norms.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave; {}: an older checkpoint, which knew no guard."""
        self.norms.extend(state.get("norms", []))
        self.in_a_row, self.dropped = state.get("in_a_row", 0), state.get("dropped", 0)
