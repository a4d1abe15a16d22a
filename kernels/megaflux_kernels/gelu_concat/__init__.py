"""gelu_concat: attention output and GELU side by side, as the last linear of a FLUX single block reads them.

    out = [attn_output, gelu(hidden_states)],  gelu(h) = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3)))

The tanh form of GELU (1606.08415, section 2), as in diffusers' FluxSingleTransformerBlock. Shapes: B batch, S tokens;
attn_output (B, S, W) or None, hidden_states (B, S, M). The backward pass keeps hidden_states only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaflux_kernels.dispatch import check, rows, torch_path, use_triton
from megaflux_kernels.gelu_concat import reference


@torch.library.custom_op("megaflux::gelu_concat", mutates_args=())
def _triton_forward(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    from megaflux_kernels.gelu_concat import triton_kernels

    return triton_kernels.forward(attn_output, hidden_states)


@_triton_forward.register_fake
def _(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    B, S, M = hidden_states.shape
    return hidden_states.new_empty((B, S, M if attn_output is None else attn_output.shape[-1] + M))


@torch.library.custom_op("megaflux::gelu_concat_backward", mutates_args=())
def _triton_backward(dgelu: Tensor, hidden_states: Tensor) -> Tensor:
    from megaflux_kernels.gelu_concat import triton_kernels

    return triton_kernels.backward(dgelu, hidden_states)


@_triton_backward.register_fake
def _(dgelu: Tensor, hidden_states: Tensor) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


@torch.library.custom_op("megaflux::gelu_concat_backward_", mutates_args=("dgelu",))
def _triton_backward_(dgelu: Tensor, hidden_states: Tensor) -> None:
    from megaflux_kernels.gelu_concat import triton_kernels

    triton_kernels.backward(dgelu, hidden_states, dgelu)


def _check(attn_output: Tensor | None, hidden_states: Tensor) -> None:
    check("gelu_concat", hidden_states, attn_output, dims=3)
    if attn_output is not None and (attn_output.ndim != 3 or attn_output.shape[:2] != hidden_states.shape[:2]):
        raise ValueError(
            f"gelu_concat: want attn_output ({hidden_states.shape[0]}, {hidden_states.shape[1]}, any width) beside "
            f"hidden_states {tuple(hidden_states.shape)}, got {tuple(attn_output.shape)}"
        )


def forward(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    """[attn_output, gelu(hidden_states)], (B, S, W + M), without autograd; attn_output None: W is 0."""
    _check(attn_output, hidden_states)
    run = _triton_forward if use_triton(hidden_states) else reference.forward
    return run(None if attn_output is None else rows(attn_output), rows(hidden_states))


def backward(dgelu: Tensor, hidden_states: Tensor) -> Tensor:
    """The gradient (B, S, M) of hidden_states. dgelu: the gradient of gelu(hidden_states), (B, S, M), any strides over
    B and S: dout[..., W:] itself. The gradient of attn_output is dout[..., :W]."""
    _check_gradient(dgelu, hidden_states)
    run = _triton_backward if use_triton(hidden_states) else reference.backward
    return run(rows(dgelu), rows(hidden_states))


def backward_(dgelu: Tensor, hidden_states: Tensor) -> Tensor:
    """`backward`, written over dgelu, which is returned: (B, S, M), any strides over B and S, so that it may be a slice
    of a wider gradient. ValueError for other input, and where the last stride is not 1."""
    _check_gradient(dgelu, hidden_states)
    if rows(dgelu) is not dgelu:
        raise ValueError(f"gelu_concat: want dgelu of unit stride in the last dimension, got strides {dgelu.stride()}")
    run = _triton_backward_ if use_triton(hidden_states) else reference.backward_
    run(dgelu, rows(hidden_states))
    return dgelu


def _check_gradient(dgelu: Tensor, hidden_states: Tensor) -> None:
    check("gelu_concat", hidden_states, dgelu, dims=3)
    if dgelu.shape != hidden_states.shape:
        raise ValueError(
            f"gelu_concat: want dgelu of hidden_states' shape {tuple(hidden_states.shape)}, got {tuple(dgelu.shape)}; "
            "slice dout[..., W:]"
        )


def _setup(ctx, inputs, output) -> None:
    attn_output, hidden_states = inputs
    ctx.width = 0 if attn_output is None else attn_output.shape[-1]
    ctx.save_for_backward(hidden_states if ctx.needs_input_grad[1] else None)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout):
    if dout is None:
        return None, None
    (hidden_states,) = ctx.saved_tensors
    dattn = dout[..., : ctx.width] if ctx.needs_input_grad[0] else None
    return dattn, None if hidden_states is None else backward(dout[..., ctx.width :], hidden_states)


_triton_forward.register_autograd(_backward, setup_context=_setup)

_reference = torch_path(reference.forward, _setup, _backward)


def gelu_concat(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    """[attn_output, gelu(hidden_states)] along the last dimension, with the tanh form of GELU; differentiable in both.

    attn_output: (B, S, W), or None for GELU alone; hidden_states: (B, S, M); any strides over B and S, any widths,
    one dtype: bfloat16, float16 or float32 (float64 on the torch path). Arithmetic is float32, the result is rounded
    once. ValueError for other input.
    """
    _check(attn_output, hidden_states)
    run = _triton_forward if use_triton(hidden_states) else _reference
    return run(None if attn_output is None else rows(attn_output), rows(hidden_states))
