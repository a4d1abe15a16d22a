"""The state of a training run, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megaflux.common.ranks import World
from megaflux.config.schema import Config
from megaflux.data.batches import Batch
from megaflux.data.loader import BucketLoader
from megaflux.models.pretrained import Models
from megaflux.training import distributed
from megaflux.training.average import WeightAverage
from megaflux.training.checkpoint.state import Checkpoint, Progress
from megaflux.training.engine import Carried, StageEngine
from megaflux.training.monitor import Monitor
from megaflux.training.planning.plan import Plan
from megaflux.training.survival.events import Events
from megaflux.training.survival.guard import Drop, Guard
from megaflux.training.survival.watch import Watch
from megaflux.training.validation import References


class Verdict(Enum):
    """What follows an update, a stage, or the run."""

    CONTINUE = "continue"
    """No reason to stop early: the next update follows, or the stage or run has reached its end."""
    LEAVE = "leave"
    """A signal asked the run to leave, and everything is saved."""
    GO_BACK = "go back"
    """Too many consecutive updates were dropped (train.bad_updates): return to a checkpoint."""


@dataclass(frozen=True)
class Run:
    """What stays the same from a process's start to its end."""

    config: Config
    """With batch sizes per rank as numbers (checkpoint/elastic.py)."""
    ds_config: dict[str, Any]
    """DeepSpeed's configuration as given."""
    world: World
    events: Events
    watch: Watch
    plan: Plan
    """Micro-batch and activation policies, chosen anew for each stage."""


@dataclass(frozen=True)
class Divergence:
    """Why a run returns to its last checkpoint, and how it avoids the same data there."""

    drop: Drop
    """Of the last dropped update."""
    data: dict[str, Any]
    """Loader position just past the dropped data."""
    dropped: int
    """Updates dropped since the run began."""


@dataclass
class Trainer:
    """What updates change, and what they change it with. Made when a run starts and again after a return to a checkpoint."""

    run: Run
    models: Models
    references: References
    loader: BucketLoader
    guard: Guard
    monitor: Monitor
    average: WeightAverage
    drawn_batches: Iterator[Batch]
    """Batches as the loader draws them, over all stages."""
    resumed: Checkpoint | None = None
    """Where this trainer began; None: at update 0."""
    carried: Carried = field(default_factory=Carried)
    """Adam's moments and fp32 masters that the last stage handed over."""
    stage: int = 0
    """Index of the active stage."""
    updates_done: int = 0
    divergence: Divergence | None = None
    """Set with Verdict.GO_BACK."""
    engine: StageEngine = field(init=False)
    """Of the active stage; set when a stage begins, like batches."""
    batches: Iterator[Batch] = field(init=False)
    """The stage's micro-batches."""

    @property
    def last_update(self) -> int:
        """How many updates are done when this process stops."""
        train = self.run.config.train
        return train.stop_after or train.updates

    @property
    def stage_end(self) -> int:
        """The last update of the active stage."""
        return self.run.config.stage_ends()[self.stage]

    @property
    def progress(self) -> Progress:
        """What a checkpoint would store now."""
        plan, guard = self.run.plan.state_dict(), self.guard.state_dict()
        return Progress(self.updates_done, self.stage, self.loader.state_dict(), guard, plan)

    def drawn_index(self, micro: int) -> int:
        """Which of the update's drawn batches a micro-batch (both from 0) is cut from, the same on all ranks."""
        return micro * self.run.plan.micro_batch_size * self.run.world.size // self.loader.drawn_together

    def asked_to_leave(self) -> bool:
        """Whether a signal has asked any rank to leave. Collective."""
        return distributed.any_over_ranks(self.run.watch.signal is not None, self.run.world)


def due(update: int, every: int) -> bool:
    """Whether something that happens every so many updates (0: never) follows this one."""
    return every > 0 and update % every == 0
