"""One DeepSpeed engine per stage; Adam's state is carried from one to the next by parameter name.

DeepSpeed collects the trainable parameters when an engine is built: unfreezing a parameter later does not train it, and a
changed set makes loading an optimizer fail. So a stage change builds a new engine on the same module.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megaflux.config.recipe import Part
from megaflux.config.schema import Config
from megaflux.training import optim, schedule, stages
from megaflux.training.before_engine import ModuleBefore, restore_buffers, use_zero3_linear
from megaflux.training.ds_config import resolve_ds_config, sharding
from megaflux.training.survival.guard import NOT_FINITE, Drop

log = logging.getLogger("megaflux")
MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""Of the weights (average.py), beside the moments in Adam's state, where there is one."""
SLICE = 2**24  # gradient values that are looked at together: 64 MB in float32
Judge = Callable[[float, float], Drop | None]
"""(global gradient norm before clipping, nan: not finite; share of large gradient values) -> None to take the step, or why to
drop it."""


@dataclass
class Carried:
    """Adam's state, passed from one stage to the next: moments and fp32 masters by name, on the host, and steps by group."""

    tensors: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)
    """parameter name -> {"master", "exp_avg", "exp_avg_sq"} -> float32, the parameter's shape."""
    steps: dict[int, Tensor] = field(default_factory=dict)
    """first stage of a parameter group -> Adam steps it has taken, 0-dim float32."""


