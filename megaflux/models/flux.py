"""diffusers' FluxTransformer2DModel with fused paths: the same class, parameters and state dict, another forward.

`fuse` gives a transformer and its blocks the forwards below; `unfuse` takes them off again. What changes: one product
for q, k and v; norm, RoPE and the joint layout in one pass (megaflux_kernels); the two streams joined once and not in
every single block; positions computed once per shape; and a policy per block of what the backward pass keeps:

    none  every matrix product's result that a gradient needs
    mlp   the same without the MLP's pre-activation, which is computed again: a tenth of a step's FLOPs
    full  the block's input; all of the block is computed again

All policies give the same gradients, bit for bit where attention and matrix products are deterministic.

Shapes: B batch, T text tokens (the condition), L image tokens, S = T + L, W width, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaflux.common import compat  # noqa: F401  (before diffusers)
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from megaflux.models.flux_blocks import double_block, qkv_layers, single_block, text_qkv_layers
from megaflux.models.flux_functions import even_gradient
from megaflux.models.rope import Rope
from megaflux_kernels.modulate import modulate
from megaflux_kernels.qk_norm_rope import in_proportion

Policy = Literal["none", "mlp", "full"]
POLICIES: tuple[Policy, ...] = ("none", "mlp", "full")
NORMS_CHECKED_EVERY = 16  # forward passes: a norm weight moves by about the learning rate in each update


@dataclass
class Fused:
    """What `fuse` leaves on a transformer as its attribute `fused`."""

    policies: list[Policy]
    """One per block, double blocks first."""
    rope: Rope
    keep_input: list[bool] = field(default_factory=list)
    """Per block: q and k cannot be told from their rotated values, since a norm weight is near zero."""
    forwards: int = 0
    norms: list[tuple[Tensor, int]] = field(default_factory=list)
    """The q and k norm weights of the last forward pass, and their versions where they do not train."""


def fuse(transformer: FluxTransformer2DModel, policies: Policy | Sequence[Policy] = "none") -> None:
    """Give a transformer the fused forward. policies: one for all blocks, or one per block, double blocks first.

    On a fused transformer it only sets the policies. ValueError for an unknown policy, a wrong number of them, and
    for blocks whose linears are not plain ones (LoRA, quantized): those need diffusers' own path.
    """
    blocks = all_blocks(transformer)
    chosen = [policies] * len(blocks) if isinstance(policies, str) else list(policies)
    unknown = next((p for p in chosen if p not in POLICIES), None)
    if unknown is not None:
        raise ValueError(f"activation policy {unknown!r}: use one of {', '.join(POLICIES)}")
    if len(chosen) != len(blocks):
        raise ValueError(f"{len(chosen)} activation policies for {len(blocks)} blocks; give one each")
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and "blocks." in name:
            raise ValueError(f"{name} is a {type(module).__name__}: fused FLUX needs plain linears; turn kernels off")
        if isinstance(module, nn.Linear) and hasattr(
            module.weight, "__tensor_flatten__"
        ):  # a wrapper, as torchao's are
            raise ValueError(f"{name}'s weight is quantized: fused FLUX needs plain linears; turn kernels off")
    if is_fused(transformer):
        transformer.fused.policies, transformer.fused.forwards = chosen, 0
    else:
        transformer.fused = Fused(chosen, Rope(transformer.pos_embed))
        transformer.forward = MethodType(_forward, transformer)
        for block in transformer.transformer_blocks:
            block.forward = MethodType(double_block, block)
        for block in transformer.single_transformer_blocks:
            block.forward = MethodType(single_block, block)
    with torch.no_grad():  # generation may be all that comes
        pack_projections(transformer)


def pack_projections(transformer: FluxTransformer2DModel) -> None:
    """Lay the frozen q, k and v projections of each block side by side, so that one product needs no copy; with
    gradients on a single block's proj_mlp too. The forward does so too, for weights move: to a device, out of an
    optimizer's buffer."""
    for block in all_blocks(transformer):
        qkv_layers(block)
    for block in transformer.transformer_blocks:
        text_qkv_layers(block)


def unfuse(transformer: FluxTransformer2DModel) -> None:
    """Give a transformer diffusers' own forward back; nothing happens to one that has it."""
    if is_fused(transformer):
        del transformer.fused
        for module in (transformer, *all_blocks(transformer)):
            del module.forward


def is_fused(transformer: nn.Module) -> bool:
    return "fused" in vars(transformer)


def even_attention_gradients(transformer: FluxTransformer2DModel) -> None:
    """Give diffusers' own attention gradients of one layout on a GPU, as the fused blocks have them (see
    `flux_functions.even_gradient`). Once or often: it is the same."""
    for block in all_blocks(transformer):
        if _even_outputs not in block.attn._forward_hooks.values():
            block.attn.register_forward_hook(_even_outputs)


