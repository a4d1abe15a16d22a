"""Memory at its edge: a stage's micro-batch and activation policies, tried out before its first update, and what to do when a
GPU runs out.

Before: each rank runs the real module forward and backward once at every bucket, without a collective and without a
trace. A rank that runs out lowers its plan by the formula of memory.py and tries again; then all take the lowest.

Later a peer may be inside a collective, so that nothing can be agreed on: the rank writes how much may be planned with
into RUN/memory.json and leaves with exit code 11, as one that hangs. The next start plans within it.

Only `model.activation_checkpointing auto` and `train.micro_batch_size auto` are lowered; what a person chose stays, and the
mend is said.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from megaflux.common import ranks
from megaflux.common.errors import STUCK, UserError, is_out_of_memory
from megaflux.common.ranks import World
from megaflux.config.parse import Config, Stage
from megaflux.models.flux import Policy, uneven_norms
from megaflux.models.pretrained import Models, meta_models
from megaflux.training import distributed
from megaflux.training.checkpoint import manifest
from megaflux.training.ds_config import divisors, uses_kernels, weight_bytes
from megaflux.training.engine import StageEngine, release_memory
from megaflux.training.planning import memory
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.micro_batch import Choice, Planner, reason
from megaflux.training.planning.throughput import PER_MACHINE, Cluster
from megaflux.training.planning.trial import device_name, forward_and_backward, held, held_by_others, tries_out
from megaflux.training.survival import watch
from megaflux.training.survival.events import Events

log = logging.getLogger("megaflux")
FILE = "memory.json"
ALIKE = 1.01  # of what is free at one start may be free at the next, where no try tells
STEP = 0.95  # of what a plan that did not fit needs
TELLING = 10.0  # s for the run's file system, which may hang
NEVER = 10**6  # steps: of a rank on which no plan fits


class Plan:
    """Micro-batch and activation policies of the stage at hand, alike on all ranks."""

    def __init__(
        self,
        config: Config,
        ds_config: dict[str, Any],
        world: World,
        choose_micro_batch: bool = False,
        assumed: Assumed | None = None,
    ):
        """Reads RUN/memory.json, on rank 0 for all; UserError where it cannot be read. Collective.

        config: with the micro-batch in numbers. choose_micro_batch: whether another one may be taken (train.micro_batch_size
        auto), where the GPU's speed is known. assumed: what a person says of the GPU."""
        self.config, self.ds_config, self.world = config, ds_config, world
        self.assumed = assumed or Assumed()
        self.file = Path(config.run.dir) / FILE
        self.stage: Stage | None = None
        self.choice: Choice | None = None
        """The stage's; None while its engine is being built."""
        self.why = ""
        """One line on how the micro-batch was chosen; empty where it was given."""
        self.trained = False
        """Whether this process has done an update."""
        self.updating = False
        """Whether an update is under way; only what it needs can be lowered."""
        self.update = 0
        """Updates done, for whoever reads the events."""
        found = distributed.from_main(_read(self.file) if world.is_main else None, world)
        if isinstance(found, str):
            raise UserError(found, agreed=True)
        self.limits: dict[str, int] = found
        """Stage -> bytes of memory.py's formula that may be planned with."""
        names = set(ranks.gathered(device_name(world.device), world))
        self.gpu = " and ".join(sorted(names))
        """Name of the ranks' GPUs, "cpu" of CPUs."""
        known = self.assumed.of(self.gpu if len(names) == 1 else None)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", min(world.size, PER_MACHINE)))
        self.cluster = Cluster(known, world.size, here) if known else None
        self.free = choose_micro_batch and self.cluster is not None
        if choose_micro_batch and not self.free:
            why = f"nothing is known of the speed of {self.gpu}" if world.device.type == "cuda" else "no GPU"
            self.why = f"{why}, so none is chosen; --gpu-memory GB lets the run choose"
        self._saved: dict[str, Any] = {}

    @property
    def sizes(self) -> list[int]:
        """Micro-batches that may be taken."""
        train = self.config.train
        return divisors(train.drawn_per_rank) if self.free else [train.micro_batch_size]

    @property
    def micro_batch_size(self) -> int:
        return self.choice.micro_batch_size if self.choice else self.config.train.micro_batch_size

    @property
    def policies(self) -> list[Policy]:
        return list(self.choice.policies) if self.choice else []

    @property
    def can_lower(self) -> bool:
        """Whether there is anything but what a person chose."""
        return self.free or self.config.model.activation_checkpointing == "auto"

    def state_dict(self) -> dict[str, Any]:
        """Of the stage at hand, for a checkpoint's manifest."""
        return {
            "stage": self.stage.name,
            "micro_batch_size": self.micro_batch_size,
            "policies": self.policies,
            "gpu": self.gpu,
            "ranks": self.world.size,
            "free": self.free,
            "limit": self.limit,
            "activation_checkpointing": self.config.model.activation_checkpointing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What the checkpoint's stage was planned with: taken again on as many ranks of the same GPU, so that a resumed run
        rounds as one that was never stopped. {}: nothing is known."""
        self._saved = state

    def enter(self, stage: Stage) -> None:
        """From here on, what does not fit is this stage's."""
        self.stage, self.choice, self.updating = stage, None, False

    def choose(self, models: Models, engine: StageEngine) -> Choice:
        """The plan of the stage, whose engine is built: as the checkpoint has it, or chosen, within what earlier attempts
        found, and tried out. Configures model and engine with it. Collective.

        UserError, alike on all ranks, where not even the lowest plan fits."""
        kernels, stage = uses_kernels(self.config, self.ds_config), self.stage
        uneven = uneven_norms(models.trainable.transformer) if kernels else None
        if uneven and any(uneven):
            log.info(
                "%d of %d FLUX blocks keep their q, k, v product: norm weights near zero", sum(uneven), len(uneven)
            )
        # Sizes: ZeRO-3 leaves the real parameters empty.
        self.planner = Planner(self.config, self.ds_config, self.world.size, *meta_models(self.config), uneven)
        budget = memory.budget(self.world, models, engine.deepspeed.optimizer.optimizer)
        if self.assumed.memory_gb is not None:
            budget = min(budget, memory.usable(self.assumed.memory_gb * 1e9))
        saved = self._as_saved(budget, tries_out(self.world, engine))
        choice = saved or self._within(budget)
        limit = self.limit
        if limit is not None and self._needs(choice) > limit:
            choice = self._within(limit)
            if self.world.is_main:
                log.warning(
                    "stage %s: planned within %.1f GB, for a GPU ran out of memory with more; delete %s to plan anew",
                    stage.name,
                    limit / 1e9,
                    self.file,
                )
        if tries_out(self.world, engine):
            choice = self._tried(choice, lambda plan: self._fits(models, engine, plan))
            if self.world.device.type == "cuda":  # what the tries needed is no news of the run
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.reset_accumulated_memory_stats()
        if self._saved.get("stage") == stage.name and self.world.is_main:
            there = Choice(self._saved["micro_batch_size"], tuple(self._saved["policies"]))
            here, then = (self.gpu, self.world.size), (self._saved["gpu"], self._saved["ranks"])
            if (choice, here) != (there, then):
                log.warning(
                    "stage %s: planned anew: %s, on %d ranks (%s); in the checkpoint %s, on %d ranks (%s); rounding may "
                    "differ from that of a run that was never stopped",
                    stage.name,
                    _shown(choice),
                    *reversed(here),
                    _shown(there),
                    *reversed(then),
                )
        self._saved = {}  # of this stage; the next is planned when it comes
        if self.free:
            images = self.config.train.global_batch_size
            others = self.planner.choices(stage, self.sizes, limit or budget, self.cluster)
            self.why = "as in the checkpoint" if choice == saved else reason(choice, others, images)
        models.trainable.configure(kernels, list(choice.policies))
        engine.cut_into(choice.micro_batch_size)
        self.choice = choice
        return choice

    def describe(self) -> str:
        """The plan in words for people."""
        why = f" ({self.why})" if self.why else ""
        drawn, micro = self.config.train.drawn_per_rank, self.micro_batch_size
        return f"micro-batch {micro} of {drawn} drawn{why}; computed again in the backward pass, {memory.counted(self.policies)}"

    def scalars(self) -> dict[str, float]:
        """Curves of the plan."""
        values = {f"plan/blocks_{policy}": count for policy, count in self.choice.counts.items()}
        return {"plan/micro_batch_size": self.micro_batch_size} | values

    @contextmanager
    def one_update(self) -> Iterator[None]:
        """Around an update, from its first batch to its step. One that raises stays the update under way: `leave` asks."""
        self.updating = True
        yield
        self.updating, self.trained, self.update = False, True, self.update + 1

    @property
    def limit(self) -> int | None:
        """Bytes that an earlier attempt's end left to plan with in this stage; None: none ended so."""
        return self.limits.get(self.stage.name) if self.stage is not None and self.can_lower else None

    def lower(self, choice: Choice) -> tuple[Choice, int] | None:
        """The next lower plan, and the bytes that it is planned within: a twentieth less than this one needs, or the next
        twentieth at which anything changes. None: there is no lower one."""
        limit, lowest = self._needs(choice), self._within(0)
        while choice != lowest:
            limit = int(STEP * limit)
            if (lower := self._within(limit)) != choice:
                return lower, limit
        return None

    def leave(self, error: BaseException) -> NoReturn:
        """This rank ran out of memory: leave word for the next start and end the process with exit code 11.

        UserError where the next start would end here as well: nothing was lowered, no update was done, and nobody else
        holds memory of this GPU."""
        what = " ".join(str(error).split())[:200]
        lower = self.lower(self.choice) if self.updating else None
        if self.choice is None:
            then = (
                "the models and the stage's optimizer do not fit this GPU; shard them (--deepspeed ds_configs/zero3.json), "
                "or use more or larger GPUs"
            )
        elif lower is not None:
            then = f"the next start plans with less ({_shown(lower[0])}; {self.file})"
        elif self.updating:
            then = f"nothing is left to compute again: {self._mend()}"
        else:
            then = f"not in an update but around it (validation, a save); if this is how it always ends, {self._mend()}"
        others = held_by_others(self.world.device)
        if others:
            then += f"; other processes hold {others / 1e9:.1f} GB of this GPU"
        why = f"out of memory in stage {self.stage.name} after update {self.update}: {what}; {then}"
        telling = threading.Thread(target=self._tell, args=(lower and lower[1], why), daemon=True)
        telling.start()
        telling.join(TELLING)
        if lower is None and not self.trained and not others:
            raise UserError(why)
        watch.leave(why, STUCK)

    def _tell(self, limit: int | None, why: str) -> None:
        if limit is not None:
            try:
                # A peer that ran out as well has planned alike, so that whoever comes last writes no more than it read.
                limits = _read(self.file)
                limits = limits if isinstance(limits, dict) else {}
                limit = min(limit, limits.get(self.stage.name, limit))
                draft = self.file.with_name(f".{FILE}.{self.world.rank}")
                manifest.write_durably(draft, json.dumps({"bytes": limits | {self.stage.name: limit}}, indent=1) + "\n")
                draft.replace(self.file)
                manifest.sync(self.file.parent)
            except OSError as error:
                log.error("%s: %s; the next start plans as this one did", self.file, error.strerror)
        # Any rank may be the one that ran out, and rank 0 may be waiting for it.
        Events(self.config.run.dir, enabled=True).record("fault", what="out_of_memory", update=self.update, detail=why)

    def _as_saved(self, budget: int, tried_out: bool) -> Choice | None:
        """The checkpoint's plan of this stage where it is to be taken again: of as many ranks and the same GPU, not against
        what a person has set since (a number or `auto`, a policy, --gpu-memory, memory.json deleted), within the memory that is
        there. That is left to the try where there is one: free memory differs by a little from start to start."""
        saved, wanted = self._saved, self.config.model.activation_checkpointing
        if saved.get("stage") != self.stage.name or (saved["gpu"], saved["ranks"]) != (self.gpu, self.world.size):
            return None
        size, policies = saved["micro_batch_size"], saved["policies"]
        if size not in self.sizes or (self.free and not saved.get("free", True)):
            return None
        as_wanted = (
            saved.get("activation_checkpointing", "auto") == "auto" if wanted == "auto" else set(policies) == {wanted}
        )
        if not as_wanted:
            return None
        planned_within = saved.get("limit")
        if planned_within is not None and (self.limit is None or self.limit > planned_within):
            return None
        choice = self.planner.with_needs(self.stage, size, policies, budget)
        given = self.assumed.memory_gb
        if given is not None and choice.bytes > memory.usable(given * 1e9):
            return None
        return choice if tried_out or choice.bytes <= ALIKE * budget else None

    def _tried(self, plan: Choice, fits: Callable[[Choice], bool]) -> Choice:
        """The highest plan that fits on every rank, from this one down. Collective."""
        plans = [plan]
        while not fits(plans[-1]):
            if (lower := self.lower(plans[-1])) is None:
                plans = []
                break
            plans.append(lower[0])
        steps = -distributed.min_over_ranks(-(len(plans) - 1 if plans else NEVER), self.world)
        if steps == NEVER:
            smallest = self._within(0).micro_batch_size
            why = f"stage {self.stage.name}: a micro-batch of {smallest} does not fit the GPU's memory"
            others = -distributed.min_over_ranks(-held_by_others(self.world.device), self.world)
            if others:  # a process that is about to leave, perhaps: the same command may fit later
                why += f", of which other processes hold {others / 1e9:.1f} GB"
                if self.world.is_main:
                    Events(self.config.run.dir, enabled=True).record(
                        "fault", what="out_of_memory", update=self.update, detail=why
                    )
                watch.leave(why, STUCK)
            raise UserError(f"{why}; {self._mend()}", agreed=True)
        for _ in range(steps):  # those of another rank, the same everywhere
            plan, _ = self.lower(plan)
        if steps and self.world.is_main:
            log.warning(
                "stage %s: the plan did not fit the memory of every GPU; lowered %d times, to %s",
                self.stage.name,
                steps,
                _shown(plan),
            )
        return plan

    def _fits(self, models: Models, engine: StageEngine, plan: Choice) -> bool:
        models.trainable.configure(uses_kernels(self.config, self.ds_config), list(plan.policies))
        config, fits = self.config.with_batches(self.config.train.drawn_per_rank, plan.micro_batch_size), True
        try:
            with held(self.world.device, [*engine.coming(self.world.device), self._in_flight()]):
                for bucket in self.planner.buckets:
                    forward_and_backward(config, models, bucket)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        release_memory()  # past the handler: its traceback holds all that the try had made
        return fits

    def _mend(self) -> str:
        if self.config.model.activation_checkpointing not in ("auto", "full"):
            return "set model.activation_checkpointing to auto"
        smallest = self._within(0).micro_batch_size if self.choice is None else self.micro_batch_size
        if smallest > 1:
            return f"lower train.micro_batch_size (it is {smallest})"
        return "train.micro_batch_size is 1 already: lower data.longest_side, or use more or larger GPUs"

    def _needs(self, choice: Choice) -> int:
        return choice.bytes or self.planner.with_needs(self.stage, choice.micro_batch_size, choice.policies, 0).bytes

    def _within(self, limit: int) -> Choice:
        return self.planner.best(self.stage, self.sizes, limit, self.cluster if self.free else None)

    def _in_flight(self) -> int:
        """Bytes of gradients that are being reduced while a backward pass runs."""
        return memory.zero_bytes(
            self.ds_config, self.world.size, self.planner.module, self.stage, weight_bytes(self.ds_config)
        )[0]


def _shown(choice: Choice) -> str:
    return f"micro-batch {choice.micro_batch_size}, {memory.counted(choice.policies)}"


def _read(file: Path) -> dict[str, int] | str:
    """Stage -> bytes, nothing where there is no file; or what is wrong with it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        limits = content["bytes"]
        if not all(type(limit) is int and limit > 0 for limit in limits.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except OSError as error:
        return f"{file}: {error.strerror}; delete it to plan the memory anew"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f'{file}: want {{"bytes": {{STAGE: BYTES}}}}; delete it to plan the memory anew'
    return limits
