"""AdamW's parameter groups and the trapezoid learning rate."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # the bench `traffic` runs where pydantic is missing
    from megaflux.config.schema import Config, Optim


def learning_rate(update: int, updates: int, optim: Optim) -> float:
    """Rate of the update number `update` (from 0) of a run of `updates`: a trapezoid.

    Linear from lr / n to lr over the n updates of the warm-up, flat over the plateau, then linear towards 0, which
    the update after the last would have. One trapezoid spans all stages.
    """
    warmup = round(updates * optim.warmup_fraction)
    plateau = round(updates * optim.plateau_fraction)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    falling = max(1, updates - warmup - plateau)
    return optim.lr * min(1.0, (updates - update) / falling)


def parameter_groups(module: nn.Module, first_stage: dict[str, int]) -> list[dict]:
    """One group per number of Adam steps already taken, so that each has its own bias correction.

    ZeRO flattens a group into one tensor, and Adam counts one `step` for it: parameters carried from an earlier stage
    and newcomers must not share one. first_stage: parameter name -> first consecutive stage that trains it.
    """
    parameters = dict(module.named_parameters())
    groups = []
    for first in sorted(set(first_stage.values())):
        names = products_together([name for name, stage in first_stage.items() if stage == first])
        groups.append({"params": [parameters[name] for name in names], "first_stage": first})
    return groups


def products_together(names: list[str]) -> list[str]:
    """The names with a block's q, k and v weights in a row, and their biases: ZeRO lays parameters into one buffer in
    the order of their group, and what lies side by side there is one product without a copy (models.flux_functions)."""
    place: dict[str, int] = {}
    keys = []
    for i, name in enumerate(names):
        found = re.fullmatch(r"(.+\.attn\.)(to_[qkv]|add_[qkv]_proj)\.(weight|bias)", name)
        if found:
            first = place.setdefault(found[1] + found[2][:2], i)
            keys.append((first, found[3] == "bias", i))
        else:
            keys.append((i, False, i))
    return [name for _, name in sorted(zip(keys, names, strict=True))]


def build_optimizer(groups: list[dict], optim: Optim) -> torch.optim.AdamW:
    """torch's fused AdamW, on GPU and CPU alike: no compiler needed, and the same arithmetic with offloading."""
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def set_learning_rate(optimizer, update: int, config: Config) -> float:
    """Put the rate of `update` into every group; returns it."""
    rate = learning_rate(update, config.train.updates, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
