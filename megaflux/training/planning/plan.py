"""A run's plan of memory: the micro-batch and activation policies of each stage.

Before a stage's first update each rank runs the real module forward and backward once at every bucket (trial.py). A rank that
runs out of memory lowers its plan, by the formula of memory.py, and tries again; then all take the lowest. A rank that runs
out later ends the process and lets the next start plan with less (out_of_memory.py).

Only `model.activation_checkpointing auto` and `train.micro_batch_size auto` are lowered; values that the user set stay, and
the error says what to change.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from megaflux.common.ranks import World, gathered
from megaflux.config.schema import Config, Stage
from megaflux.models.flux import Policy, uneven_norms
from megaflux.models.pretrained import Models
from megaflux.training.ds_config import batch_sizes, divisors, uses_kernels
from megaflux.training.engine import StageEngine
from megaflux.training.planning import limits, memory, out_of_memory, trial
from megaflux.training.planning.candidates import Candidates
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.micro_batch import Choice, Planner, reason
from megaflux.training.planning.out_of_memory import Situation
from megaflux.training.planning.saved_plan import SavedPlan
from megaflux.training.planning.sizes import Sizes
from megaflux.training.planning.throughput import PER_MACHINE, Cluster

log = logging.getLogger("megaflux")
CLOSE = 1.01  # free memory may differ by this factor from start to start; closer than this, only a trial can decide


class Plan:
    """Micro-batch and activation policies of the current stage, the same on all ranks."""

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        world: World,
        choose_micro_batch: bool = False,
        assumed: Assumed | None = None,
    ):
        """Reads RUN/memory.json; raises UserError if it is invalid. Collective.

        config: fitted to the ranks (`elastic.fit`). choose_micro_batch: whether another micro-batch may be chosen
        (train.micro_batch_size auto), provided the GPU's speed is known. assumed: what the user states about the GPU."""
        self.config, self.ds_config, self.world = config.for_world(world.size), ds_config, world
        self.assumed = assumed or Assumed()
        self.stage: Stage | None = None
        self.candidates: Candidates | None = None
        """Plans of the stage; None: its engine is being built."""
        self.choice: Choice | None = None
        """The stage's plan; None: not chosen yet."""
        self.why = ""
        """One line on how the micro-batch was chosen; empty if the user set it."""
        self.trained = False
        """Whether this process has done an update."""
        self.updating = False
        """Whether an update is under way; a lower plan reduces only the memory of updates."""
        self.update = 0
        """Updates done, for the events."""
        self.file = Path(config.run.dir) / limits.FILE
        self.limits = limits.read_for_all(self.file, world)
        """Stage -> bytes that may be planned with."""
        names = set(gathered(trial.device_name(world.device), world))
        self.gpu = " and ".join(sorted(names))
        """Name of the ranks' GPUs; "cpu" for CPUs."""
        known = self.assumed.of(self.gpu if len(names) == 1 else None)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", min(world.size, PER_MACHINE)))
        self.cluster = Cluster(known, world.size, here) if known else None
        self.free = choose_micro_batch and self.cluster is not None
        """Whether the micro-batch is chosen here."""
        if choose_micro_batch and not self.free:
            why = f"nothing is known of the speed of {self.gpu}" if world.device.type == "cuda" else "no GPU"
            self.why = f"{why}, so none is chosen; --gpu-memory GB lets the run choose"
        self._saved: SavedPlan | None = None

    # --- what the plan is ---

    @property
    def micro_batch_size(self) -> int:
        """Images of a micro-batch; before the plan is chosen, the configured number."""
        return self.choice.micro_batch_size if self.choice else batch_sizes(self.config).micro

    @property
    def policies(self) -> list[Policy]:
        """Activation policy of each FLUX block; [] before the plan is chosen."""
        return list(self.choice.policies) if self.choice else []

    @property
    def limit(self) -> int | None:
        """Bytes that RUN/memory.json allows in this stage; None: no limit, or nothing that could be lowered."""
        can_lower = self.free or self.config.model.activation_checkpointing == "auto"
        return self.limits.get(self.stage.name) if self.stage is not None and can_lower else None

    def describe(self) -> str:
        """The plan as text."""
        why = f" ({self.why})" if self.why else ""
        drawn = batch_sizes(self.config).drawn
        recomputed = memory.counted(self.policies)
        return (
            f"micro-batch {self.micro_batch_size} of {drawn} drawn{why}; recomputed in the backward pass, {recomputed}"
        )

    def scalars(self) -> dict[str, float]:
        """TensorBoard tag -> value."""
        values: dict[str, float] = {"plan/micro_batch_size": self.micro_batch_size}
        counts = self.choice.counts if self.choice else {}
        return values | {f"plan/blocks_{policy}": count for policy, count in counts.items()}

    def state_dict(self) -> dict[str, Any]:
        """The current stage's plan, for a checkpoint's manifest."""
        return self._as_saved(self._stage()).state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The plan of the checkpoint's stage. `choose` takes it again on as many ranks of the same GPU, so that a resumed run
        rounds as an uninterrupted one. {}: unknown."""
        self._saved = SavedPlan.from_state(state)

    # --- through a stage ---

    def enter(self, stage: Stage) -> None:
        """Begin a stage: from now on, running out of memory is attributed to it."""
        self.stage, self.candidates, self.choice, self.updating = stage, None, None, False

    def choose(self, models: Models, engine: StageEngine) -> Choice:
        """Choose the stage's plan, once its engine is built: the checkpoint's, or the fastest within the limits, tried out.
        Configures models and engine with it. Collective.

        Raises UserError, the same on all ranks, if not even the lowest plan fits."""
        stage = self._stage()
        sizes = self._sizes(models)
        candidates = self.candidates = self._candidates(stage, sizes)
        budget = memory.budget(self.world, models, engine.deepspeed.optimizer.optimizer)
        if self.assumed.memory_gb is not None:
            budget = min(budget, memory.usable(self.assumed.memory_gb * 1e9))
        tries_out = trial.tries_out(self.world, engine)
        saved = self._take_saved(candidates, budget, tries_out)
        choice = self._within_limit(candidates, saved or candidates.within(budget))
        if tries_out:
            choice = self._try_out(candidates, choice, models, engine)
        self._warn_if_changed(choice)
        self._saved = None  # it is of this stage alone
        if self.free:
            others = candidates.others(self.limit or budget)
            images = self.config.train.global_batch_size
            self.why = "as in the checkpoint" if choice == saved else reason(choice, others, images)
        models.trainable.configure(sizes.fused, list(choice.policies))
        engine.cut_into(choice.micro_batch_size)
        self.choice = choice
        return choice

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Around an update, from its first batch to its step. If it raises, `updating` stays True, for `leave`."""
        self.updating = True
        yield
        self.updating, self.trained, self.update = False, True, self.update + 1

    def leave(self, error: BaseException) -> NoReturn:
        """This rank ran out of memory: tell the next start, and end the process with exit code 11.

        Raises UserError if the next start would end here as well: nothing was lowered, no update was done, and no other
        process holds memory of this GPU."""
        lower = None
        if self.candidates is None or self.choice is None:
            advice = (
                "the models and the stage's optimizer do not fit this GPU; shard them (--deepspeed ds_configs/zero3.json), "
                "or use more or larger GPUs"
            )
        elif not self.updating:
            remedy = self.candidates.remedy(self.choice)
            advice = f"outside an update (validation or a save); if it recurs, {remedy}"
        elif (lower := self.candidates.lower(self.choice)) is not None:
            advice = f"the next start plans with less ({_as_text(lower[0])}; {self.file})"
        else:
            advice = f"nothing is left to recompute: {self.candidates.remedy(self.choice)}"
        situation = self._situation(advice, lower[1] if lower else None, final=lower is None and not self.trained)
        out_of_memory.leave(error, situation)

    # --- choosing ---

    def _stage(self) -> Stage:
        if self.stage is None:
            raise RuntimeError("Plan.enter a stage first")
        return self.stage

    def _sizes(self, models: Models) -> Sizes:
        """From the configuration, as ZeRO-3 leaves the real parameters empty; blocks with uneven norms from the weights."""
        uneven = None
        if uses_kernels(self.config, self.ds_config):
            transformer: Any = models.trainable.transformer
            uneven = uneven_norms(transformer)
            if any(uneven):
                log.info(
                    "%d of %d FLUX blocks keep their q, k, v product: norm weights near zero", sum(uneven), len(uneven)
                )
        return Sizes.of(self.config, self.ds_config, self.world.size, uneven)

    def _candidates(self, stage: Stage, sizes: Sizes) -> Candidates:
        drawn, micro = batch_sizes(self.config)
        if self.free:
            return Candidates(Planner(sizes), stage, divisors(drawn), self.cluster)
        return Candidates(Planner(sizes), stage, [micro], None)

    def _take_saved(self, candidates: Candidates, budget: int, tried_out: bool) -> Choice | None:
        """The checkpoint's plan, if the user still asks for it and it fits; None otherwise. If it will be tried out, the try
        decides whether it fits: free memory differs a little from start to start."""
        saved = self._saved
        if saved is None or not saved.still_asked_for(self._as_saved(candidates.stage), candidates.micro_batches):
            return None
        choice = candidates.planner.with_needs(candidates.stage, saved.micro_batch_size, saved.policies, budget)
        given = self.assumed.memory_gb
        if given is not None and choice.bytes > memory.usable(given * 1e9):
            return None
        return choice if tried_out or choice.bytes <= CLOSE * budget else None

    def _within_limit(self, candidates: Candidates, choice: Choice) -> Choice:
        """This plan, or the fastest within RUN/memory.json's limit if it needs more."""
        limit = self.limit
        if limit is None or candidates.needs(choice) <= limit:
            return choice
        if self.world.is_main:
            log.warning(
                "stage %s: planned within %.1f GB, since a GPU ran out of memory with more; delete %s to plan anew",
                candidates.stage.name,
                limit / 1e9,
                self.file,
            )
        return candidates.within(limit)

    def _try_out(self, candidates: Candidates, choice: Choice, models: Models, engine: StageEngine) -> Choice:
        """The highest plan, from this one down, that fits on every rank. Collective."""
        stage, sizes = candidates.stage, candidates.planner.sizes

        def fits(plan: Choice) -> bool:
            return trial.fits(sizes, stage, models, engine, plan)

        found = trial.highest_that_fits(candidates, choice, fits, self.world)
        if found is None:
            lowest = candidates.within(0)
            out_of_memory.nothing_fits(self._situation(candidates.remedy(lowest)), lowest.micro_batch_size)
        choice, steps = found
        if steps and self.world.is_main:
            log.warning(
                "stage %s: the plan did not fit the memory of every GPU; lowered %d times, to %s",
                stage.name,
                steps,
                _as_text(choice),
            )
        if self.world.device.type == "cuda":  # what the tries used does not count as the run's
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_accumulated_memory_stats()
        return choice

    def _warn_if_changed(self, choice: Choice) -> None:
        """Warn if a resumed stage is not trained with the checkpoint's plan."""
        saved, now = self._saved, self._as_saved(self._stage())
        if saved is None or saved.stage != now.stage or not self.world.is_main:
            return
        if (choice, now.gpu, now.ranks) == (saved.choice, saved.gpu, saved.ranks):
            return
        log.warning(
            "stage %s: planned anew: %s, on %d ranks (%s); in the checkpoint %s, on %d ranks (%s); rounding may differ from "
            "that of an uninterrupted run",
            *(now.stage, _as_text(choice), now.ranks, now.gpu),
            *(_as_text(saved.choice), saved.ranks, saved.gpu),
        )

    def _as_saved(self, stage: Stage) -> SavedPlan:
        return SavedPlan(
            stage=stage.name,
            micro_batch_size=self.micro_batch_size,
            policies=self.policies,
            gpu=self.gpu,
            ranks=self.world.size,
            free=self.free,
            limit=self.limit,
            activation_checkpointing=self.config.model.activation_checkpointing,
        )

    def _situation(self, advice: str, limit: int | None = None, final: bool = False) -> Situation:
        return Situation(
            run_dir=self.config.run.dir,
            world=self.world,
            stage=self.stage.name if self.stage else None,
            update=self.update,
            advice=advice,
            limit=limit,
            final=final,
        )


def _as_text(choice: Choice) -> str:
    return f"micro-batch {choice.micro_batch_size}, {memory.counted(choice.policies)}"
