"""diffusers' FluxTransformer2DModel with a faster forward: the same class, parameters, state dict and arguments.

A FLUX forward takes packed noisy latents (hidden_states) and the condition's tokens (encoder_hidden_states) and returns
the velocity of each latent. Double blocks keep text and image as two streams, which meet in attention; single blocks run
on both joined, text first. All AdaLN modulations come from temb, the embedding of time, guidance and pooled vector.
`fuse` replaces the forward of a transformer and of its blocks by those here and in flux_blocks; `unfuse` restores
diffusers' own. The results are the same but for rounding. What differs, and why:

    one product for q, k and v             fewer launches; in single blocks their gradients join the MLP's in one product
    qk_norm_rope                           norm, RoPE and the joint layout in one pass over q, k and v
    gate_residual makes the next norm      the residual stream is read once, not again by the next block's norm
    streams joined once                    diffusers joins and splits them in every single block
    RoPE tables cached per shape           diffusers computes them in every forward pass
    inputs of linears rebuilt              the backward pass keeps less (flux_functions)

A policy per block chooses what the backward pass computes again instead of keeping:

    none  nothing: every matrix product's result that a gradient needs is kept
    mlp   the MLP's pre-activation, a tenth of a step's FLOPs (`gelu_linear`, by way of `Call.recompute_mlp`)
    full  the whole block, of which only the input is kept (`_run_block`, torch's checkpoint)

All policies give the same gradients, bit for bit where attention and matrix products are deterministic.

Shapes: B batch, T text tokens (the condition), L image tokens, S = T + L, W width, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from megaflux.models.flux_blocks import (
    Block,
    Call,
    Modulation,
    TwoNorms,
    double_block,
    qkv_layers,
    single_block,
    text_qkv_layers,
)
from megaflux.models.flux_functions import contiguous_gradient
from megaflux.models.rope import Rope
from megaflux_kernels.modulate import modulate
from megaflux_kernels.qk_norm_rope import in_proportion

Policy = Literal["none", "mlp", "full"]
POLICIES: tuple[Policy, ...] = ("none", "mlp", "full")
NORMS_CHECKED_EVERY = 16  # forward passes: a norm weight moves by about the learning rate in each update


@dataclass
class Fused:
    """What `fuse` stores on a transformer as its attribute `fused`."""

    policies: list[Policy]
    """One per block, double blocks first."""
    rope: Rope
    keep_input: list[bool] = field(default_factory=list)
    """Per block: keep q, k and v before their norms, since a norm weight is near zero (`uneven_norms` says how near)."""
    forwards: int = 0
    """Forward passes with gradients since `fuse`."""
    norms: list[tuple[Tensor, int]] = field(default_factory=list)
    """The q and k norm weights of the last forward pass, with the versions of frozen ones (-1: trainable)."""


# --- which forward a transformer runs -------------------------------------------------------------------------------


def fuse(transformer: FluxTransformer2DModel, policies: Policy | Sequence[Policy] = "none") -> None:
    """Give a transformer the fused forward. policies: one for all blocks, or one per block, double blocks first.

    On a transformer that is fused already, only the policies change. ValueError for an unknown policy, a wrong number of
    them, and for blocks whose linears are not plain ones (LoRA, quantized): those need diffusers' own path.
    """
    blocks = all_blocks(transformer)
    chosen: list[Policy] = [policies] * len(blocks) if isinstance(policies, str) else list(policies)
    unknown = next((p for p in chosen if p not in POLICIES), None)
    if unknown is not None:
        raise ValueError(f"activation policy {unknown!r}: use one of {', '.join(POLICIES)}")
    if len(chosen) != len(blocks):
        raise ValueError(f"{len(chosen)} activation policies for {len(blocks)} blocks; give one each")
    _check_linears(transformer)
    if is_fused(transformer):
        state = fused_state(transformer)
        state.policies, state.forwards = chosen, 0
    else:
        vars(transformer)["fused"] = Fused(chosen, Rope(transformer.pos_embed))
        _replace_forward(transformer, _forward)
        for block in double_blocks(transformer):
            _replace_forward(block, double_block)
        for single in single_blocks(transformer):
            _replace_forward(single, single_block)
    with torch.no_grad():  # so that generation, which needs no gradients, is packed as well
        pack_projections(transformer)


def _check_linears(transformer: FluxTransformer2DModel) -> None:
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if type(module) is not nn.Linear and "blocks." in name:
            raise ValueError(f"{name} is a {type(module).__name__}: fused FLUX needs plain linears; turn kernels off")
        if hasattr(module.weight, "__tensor_flatten__"):  # a wrapper, such as torchao's
            raise ValueError(f"{name}'s weight is quantized: fused FLUX needs plain linears; turn kernels off")


def _replace_forward(module: nn.Module, forward: Callable) -> None:
    vars(module)["forward"] = MethodType(forward, module)


def unfuse(transformer: FluxTransformer2DModel) -> None:
    """Give a transformer diffusers' own forward back, if it is fused."""
    if is_fused(transformer):
        del vars(transformer)["fused"]
        for module in (transformer, *all_blocks(transformer)):
            del vars(module)["forward"]


