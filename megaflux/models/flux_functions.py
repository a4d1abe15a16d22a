"""The parts of a FLUX block around attention, as autograd functions that keep as little as the gradients need.

A frozen linear keeps no input. A trainable one has its input rebuilt in the backward pass, from the residual stream
(AdaLN) or from the MLP's pre-activation (GELU): a pass over memory instead of a copy kept. With `recompute` the MLP's
pre-activation is not kept either, but computed again, at the price of one matrix product.

Shapes: B batch, S tokens of a stream, W width, M the MLP's width (4 W), N output features. Modulations are (B, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaflux_kernels import gelu_concat, modulate


def even_gradient(attn_output: Tensor) -> Tensor:
    """The tensor itself, (B, S, W); on a GPU its gradient is contiguous.

    torch's cuDNN attention remembers a plan for its backward pass by the layout of q, k and v, not by that of the gradient
    (aten/src/ATen/native/cudnn/MHA.cpp, the key of run_cudnn_SDP_bprop). A single block's gradient is a slice of a wider
    tensor, a double block's is not: the second to come is read by the first one's strides, out of bounds. Seen on an H200
    with torch 2.11 and cuDNN 9.19; diffusers' own blocks do the same.
    """
    if torch.is_grad_enabled() and attn_output.requires_grad and copies_gradients(attn_output):
        return _EvenGradient.apply(attn_output)
    return attn_output


def copies_gradients(x: Tensor) -> bool:
    """Whether `even_gradient` does anything: CPUs have no such attention."""
    return x.is_cuda


def linears(*layers: nn.Linear) -> list[Tensor]:
    """Weights, then biases, of the layers of one product."""
    return [layer.weight for layer in layers] + [layer.bias for layer in layers]


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """(LayerNorm(x) * (1 + scale) + shift, x). The residual passes through, so that its gradient is added in the
    norm's own backward pass and not in one more."""
    return _Modulated.apply(x, scale, shift)


def modulated_linear(n: Tensor, x: Tensor, scale: Tensor, shift: Tensor, *layers: nn.Linear) -> Tensor:
    """One product of n (B, S, W) with all the layers' weights: (B, S, N), the layers' outputs side by side.

    n is what `modulated` made of x, scale and shift, from which it is rebuilt where a weight trains.
    """
    parameters = linears(*layers)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return _ModulatedLinear.apply(n, x, scale, shift, *parameters)
    return F.linear(n, packed(parameters[: len(layers)]), packed(parameters[len(layers) :]))


def mlp(
    n: Tensor, attn_output: Tensor | None, x: Tensor, scale: Tensor, shift: Tensor, proj_in: nn.Linear,
    proj_out: nn.Linear, recompute: bool,
) -> Tensor:  # fmt: skip
    """proj_out([attn_output |] gelu(proj_in(n))): (B, S, W).

    attn_output: (B, S, W) in single blocks, None in double ones. n: (B, S, W), what `modulated` made of x, scale and
    shift. recompute: run proj_in again in the backward pass instead of keeping its output (B, S, M).
    """
    return _Mlp.apply(n, attn_output, x, scale, shift, recompute, *linears(proj_in), *linears(proj_out))


def stream_linears(
    attn_output: Tensor, text_tokens: int, to_out: nn.Linear, to_add_out: nn.Linear
) -> tuple[Tensor, Tensor]:
    """(to_out of the image rows (B, L, W), to_add_out of the text rows (B, T, W)) of attn_output (B, T + L, W), text
    first; text_tokens is T. Its gradient is written by two products into one contiguous tensor: the gradients of slices
    would each be filled with zeros first, and added."""
    return _StreamLinears.apply(attn_output, text_tokens, *linears(to_out), *linears(to_add_out))


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along their first dimension as one: a view where they lie side by side in memory (`pack`), else a
    copy."""
    if not side_by_side(tensors):
        return torch.cat(list(tensors))
    first = tensors[0].detach()
    size = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors fill one stretch of one storage, in order. Never under torch.compile, which sees no storage."""
    if torch.compiler.is_compiling():
        return False
    first, offset = tensors[0], tensors[0].storage_offset()
    storage = first.untyped_storage()._cdata
    for tensor in tensors:
        alike = tensor.untyped_storage()._cdata == storage and tensor.dtype == first.dtype
        if not (alike and tensor.storage_offset() == offset and tensor.is_contiguous()):
            return False
        offset += tensor.numel()
    return True


@torch.no_grad()
def pack(*layers: nn.Linear) -> None:
    """Lay frozen weights, and biases, of the layers side by side, so that one product needs no copy. Names, values
    and parameters stay; a layer that trains is left to its optimizer."""
    for parameters in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if any(p.requires_grad for p in parameters) or side_by_side(parameters):
            continue
        joined, start = torch.cat([p.data for p in parameters]), 0
        for parameter in parameters:
            parameter.data = joined[start : start + parameter.shape[0]]
            start += parameter.shape[0]


