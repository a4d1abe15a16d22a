"""The parts of a FLUX block around attention, as autograd functions that keep as little as the gradients need.

A frozen linear keeps no input. A trainable one has its input rebuilt in the backward pass, from the residual stream
(AdaLN) or from the MLP's pre-activation (GELU): one pass over memory instead of a copy kept. With `recompute` the MLP's
pre-activation is not kept either but computed again, at the price of one matrix product.

Shapes: B batch, S tokens of a stream, W width, M the MLP's width (4 W), N output features. Modulations are (B, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux.models.packing import linears, packed
from megaflux.models.products import (
    grouped,
    halves,
    input_gradient,
    linear,
    product_into,
    products,
    split,
    weight_gradient,
)
from megaflux_kernels import gate_residual, gelu_concat, modulate, qk_norm_rope
from megaflux_kernels.qk_norm_rope.streams import Saved, Stream


def contiguous_gradient(attn_output: Tensor) -> Tensor:
    """The tensor itself, (B, S, W); on a GPU its gradient is contiguous.

    torch's cuDNN attention caches its backward plan by the layout of q, k and v, not by that of the gradient
    (aten/src/ATen/native/cudnn/MHA.cpp, the key of run_cudnn_SDP_bprop). A single block's gradient is a slice of a wider
    tensor, a double block's is not: whichever comes second is read with the first one's strides, out of bounds. Seen on
    an H200 with torch 2.11 and cuDNN 9.19; diffusers' own blocks have the same fault.
    """
    if torch.is_grad_enabled() and attn_output.requires_grad and copies_gradients(attn_output):
        return _ContiguousGradient.apply(attn_output)
    return attn_output


def copies_gradients(x: Tensor) -> bool:
    """Whether `contiguous_gradient` does anything: CPUs have no cuDNN attention."""
    return x.is_cuda


class AdaLN(NamedTuple):
    """A residual stream and the modulation of its norm: enough to rebuild n = LayerNorm(x) * (1 + scale) + shift."""

    x: Tensor
    """(B, S, W)."""
    scale: Tensor
    shift: Tensor


def modulated(adaln: AdaLN) -> tuple[Tensor, Tensor]:
    """(n, x). The residual stream passes through, so that its gradient is added in the norm's own backward pass and not
    in an extra one."""
    return _Modulated.apply(*adaln)


@dataclass
class Handover:
    """What the backward passes of one call of a block leave for each other. Each entry is made anew in every backward
    pass, and gradients are right without it."""

    qkv_gradient: Tensor | None = None
    """Where the gradient of q, k and v (B, S, 3 W) is written: columns of one tensor with the MLP's, so that one product
    with the weights serves both."""
    rebuilds: bool = False
    """Whether `modulated_linears` needs n again."""
    n: Tensor | None = None
    """n, rebuilt."""

    def take_qkv_gradient(self) -> Tensor | None:
        tensor, self.qkv_gradient = self.qkv_gradient, None
        return tensor

    def take_n(self) -> Tensor | None:
        tensor, self.n = self.n, None
        return tensor


def modulated_linears(
    n: Tensor, adaln: AdaLN, *groups: Sequence[nn.Linear], handover: Handover | None = None
) -> tuple[Tensor, ...]:
    """One product of n (B, S, W) per group of layers: (B, S, N), the layers' outputs side by side.

    n is what `modulated` made of adaln, from which it is rebuilt where a weight is trainable. The gradient of n is one
    product where the gradients of all outputs are columns of one tensor and all weights lie side by side.
    """
    parameters = linears(*(layer for group in groups for layer in group))
    trains = any(parameter.requires_grad for parameter in parameters)
    handover = None if torch.compiler.is_compiling() else handover
    if torch.is_grad_enabled() and (trains or len(groups) > 1):
        sizes = tuple(len(group) for group in groups)
        return _ModulatedLinears.apply(n, *adaln, sizes, handover, *parameters)
    weights, biases = ([packed(part) for part in grouped(half, groups)] for half in halves(parameters))
    return tuple(F.linear(n, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def norm_and_rotate(
    stream: Stream,
    image_rotary_emb: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    keep_input: bool,
    handover: Handover,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` of one stream; its gradient is written where the handover says."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return qk_norm_rope.qk_norm_rope(stream, image_rotary_emb, heads, eps=eps, keep_input=keep_input)
    return _NormAndRotate.apply(*stream, *image_rotary_emb, heads, eps, keep_input, handover)


def gelu_linear(
    pre: Tensor,
    attn_output: Tensor | None,
    adaln: AdaLN,
    proj_in: nn.Linear,
    proj_out: nn.Linear,
    recompute: bool,
    handover: Handover | None = None,
) -> Tensor:
    """proj_out([attn_output |] gelu(pre)): (B, S, W).

    pre: (B, S, M), proj_in of the n that `modulated` made of adaln. attn_output: (B, S, W) in single blocks, None in
    double ones. recompute: compute pre again in the backward pass instead of keeping it.
    """
    handover = None if torch.compiler.is_compiling() else handover
    return _GeluLinear.apply(pre, attn_output, *adaln, recompute, handover, *linears(proj_in), *linears(proj_out))


def last_norm(residual: Tensor, x: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm(residual + gate * x) * (1 + scale) + shift: (B, S, W). Where the gate is trainable, x is kept for it,
    and residual by the block's own norm: then their sum is computed again instead of kept."""
    return _LastNorm.apply(residual, x, gate, scale, shift)


