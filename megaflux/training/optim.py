"""AdamW and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megaflux.config.recipe import Optim, Part, Stage
from megaflux.training import stages
from megaflux.training.parameter_order import products_together


def parameter_groups(module: nn.Module, first_stage: dict[str, int], by_part: bool = False) -> list[dict[str, Any]]:
    """One group per number of Adam steps already taken, so that each has its own bias correction; with by_part
    (`Config.rates_by_part`), one per part of each.

    ZeRO flattens a group into one tensor, for which Adam counts one `step`, so parameters carried over from an earlier
    stage and new ones must not share a group. first_stage: parameter name -> first of the consecutive stages that train it
    (`stages.first_stages`). A group's `part` is None if it holds all parts.
    """
    parameters, num_double = dict(module.named_parameters()), stages.count_double(module)
    keys = {
        name: (first, stages.locate(name, num_double).group if by_part else "") for name, first in first_stage.items()
    }
    groups = []
    for key in sorted(set(keys.values())):
        names = products_together([name for name in first_stage if keys[name] == key])
        groups.append({"params": [parameters[name] for name in names], "first_stage": key[0], "part": key[1] or None})
    return groups


def build_optimizer(groups: list[dict[str, Any]], optim: Optim, stage: Stage) -> torch.optim.AdamW:
    """torch's fused AdamW, on GPU and CPU: it needs no compiler, and offloading does not change its arithmetic."""
    optimizer = torch.optim.AdamW(groups, fused=True)
    configure(optimizer, optim, stage)
    return optimizer


def configure(optimizer: Any, optim: Optim, stage: Stage) -> None:
    """Set every group's betas, eps, weight decay and peak rate in torch's or DeepSpeed's optimizer, as a stage has them."""
    peaks = optim.peaks(stage)
    for group in optimizer.param_groups:
        peak = peaks[group["part"] or "flux"]
        group |= {"lr": peak.lr, "weight_decay": peak.weight_decay, "betas": optim.betas, "eps": optim.eps}


def set_learning_rates(optimizer: Any, rates: dict[Part, float]) -> None:
    """Set each part's learning rate in every group of torch's or DeepSpeed's optimizer. rates: of the parts that train; all
    the same where a group holds several."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] if group["part"] else max(rates.values())
