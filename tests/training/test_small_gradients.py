"""Adam on gradients as small as its epsilon, where epsilon decides how far a weight moves."""

import pytest
import torch

from megaflux.config.parse import build_config
from megaflux.training.optim import build_optimizer
from tests.conftest import small_values


@pytest.mark.parametrize("eps", [1e-8, 1e-6])
def test_the_first_step_is_adams_with_the_configured_epsilon(eps):
    values = small_values()
    values["optim"] = {"lr": 0.5, "eps": eps, "weight_decay": 0.0}
    gradient = torch.tensor([1.0, 1e-6, -1e-7, 1e-8])
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = gradient.clone()
    config = build_config(values)
    build_optimizer([{"params": [weight], "part": None}], config.optim, config.stages[0]).step()
    torch.testing.assert_close(weight.detach(), -0.5 * gradient / (gradient.abs() + eps), rtol=1e-4, atol=0)