class _EvenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attn_output):
        return attn_output.view_as(attn_output)

    @staticmethod
    def backward(ctx, dattn_output):
        return dattn_output.contiguous()


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift):
        out, mean, rstd = modulate.forward(x, scale, shift)
        ctx.save_for_backward(x, mean, rstd, scale)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx, dout, residual):
        if dout is None:
            return residual, None, None
        need_modulation = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return modulate.backward(dout, *ctx.saved_tensors, residual, need_modulation)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, x, scale, shift, *parameters):
        weights, biases = _halves(parameters)
        ctx.rebuilds = any(ctx.needs_input_grad[4 : 4 + len(weights)])
        ctx.save_for_backward(*((x, scale, shift) if ctx.rebuilds else ()), *parameters)
        if torch.compiler.is_compiling() or (side_by_side(weights) and side_by_side(biases)):
            return F.linear(n, packed(weights), packed(biases))
        # Apart in memory: a product each into one result costs less than joining the weights first.
        rows = [weight.shape[0] for weight in weights]
        out = torch.empty((*n.shape[:-1], sum(rows)), dtype=n.dtype, device=n.device)
        for part, weight, bias in zip(out.flatten(0, 1).split(rows, dim=1), weights, biases, strict=True):
            torch.addmm(bias, n.flatten(0, 1), weight.t(), out=part)
        return out

    @staticmethod
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # once: checkpointing gives them out once
        sources, (weights, _) = saved[: 3 * ctx.rebuilds], _halves(saved[3 * ctx.rebuilds :])
        needs = ctx.needs_input_grad[4:]
        rows = [weight.shape[0] for weight in weights]
        dn = None
        if ctx.needs_input_grad[0] and (torch.compiler.is_compiling() or side_by_side(weights)):
            dn = dout @ packed(weights)
        elif ctx.needs_input_grad[0]:
            first, *others = dout.flatten(0, 1).split(rows, dim=1)
            dn = first @ weights[0]
            for part, weight in zip(others, weights[1:], strict=True):
                torch.addmm(dn, part, weight, out=dn)
            dn = dn.view(*dout.shape[:-1], -1)
        dweight = _dweight(dout, modulate.forward(*sources)[0]) if ctx.rebuilds else None
        dbias = dout.sum((0, 1)) if any(needs[len(rows) :]) else None
        parts = *_split(dweight, rows, needs[: len(rows)]), *_split(dbias, rows, needs[len(rows) :])
        return dn, None, None, None, *parts


class _StreamLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attn_output, text_tokens, w_image, b_image, w_text, b_text):
        ctx.text_tokens, ctx.shape = text_tokens, attn_output.shape
        trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[4]
        ctx.save_for_backward(w_image, w_text, attn_output if trains else None)  # which attention keeps, too
        ctx.set_materialize_grads(False)
        image, text = attn_output[:, text_tokens:], attn_output[:, :text_tokens]
        return _linear(image, w_image, b_image), _linear(text, w_text, b_text)

    @staticmethod
    def backward(ctx, dimage, dtext):
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
            if needs[0] and not torch.compiler.is_compiling():
                _product(dout, weight, dattn[:, rows])
            given = dout is not None
            gradients.append(_dweight(dout, attn_output[:, rows]) if need_weight and given else None)
            gradients.append(dout.sum((0, 1)) if need_bias and given else None)
        return dattn, None, *gradients


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, n, attn_output, x, scale, shift, recompute, w_in, b_in, w_out, b_out):
        pre = F.linear(n, w_in, b_in)
        ctx.recompute, ctx.rebuilds = recompute, recompute or ctx.needs_input_grad[6]
        keeps_attention = ctx.needs_input_grad[8] and attn_output is not None
        ctx.split = 0 if attn_output is None else attn_output.shape[-1]
        ctx.save_for_backward(
            w_in, b_in if recompute else None, w_out, None if recompute else pre,
            attn_output if keeps_attention else None, *((x, scale, shift) if ctx.rebuilds else ()),
        )  # fmt: skip
        return F.linear(gelu_concat.forward(attn_output, pre), w_out, b_out)

    @staticmethod
    def backward(ctx, dout):
        w_in, b_in, w_out, pre, attn_output, *sources = ctx.saved_tensors
        need_n, need_attention, *_, need_w_in, need_b_in, need_w_out, need_b_out = ctx.needs_input_grad
        n = modulate.forward(*sources)[0] if ctx.rebuilds else None
        if ctx.recompute:
            pre = F.linear(n, w_in, b_in)
        dw_out = _dweight(dout, gelu_concat.forward(attn_output, pre)) if need_w_out else None
        db_out = dout.sum((0, 1)) if need_b_out else None
        dconcat = dout @ w_out  # (B, S, [W +] M)
        dattention = dconcat[..., : ctx.split] if need_attention else None
        dpre = gelu_concat.backward(dconcat[..., ctx.split :], pre)
        del pre
        dw_in = _dweight(dpre, n) if need_w_in else None
        db_in = dpre.sum((0, 1)) if need_b_in else None
        dn = dpre @ w_in if need_n else None
        return dn, dattention, None, None, None, None, dw_in, db_in, dw_out, db_out


def _halves(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """(weights, biases) of `linears`."""
    return parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of rows x (B, L, W) of a longer tensor, without a copy of them: a product for each sample."""
    if len(x) == 1 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], len(weight)))
    for rows, part in zip(x, out):
        torch.addmm(bias, rows, weight.t(), out=part)
    return out


def _product(dout: Tensor | None, weight: Tensor, out: Tensor) -> None:
    """out = dout @ weight, written into rows (B, L, W) of a longer tensor; zeros where there is no gradient."""
    if dout is None:
        out.zero_()
        return
    for rows, part in zip(dout, out):
        torch.mm(rows, weight, out=part)


def _dweight(dout: Tensor, x: Tensor) -> Tensor:
    """(N, W): gradient of a weight from its output's gradient (B, S, N) and its input (B, S, W)."""
    return dout.flatten(0, 1).t() @ x.flatten(0, 1)


def _split(gradient: Tensor | None, rows: Sequence[int], needs: Sequence[bool]) -> list[Tensor | None]:
    if gradient is None:
        return [None] * len(rows)
    return [part if need else None for part, need in zip(gradient.split(list(rows)), needs, strict=True)]
