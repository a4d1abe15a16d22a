"""A position in the data: how much of an epoch's order a run has drawn, and what that order depends on.

The order belongs to the global micro-batches (micro-batch x ranks samples of one bucket), whichever ranks share them. A
position can therefore be restated for any number of ranks that divides a global micro-batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from megaflux.common.errors import UserError


@dataclass(frozen=True)
class Position:
    """What checkpoints store of a loader, as a JSON object with these fields.

    dataset: fingerprint of the data whose order is drawn. split, seed, shuffle: other settings that determine the order.
    micro_batch_size: samples that each rank draws at a time. world_size: ranks. epoch: from 0. batches: micro-batches
    that each rank has drawn in this epoch. order: bucket name -> [[samples, shards in a row of that many], ...], where
    the order is not the dataset's own (megaflux.data.reading.order); the key is then absent.
    """

    dataset: str
    split: str
    seed: int
    shuffle: bool
    micro_batch_size: int
    world_size: int
    epoch: int = 0
    batches: int = 0
    order: dict[str, list[list[int]]] | None = None

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Position:
        """The inverse of `state_dict`. Keys that are not a position's are ignored, absent ones are None.

        Raises UserError if the batch size or the number of ranks is missing."""
        for name in ("micro_batch_size", "world_size"):
            if type(state.get(name)) is not int:
                raise UserError(f"the saved data position has no {name}; resume from another checkpoint")
        known: dict[str, Any] = {field.name: state.get(field.name) for field in dataclasses.fields(cls)}
        if "order" in state and state["order"] is None:
            known["order"] = {}  # never stored; an order of no dataset, which the loader refuses
        return cls(**known)

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON values."""
        state = dataclasses.asdict(self)
        if self.order is None:
            del state["order"]
        return state

    @property
    def global_micro_batch(self) -> int:
        """Samples that all ranks together draw at a time."""
        return self.micro_batch_size * self.world_size

    def for_world(self, world_size: int) -> Position:
        """The same position as `world_size` ranks would store it; world_size divides `global_micro_batch`."""
        return dataclasses.replace(self, micro_batch_size=self.global_micro_batch // world_size, world_size=world_size)

    def difference(self, other: Position) -> str | None:
        """The first setting, apart from the dataset, in which the two orders differ, or None."""
        names = ("split", "seed", "shuffle", "micro_batch_size", "world_size")
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)
