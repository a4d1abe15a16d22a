"""The plans that a stage may be trained with: which is the fastest within a limit of memory, and which is the next lower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaflux.config.schema import Stage
from megaflux.training.planning.micro_batch import Choice, Planner
from megaflux.training.planning.throughput import Cluster

STEP = 0.95  # of what a plan that did not fit needs


@dataclass(frozen=True)
class Candidates:
    """Plans of one stage."""

    planner: Planner
    stage: Stage
    micro_batches: Sequence[int]
    """Micro-batches to choose from; one if the user set it."""
    cluster: Cluster | None
    """The GPUs to predict speeds for; None: there is nothing to choose."""

    def within(self, limit: int) -> Choice:
        """The fastest plan within `limit` bytes; if none fits, the one that needs least."""
        return self.planner.best(self.stage, self.micro_batches, limit, self.cluster)

    def others(self, limit: int) -> list[Choice]:
        """The plan of every micro-batch within `limit` bytes."""
        return self.planner.choices(self.stage, self.micro_batches, limit, self.cluster)

    def needs(self, choice: Choice) -> int:
        """Bytes of a plan."""
        return choice.bytes or self.planner.with_needs(self.stage, choice.micro_batch_size, choice.policies, 0).bytes

    def lower(self, choice: Choice) -> tuple[Choice, int] | None:
        """The next lower plan and its limit in bytes: STEP times this plan's need, repeated until the plan changes.
        None: this is the lowest."""
        limit, lowest = self.needs(choice), self.within(0)
        while choice != lowest:
            limit = int(STEP * limit)
            if (lower := self.within(limit)) != choice:
                return lower, limit
        return None

    def remedy(self, choice: Choice) -> str:
        """What the user can change so that less memory is needed than for this plan, the lowest."""
        if self.planner.sizes.config.model.activation_checkpointing not in ("auto", "full"):
            return "set model.activation_checkpointing to auto"
        if choice.micro_batch_size > 1:
            return f"lower train.micro_batch_size (it is {choice.micro_batch_size})"
        return "train.micro_batch_size is 1 already: lower data.longest_side, or use more or larger GPUs"
