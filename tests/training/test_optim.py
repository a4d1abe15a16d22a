"""The optimizer is AdamW as configured, by groups of equal age, at the rate of the update."""

from __future__ import annotations

import pytest
import torch

from megaflux.config.parse import build_config
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


def test_each_part_has_its_own_rate_and_weight_decay():
    """And each stage may have its own for some or all of them."""
    config = build_config(
        toy_config(lr={"flux": 1e-3, "connector": 2e-2, "vlm": 3e-4}, weight_decay=0.2).model_dump()
        | {
            "stages": [
                {"name": "a", "share": 1, "blocks": [0], "lr": {"connector": 5e-2}},
                {"name": "b", "share": 1, "blocks": [0], "lr": 4e-3, "weight_decay": {"vlm": 0.0}},
            ]
        }
    )
    assert config.rates_by_part and not toy_config(lr=1e-3).rates_by_part
    parts = ("flux", "connector", "vlm")
    for stage, lrs, decays in ((0, (1e-3, 5e-2, 3e-4), (0.2,) * 3), (1, (4e-3,) * 3, (0.2, 0.2, 0.0))):
        peaks = config.optim.peaks(config.stages[stage])
        assert [tuple(peaks[part]) for part in parts] == list(zip(lrs, decays, strict=True))
    module = Toy()
    first_stage = dict.fromkeys(("connector.weight", "vlm.layers.0.weight", "transformer.context_embedder.weight"), 0)
    first_stage["transformer.transformer_blocks.0.attn.to_q.weight"] = 1
    groups = optim.parameter_groups(module, first_stage, by_part=True)
    assert [(g["first_stage"], g["part"]) for g in groups] == [(0, "connector"), (0, "flux"), (0, "vlm"), (1, "flux")]
    optimizer = optim.build_optimizer(groups, config.optim, config.stages[1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.2, 0.2, 0.0, 0.2]
    optim.set_learning_rates(optimizer, learning_rates(config, 0, 0))
    warmth = learning_rate(1.0, 0, config.train.updates, config.optim)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr * warmth for lr in (5e-2, 1e-3, 3e-4, 1e-3)])


def test_a_schedule_per_stage_begins_again_in_each():
    """Two stages of 4 and 8 updates: a warm-up of a quarter, a plateau of half, and down to 0 after the last."""
    config = build_config(
        toy_config(lr=8e-3, schedule="per_stage", warmup_fraction=0.25, plateau_fraction=0.5).model_dump()
        | {"stages": [{"name": "a", "share": 1, "blocks": [0]}, {"name": "b", "share": 2, "blocks": [0], "lr": 4e-3}]}
    )
    assert config.stage_ends() == [4, 12]
    rates = [learning_rates(config, 0 if update < 4 else 1, update)["vlm"] for update in range(12)]
    assert rates[:4] == pytest.approx(
        [8e-3] * 4
    )  # one update of warm-up, two of plateau, and one that falls to 8 after it
    assert rates[4:] == pytest.approx([2e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 4e-3, 2e-3])
