"""The forwards of FLUX's fused blocks, in diffusers' names; megaflux.models.flux tells how they differ and why.

Shapes: B batch, T text tokens (encoder_hidden_states), L image tokens (hidden_states), S = T + L, W width, H heads, D
head_dim. Pairs of streams are (text, image), the order of the joint sequence.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

from megaflux.models.flux_functions import (
    AdaLN,
    Handover,
    contiguous_gradient,
    gelu_linear,
    last_norm,
    modulated,
    modulated_linears,
    norm_and_rotate,
    stream_linears,
)
from megaflux.models.packing import pack, unpack
from megaflux_kernels.biased_attention import biased_attention
from megaflux_kernels.gate_residual import gate_residual
from megaflux_kernels.qk_norm_rope import qk_norm_rope
from megaflux_kernels.qk_norm_rope.streams import Stream

Block = FluxTransformerBlock | FluxSingleTransformerBlock
Modulation = tuple[tuple[Tensor, ...], ...]
"""A block's AdaLN: of text and image in a double block, of the joined stream in a single one. Each is shift, scale and
gate (B, W), in a double block followed by the MLP's shift, scale and gate."""
TwoNorms = tuple[Tensor | None, Tensor | None]


class Call(NamedTuple):
    """How one block is to be run. A named tuple, so that its tensors are seen where those of arguments are counted."""

    modulation: Modulation
    following: Modulation | None
    """The next block's modulation, if this one makes the next one's first norm as well."""
    image_rotary_emb: tuple[Tensor, Tensor]
    """cos and sin, (S, D) float32."""
    bias: Tensor | None
    """(B, S): log-bias per key of attention."""
    recompute_mlp: bool
    """Policy `mlp`: the MLP's pre-activation is computed again in the backward pass."""
    keep_input: bool
    """Keep q, k and v before their norms: the rotated ones do not determine them, a norm weight being near zero."""


def double_block(
    self: FluxTransformerBlock, hidden_states: Tensor, encoder_hidden_states: Tensor, normed: TwoNorms, call: Call
) -> tuple[Tensor, Tensor, TwoNorms]:
    """FluxTransformerBlock.forward: (encoder_hidden_states (B, T, W), hidden_states (B, L, W), norms for the next block).

    normed: the norms of text and image by this block's modulation, if the block before made them; so is what is
    returned for the next."""
    attn, text, image = self.attn, encoder_hidden_states, hidden_states
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = call.modulation[0]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = call.modulation[1]
    c_next, next_ = call.following or (None, None)
    c_n, n = normed
    if n is None or c_n is None:
        n, image = modulated(AdaLN(image, scale, shift))
        c_n, text = modulated(AdaLN(text, c_scale, c_shift))
    (qkv,) = modulated_linears(n, AdaLN(image, scale, shift), qkv_layers(self))
    (c_qkv,) = modulated_linears(c_n, AdaLN(text, c_scale, c_shift), text_qkv_layers(self))
    q, k, v = qk_norm_rope(
        Stream(qkv, attn.norm_q.weight, attn.norm_k.weight),
        call.image_rotary_emb,
        attn.heads,
        Stream(c_qkv, attn.norm_added_q.weight, attn.norm_added_k.weight),
        cast(float, attn.norm_q.eps),
        call.keep_input,
    )
    del n, c_n, qkv, c_qkv  # where no gradient needs them, their memory is free during attention
    attn_output = _attention(self, q, k, v, call.bias)
    image_output, text_output = stream_linears(
        attn_output, text.shape[1], cast(nn.Linear, attn.to_out[0]), attn.to_add_out
    )

    image, n = gate_residual(image, image_output, gate, scale_mlp, shift_mlp)
    text, c_n = gate_residual(text, text_output, c_gate, c_scale_mlp, c_shift_mlp)
    image_output = _feed_forward(self.ff, n, AdaLN(image, scale_mlp, shift_mlp), call.recompute_mlp)
    image, n = _gate_residual(image, image_output, gate_mlp, next_)
    text_output = _feed_forward(self.ff_context, c_n, AdaLN(text, c_scale_mlp, c_shift_mlp), call.recompute_mlp)
    text, c_n = _gate_residual(text, text_output, c_gate_mlp, c_next)
    return _in_range(text), image, (c_n, n)