class StageEngine:
    """DeepSpeed's engine for one stage, with the freezing hooks."""

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        ds_config: dict[str, Any],
        stage: int,
        world_size: int,
        carried: Carried | None = None,
        judge: Judge | None = None,
    ):
        """stage: index into config.stages. carried: Adam's state of the stage before; None: of none. judge: decides whether
        each step is taken; None: every step with a finite gradient is."""
        import deepspeed

        self.module, self.stage, self.config = module, stage, config
        self.first_stage = stages.first_stages(module, config.stages, stage)
        self.hooks = stages.FreezingHooks(module, self.first_stage, config.monitor.label_blocks)
        self.by_part = config.rates_by_part
        groups = optim.parameter_groups(module, self.first_stage, self.by_part)
        self.groups = [(group["first_stage"], group["part"]) for group in groups]
        optimizer = optim.build_optimizer(groups, config.optim, config.stages[stage])
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._before = ModuleBefore(module)
        self.deepspeed: Any
        self.deepspeed, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=resolve_ds_config(ds_config, config, world_size)
        )
        restore_buffers(module, buffers)
        if self.deepspeed.zero_optimization_stage() == 3:
            use_zero3_linear(self.deepspeed)
        self.num_trainable = sum(whole_size(p) for p in module.parameters() if p.requires_grad)
        """Number of values in the parameters that train."""
        self.sharding = sharding(ds_config)
        self.zero_stage = self.sharding["zero_stage"]
        self.judge = judge
        self._norm = self.large_gradient_share = float("nan")
        """The share of the last step's gradient values that are larger than optim.large_gradient, before clipping; nan: no norm
        was taken."""
        self.dropped: Drop | None = None
        """Why the last step was dropped, the same on all ranks; None: it was taken."""
        self._put_judge_before_step()
        if carried is not None and carried.tensors:
            self.take_over(carried)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of an update, on each rank."""
        return self.deepspeed.gradient_accumulation_steps()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.deepspeed(*args, **kwargs)

    def cut_into(self, micro_batch_size: int) -> None:
        """Change the micro-batch size of each rank. Call it between updates."""
        self.deepspeed.set_train_micro_batch_size(micro_batch_size)
        self.deepspeed.set_train_batch_size(self.config.train.global_batch_size)
        # ZeRO's optimizer keeps a copy.
        self.deepspeed.optimizer.gradient_accumulation_steps = self.deepspeed.gradient_accumulation_steps()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of loss / accumulation_steps; DeepSpeed averages them over ranks. loss: 0-dim."""
        self.deepspeed.backward(loss)

    def step(self) -> None:
        """Call after every backward; parameters change at the last micro-batch of an update."""
        self.hooks.check()
        if self.deepspeed.is_gradient_accumulation_boundary():
            self.dropped, before = None, self.deepspeed.skipped_steps
            self.large_gradient_share = float("nan")
            self.deepspeed.step()
            if self.deepspeed.skipped_steps > before:
                self._forget_gradient()
            if self.deepspeed.skipped_steps > before and self.dropped is None:  # found before a norm was taken
                self.dropped = self.judge(float("nan"), float("nan")) if self.judge else NOT_FINITE
        else:
            self.deepspeed.step()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter that trains."""
        return {name: tuple(p.shape) for name, p in self.module.named_parameters() if name in self.first_stage}

    def set_learning_rates(self, update: int) -> dict[Part, float]:
        """Set each part's learning rate of an update, counted from 0; returns them."""
        rates = schedule.learning_rates(self.config, self.stage, update)
        optim.set_learning_rates(self.deepspeed.optimizer, rates)
        return rates

    def configure_optimizer(self) -> None:
        """Set what the configuration says of every group and of clipping. Call it after DeepSpeed has loaded a checkpoint: it
        brings back the values of the start that saved it."""
        zero = self.deepspeed.optimizer
        for group, (first_stage, part) in zip(zero.param_groups, self.groups, strict=True):
            group |= {"first_stage": first_stage, "part": part}
        optim.configure(zero, self.config.optim, self.config.stages[self.stage])
        zero.clip_grad = self.config.optim.max_grad_norm

    def grad_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; nan if that step was dropped."""
        return float("nan") if self.dropped else self._norm

    def grad_norms(self) -> dict[str, float]:
        """Norms of the accumulated gradient before clipping, by part ("flux") and FLUX block ("block07").

        Call it after the last backward of an update and before its step. Collective.
        """
        from deepspeed.utils import safe_get_full_grad

        num_double = stages.count_double(self.module)
        squares: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if name in self.first_stage:
                place = stages.locate(name, num_double)
                square = safe_get_full_grad(parameter).float().square().sum().double()
                for label in (place.group, f"block{place.block:02d}" if place.block is not None else None):
                    if label:
                        squares[label] = squares[label] + square if label in squares else square
        values = torch.stack(list(squares.values())).tolist()  # one wait for the GPU, not one for each
        return {label: square**0.5 for label, square in zip(squares, values, strict=True)}

    def carry(self, names: set[str]) -> Carried:
        """Adam's state of the named parameters, gathered on every rank's host. Collective; does not change the engine."""
        steps: dict[int, Tensor] = {}
        found: dict[str, dict[str, Tensor]] = {}
        inner = self.deepspeed.optimizer.optimizer
        for first_stage, flat in self.flat_groups():
            if "step" in inner.state.get(flat, {}):
                steps[first_stage] = inner.state[flat]["step"].detach().cpu().clone()
        if not steps:  # no step was taken (all were dropped): nothing to carry
            return Carried()
        self.link_state()
        for name, parameter in self.module.named_parameters():
            if name in names and name in self.first_stage:
                tensors = {"master": self.full_state(parameter, None)}
                tensors |= {key: self.full_state(parameter, key) for key in MOMENTS}
                found[name] = {key: tensor.cpu() for key, tensor in tensors.items()}
        return Carried(found, steps)

    def full_state(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A whole tensor of the optimizer's state, float32 of the parameter's shape, on every rank. key: of MOMENTS, or AVERAGE;
        None: the fp32 master. Collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is None:
            return safe_get_full_fp32_param(parameter).float()
        return safe_get_full_optimizer_state(parameter, key).float()

    def close(self) -> None:
        """Remove the engine and all hooks from the module, which stays usable and keeps its weights (under ZeRO-3:
        partitioned, for the next engine). All memory of the engine, its optimizer and its buffers is freed, unless the
        caller still refers to it."""
        zero_optimizer = self.deepspeed.optimizer
        self.deepspeed.destroy()
        self.hooks.remove()
        self._before.restore(self.deepspeed, zero_optimizer, keep_partitions=self.zero_stage == 3)
        for parameter in self.module.parameters():
            parameter.grad = None
            # Copied out of the engine's flat buffer, which a single view would keep alive.
            if self.zero_stage < 3:
                parameter.data = parameter.data.clone()
            else:
                part: Tensor = vars(parameter)["ds_tensor"]
                part.data = part.data.clone()
        self.deepspeed = None
        del self._before, zero_optimizer
        release_memory()

    def _put_judge_before_step(self) -> None:
        """Have the judge decide after DeepSpeed has computed the gradient norm and before its step: a step to drop is
        reported to DeepSpeed as an invalid norm, which it drops as an overflow, before anything has changed."""
        zero = self.deepspeed.optimizer
        name = "scaled_global_norm" if self.zero_stage < 3 else "_get_norm_groups"
        real = getattr(zero, name)

        def judged(*args: Any, **kwargs: Any) -> Any:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norms = real(*args, **kwargs)
            norm, large = norms if self.zero_stage < 3 else combine_grad_norm_groups(norms), self._count_large()
            both = [torch.as_tensor(norm, device=large.device).double(), large.double()]
            self._norm, large_values = torch.stack(both).tolist()  # one wait for the GPU
            self.large_gradient_share = large_values / self.num_trainable
            self.dropped = self.judge(self._norm, self.large_gradient_share) if self.judge else None
            if self.dropped is None:
                return norms
            invalid = torch.full_like(torch.as_tensor(norms if self.zero_stage < 3 else norms[0]), -1.0)
            return invalid if self.zero_stage < 3 else [invalid] * len(norms)

        setattr(zero, name, judged)

    def _forget_gradient(self) -> None:
        """Discard the gradient of a dropped update. With an offloaded optimizer DeepSpeed (0.19.8) keeps the accumulated float32
        gradient where it drops a step, and would add the next update's to it."""
        zero = self.deepspeed.optimizer
        if self.zero_stage < 3 and zero.cpu_offload:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None

    def _count_large(self) -> Tensor:
        """How many values of the gradient of an update, averaged over ranks and micro-batches and not yet clipped, are larger than
        optim.large_gradient: 0-dim, on the device. Each rank counts its own part. Collective."""
        zero, threshold = self.deepspeed.optimizer, self.config.optim.large_gradient
        offloaded = zero.cpu_offload if self.zero_stage < 3 else zero.offload_optimizer
        if offloaded:
            parts: list[Tensor] = [flat.grad for _, flat in self.flat_groups() if flat.grad is not None]
        else:
            parts = [part for parts in zero.averaged_gradients.values() for part in parts]
        count = torch.zeros((), dtype=torch.int64, device=parts[0].device)
        for part in parts:
            for piece in part.detach().flatten().split(SLICE):
                count += torch.count_nonzero(piece.float().abs() > threshold)
        if offloaded:
            count = count.to(self.deepspeed.device)
        torch.distributed.all_reduce(count)
        return count

    def flat_groups(self) -> list[tuple[int, Tensor]]:
        """(first stage of the group, this rank's fp32 partition) of each tensor that the inner optimizer updates."""
        zero = self.deepspeed.optimizer
        firsts = [group["first_stage"] for group in zero.optimizer.param_groups]
        if self.zero_stage < 3:
            return list(zip(firsts, zero.single_partition_of_fp32_groups, strict=True))
        # ZeRO-3 splits a group into sub-groups of bounded size.
        flats = zero.fp32_partitioned_groups_flat
        return [(firsts[zero.sub_group_to_group_id[i]], flat) for i, flat in enumerate(flats)]

    def coming(self, device: torch.device) -> list[int]:
        """Bytes of each tensor that later updates allocate on a device and that does not exist yet: Adam's moments before
        the first step, and the fp32 sum of the gradients, which every step frees. The sum is on the GPU even if ZeRO-2
        offloads masters and moments."""
        state = self.deepspeed.optimizer.optimizer.state
        flats = [flat for _, flat in self.flat_groups()]
        there = [flat for flat in flats if flat.device == device]
        moments = [flat.nbytes for flat in there for key in MOMENTS if key not in state.get(flat, {})]
        return moments + [flat.nbytes for flat in flats]

    def take_over(self, carried: Carried) -> None:
        """Load Adam's state, given as whole tensors by name, into this rank's part of the optimizer. Collective."""
        zero = self.deepspeed.optimizer
        # torch creates Adam's state at the first step; create it now, to load values into it.
        for first_stage, flat in self.flat_groups():
            zero.optimizer.state[flat] = adam_state(flat, carried.steps.get(first_stage))
        self.link_state()
        for name, parameter in self.module.named_parameters():
            if name in carried.tensors:
                for key in ("master", *MOMENTS):
                    self.set_state(parameter, carried.tensors[name][key], None if key == "master" else key)
        log.info(
            "carried Adam's moments of %d parameters into stage %s",
            len(carried.tensors),
            self.config.stages[self.stage].name,
        )

    def link_state(self) -> None:
        """Let DeepSpeed find each parameter's part of Adam's state. By itself it does so after the first step of the first
        group, when the other groups have none yet, and not at all in an engine that is resumed at its stage's end."""
        if self.zero_stage < 3:
            zero = self.deepspeed.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_state(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Load this rank's part of a whole tensor into the optimizer's state. key: of MOMENTS, or AVERAGE; None: the fp32 master."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.zero_stage == 3:
            # DeepSpeed's own setter reads past the end if the parameter's size is not a multiple of the ranks.
            part, _ = self.deepspeed.optimizer._get_fp32_opt_state_partition(parameter, False, key)
            rank, size = torch.distributed.get_rank(), part.numel()
            mine = value.flatten()[rank * size : (rank + 1) * size]
            part[: mine.numel()].data.copy_(mine)
        elif key is None:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def whole_size(parameter: nn.Parameter) -> int:
    """Number of values in a parameter; ZeRO-3 empties the parameter itself between uses."""
    return getattr(parameter, "ds_numel", parameter.numel())


def adam_state(flat: Tensor, step: Tensor | None) -> dict[str, Tensor]:
    """The state that torch's AdamW keeps for one tensor, with moments of zero, all on the tensor's device: the fused AdamW
    rejects a step on another one. step: steps taken, 0-dim float32 on any device; None: 0."""
    taken = torch.zeros((), dtype=torch.float32) if step is None else step
    return {"step": taken.to(flat.device, copy=True), **{key: torch.zeros_like(flat) for key in MOMENTS}}


def release_memory() -> None:
    """Free unreferenced memory now: DeepSpeed's engines and the models are in reference cycles, which Python collects at an
    unknown time, and torch caches a GPU's freed memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
