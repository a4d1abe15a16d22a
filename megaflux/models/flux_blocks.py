"""The forwards of FLUX's fused blocks. Shapes: B batch, T text tokens, L image tokens, S = T + L, W width, H heads, D
head_dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.models.flux_functions import (
    Handover,
    even_gradient,
    gelu_linear,
    last_norm,
    modulated,
    modulated_linears,
    normed_and_turned,
    stream_linears,
)
from megaflux.models.packing import pack, unpack
from megaflux_kernels.biased_attention import biased_attention
from megaflux_kernels.gate_residual import gate_residual
from megaflux_kernels.qk_norm_rope import qk_norm_rope


def double_block(
    self: nn.Module,
    text: Tensor,
    image: Tensor,
    normed: tuple[Tensor | None, Tensor | None],
    modulation: tuple,
    following: tuple | None,
    rope: tuple[Tensor, Tensor],
    bias: Tensor | None,
    recompute: bool,
    keep_input: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """FluxTransformerBlock.forward: text (B, T, W), image (B, L, W) -> the same, and their norms for the next block.

    normed: the norms of text and image by this block's modulation, or None; following: the modulation of the next block,
    or None: no norms are made for it."""
    attn, T = self.attn, text.shape[1]
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = modulation[0]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation[1]
    c_next, next_ = following or (None, None)
    c_n, n = normed
    if n is None:
        n, image = modulated(image, scale, shift)
        c_n, text = modulated(text, c_scale, c_shift)
    (qkv,) = modulated_linears(n, image, scale, shift, qkv_layers(self))
    (c_qkv,) = modulated_linears(c_n, text, c_scale, c_shift, text_qkv_layers(self))
    q, k, v = qk_norm_rope(
        qkv,
        attn.norm_q.weight,
        attn.norm_k.weight,
        *rope,
        attn.heads,
        c_qkv,
        attn.norm_added_q.weight,
        attn.norm_added_k.weight,
        attn.norm_q.eps,
        keep_input,
    )
    del n, c_n, qkv, c_qkv
    attn_output = _attention(self, q, k, v, bias)
    image_output, text_output = stream_linears(attn_output, T, attn.to_out[0], attn.to_add_out)

    image, n = gate_residual(image, image_output, gate, scale_mlp, shift_mlp)
    text, c_n = gate_residual(text, text_output, c_gate, c_scale_mlp, c_shift_mlp)
    image_output = _feed_forward(self.ff, n, image, scale_mlp, shift_mlp, recompute)
    image, n = _gate_residual(image, image_output, gate_mlp, next_)
    text_output = _feed_forward(self.ff_context, c_n, text, c_scale_mlp, c_shift_mlp, recompute)
    text, c_n = _gate_residual(text, text_output, c_gate_mlp, c_next)
    return _in_range(text), image, (c_n, n)


def _gate_residual(
    residual: Tensor, x: Tensor, gate: Tensor, following: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """(residual + gate * x, its norm by the next block's modulation or None). After the last block, whose norm's
    modulation has no gate, only the norm is read: it comes twice."""
    if following is None:
        return gate_residual(residual, x, gate), None
    shift, scale, *gates = following
    if not gates:
        n = last_norm(residual, x, gate, scale, shift)
        return n, n
    return gate_residual(residual, x, gate, scale, shift)


def _feed_forward(ff: nn.Module, n: Tensor, x: Tensor, scale: Tensor, shift: Tensor, recompute: bool) -> Tensor:
    """A double block's MLP of one stream: n (B, S, W), the norm of x by scale and shift -> (B, S, W)."""
    proj_in, proj_out, handover = ff.net[0].proj, ff.net[2], Handover()
    (pre,) = modulated_linears(n, x, scale, shift, (proj_in,), handover=handover)
    return gelu_linear(pre, None, x, scale, shift, proj_in, proj_out, recompute, handover)


def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    n: Tensor | None,
    modulation: tuple,
    following: tuple | None,
    rope: tuple[Tensor, Tensor],
    bias: Tensor | None,
    recompute: bool,
    keep_input: bool,
) -> tuple[Tensor, Tensor | None]:
    """FluxSingleTransformerBlock.forward on the joined streams: (B, S, W) -> the same, and its norm for the next block.
    n, modulation and following as in `double_block`, of one stream."""
    attn, handover = self.attn, Handover()
    ((shift, scale, gate),) = modulation
    (next_,) = following or (None,)
    if n is None:
        n, hidden_states = modulated(hidden_states, scale, shift)
    qkv, pre = modulated_linears(n, hidden_states, scale, shift, qkv_layers(self), (self.proj_mlp,), handover=handover)
    q, k, v = normed_and_turned(
        qkv, attn.norm_q.weight, attn.norm_k.weight, rope, attn.heads, attn.norm_q.eps, keep_input, handover
    )
    del n, qkv
    attn_output = _attention(self, q, k, v, bias)
    output = gelu_linear(
        pre, attn_output, hidden_states, scale, shift, self.proj_mlp, self.proj_out, recompute, handover
    )
    hidden_states, n = _gate_residual(hidden_states, output, gate, next_)
    return _in_range(hidden_states), n


def _attention(block: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, S, D) three times -> (B, S, W). bias: (B, S) float log-bias per key, or None."""
    if (probe := vars(block).get("attention_probe")) is not None:  # see generation.attention_map
        probe(q, k, bias)
    if bias is None:
        return even_gradient(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return biased_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def qkv_layers(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """A block's q, k and v projections, side by side in memory where they are frozen; with gradients on, beside them a
    frozen proj_mlp, for the product of all four gradients. Without gradients nothing reads that, and the largest weights
    of a single block would be copied for nothing."""
    attn, mlp = block.attn, getattr(block, "proj_mlp", None)  # of single blocks
    if mlp is not None and not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            pack(attn.to_q, attn.to_k, attn.to_v, mlp)
        if attn.to_q.weight.requires_grad:
            unpack(mlp)
    return _laid_together(attn.to_q, attn.to_k, attn.to_v)


def text_qkv_layers(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return _laid_together(block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)


def _laid_together(*layers: nn.Linear) -> tuple[nn.Linear, ...]:
    # Looked up each time, not remembered; the look is cheap.
    if not torch.compiler.is_compiling():
        pack(*layers)
    return layers


def _in_range(hidden_states: Tensor) -> Tensor:
    # as diffusers' blocks: float16 ends at 65504
    return hidden_states.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else hidden_states