def stream_linears(
    attn_output: Tensor, text_tokens: int, to_out: nn.Linear, to_add_out: nn.Linear
) -> tuple[Tensor, Tensor]:
    """(to_out of the image rows (B, L, W), to_add_out of the text rows (B, T, W)) of attn_output (B, T + L, W), text
    first; text_tokens is T. Two products write its gradient into one contiguous tensor; the gradients of two slices
    would each be filled with zeros first and then added."""
    return _StreamLinears.apply(attn_output, text_tokens, *linears(to_out), *linears(to_add_out))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attn_output: Any) -> Any:
        return attn_output.view_as(attn_output)

    @staticmethod
    def backward(ctx: Any, dattn_output: Any) -> Any:
        return dattn_output.contiguous()


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, shift: Any) -> Any:
        out, mean, rstd = modulate.forward(x, scale, shift)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx: Any, dout: Any, residual: Any) -> Any:
        if dout is None:
            return residual, None, None
        x, mean, rstd, scale = ctx.saved_tensors
        need_modulation = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return modulate.backward(dout, x, mean, rstd, scale, residual, need_modulation)


class _ModulatedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, n: Tensor, x: Any, scale: Any, shift: Any, sizes: Any, handover: Any, *parameters: Any
    ) -> Any:
        weights, biases = halves(parameters)
        ctx.sizes, ctx.handover = sizes, handover
        ctx.rebuilds = any(ctx.needs_input_grad[6 : 6 + len(weights)])
        if handover is not None:
            handover.rebuilds = ctx.rebuilds
        ctx.save_for_backward(*((x, scale, shift) if ctx.rebuilds else ()), *parameters)
        ctx.set_materialize_grads(False)
        groups = zip(grouped(weights, sizes), grouped(biases, sizes), strict=True)
        return tuple(products(n, *group) for group in groups)

    @staticmethod
    def backward(ctx: Any, *douts: Any) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing gives them out once
        adaln, (weights, _) = saved[: 3 * ctx.rebuilds], halves(saved[3 * ctx.rebuilds :])
        groups = list(grouped(weights, ctx.sizes))
        dn = input_gradient(douts, groups) if ctx.needs_input_grad[0] else None
        n = None if ctx.handover is None else ctx.handover.take_n()
        if ctx.rebuilds and n is None:
            n = modulate.forward(*adaln)[0]
        dweights, dbiases = [], []
        need_weights, need_biases = (grouped(half, ctx.sizes) for half in halves(ctx.needs_input_grad[6:]))
        for dout, group, weight_needs, bias_needs in zip(douts, groups, need_weights, need_biases, strict=True):
            rows = [weight.shape[0] for weight in group]
            dweight = None if dout is None or n is None or not any(weight_needs) else weight_gradient(dout, n)
            dbias = None if dout is None or not any(bias_needs) else dout.sum((0, 1))
            dweights += split(dweight, rows, weight_needs)
            dbiases += split(dbias, rows, bias_needs)
        return dn, None, None, None, None, None, *dweights, *dbiases


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        norm_q: Tensor,
        norm_k: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        eps: float,
        keep_input: bool,
        handover: Any,
    ) -> Any:
        q, k, v, rstd = qk_norm_rope.forward(Stream(qkv, norm_q, norm_k), (cos, sin), heads, eps=eps)
        ctx.handover = handover
        ctx.save_for_backward(q, k, rstd, norm_q, norm_k, cos, sin, qkv if keep_input else None)
        ctx.set_materialize_grads(False)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *douts: Any) -> Any:
        out = ctx.handover.take_qkv_gradient()
        if all(dout is None for dout in douts):
            return (None,) * 9
        q, k, rstd, norm_q, norm_k, cos, sin, qkv = ctx.saved_tensors
        saved = Saved(q, k, rstd, norm_q, norm_k, cos, sin, qkv=qkv)
        dq, dk, dv = (torch.zeros_like(saved.q) if dout is None else dout.transpose(1, 2) for dout in douts)
        need_norms = any(ctx.needs_input_grad[1:3])
        dqkv, _, dnorm_q, dnorm_k, *_ = qk_norm_rope.backward((dq, dk, dv), saved, need_norms, out)
        return dqkv, dnorm_q, dnorm_k, None, None, None, None, None, None


