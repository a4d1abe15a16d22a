"""An average of the weights beside them: an exponential moving average (EMA), in float32.

    average_n = average_{n-1} + (1 - d_n) (weights_n - average_{n-1}),   d_n = min(decay, (1 + n) / (10 + n))

n counts the updates since the average began that were taken, not dropped (schedule.average_decay). weights_n are the
float32 masters.

Each rank keeps the average of its own part of the masters, 4 P / R bytes beside Adam's moments (P parameters that train, R
ranks), so that an update needs no communication; offloaded with them, it is on the host. At a change of stage averages are
moved by name, over the host of one rank each. A parameter that no longer trains keeps its average there; if it trains
again, its average goes on. Checkpoints hold the averages of all parameters that have trained since the average began
(checkpoint/weights.py).
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
        """Parameters that do not train now -> the rank that keeps their average."""
        self._kept: dict[str, Tensor] = {}
        """This rank's of them: float32, on the host."""

    def begin_stage(self, engine: StageEngine) -> None:
        """Have an average of each parameter that the engine trains: the one kept since it trained last, or else its weight. Call
        it when the engine has its state. Collective."""
        if not self.decay:
            return
        state = engine.deepspeed.optimizer.optimizer.state
        for _, flat in engine.flat_groups():
            if "step" not in state.get(flat, {}):  # torch creates Adam's state at the first step
                state[flat] = adam_state(flat, None)
            state[flat][AVERAGE] = flat.detach().clone()
        engine.link_state()
        self._hand_out(engine)

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

    def leave_stage(self, engine: StageEngine) -> None:
        """Keep the averages of all that the engine trains, each on one rank, for a later stage that trains it and for checkpoints.
        Call it before the engine is closed. Collective."""
        if self.decay:
            found, owner = self._gather(engine)
            self._kept |= found
            self._owner |= owner

    def gather_share(self, engine: StageEngine) -> dict[str, Tensor]:
        """This rank's share of all averages: name -> float32 on the host. Collective."""
        if not self.decay:
            return {}
        return self._kept | self._gather(engine)[0]

    def _gather(self, engine: StageEngine) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(this rank's share of the averages of the parameters that train; the rank of each). Collective."""
        parameters = {name: p for name, p in engine.module.named_parameters() if name in engine.first_stage}
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
        self._owner = self._owners({name: math.prod(shapes[name]) for name in names})
        mine = {name for name in names if self._owner[name] == self.world.rank}
        self._kept = {
            name: tensor.clone() for name, tensor in weights.stored(path, manifest, shapes, weights.AVERAGE, mine)
        }
        self._hand_out(engine)

    def _hand_out(self, engine: StageEngine) -> None:
        """Move the kept averages of parameters that the engine trains into every rank's part of them. Collective."""
        for name, parameter in engine.module.named_parameters():
            if name in engine.first_stage and name in self._owner:
                engine.set_state(parameter, self._from_owner(name, parameter, self._kept), AVERAGE)
                del self._owner[name]
                self._kept.pop(name, None)

    @contextmanager
    def in_place_of_weights(self, engine: StageEngine) -> Iterator[None]:
        """Inside, the engine's module computes with the averages of all that has trained since they began; afterwards its weights
        are what they were, bit for bit. Not after an error, which may be of one rank: this one would wait for the others, which
        wait elsewhere, instead of ending. Collective."""
        raw: dict[str, Tensor] = {}
        for name, parameter in self._averaged(engine):
            with weights.gathered(parameter, engine.zero_stage, modified=True):
                if self._owner.get(name) == self.world.rank:
                    raw[name] = parameter.detach().cpu().clone()
                self._put(engine, name, parameter, AVERAGE, self._kept)
        yield
        for name, parameter in self._averaged(engine):
            with weights.gathered(parameter, engine.zero_stage, modified=True):
                self._put(engine, name, parameter, None, raw)  # the weights of what trains are the rounded masters

    def _averaged(self, engine: StageEngine) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that have an average, in the same order on every rank."""
        for name, parameter in engine.module.named_parameters():
            if name in engine.first_stage or name in self._owner:
                yield name, parameter

    def _put(
        self, engine: StageEngine, name: str, parameter: nn.Parameter, key: str | None, kept: Mapping[str, Tensor]
    ) -> None:
        """Give a parameter the value of its part of the optimizer's state (None: its master), or, if it does not train, its owner's
        kept tensor. Collective."""
        trains = name in engine.first_stage
        whole = engine.full_state(parameter, key) if trains else self._from_owner(name, parameter, kept)
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