def is_fused(transformer: nn.Module) -> bool:
    return "fused" in vars(transformer)


def fused_state(transformer: nn.Module) -> Fused:
    """What `fuse` stored on a transformer. KeyError where it is not fused."""
    return vars(transformer)["fused"]


def double_blocks(transformer: FluxTransformer2DModel) -> list[FluxTransformerBlock]:
    return cast("list[FluxTransformerBlock]", list(transformer.transformer_blocks))


def single_blocks(transformer: FluxTransformer2DModel) -> list[FluxSingleTransformerBlock]:
    return cast("list[FluxSingleTransformerBlock]", list(transformer.single_transformer_blocks))


def all_blocks(transformer: FluxTransformer2DModel) -> list[Block]:
    """Double blocks, then single ones: the order in which megaflux numbers them."""
    return [*double_blocks(transformer), *single_blocks(transformer)]


def pack_projections(transformer: FluxTransformer2DModel) -> None:
    """Lay the frozen q, k and v projections of each block side by side, so that one product needs no copy; with
    gradients enabled, a single block's proj_mlp as well. Each forward pass does so again (flux_blocks.qkv_layers), since
    weights move: to a device, out of an optimizer's buffer."""
    for block in all_blocks(transformer):
        qkv_layers(block)
    for double in double_blocks(transformer):
        text_qkv_layers(double)


def contiguous_attention_gradients(transformer: FluxTransformer2DModel) -> None:
    """Make the gradients of diffusers' own attention contiguous on a GPU, as those of fused blocks are (see
    `flux_functions.contiguous_gradient`). Idempotent."""
    for block in all_blocks(transformer):
        if _contiguous_outputs not in block.attn._forward_hooks.values():
            block.attn.register_forward_hook(_contiguous_outputs)


def _contiguous_outputs(
    attn: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]
) -> Tensor | tuple[Tensor, ...]:
    # Single blocks only: the outputs of a double block's attention have passed linears, whose gradients are contiguous.
    return contiguous_gradient(output) if isinstance(output, Tensor) else output


# --- the forward pass -----------------------------------------------------------------------------------------------


