"""The micro-batch of a stage, chosen for images per second: a larger one needs more recomputation in FLUX, a smaller one
sends gradients and launches kernels more often.

What a rank draws of one bucket (train.drawn_per_rank) is fixed; the choices are its divisors. For each, `policies_for` gives
the least recomputation that fits in memory, and throughput.py the time of an update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megaflux.config.schema import Stage
from megaflux.data.buckets import Bucket
from megaflux.models.flux import POLICIES, Policy
from megaflux.training.planning import costs, memory
from megaflux.training.planning.gradients import flux_gradients
from megaflux.training.planning.sizes import Sizes
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
    """A plan: a micro-batch and the activation policies of FLUX's blocks. Plans are equal if these two are."""

    micro_batch_size: int
    policies: tuple[Policy, ...]
    """Of FLUX's blocks, double ones first."""
    bytes: int = field(compare=False, default=0)
    """Peak on a GPU by memory.py, at the bucket that needs most; 0: not computed."""
    fits: bool = field(compare=False, default=True)
    """Whether that is within the limit it was planned for."""
    seconds: dict[Bucket, float] = field(compare=False, default_factory=dict)
    """Bucket -> predicted time of an update with only images of that bucket; empty if the GPU's speed is unknown."""
    flops: dict[Bucket, int] = field(compare=False, default_factory=dict)
    """Bucket -> hardware FLOPs of one image."""

    @property
    def mean_seconds(self) -> float:
        """Predicted time of an update, averaged over buckets."""
        return sum(self.seconds.values()) / len(self.seconds)

    @property
    def counts(self) -> dict[Policy, int]:
        """Policy -> number of blocks."""
        found = Counter(self.policies)
        return {policy: found[policy] for policy in POLICIES}


class Planner:
    """What micro-batches of a run need and how fast they are, computed from sizes alone."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self._known: dict[tuple[Any, ...], tuple[Work, costs.Recomputation]] = {}

    def choices(
        self, stage: Stage, micro_batches: Sequence[int], limit: int, cluster: Cluster | None = None
    ) -> list[Choice]:
        """The fastest plan of each micro-batch within `limit` bytes. cluster: the GPUs to predict times for; None: no times."""
        return [self._choice(stage, size, limit, cluster) for size in micro_batches]

    def best(self, stage: Stage, micro_batches: Sequence[int], limit: int, cluster: Cluster | None = None) -> Choice:
        """`best_of` the `choices`. Without a cluster, micro_batches must have one element."""
        return best_of(self.choices(stage, micro_batches, limit, cluster))

    def with_needs(self, stage: Stage, micro_batch_size: int, policies: Sequence[Policy], limit: int) -> Choice:
        """This plan with its memory, and whether that is within `limit` bytes."""
        sizes = self.sizes.cut_into(micro_batch_size)
        need = max(memory.stage_memory(sizes, stage, bucket, policies).total for bucket in sizes.buckets)
        return Choice(micro_batch_size, tuple(policies), need, need <= limit)

    def _choice(self, stage: Stage, micro_batch_size: int, limit: int, cluster: Cluster | None) -> Choice:
        policies = memory.policies_for(self.sizes.cut_into(micro_batch_size), stage, limit)
        choice = self.with_needs(stage, micro_batch_size, policies, limit)
        if cluster is None:
            return choice
        moved, launches = self._traffic(stage), self._launches(stage)
        work = {bucket: self._work(stage, bucket, policies) for bucket in self.sizes.buckets}
        images = self.sizes.config.train.global_batch_size
        return replace(
            choice,
            seconds={b: cluster.update_seconds(w, launches, moved, micro_batch_size, images) for b, w in work.items()},
            flops={b: w.total for b, w in work.items()},
        )

    def _work(self, stage: Stage, bucket: Bucket, policies: Sequence[Policy]) -> Work:
        key = (stage.trained, bucket)
        if key not in self._known:
            sizes = self.sizes
            tokens = costs.token_counts(sizes.config, bucket)
            trunk, vae = costs.frozen_parts(sizes.config, sizes.trunk, bucket)
            flops = costs.training_flops(sizes.module, stage, tokens).hardware
            self._known[key] = Work(flops, trunk, vae), costs.recomputation(sizes.module, stage, tokens)
        work, again = self._known[key]
        return replace(work, flux=work.flux + again.of(policies))

    def _traffic(self, stage: Stage) -> Traffic:
        sizes = self.sizes
        in_engine = sum(parameter.numel() for parameter in sizes.module.parameters())
        return traffic(sizes.ds_config, sizes.ranks, sum(memory.trained_sizes(sizes.module, stage)), in_engine)

    def _launches(self, stage: Stage) -> Launches:
        trunk, module = self.sizes.trunk, self.sizes.module
        each, blocks = BLOCK_LAUNCHES[self.sizes.fused], flux_gradients(module.transformer, stage).blocks
        flux = sum(each if block.backward else each // 3 for block in blocks)
        layers = len(trunk.language_model.layers) + len(trunk.visual.blocks)
        return Launches(flux + _layer_launches(len(module.vlm.layers), stage.vlm_layers), layers * LAYER_LAUNCHES)


def _layer_launches(layers: int, trained: int) -> int:
    """Of the Qwen layers that are apart from the trunk; the published recipe's one is a small part that is left out."""
    return LAYER_LAUNCHES * (max(0, layers - 1) + 2 * max(0, trained - 1))


def best_of(choices: Sequence[Choice]) -> Choice:
    """The fastest plan that fits, of equally fast ones that with the smallest micro-batch; if none fits, the one that needs
    least memory."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: choice.bytes)
    if len(fitting) == 1:
        return fitting[0]
    return min(fitting, key=lambda choice: (choice.mean_seconds, choice.micro_batch_size))


def reason(chosen: Choice, others: Sequence[Choice], images: int) -> str:
    """Why a micro-batch was chosen: predicted images/s of it and of the others that fit. images: per update."""

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
