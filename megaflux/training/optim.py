"""AdamW, its parameter groups and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megaflux.config.schema import Config, Optim
from megaflux.training.parameter_order import products_together


def learning_rate(update: int, updates: int, optim: Optim) -> float:
    """Learning rate of an update, counted from 0, in a run of `updates`: a trapezoid that spans all stages.

    Linear from lr / n to lr over the n updates of the warm-up, constant over the plateau, then linear towards 0, which it
    would reach one update after the last.
    """
    warmup = round(updates * optim.warmup_fraction)
    plateau = round(updates * optim.plateau_fraction)
    if update < warmup:
        return optim.lr * (update + 1) / warmup
    falling = max(1, updates - warmup - plateau)
    return optim.lr * min(1.0, (updates - update) / falling)


def parameter_groups(module: nn.Module, first_stage: dict[str, int]) -> list[dict[str, Any]]:
    """One group per number of Adam steps already taken, so that each has its own bias correction.

    ZeRO flattens a group into one tensor, for which Adam counts one `step`, so parameters carried over from an earlier
    stage and new ones must not share a group. first_stage: parameter name -> first of the consecutive stages that train it
    (`stages.first_stages`).
    """
    parameters = dict(module.named_parameters())
    groups = []
    for first in sorted(set(first_stage.values())):
        names = products_together([name for name, stage in first_stage.items() if stage == first])
        groups.append({"params": [parameters[name] for name in names], "first_stage": first})
    return groups


def build_optimizer(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.AdamW:
    """torch's fused AdamW, on GPU and CPU: it needs no compiler, and offloading does not change its arithmetic."""
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def set_learning_rate(optimizer: Any, update: int, config: Config) -> float:
    """Set the learning rate of `update` in every group of torch's or DeepSpeed's optimizer; returns it."""
    rate = learning_rate(update, config.train.updates, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
