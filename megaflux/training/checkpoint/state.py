"""What a checkpoint is: its folder, and the part of a run's state that its manifest stores.

    RUN/checkpoints/update-0000400/
        manifest.json             format, progress, world size, identity; size and SHA-256 of every file below
        weights-....safetensors   every parameter that has trained so far, one part per rank (weights.py)
        deepspeed/...             DeepSpeed's shards: fp32 masters and Adam's moments of the active stage
        rng-rank0000.pt           global random state of each rank

write.py writes one, resume.py finds the one to resume from and loads it, manifest.py makes the writing durable,
retention.py says which are kept. The learning rate is a function of the update and needs no state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progress:
    """How far a run has come: exactly what a checkpoint stores beside weights, optimizer and random state."""

    update: int
    """Updates done."""
    stage: int
    """Index of the stage whose optimizer the checkpoint holds."""
    data: dict[str, Any]
    """Position of the loader (BucketLoader.state_dict)."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the spike rule; {} in checkpoints older than the rule."""
    plan: dict[str, Any] = field(default_factory=dict)
    """The stage's micro-batch and activation policies, and what they were chosen for; {} likewise."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its files verified."""

    path: Path
    manifest: dict[str, Any]
    refused: list[str] = field(default_factory=list)
    """Why newer ones were not used, one line each."""

    @property
    def progress(self) -> Progress:
        content = self.manifest
        return Progress(
            content["update"], content["stage"], content["data"], content.get("guard", {}), content.get("plan", {})
        )

    @property
    def update(self) -> int:
        """Updates done."""
        return self.manifest["update"]

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self.manifest["world_size"]
