"""The plan of the stage that a checkpoint was saved in, and when a resumed run takes it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from megaflux.models.flux import Policy
from megaflux.training.planning.micro_batch import Choice


@dataclass(frozen=True)
class SavedPlan:
    """What a checkpoint's manifest holds as `plan`."""

    stage: str
    micro_batch_size: int
    policies: Sequence[Policy]
    gpu: str
    """Name of the ranks' GPUs."""
    ranks: int
    free: bool = True
    """Whether the micro-batch was chosen, not set by the user."""
    limit: int | None = None
    """Bytes of RUN/memory.json that it was planned within; None: no limit."""
    activation_checkpointing: str = "auto"
    """model.activation_checkpointing, as configured."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SavedPlan | None:
        """None for {} (checkpoints before format 5) and for a plan of another version that lacks a field without a default."""
        known = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        return cls(**known) if required <= set(known) else None

    def state_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    @property
    def choice(self) -> Choice:
        """The plan itself, without its memory."""
        return Choice(self.micro_batch_size, tuple(self.policies))

    def still_asked_for(self, now: SavedPlan, micro_batches: Sequence[int]) -> bool:
        """Whether it may be taken again: the same stage, GPUs and ranks, and nothing that the user has changed since rules
        it out (a number or `auto`, a policy, RUN/memory.json deleted).

        now: the circumstances of this start; its micro-batch and policies are not read. micro_batches: to choose from."""
        if (self.stage, self.gpu, self.ranks) != (now.stage, now.gpu, now.ranks):
            return False
        if self.micro_batch_size not in micro_batches or (now.free and not self.free):
            return False
        wanted = now.activation_checkpointing
        if wanted == "auto":
            if self.activation_checkpointing != "auto":
                return False
        elif set(self.policies) != {wanted}:
            return False
        return self.limit is None or (now.limit is not None and now.limit <= self.limit)