class _LastNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Any, x: Any, gate: Tensor, scale: Any, shift: Any) -> Any:
        hidden, n, mean, rstd = gate_residual.forward_modulate(residual, x, gate, scale, shift)
        kept = (residual, x) if ctx.needs_input_grad[2] else (hidden, None)
        ctx.save_for_backward(gate, scale, mean, rstd, *kept)
        return n

    @staticmethod
    def backward(ctx: Any, dn: Any) -> Any:
        gate, scale, mean, rstd, hidden, x = ctx.saved_tensors
        if x is not None:
            hidden = gate_residual.forward(hidden, x, gate)
        needs = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        return gate_residual.backward_modulate(None, dn, hidden, mean, rstd, scale, gate, x, need_modulation=needs)


class _StreamLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attn_output: Any, text_tokens: int, w_image: Tensor, b_image: Any, w_text: Tensor, b_text: Any
    ) -> Any:
        ctx.text_tokens, ctx.shape = text_tokens, attn_output.shape
        trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        ctx.save_for_backward(w_image, w_text, attn_output if trains else None)  # attention keeps it anyway
        ctx.set_materialize_grads(False)
        image, text = attn_output[:, text_tokens:], attn_output[:, :text_tokens]
        return linear(image, w_image, b_image), linear(text, w_text, b_text)

    @staticmethod
    def backward(ctx: Any, dimage: Any, dtext: Any) -> Any:
        w_image, w_text, attn_output = ctx.saved_tensors
        T, needs = ctx.text_tokens, ctx.needs_input_grad
        streams = (
            (slice(T, None), dimage, w_image, needs[2], needs[3]),
            (slice(0, T), dtext, w_text, needs[4], needs[5]),
        )
        dattn, gradients = None, []
        if needs[0] and torch.compiler.is_compiling():  # Dynamo refuses out= of a slice
            dattn = torch.cat([dtext @ w_text, dimage @ w_image], dim=1)
        elif needs[0]:
            dattn = w_image.new_empty(ctx.shape)
        for rows, dout, weight, need_weight, need_bias in streams:
            if dattn is not None and not torch.compiler.is_compiling():
                product_into(dout, weight, dattn[:, rows])
            given = dout is not None
            gradients.append(weight_gradient(dout, attn_output[:, rows]) if need_weight and given else None)
            gradients.append(dout.sum((0, 1)) if need_bias and given else None)
        return dattn, None, *gradients


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        attn_output: Any,
        x: Any,
        scale: Any,
        shift: Any,
        recompute: bool,
        handover: Any,
        w_in: Tensor,
        b_in: Any,
        w_out: Tensor,
        b_out: Any,
    ) -> Any:
        ctx.recompute, ctx.handover = recompute, handover
        ctx.split = 0 if attn_output is None else attn_output.shape[-1]
        keeps_attention = ctx.needs_input_grad[9] and attn_output is not None
        ctx.save_for_backward(
            w_out, attn_output if keeps_attention else None, *((x, scale, shift, w_in, b_in) if recompute else (pre,))
        )
        return F.linear(gelu_concat.forward(attn_output, pre), w_out, b_out)

    @staticmethod
    def backward(ctx: Any, dout: Any) -> Any:
        w_out, attn_output, *kept = ctx.saved_tensors
        need_pre, need_attention, *_, need_w_out, need_b_out = ctx.needs_input_grad
        pre = _recomputed_pre(ctx.handover, *kept) if ctx.recompute else kept.pop()
        dw_out = weight_gradient(dout, gelu_concat.forward(attn_output, pre)) if need_w_out else None
        db_out = dout.sum((0, 1)) if need_b_out else None
        dattention = dout @ w_out[:, : ctx.split] if need_attention else None
        dpre = _dpre(dout, w_out[:, ctx.split :], pre, 3 * ctx.split, ctx.handover) if need_pre else None
        return dpre, dattention, None, None, None, None, None, None, None, dw_out, db_out


def _recomputed_pre(
    handover: Handover | None, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """pre (B, S, M), computed again; n is left in the handover if `modulated_linears` needs it."""
    n = modulate.forward(x, scale, shift)[0]
    if handover is not None and handover.rebuilds:
        handover.n = n
    return F.linear(n, weight, bias)


def _dpre(dout: Tensor, weight: Tensor, pre: Tensor, before: int, handover: Handover | None) -> Tensor:
    """Gradient of pre from that of gelu(pre) @ weight.t(). With a handover, it is the last columns of a tensor whose
    first `before` columns are left for the gradient of q, k and v."""
    if torch.compiler.is_compiling():
        return gelu_concat.backward(dout @ weight, pre)
    joined = dout.new_empty((*dout.shape[:-1], before + pre.shape[-1]))
    dpre = joined[..., before:]
    torch.mm(dout.flatten(0, 1), weight, out=dpre.flatten(0, 1))
    if handover is not None and before:
        handover.qkv_gradient = joined[..., :before]
    return gelu_concat.backward_(dpre, pre)
