"""What DeepSpeed changes in a module when it builds an engine on it, and how that is undone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ModuleBefore:
    """A module as it was before DeepSpeed built an engine on it. DeepSpeed's `destroy` leaves two hooks and some attributes
    that refer to the engine, and so keep its optimizer and buffers alive."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.linear = (
            nn.functional.linear
        )  # ZeRO-3 replaces it by one that saves more for backward than frozen layers need
        self.attributes = {parameter: set(vars(parameter)) for parameter in module.parameters()}

    def restore(self, engine: Any, zero_optimizer: Any, keep_partitions: bool) -> None:
        """Remove the hooks, and the attributes that DeepSpeed added to parameters and submodules.

        keep_partitions: under ZeRO-3 an attribute holds a parameter's weights; remove only those that refer to the engine."""
        from deepspeed.runtime.zero import parameter_offload

        nn.functional.linear = self.linear
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for parameter, known in self.attributes.items():
            for name, value in list(vars(parameter).items()):
                if name not in known and (not keep_partitions or value is zero_optimizer):
                    delattr(parameter, name)
        if keep_partitions:
            for module in self.module.modules():
                for name in ("pre_bwd_fn", "post_bwd_fn"):  # they hold functions of the engine
                    vars(module).pop(name, None)
            stack = parameter_offload.FWD_MODULE_STACK  # every engine pushes its module, and none pops it
            stack[:] = [module for module in stack if module is not self.module]


def restore_buffers(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Give a module's buffers the values, and so the dtypes, that they had."""
    # DeepSpeed casts buffers where its file's data_types say so (earlier versions always), and RoPE's inv_freq in bf16 would
    # give wrong angles.
    for name, buffer in module.named_buffers():
        buffer.data = buffers[name].to(buffer.device)


def use_zero3_linear(engine: Any) -> None:
    """Have an engine of ZeRO-3 compute linears as DeepSpeed's file says (memory_efficient_linear, by default true).

    DeepSpeed replaces torch's linear where it partitions a module, which in a process happens once, while `ModuleBefore.restore`
    puts torch's back after each engine. A later stage would then round otherwise than the same stage in a process that
    resumes in it, and hold every gathered weight until its backward pass."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    if engine._config.zero_config.memory_efficient_linear:
        nn.functional.linear = zero3_linear_wrap