def _gate_residual(
    residual: Tensor, x: Tensor, gate: Tensor, following: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """(residual + gate * x, its norm by the next block's modulation or None). FLUX's last norm has a modulation without
    gates, and nothing but the norm is read after it: then the norm is returned as both."""
    if following is None:
        return gate_residual(residual, x, gate), None
    shift, scale, *gates = following
    if not gates:
        n = last_norm(residual, x, gate, scale, shift)
        return n, n
    return gate_residual(residual, x, gate, scale, shift)


def _feed_forward(ff: FeedForward, n: Tensor, adaln: AdaLN, recompute: bool) -> Tensor:
    """A double block's MLP of one stream: n (B, S, W), made of adaln -> (B, S, W)."""
    proj_in, proj_out, handover = cast(GELU, ff.net[0]).proj, cast(nn.Linear, ff.net[2]), Handover()
    (pre,) = modulated_linears(n, adaln, (proj_in,), handover=handover)
    return gelu_linear(pre, None, adaln, proj_in, proj_out, recompute, handover)


def single_block(
    self: FluxSingleTransformerBlock, hidden_states: Tensor, normed: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None]:
    """FluxSingleTransformerBlock.forward on the joined streams: (hidden_states (B, S, W), its norm for the next block).
    normed: as in `double_block`, of the one stream."""
    attn, handover = self.attn, Handover()
    ((shift, scale, gate),) = call.modulation
    (next_,) = call.following or (None,)
    n = normed
    if n is None:
        n, hidden_states = modulated(AdaLN(hidden_states, scale, shift))
    adaln = AdaLN(hidden_states, scale, shift)
    qkv, pre = modulated_linears(n, adaln, qkv_layers(self), (self.proj_mlp,), handover=handover)
    q, k, v = norm_and_rotate(
        Stream(qkv, attn.norm_q.weight, attn.norm_k.weight),
        call.image_rotary_emb,
        attn.heads,
        cast(float, attn.norm_q.eps),
        call.keep_input,
        handover,
    )
    del n, qkv  # where no gradient needs them, their memory is free during attention
    attn_output = _attention(self, q, k, v, call.bias)
    output = gelu_linear(pre, attn_output, adaln, self.proj_mlp, self.proj_out, call.recompute_mlp, handover)
    hidden_states, n = _gate_residual(hidden_states, output, gate, next_)
    return _in_range(hidden_states), n


def _attention(block: Block, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, S, D) three times -> (B, S, W). bias: (B, S) float log-bias per key, or None."""
    if (probe := vars(block).get("attention_probe")) is not None:  # see generation.dots.attention_map
        probe(q, k, bias)
    if bias is None:
        return contiguous_gradient(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return biased_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def qkv_layers(block: Block) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """A block's q, k and v projections, side by side in memory where they are frozen. With gradients enabled, a single
    block's frozen proj_mlp lies beside them, for one product of all four gradients; without gradients nothing reads
    that, and the largest weights of the block would be copied for nothing."""
    attn = block.attn
    if isinstance(block, FluxSingleTransformerBlock) and not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            pack(attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        if attn.to_q.weight.requires_grad:
            unpack(block.proj_mlp)
    return _side_by_side(attn.to_q, attn.to_k, attn.to_v)


def text_qkv_layers(block: FluxTransformerBlock) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The q, k and v projections of a double block's text stream, as in `qkv_layers`."""
    return _side_by_side(block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)


def _side_by_side(q: nn.Linear, k: nn.Linear, v: nn.Linear) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    # Checked on each call, not remembered: weights move, and the check is cheap.
    if not torch.compiler.is_compiling():
        pack(q, k, v)
    return q, k, v


def _in_range(hidden_states: Tensor) -> Tensor:
    # as in diffusers' blocks: float16 ends at 65504
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states
