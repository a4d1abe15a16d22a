"""The gate before anything is timed: at full width and reduced depth, no result of ours has more than twice the error of
diffusers' own path in the same dtype, both measured against a wider dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.bench import activations
from megaflux.bench.arms import Arms, random_flux, random_inputs
from megaflux.bench.sizes import Sizes
from megaflux_kernels.bench.trials import FLOOR

DEPTH = (2, 2)  # double, single blocks
TRAIN = (1, 3)  # one of each kind trains, one of each is frozen
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True)
class Error:
    """Relative errors (of norms) of one result: the velocity, or the gradient of a parameter or of the condition."""

    name: str
    ours: float
    eager: float
    floor: float

    @property
    def passes(self) -> bool:
        return self.ours <= 2 * self.eager + self.floor  # false for NaN


def gate(
    sizes: Sizes, grid: tuple[int, int], dtype: torch.dtype, device: torch.device, arms: Sequence[str]
) -> dict[str, list[Error]]:
    """For each of our arms: the error of every result, largest ratio first."""
    config = sizes.flux_config(*DEPTH)
    transformer = random_flux(config, dtype, device)
    activations.freeze(transformer, activations.trainable_flux(config, TRAIN, sizes.components))
    given = random_inputs(transformer, sizes.batch, grid, sizes.text, device)
    found = {"diffusers-eager": results(transformer, "diffusers-eager", given)}
    for arm in arms:
        found[arm] = results(transformer, arm, given)
    activations.set_arm(transformer, "diffusers-eager")
    wide = WIDER[dtype]
    transformer.zero_grad()
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(wide)
    widened = {name: t.to(wide) if t is not None and t.dtype == dtype else t for name, t in given.items()}
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # those that know the wider dtype
        exact = results(transformer, "diffusers-eager", widened)
    return {arm: _errors(found[arm], found["diffusers-eager"], exact, dtype) for arm in arms}


def results(transformer: FluxTransformer2DModel, arm: str, given: dict[str, Any]) -> dict[str, Tensor]:
    """{"velocity", "condition" (gradient of encoder_hidden_states), each trainable parameter's gradient}."""
    arms = Arms(transformer)
    arms.set(arm)
    given = given | {"encoder_hidden_states": given["encoder_hidden_states"].detach().requires_grad_()}
    arms.clear(given)
    velocity = transformer(**given, return_dict=False)[0]
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2)).to(velocity)
    velocity.backward(weights)
    found = {"velocity": velocity.detach(), "condition": given["encoder_hidden_states"].grad}
    found |= {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    arms.clear(given)
    return found


def _errors(ours: dict[str, Tensor], eager: dict, exact: dict, dtype: torch.dtype) -> list[Error]:
    floor = FLOOR[dtype] * torch.finfo(dtype).eps
    errors = [
        Error(name, _relative(ours[name], true), _relative(eager[name], true), floor) for name, true in exact.items()
    ]
    return sorted(errors, key=lambda e: (e.passes, -e.ours / max(e.eager, floor)))


def _relative(x: Tensor | None, true: Tensor) -> float:
    if x is None:
        return float("nan")
    true = true.double()
    return ((x.double() - true).norm() / true.norm().clamp(min=1e-30)).item()
