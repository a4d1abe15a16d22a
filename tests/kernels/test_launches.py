"""How many programs the kernels of modulate and gate_residual are launched with, and that the number changes no bit."""

import pytest
import torch
import triton

from megaflux_kernels import gate_residual, modulate
from megaflux_kernels.gate_residual import triton_kernels as gate_residual_kernels
from megaflux_kernels.modulate import triton_kernels as modulate_kernels
from tests.kernels.accuracy import randn
from tests.kernels.conftest import DEVICE, DTYPES

pytestmark = pytest.mark.usefixtures("triton_path")


class Listening:
    """A kernel that runs as it would and writes down with which grid and constants."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.kernel, grid, kwargs))
            return self.kernel[grid](*args, **kwargs)

        return launch

    def __call__(self, *args):
        """Of a function that kernels call, which is no launch."""
        return self.kernel(*args)


@pytest.fixture
def launches(monkeypatch):
    """[(kernel, grid, constants and options)] of what is launched from now on."""
    found = []
    for module in (modulate_kernels, gate_residual_kernels):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.runtime.KernelInterface):
                monkeypatch.setattr(module, name, Listening(kernel, found))
    return found


def inputs(B, S, W, dtype):
    """Three (B, S, W) that are slices of wider tensors, three (B, W)."""
    wide = [randn(B, S + 3, 2 * W, seed=i, dtype=dtype, device=DEVICE)[:, 3:, W:] for i in range(3)]
    return *wide, *(randn(B, W, seed=3 + i, dtype=dtype, device=DEVICE) for i in range(3))


def backward_passes(B, S, W, dtype, trained):
    """Input gradients of all three backward kernels, by name; trained: with the sums of gate and modulation."""
    x, dout, dhidden, gate, scale, shift = inputs(B, S, W, dtype)
    read = x if trained else None
    _, mean, rstd = modulate.forward(x, scale, shift)
    found = {
        f"modulate {residual is not None}": modulate.backward(dout, x, mean, rstd, scale, residual, trained)[:1]
        for residual in (None, dhidden)
    }
    found["gate_residual"] = gate_residual.backward(dhidden, gate, read)[:1]
    hidden, _, mean, rstd = gate_residual.forward_modulate(dhidden, x, gate, scale, shift)
    for add in (None, dhidden):
        results = gate_residual.backward_modulate(add, dout, hidden, mean, rstd, scale, gate, read, trained)
        found[f"gate_residual_modulate {add is not None}"] = results[:2]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 33, 128)])
def test_one_row_a_program_gives_the_bits_of_many(shape, dtype):
    frozen, summed = (backward_passes(*shape, dtype, trained) for trained in (False, True))
    for name, results in summed.items():
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], results, strict=True)), name


def test_frozen_blocks_have_a_program_for_each_token(launches):
    B, S, W = 3, 33, 96
    for trained in (False, True):
        launches.clear()
        backward_passes(B, S, W, torch.float32, trained)
        for kernel, grid, constants in launches:
            tokens = 33 if "forward" in kernel.fn.__name__ or not trained else 3  # of 16 tokens each
            assert grid[:2] == (tokens, B), kernel.fn.__name__
            assert "backward" not in kernel.fn.__name__ or constants["ROWS"] == (16 if trained else 1)


def test_what_frozen_blocks_launch_is_compiled_ahead_of_time(launches):
    """All but gate_residual_modulate without a gradient of hidden, which no block of FLUX has."""
    backward_passes(1, 5, 96, torch.float32, False)
    known = [
        (kernel, constants, warps)
        for m in (modulate_kernels, gate_residual_kernels)
        for kernel, constants, warps in m.AOT
    ]
    for kernel, _, launched in launches:
        if launched.get("HIDDEN", True):
            asked = {n: v for n, v in launched.items() if n.isupper() and n != "BLOCK"}
            assert any(
                k.fn.__name__ == kernel.fn.__name__ and asked.items() <= constants.items() for k, constants, _ in known
            ), (kernel.fn.__name__, asked)
