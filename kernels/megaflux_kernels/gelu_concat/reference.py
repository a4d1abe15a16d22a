"""gelu_concat in plain torch: the definition, and the path of CPUs. Shapes: attn_output (B, S, W), hidden_states
(B, S, M)."""

from __future__ import annotations

import torch
from torch import Tensor


def definition(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    """The op as it is written in a model; what the other paths must equal."""
    gelu = torch.nn.functional.gelu(hidden_states, approximate="tanh")
    return gelu if attn_output is None else torch.cat([attn_output, gelu], dim=-1)


def forward(attn_output: Tensor | None, hidden_states: Tensor) -> Tensor:
    """(B, S, W + M), GELU written where it belongs."""
    if attn_output is None or torch.compiler.is_compiling():  # Dynamo refuses out= of a slice, and fuses these anyway
        return definition(attn_output, hidden_states)
    W = attn_output.shape[-1]
    out = hidden_states.new_empty((*hidden_states.shape[:-1], W + hidden_states.shape[-1]))
    out[..., :W].copy_(attn_output)
    torch.ops.aten.gelu.out(hidden_states, approximate="tanh", out=out[..., W:])
    return out


def backward(dgelu: Tensor, hidden_states: Tensor) -> Tensor:
    """dhidden_states."""
    return torch.ops.aten.gelu_backward(dgelu, hidden_states, approximate="tanh")


def backward_(dgelu: Tensor, hidden_states: Tensor) -> None:
    """dhidden_states, written over dgelu."""
    torch.ops.aten.gelu_backward.grad_input(dgelu, hidden_states, approximate="tanh", grad_input=dgelu)
