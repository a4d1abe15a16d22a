"""The micro-batch of a stage, chosen for images per second: the larger it is, the more of FLUX must be computed again; the
smaller, the more often gradients are sent and kernels launched.

What a rank draws of one bucket (train.drawn_per_rank) never changes; its divisors are the choices. For each the memory
formula gives the least recomputation that fits (`memory.policies_for`), and throughput.py the time of an update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from megaflux.config.schema import Config, Stage
from megaflux.data.buckets import Bucket, make_buckets
from megaflux.models.flux import POLICIES, Policy, all_blocks
from megaflux.training.ds_config import uses_kernels
from megaflux.training.planning import costs, memory
from megaflux.training.planning.throughput import (
    BLOCK_LAUNCHES,
    LAYER_LAUNCHES,
    Cluster,
    Launches,
    Traffic,
    Work,
    traffic,
)


@dataclass(frozen=True)
class Choice:
    """A micro-batch, and what its blocks compute again. Two are equal where these are."""

    micro_batch_size: int
    policies: tuple[Policy, ...]
    """Of FLUX's blocks, double ones first."""
    bytes: int = field(compare=False, default=0)
    """Peak on a GPU by memory.py, at the bucket that needs most."""
    fits: bool = field(compare=False, default=True)
    seconds: dict[Bucket, float] = field(compare=False, default_factory=dict)
    """Of an update whose images are all of a bucket; empty where nothing is known of the GPU."""
    flops: dict[Bucket, int] = field(compare=False, default_factory=dict)
    """Of one image as the device computes them, by bucket."""

    @property
    def mean_seconds(self) -> float:
        """Of an update, the buckets weighed alike."""
        return sum(self.seconds.values()) / len(self.seconds)

    @property
    def counts(self) -> dict[Policy, int]:
        """Blocks by policy."""
        found = Counter(self.policies)
        return {policy: found[policy] for policy in POLICIES}


class Planner:
    """What micro-batches of a run need and how fast they are, from sizes alone."""

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        ranks: int,
        module: nn.Module,
        trunk: nn.Module,
        uneven: Sequence[bool] | None = None,
    ):
        """config: with what each rank draws filled in. module, trunk: as `meta_models` gives them. uneven: blocks that keep
        their q, k, v product (`flux.uneven_norms`)."""
        self.config, self.ds_config, self.ranks = config, ds_config, ranks
        self.module, self.trunk, self.uneven = module, trunk, uneven
        self.buckets = make_buckets(config.data.aspect_ratios, config.data.longest_side)
        self._known: dict[tuple, tuple[Work, costs.Recomputation]] = {}

    def choices(self, stage: Stage, sizes: Sequence[int], limit: int, cluster: Cluster | None = None) -> list[Choice]:
        """Of each micro-batch the plan that is fastest within `limit` bytes; cluster None: without times."""
        return [self._choice(stage, size, limit, cluster) for size in sizes]

    def best(self, stage: Stage, sizes: Sequence[int], limit: int, cluster: Cluster | None = None) -> Choice:
        """Of `choices` that fit the one with the most images per second, of equals the smallest; where none fits the one
        that needs least. Without a cluster `sizes` must be one."""
        return best_of(self.choices(stage, sizes, limit, cluster))

    def with_needs(self, stage: Stage, size: int, policies: Sequence[Policy], limit: int) -> Choice:
        """A plan as it is, its bytes held against `limit`."""
        config = self._cut_into(size)
        need = max(
            memory.stage_memory(
                config, self.ds_config, self.ranks, self.module, self.trunk, stage, bucket, policies, self.uneven
            ).total
            for bucket in self.buckets
        )
        return Choice(size, tuple(policies), need, need <= limit)

    def _choice(self, stage: Stage, size: int, limit: int, cluster: Cluster | None) -> Choice:
        policies = memory.policies_for(
            self._cut_into(size),
            self.ds_config,
            self.ranks,
            self.module,
            self.trunk,
            self.buckets,
            stage,
            limit,
            self.uneven,
        )
        choice = self.with_needs(stage, size, policies, limit)
        if cluster is None:
            return choice
        moved, launches = self._traffic(stage), self._launches()
        work = {bucket: self._work(stage, bucket, policies) for bucket in self.buckets}
        images = self.config.train.global_batch_size
        return replace(
            choice,
            seconds={b: cluster.update_seconds(w, launches, moved, size, images) for b, w in work.items()},
            flops={b: w.total for b, w in work.items()},
        )

    def _cut_into(self, size: int) -> Config:
        return self.config.with_batches(self.config.train.drawn_per_rank, size)

    def _work(self, stage: Stage, bucket: Bucket, policies: Sequence[Policy]) -> Work:
        key = (stage.blocks, stage.components, bucket)
        if key not in self._known:
            tokens = costs.token_counts(self.config, bucket)
            trunk, vae = costs.frozen_parts(self.config, self.trunk, bucket)
            flops = costs.training_flops(self.module, stage, tokens).hardware
            self._known[key] = Work(flops, trunk, vae), costs.recomputation(self.module, tokens)
        work, again = self._known[key]
        return replace(work, flux=work.flux + again.of(policies))

    def _traffic(self, stage: Stage) -> Traffic:
        in_engine = sum(parameter.numel() for parameter in self.module.parameters())
        return traffic(self.ds_config, self.ranks, sum(memory.trained_sizes(self.module, stage)), in_engine)

    def _launches(self) -> Launches:
        blocks = len(all_blocks(self.module.transformer))
        layers = len(self.trunk.language_model.layers) + len(self.trunk.visual.blocks)
        return Launches(blocks * BLOCK_LAUNCHES[uses_kernels(self.config, self.ds_config)], layers * LAYER_LAUNCHES)


def best_of(choices: Sequence[Choice]) -> Choice:
    """The fastest that fits, of equals the smallest micro-batch; where none fits the one that needs least."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.bytes)
    if len(fitting) == 1:
        return fitting[0]
    return min(fitting, key=lambda choice: (choice.mean_seconds, choice.micro_batch_size))


def reason(chosen: Choice, others: Sequence[Choice], images: int) -> str:
    """Why a micro-batch was chosen: predicted images/s of it and of the others that fit. images: of an update."""

    def rate(choice: Choice) -> str:
        return f"{images / choice.mean_seconds:.3g} images/s"

    rest = [
        f"{rate(choice)} with {choice.micro_batch_size} ({memory.counted(choice.policies)})"
        if choice.fits
        else f"{choice.micro_batch_size} does not fit"
        for choice in others
        if choice.micro_batch_size != chosen.micro_batch_size
    ]
    return f"predicted {rate(chosen)} over all GPUs" + (f"; {', '.join(rest)}" if rest else "")
