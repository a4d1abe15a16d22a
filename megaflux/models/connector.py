"""The connector: one Linear(3584 -> 4096, bias) that puts Qwen2-VL's tokens in the place of T5's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megaflux.models.draws import Way, seeded


def build_connector(vlm_hidden_size: int, joint_attention_dim: int, seed: int, way: Way = "portable") -> nn.Linear:
    """A fresh connector with seeded weights: (B, T, vlm_hidden_size) -> (B, T, joint_attention_dim).

    Weights are normal with variance 1 / vlm_hidden_size and the bias is 0, so that tokens of unit RMS, as an RMSNorm
    returns them, keep it. way: how numbers are drawn (draws.py).
    """
    with torch.random.fork_rng(devices=[]):  # nn.Linear first draws weights of its own
        connector = nn.Linear(vlm_hidden_size, joint_attention_dim, bias=True)
    if connector.weight.device.type != "meta":
        with torch.no_grad():
            if way == "portable":
                with seeded(seed, "connector"):
                    connector.weight.normal_(std=vlm_hidden_size**-0.5)
            else:
                drawn = torch.randn(connector.weight.shape, generator=torch.Generator().manual_seed(seed))
                connector.weight.copy_(drawn / vlm_hidden_size**0.5)
            connector.bias.zero_()
    return connector


@torch.no_grad()
def folded(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor]:
    """(weight, bias) of the one linear that equals second(first(x)), multiplied in float32 and rounded once.

    For generation, where both are fixed: connector and FLUX's context_embedder, 3584 -> 4096 -> 3072.
    """
    wide, dtype = torch.promote_types(first.weight.dtype, torch.float32), first.weight.dtype
    weight = second.weight.to(wide) @ first.weight.to(wide)
    bias = second.weight.to(wide) @ first.bias.to(wide) + second.bias.to(wide)
    return weight.to(dtype), bias.to(dtype)