def _even_outputs(attn: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    # A single block's output only: a double block's has passed linears already, whose gradients are joined.
    return even_gradient(output) if isinstance(output, Tensor) else output


def all_blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    """Double blocks, then single ones: the order in which megaflux numbers them."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


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
    already and are (B, T, W). ValueError for others: diffusers' own path knows more of them.
    """
    bias, embedded = _attention_options(joint_attention_kwargs)
    dtype = hidden_states.dtype
    scaled = [None if t is None else t.to(dtype) * 1000 for t in (timestep, guidance)]
    temb = self.time_text_embed(*(t for t in scaled if t is not None), pooled_projections)
    temb = F.silu(temb)  # every AdaLN starts with it
    image = self.x_embedder(hidden_states)
    text = encoder_hidden_states if embedded else self.context_embedder(encoder_hidden_states)
    txt_ids, img_ids = (ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids))
    rope = self.fused.rope(txt_ids, img_ids)
    _check_norms(self)
    T, double = text.shape[1], len(self.transformer_blocks)
    modulations = [_modulation(block, temb) for block in all_blocks(self)]
    added = controlnet_block_samples is not None, controlnet_single_block_samples is not None
    scale, shift = self.norm_out.linear(temb).chunk(2, dim=1)
    following = _following(self, [*modulations, ((shift, scale),)], dtype, added)

    normed: Any = (None, None)  # a block's first norms, where the one before has made them
    for i, block in enumerate(self.transformer_blocks):
        text, image, normed = _run(self, i, block, text, image, normed, modulations[i], following[i], rope, bias)
        if controlnet_block_samples is not None:
            samples = controlnet_block_samples
            image = image + samples[i % len(samples) if controlnet_blocks_repeat else i // -(-double // len(samples))]
    hidden_states, normed = torch.cat([text, image], dim=1), None  # (B, S, W), joined once
    for i, block in enumerate(self.single_transformer_blocks, double):
        hidden_states, normed = _run(self, i, block, hidden_states, normed, modulations[i], following[i], rope, bias)
        if controlnet_single_block_samples is not None:
            samples = controlnet_single_block_samples
            sample = samples[(i - double) // -(-len(self.single_transformer_blocks) // len(samples))]
            hidden_states = hidden_states + F.pad(sample, (0, 0, T, 0))

    image = modulate(hidden_states[:, T:], scale, shift) if normed is None else normed[:, T:]
    output = self.proj_out(image)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _modulation(block: nn.Module, temb: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """A block's AdaLN from temb (B, W), past its SiLU: of text and image, or of the joined stream, what diffusers'
    AdaLayerNormZero makes, (B, W) each: shift, scale, gate; in double blocks also the MLP's shift, scale, gate."""
    if hasattr(block, "norm1_context"):
        return block.norm1_context.linear(temb).chunk(6, dim=1), block.norm1.linear(temb).chunk(6, dim=1)
    return (block.norm.linear(temb).chunk(3, dim=1),)


def _following(
    transformer: FluxTransformer2DModel, modulations: Sequence[tuple], dtype: torch.dtype, added: tuple[bool, bool]
) -> list[tuple | None]:
    """Per block the next one's modulation, FLUX's last norm's after the last block, where the block makes the next norm
    in one pass with its own last residual. None: at the last double block; where a ControlNet's samples are added in
    between (added: to double blocks, to single ones); in float16, which is clipped in between; before a block that is
    computed again in full, whose checkpoint would keep two tensors. modulations: of all blocks, and of the last norm."""
    double, following = len(transformer.transformer_blocks), list(modulations[1:])
    for i, policy in enumerate([*transformer.fused.policies[1:], None]):
        full = policy == "full" and torch.is_grad_enabled()
        if full or i == double - 1 or added[i >= double] or dtype == torch.float16:
            following[i] = None
    return following


def _run(transformer: FluxTransformer2DModel, index: int, block: nn.Module, *inputs: Any) -> Any:
    fused = transformer.fused
    policy, keep_input = fused.policies[index], fused.keep_input[index]
    if policy == "full" and torch.is_grad_enabled():
        return checkpoint(block, *inputs, False, keep_input, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs, policy == "mlp", keep_input)


def _attention_options(options: dict[str, Any] | None) -> tuple[Tensor | None, bool]:
    """(log-bias per key (B, S) or None, context_embedded) of joint_attention_kwargs."""
    options = dict(options or {})
    mask, embedded = options.pop("attention_mask", None), bool(options.pop("context_embedded", False))
    if options:
        raise ValueError(f"joint_attention_kwargs: fused FLUX knows no {', '.join(sorted(options))}; turn kernels off")
    if mask is None:
        return None, embedded
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise ValueError(f"attention_mask: fused FLUX takes a bias per key (B, 1, 1, S), got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask[:, 0, 0], embedded


def _check_norms(transformer: FluxTransformer2DModel) -> None:
    """Whether each block's q and k can be told from their rotated values; waits for the GPU in the first forward pass
    after `fuse`, then only where a norm weight is another one, or every 16 passes where one trains."""
    fused = transformer.fused
    if not torch.is_grad_enabled():
        fused.keep_input = fused.keep_input or [False] * len(fused.policies)  # nothing is kept
        return
    weights = [weight for block in all_blocks(transformer) for weight in _norm_weights(block)]
    norms = [(w, -1 if w.requires_grad or w.is_inference() else w._version) for w in weights]
    trains = any(weight.requires_grad for weight in weights)
    due = fused.forwards % NORMS_CHECKED_EVERY == 0 if trains else fused.forwards == 0
    others = bool(fused.norms) and any(a is not b or m != n for (a, m), (b, n) in zip(norms, fused.norms, strict=True))
    if due or others:
        fused.keep_input = uneven_norms(transformer)
    fused.norms = norms
    fused.forwards += 1


def uneven_norms(transformer: FluxTransformer2DModel) -> list[bool]:
    """Of each block, double ones first: whether a q or k norm weight is so near zero, beside its neighbour, that the
    block must keep its q, k, v product for the backward pass. Waits for the GPU, once."""
    blocks = all_blocks(transformer)
    flags = [torch.stack([in_proportion(weight) for weight in _norm_weights(block)]).all() for block in blocks]
    return [not flag for flag in torch.stack(flags).tolist()]


def _norm_weights(block: nn.Module) -> list[Tensor]:
    attn = block.attn
    norms = [attn.norm_q, attn.norm_k]
    if hasattr(block, "norm1_context"):
        norms += [attn.norm_added_q, attn.norm_added_k]
    return [norm.weight for norm in norms]
