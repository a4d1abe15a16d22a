"""The flow's formulas: exact round trips, densities that are what they say, diffusers' own shift."""

import math

import pytest
import torch

from megaflux import flow
from megaflux.models import pretrained  # noqa: F401  (its compat comes before diffusers)

from diffusers import FlowMatchEulerDiscreteScheduler  # isort: skip
from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # isort: skip


def euler_step(x: torch.Tensor, velocity: torch.Tensor, t: float, t_next: float) -> torch.Tensor:
    """One step of dx/dt = velocity from t to t_next."""
    return x + (t_next - t) * velocity


def sampling_times(steps: int, factor: float = 1.0) -> torch.Tensor:
    """steps + 1 times from 1 down to 0, shifted: float64."""
    return flow.shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), factor)


def integrate(x: torch.Tensor, velocity, times: list[float]) -> torch.Tensor:
    for t, t_next in zip(times, times[1:], strict=False):
        x = euler_step(x, velocity(x, t), t, t_next)
    return x


def test_ends_of_the_path_are_data_and_noise():
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2)), noise)
    mixed = flow.interpolate(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], data[0]) and torch.equal(mixed[1], noise[1])
    low = flow.interpolate(data.bfloat16(), noise.bfloat16(), torch.tensor([0.3, 0.8]))
    assert low.dtype == torch.bfloat16 and low.shape == data.shape  # whatever t is in


def test_target_is_the_paths_derivative():
    data, noise = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    _, derivative = torch.func.jvp(
        lambda t: flow.interpolate(data, noise, t), (torch.tensor([0.3, 0.8]).double(),), (torch.ones(2).double(),)
    )
    torch.testing.assert_close(derivative, flow.velocity_target(data, noise), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("steps", "factor"), [(1, 1.0), (28, 1.0), (28, 3.0)])
def test_round_trip_along_the_exact_velocity(steps, factor):
    data, noise = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    target, down = flow.velocity_target(data, noise), sampling_times(steps, factor).tolist()
    to_noise = integrate(data, lambda x, t: target, down[::-1])
    torch.testing.assert_close(to_noise, noise, rtol=0, atol=1e-13)
    back = integrate(to_noise, lambda x, t: target, down)
    torch.testing.assert_close(back, data, rtol=0, atol=1e-13)


def test_marginal_velocity_of_a_gaussian_gives_the_gaussian_back():
    """Data N(m, s^2): E[n - x | x_t] is known in closed form; its flow takes a quantile to the same
    quantile."""
    m, s = 2.0, 0.5

    def velocity(x, t):
        variance = (1 - t) ** 2 * s**2 + t**2
        return (t - (1 - t) * s**2) / variance * (x - (1 - t) * m) - m

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (500, 1000):
        down = sampling_times(steps).tolist()
        made = integrate(z, velocity, down)
        errors.append((made - (m + s * z)).abs().max().item())
        there_and_back = integrate(made, velocity, down[::-1])
        assert (there_and_back - z).abs().max() < 10 / steps
    assert errors[1] < 5e-3 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # Euler: first order


@pytest.mark.parametrize(
    ("density", "mean", "std"), [("logit_normal", 0.0, 1.0), ("logit_normal", -0.7, 1.6), ("uniform", 0.0, 1.0)]
)
def test_densities_by_kolmogorov_smirnov(density, mean, std):
    n = 20_000
    z = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = flow.time_from_normal(z, density, mean, std).sort().values
    assert t[0] > 0 and t[-1] < 1
    cdf = t if density == "uniform" else 0.5 * (1 + torch.erf((torch.logit(t) - mean) / std / math.sqrt(2)))
    rank = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((cdf - rank / n).abs(), (cdf - (rank + 1) / n).abs()).max()
    assert distance < 1.63 / math.sqrt(n)  # the 1% point


def test_either_density_is_the_same_draw():
    z = torch.randn(100, generator=torch.Generator().manual_seed(0))
    a, b = (flow.time_from_normal(z, density, 0.0, 1.0) for density in ("logit_normal", "uniform"))
    assert torch.equal(a.argsort(), b.argsort())


@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 9216])
def test_resolution_shift_is_diffusers(tokens):
    assert flow.resolution_mu(tokens) == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    theirs = scheduler.time_shift(flow.resolution_mu(tokens), 1.0, t)
    torch.testing.assert_close(flow.shift_time(t, flow.shift_factor("resolution", tokens)), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_times_are_the_schedulers(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    steps = 28
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])  # what FluxPipeline gives it
    torch.testing.assert_close(sampling_times(steps, shift).float(), scheduler.sigmas)


def test_shift_keeps_the_ends_and_the_order():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for factor in (0.3, 1.0, 2.5):
        moved = flow.shift_time(t, factor)
        assert moved[0] == 0 and moved[-1] == pytest.approx(1) and (moved.diff() > 0).all()
    assert torch.equal(flow.shift_time(t, 1.0), t)
    assert [flow.shift_factor(shift, 256) for shift in ("none", 2.5)] == [1.0, 2.5]
    assert flow.shift_factor("resolution", 256) == pytest.approx(math.exp(0.5))


def test_loss_is_the_mean_square_per_sample_in_float32():
    velocity, target = torch.randn(3, 4, 5, dtype=torch.bfloat16), torch.randn(3, 4, 5, dtype=torch.bfloat16)
    loss = flow.velocity_loss(velocity, target)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    for i in range(3):
        assert loss[i] == pytest.approx(torch.nn.functional.mse_loss(velocity[i].double(), target[i].double()).item())
    assert flow.velocity_loss(target, target).tolist() == [0, 0, 0]
