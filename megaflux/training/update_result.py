"""What one update did, for whoever records it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megaflux.config.recipe import Part
from megaflux.data.buckets import Bucket
from megaflux.training.survival.guard import Drop


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a micro-batch that this rank has computed."""

    keys: list[str]
    """Names of its samples."""
    bucket: Bucket
    replaced: list[str]
    """Damaged samples that the loader replaced, one line each."""
    losses: Tensor
    """(B,) on the device, without a graph."""
    t: Tensor
    """(B,) on the device."""
    cut_captions: int = 0
    """Captions that were longer than model.caption_max_tokens."""


@dataclass(frozen=True)
class UpdateResult:
    """What an update did."""

    learning_rates: dict[Part, float]
    """Of each part that trains in the stage."""
    grad_norm: float
    """Global norm before clipping; nan if the update was dropped."""
    large_gradient_share: float
    """Share of the gradient's values that are larger than optim.large_gradient, before clipping, over all ranks; nan if no norm
    could be taken."""
    drop: Drop | None
    """Why the update was dropped, the same on all ranks; None: weights and optimizer have moved."""
    micro_batches: list[MicroBatch]
    data_wait: float
    """Seconds that this rank waited for batches."""
    grad_norms: dict[str, float]
    """Norms by part and FLUX block before clipping; {} where they are not due (monitor.grad_norms_every)."""

    @property
    def learning_rate(self) -> float:
        """The highest of them."""
        return max(self.learning_rates.values())

    @property
    def keys(self) -> list[str]:
        """This rank's samples."""
        return [key for micro in self.micro_batches for key in micro.keys]
