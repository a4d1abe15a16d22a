"""The optimizer is AdamW as configured, by groups of equal age, at the rate of the update."""

from __future__ import annotations

import pytest
import torch

from megaflux.config.schema import Stage
from megaflux.training import optim
from megaflux.training.schedule import learning_rate, learning_rates
from tests.training.carry_worker import Toy, toy_config

STAGE = Stage(name="one", share=1, blocks="all")


def test_its_steps_are_adamws_with_the_configured_values():
    """Loshchilov & Hutter's formula (1711.05101) in float64, with values far from torch's defaults."""
    lr, betas, eps, decay = 0.05, (0.6, 0.7), 0.3, 0.4
    config = toy_config(lr=lr, betas=list(betas), eps=eps, weight_decay=decay).optim
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7))
    optimizer = optim.build_optimizer([{"params": [parameter], "part": None}], config, STAGE)
    expected = parameter.detach().double()
    first, second = torch.zeros(7).double(), torch.zeros(7).double()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5):
        gradient = torch.randn(7, generator=generator)
        parameter.grad = gradient.clone()
        optimizer.step()
        first = betas[0] * first + (1 - betas[0]) * gradient.double()
        second = betas[1] * second + (1 - betas[1]) * gradient.double() ** 2
        update = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        expected = expected * (1 - lr * decay) - lr * update
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.defaults["fused"]  # the same arithmetic wherever the optimizer's state lies


def test_parameters_of_one_age_share_a_group_and_no_others():
    """Adam counts one step for a group, so a younger parameter in it would be corrected too little."""
    module = Toy()
    names = {
        "connector.weight": 1,
        "vlm.layers.0.weight": 0,
        "transformer.transformer_blocks.0.attn.to_q.weight": 2,
        "connector.bias": 1,
        "vlm.layers.0.bias": 0,
    }
    groups = optim.parameter_groups(module, names)
    assert [group["first_stage"] for group in groups] == [0, 1, 2]
    parameters = dict(module.named_parameters())
    for group in groups:
        wanted = {id(parameters[name]) for name, first in names.items() if first == group["first_stage"]}
        assert {id(p) for p in group["params"]} == wanted and len(group["params"]) == len(wanted)


def test_the_rate_of_an_update_reaches_every_group():
    config = toy_config(lr=2e-3, warmup_fraction=0.5)
    module = Toy()
    first_stage = {"connector.weight": 0, "connector.bias": 1}
    optimizer = optim.build_optimizer(optim.parameter_groups(module, first_stage), config.optim, config.stages[0])
    for update in range(config.train.updates):
        rates = learning_rates(config, 0, update)
        optim.set_learning_rates(optimizer, rates)
        rate = learning_rate(2e-3, update, config.train.updates, config.optim)
        assert set(rates.values()) == {rate}
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


@pytest.mark.parametrize(
    ("warmup", "plateau", "expected"),
    [
        (0.0, 0.0, [8, 7, 6, 5, 4, 3, 2, 1]),  # from the peak on, and the last update still moves
        (0.5, 0.0, [2, 4, 6, 8, 8, 6, 4, 2]),
        (0.5, 0.5, [2, 4, 6, 8, 8, 8, 8, 8]),
        (0.0, 0.5, [8, 8, 8, 8, 8, 6, 4, 2]),
        (1.0, 0.0, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_rate_with_and_without_its_ends(warmup, plateau, expected):
    config = toy_config(lr=8e-3, warmup_fraction=warmup, plateau_fraction=plateau).optim
    rates = [learning_rate(8e-3, update, 8, config) for update in range(8)]
    assert rates == pytest.approx([rate / 1000 for rate in expected])