def _forward(
    self: FluxTransformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Sequence[Tensor] | None = None,
    controlnet_single_block_samples: Sequence[Tensor] | None = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """FluxTransformer2DModel.forward: velocity (B, L, C) of packed noisy latents (B, L, C).

    encoder_hidden_states: (B, T, joint_attention_dim). joint_attention_kwargs: `attention_mask`, a log-bias per key
    (B, 1, 1, S) or a mask of bool; `context_embedded`, True where encoder_hidden_states passed context_embedder
    already and are (B, T, W). ValueError for other keys, which diffusers' own path may support.
    """
    bias, embedded = _attention_options(joint_attention_kwargs)
    dtype = hidden_states.dtype
    scaled = [None if t is None else t.to(dtype) * 1000 for t in (timestep, guidance)]
    temb = self.time_text_embed(*(t for t in scaled if t is not None), pooled_projections)
    temb = F.silu(temb)  # every AdaLN starts with it
    image = self.x_embedder(hidden_states)
    text = encoder_hidden_states if embedded else self.context_embedder(encoder_hidden_states)
    txt_ids, img_ids = (ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids))
    image_rotary_emb = fused_state(self).rope(txt_ids, img_ids)
    _refresh_keep_input(self)

    modulations = [_modulation(block, temb) for block in all_blocks(self)]
    scale, shift = self.norm_out.linear(temb).chunk(
        2, dim=1
    )  # diffusers' order here; its AdaLayerNormZero has shift first
    added = controlnet_block_samples is not None, controlnet_single_block_samples is not None
    following = _following(self, [*modulations, ((shift, scale),)], dtype, added)
    calls = [
        Call(modulation, next_, image_rotary_emb, bias, policy == "mlp", keep_input)
        for modulation, next_, policy, keep_input in zip(
            modulations, following, fused_state(self).policies, fused_state(self).keep_input, strict=True
        )
    ]

    T, double = text.shape[1], len(self.transformer_blocks)
    normed: TwoNorms = (None, None)  # a block's first norms of both streams, if the block before has made them
    for i, block in enumerate(self.transformer_blocks):
        text, image, normed = _run_block(self, i, block, image, text, normed, calls[i])
        if controlnet_block_samples is not None:
            samples = controlnet_block_samples  # spread over the blocks as in diffusers
            image = image + samples[i % len(samples) if controlnet_blocks_repeat else i // -(-double // len(samples))]
    hidden_states = torch.cat([text, image], dim=1)  # (B, S, W), joined once
    normed_joint: Tensor | None = None  # a single block's first norm likewise
    for i, block in enumerate(self.single_transformer_blocks, double):
        hidden_states, normed_joint = _run_block(self, i, block, hidden_states, normed_joint, calls[i])
        if controlnet_single_block_samples is not None:
            samples = controlnet_single_block_samples
            sample = samples[(i - double) // -(-len(self.single_transformer_blocks) // len(samples))]
            hidden_states = hidden_states + F.pad(sample, (0, 0, T, 0))

    image = modulate(hidden_states[:, T:], scale, shift) if normed_joint is None else normed_joint[:, T:]
    output = self.proj_out(image)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _attention_options(options: dict[str, Any] | None) -> tuple[Tensor | None, bool]:
    """(log-bias per key (B, S) or None, context_embedded) of joint_attention_kwargs."""
    options = dict(options or {})
    mask, embedded = options.pop("attention_mask", None), bool(options.pop("context_embedded", False))
    if options:
        raise ValueError(
            f"joint_attention_kwargs: fused FLUX does not support {', '.join(sorted(options))}; turn kernels off"
        )
    if mask is None:
        return None, embedded
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise ValueError(f"attention_mask: fused FLUX takes a bias per key (B, 1, 1, S), got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask[:, 0, 0], embedded


def _modulation(block: Block, temb: Tensor) -> Modulation:
    """A block's AdaLN of temb (B, W), which has passed its SiLU, as diffusers' AdaLayerNormZero makes it."""
    if isinstance(block, FluxTransformerBlock):
        return block.norm1_context.linear(temb).chunk(6, dim=1), block.norm1.linear(temb).chunk(6, dim=1)
    return (block.norm.linear(temb).chunk(3, dim=1),)


def _following(
    transformer: FluxTransformer2DModel, modulations: Sequence[tuple], dtype: torch.dtype, added: tuple[bool, bool]
) -> list[tuple | None]:
    """Per block, the next one's modulation (after the last block, the last norm's), if the block makes the next norm in
    the same pass as its own last residual.

    None: at the last double block; where a ControlNet's samples are added in between (added: to double blocks, to single
    ones); in float16, which is clipped in between; before a block in policy `full`, whose checkpoint would keep two
    tensors. modulations: of all blocks, then of the last norm.
    """
    double = len(transformer.transformer_blocks)
    following: list[tuple | None] = list(modulations[1:])
    for i, next_policy in enumerate([*fused_state(transformer).policies[1:], None]):
        is_single = i >= double
        next_recomputes = next_policy == "full" and torch.is_grad_enabled()
        if next_recomputes or i == double - 1 or added[is_single] or dtype == torch.float16:
            following[i] = None
    return following


def _run_block(transformer: FluxTransformer2DModel, index: int, block: nn.Module, *inputs: Any) -> Any:
    """A block's forward; in policy `full` it keeps only its inputs, and the backward pass runs it again."""
    if fused_state(transformer).policies[index] == "full" and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


# --- q and k norms --------------------------------------------------------------------------------------------------


def _refresh_keep_input(transformer: FluxTransformer2DModel) -> None:
    """Update `Fused.keep_input`. Waits for the GPU in the first forward pass after `fuse`; later only where a norm weight
    was replaced or changed, or, where one is trainable, every 16 passes."""
    fused = fused_state(transformer)
    if not torch.is_grad_enabled():
        fused.keep_input = fused.keep_input or [False] * len(fused.policies)  # nothing is kept
        return
    weights = [weight for block in all_blocks(transformer) for weight in _norm_weights(block)]
    norms = [(w, -1 if w.requires_grad or w.is_inference() else w._version) for w in weights]
    trains = any(weight.requires_grad for weight in weights)
    due = fused.forwards % NORMS_CHECKED_EVERY == 0 if trains else fused.forwards == 0
    changed = bool(fused.norms) and any(a is not b or m != n for (a, m), (b, n) in zip(norms, fused.norms, strict=True))
    if due or changed:
        fused.keep_input = uneven_norms(transformer)
    fused.norms = norms
    fused.forwards += 1


def uneven_norms(transformer: FluxTransformer2DModel) -> list[bool]:
    """Per block, double ones first: whether a q or k norm weight is so near zero, relative to its neighbour, that the
    block must keep its packed q, k and v for the backward pass. Waits for the GPU, once."""
    blocks = all_blocks(transformer)
    flags = [torch.stack([in_proportion(weight) for weight in _norm_weights(block)]).all() for block in blocks]
    return [not flag for flag in torch.stack(flags).tolist()]


def _norm_weights(block: Block) -> list[Tensor]:
    attn = block.attn
    norms = [attn.norm_q, attn.norm_k]
    if isinstance(block, FluxTransformerBlock):
        norms += [attn.norm_added_q, attn.norm_added_k]
    return [norm.weight for norm in norms]
