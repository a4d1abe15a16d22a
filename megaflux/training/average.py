"""An average of the weights beside them: an exponential moving average (EMA), in float32.

    average_n = average_{n-1} + (1 - d_n) (weights_n - average_{n-1}),   d_n = min(decay, (1 + n) / (10 + n))

n counts the updates since the average began that were taken, not dropped (schedule.average_decay). weights_n are the float32 masters.

Each rank keeps the average of its own part of the masters, 4 P / R bytes beside Adam's moments (P parameters that train, R ranks),
so that an update needs no communication; offloaded with them, it is on the host. What a stage hands to the next is moved by name, as
the moments are. A parameter that no longer trains keeps its average, on the host of one rank; if it trains again, its average
goes on from there. Checkpoints hold the averages of all parameters that have trained since the average began (checkpoint/weights.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaflux.common.ranks import World
from megaflux.training.checkpoint import weights
from megaflux.training.engine import AVERAGE, StageEngine, adam_state, whole_size
from megaflux.training.schedule import average_decay

log = logging.getLogger("megaflux")


class WeightAverage:
    """The average of a run's weights. With decay 0 there is none, and nothing here does anything."""

    def __init__(self, decay: float, world: World):
        self.decay, self.world = decay, world
        self.updates = 0
        """Updates that it has taken in."""
        self._owner: dict[str, int] = {}
        """Parameters that no longer train -> the rank that keeps their average."""
        self._kept: dict[str, Tensor] = {}
        """This rank's of them: float32, on the host."""

    def begin_stage(self, engine: StageEngine) -> None:
        """Have an average of each parameter that the engine trains: the one carried by the engine, the one kept since it trained
        last, or else its weight. Call it when the engine has its state. Collective."""
        if not self.decay:
            return
        state = engine.deepspeed.optimizer.optimizer.state
        for _, flat in engine.flat_groups():
            if "step" not in state.get(flat, {}):  # torch creates Adam's state at the first step
                state[flat] = adam_state(flat, None)
            state[flat].setdefault(AVERAGE, flat.detach().clone())
        engine.link_state()
        for name, parameter in engine.module.named_parameters():
            if name in engine.first_stage and name in self._owner:
                whole = self._from_owner(name, parameter, self._kept)
                engine.set_state(parameter, whole, AVERAGE)
                self._owner.pop(name)
                self._kept.pop(name, None)

    @torch.no_grad()
    def follow(self, engine: StageEngine) -> None:
        """Call after each update: if it was taken, the average moves towards the weights."""
        if not self.decay or engine.dropped:
            return
        self.updates += 1
        weight = 1 - average_decay(self.decay, self.updates)
        state = engine.deepspeed.optimizer.optimizer.state
        for _, flat in engine.flat_groups():
            state[flat][AVERAGE].lerp_(flat, weight)

    def leave_stage(self, engine: StageEngine, going_on: set[str]) -> None:
        """Keep the averages of the parameters that the next stage does not train (`going_on`: those that it does; the engine
        carries theirs). Call it before the engine is closed. Collective."""
        if not self.decay:
            return
        found, owner = self._gather(engine, set(engine.first_stage) - going_on)
        self._kept |= found
        self._owner |= owner

    def gather_share(self, engine: StageEngine) -> dict[str, Tensor]:
        """This rank's share of all averages: name -> float32 on the host. Collective."""
        if not self.decay:
            return {}
        return self._kept | self._gather(engine, set(engine.first_stage))[0]

    def _gather(self, engine: StageEngine, names: set[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(this rank's share of the averages of these parameters, which train; the rank of each). Collective."""
        parameters = {name: p for name, p in engine.module.named_parameters() if name in names}
        owner = self._owners({name: whole_size(p) for name, p in parameters.items()})
        found = {}
        for name, parameter in parameters.items():
            whole = engine.full_state(parameter, AVERAGE)
            if owner[name] == self.world.rank:
                found[name] = whole.cpu()
        return found, owner

    def _owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The rank that keeps each parameter's average. sizes: name -> number of values."""
        shares = weights.shares(sizes, self.world.size)
        return {name: rank for rank, names in enumerate(shares) for name in names}

    def load(self, path: Path, manifest: Mapping[str, Any], engine: StageEngine) -> None:
        """Take over a checkpoint's averages, by whichever number of ranks it was saved. Call it after `begin_stage`. Collective.

        A checkpoint without averages leaves them as they began. UserError naming the file for a name or shape that does not fit."""
        there = manifest.get("average")
        if there is None and self.decay:
            log.info("optim.ema_decay: %s holds no average of the weights; it begins at its weights", path.name)
        if there is not None and not self.decay:
            log.info("optim.ema_decay is 0: the average of the weights in %s is discarded", path.name)
        if there is None or not self.decay:
            return
        self.updates = there["updates"]
        parameters = dict(engine.module.named_parameters())
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        found = weights.stored_shapes(path, manifest, shapes, weights.AVERAGE)
        names = {name for stored_in in found.values() for name in stored_in}
        self._owner = self._owners({name: math.prod(shapes[name]) for name in names - set(engine.first_stage)})
        wanted = {name for name in names if self._owner.get(name, self.world.rank) == self.world.rank}
        self._kept = {}
        for name, tensor in weights.stored(path, manifest, shapes, weights.AVERAGE, wanted):
            if name in engine.first_stage:
                engine.set_state(parameters[name], tensor, AVERAGE)
            else:
                self._kept[name] = tensor.clone()

    @contextmanager
    def in_place_of_weights(self, engine: StageEngine) -> Iterator[None]:
        """Inside, the engine's module computes with the averages of all that has trained since they began; afterwards its weights
        are what they were, bit for bit. Not after an error, which may be of one rank: this one would wait for the others, which
        wait elsewhere, instead of ending. Collective."""
        raw: dict[str, Tensor] = {}
        self._put(engine, AVERAGE, self._kept, keep=raw)
        yield
        self._put(engine, None, raw)

    @torch.no_grad()
    def _put(
        self,
        engine: StageEngine,
        key: str | None,
        of_stopped: Mapping[str, Tensor],
        keep: dict[str, Tensor] | None = None,
    ) -> None:
        """Give the module's parameters the values of a part of the optimizer's state, None: of the masters, whose rounding the
        weights are, and those that stopped training their owners' values. keep: takes this rank's earlier values of the latter."""
        for name, parameter in engine.module.named_parameters():
            if name not in engine.first_stage and name not in self._owner:
                continue
            with weights.gathered(parameter, engine.zero_stage, modified=True):
                if name in engine.first_stage:
                    whole = engine.full_state(parameter, key)
                else:
                    if keep is not None and self._owner[name] == self.world.rank:
                        keep[name] = parameter.detach().cpu().clone()
                    whole = self._from_owner(name, parameter, of_stopped)
                parameter.data.copy_(whole.view_as(parameter))

    def _from_owner(self, name: str, parameter: nn.Parameter, kept: Mapping[str, Tensor]) -> Tensor:
        """A kept tensor from the rank that has it, on the device. Collective."""
        owner = self._owner[name]
        if owner == self.world.rank:
            whole = kept[name].float().to(self.world.device)
        else:
            whole = torch.empty(tuple(getattr(parameter, "ds_shape", parameter.shape)), device=self.world.device)
        if self.world.size > 1:
            torch.distributed.broadcast(whole, owner)
        return whole
