"""What autograd keeps of one forward pass of FLUX, by arm: bytes counted, not measured, so that no GPU is needed.

Under FakeTensorMode nothing is allocated, so FLUX.1-dev's 57 blocks at 1024 px are counted on a laptop. Counted are the
unique storages that saved-tensor hooks see and the inputs of checkpointed blocks, without weights. In policy `full` the
block being recomputed comes on top while it runs; that is not counted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.models.flux import (
    Policy,
    all_blocks,
    contiguous_attention_gradients,
    fuse,
    fused_state,
    is_fused,
    pack_projections,
    unfuse,
)

ARMS: dict[str, tuple[Policy | None, bool]] = {
    "diffusers-eager": (None, False),
    "diffusers-eager-full": (None, True),
    "ours-none": ("none", False),
    "ours-mlp": ("mlp", False),
    "ours-full": ("full", False),
}
"""Arm -> (policy of fused FLUX, None: diffusers' own path; whether diffusers checkpoints)."""


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Q K^T and P V: 4 B H S S D."""
    return 4 * math.prod(query) * key[-2]


def _attention_backward_flops(dout: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """dQ, dK, dV and dP: twice the forward; a flash kernel's second Q K^T is not counted."""
    return 2 * _attention_flops(query, key)


# torch's counter knows the GPU's attention ops, not the CPU's.
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def build(flux_config: dict[str, Any], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A FLUX of these sizes in dtype from the start: fake parameters cannot be cast in place."""
    return in_dtype(dtype, lambda: FluxTransformer2DModel(**flux_config))


def in_dtype(dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """What `make` returns while dtype is torch's default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(default)


def set_arm(transformer: FluxTransformer2DModel, arm: str) -> None:
    """Give a transformer an arm's path."""
    policy, checkpointing = ARMS[arm]
    contiguous_attention_gradients(transformer)  # without it no arm's backward pass is right on a Hopper GPU
    if policy is None:
        unfuse(transformer)
    else:
        fuse(transformer, policy)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()
    transformer.train()


def assume_even_norms(transformer: nn.Module) -> None:
    """Count a fused transformer's norm weights as far from 0, the usual case: fake ones have no values to check."""
    if is_fused(transformer):
        state = fused_state(transformer)
        state.keep_input, state.forwards = [False] * len(state.policies), 1


def freeze(transformer: FluxTransformer2DModel, trainable: set[str]) -> None:
    """Make only the parameters named trainable."""
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in trainable)


def inputs(
    config: Any,
    batch: int,
    image_tokens: int,
    text_tokens: int,
    dtype: torch.dtype,
    device: str = "cpu",
    upstream: bool = True,
) -> dict[str, Any]:
    """Arguments of FluxTransformer2DModel.forward, normal numbers. upstream: whether encoder_hidden_states requires its
    gradient, as where the connector or a Qwen layer is trained."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    return {
        "hidden_states": randn(batch, image_tokens, config.in_channels),
        "encoder_hidden_states": randn(batch, text_tokens, config.joint_attention_dim).requires_grad_(upstream),
        "pooled_projections": randn(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, dtype=dtype, device=device),
        # 1, whose thousandfold bfloat16 represents: for 3.5 FLUX would embed 3504 in bfloat16 and 3500 in float32
        "guidance": torch.ones(batch, dtype=dtype, device=device) if config.guidance_embeds else None,
        "img_ids": torch.zeros(image_tokens, 3, device=device),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
    }


def saved_bytes(
    transformer: FluxTransformer2DModel, run: Callable[[], Any], checkpointed: bool = False
) -> tuple[int, Any]:
    """(bytes of the unique storages that autograd saves while `run` runs, what it returned), without the module's
    parameters. checkpointed: blocks keep their inputs for recomputation, which no saved-tensor hook sees."""
    if is_fused(transformer):
        pack_projections(transformer)  # now, so that no weight moves while storages are compared
    weights = {p.untyped_storage()._cdata for p in transformer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Detached: the graph holds this function, so a tensor that holds the graph would close a reference cycle through
        # C++, which Python's collector does not see: the forward pass's memory would never be freed.
        tensor = tensor.detach()
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that its address is not reused
        return tensor

    def keep_inputs(block: nn.Module, args: tuple, kwargs: dict) -> None:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                keep(given)

    handles = []
    if checkpointed:
        handles = [b.register_forward_pre_hook(keep_inputs, with_kwargs=True) for b in all_blocks(transformer)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return size, result


def count(
    flux_config: dict[str, Any],
    trainable: set[str],
    arm: str,
    image_tokens: int,
    text_tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = True,
    upstream: bool = True,
) -> dict[str, int]:
    """{"saved_bytes", "flops"} of an arm at these sizes, nothing allocated. flops: matrix products of forward and
    backward, recomputation included (0 without backward). trainable: names of FLUX's parameters that train;
    upstream: whether any that is upstream of FLUX does.

    Attention is counted as a fused kernel's: it keeps q, k, v, its output and the log-sum-exp. torch's RMSNorm, which
    diffusers' path calls, is counted as the GPU's: it keeps its input and a statistic per row, while that of CPUs keeps
    up to two float32 copies.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), rms_norm_of_gpus():
        transformer = build(flux_config, dtype)
        freeze(transformer, trainable)
        set_arm(transformer, arm)
        assume_even_norms(transformer)
        given = inputs(transformer.config, batch, image_tokens, text_tokens, dtype, upstream=upstream)
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
        with counter if backward else nullcontext():
            saved, output = saved_bytes(
                transformer, lambda: transformer(**given, return_dict=False)[0], checkpointed=arm.endswith("-full")
            )
            if backward:
                output.sum().backward()
    return {"saved_bytes": saved, "flops": counter.get_total_flops() if backward else 0}


@torch.library.custom_op("megaflux_bench::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors only")


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("megaflux_bench::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("for fake tensors only")


@_rms_norm_backward.register_fake
def _(dout: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dout), torch.empty_like(weight)


class _RmsNorm(torch.autograd.Function):
    """One operation each way, which keeps what torch's fused RMSNorm keeps on a GPU. For fake tensors: no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, rstd = _rms_norm(x, weight)
        ctx.save_for_backward(x, rstd, weight)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        return _rms_norm_backward(dout.contiguous(), *ctx.saved_tensors)  # as the CUDA kernel does


@contextmanager
def rms_norm_of_gpus() -> Iterator[None]:
    """Inside, F.rms_norm of fake tensors keeps what it keeps on a GPU."""
    plain = F.rms_norm
    vars(F)["rms_norm"] = lambda x, shape, weight=None, eps=None: _RmsNorm.apply(x, weight)
    try:
        yield
    finally:
        vars(F)["rms_norm"] = plain


def trainable_flux(flux_config: dict[str, Any], blocks: Sequence[int], components: str | tuple[str, ...]) -> set[str]:
    """Names of FLUX's parameters that a stage with these blocks and this component set trains."""
    from megaflux.training.stages import PlainStage, trainable_names

    with torch.device("meta"):
        module = nn.Module()
        module.add_module("transformer", FluxTransformer2DModel(**flux_config))
    stage = PlainStage(tuple(blocks), components)
    return {name.removeprefix("transformer.") for name in trainable_names(module, stage)}
