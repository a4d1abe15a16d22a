"""LayerNorm + scale + shift: both paths against plain torch, outputs and gradients, any shape and layout."""

import pytest
import torch

from megaflux_kernels.modulate import backward, forward, modulate, reference
from tests.kernels.accuracy import assert_within_twice, randn
from tests.kernels.conftest import DEVICE, DTYPES


def inputs(shape, dtype, needs=(True, True, True)):
    B, _, W = shape
    values = [
        randn(*shape, seed=1, dtype=dtype, device=DEVICE) * 3 + 1,
        randn(B, W, seed=2, dtype=dtype, device=DEVICE),
        randn(B, W, seed=3, dtype=dtype, device=DEVICE),
    ]
    return [v.requires_grad_(n) for v, n in zip(values, needs)], [randn(*shape, seed=4, dtype=dtype, device=DEVICE)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 37, 96), (3, 16, 128), (8, 5, 100), (1, 33, 384)])
def test_modulate_is_layer_norm_scale_shift(path, shape, dtype):
    values, douts = inputs(shape, dtype)
    assert_within_twice(modulate, reference.definition, values, douts, dtype)


def test_small_rows_feel_epsilon_as_in_torch(path):
    values, douts = inputs((2, 9, 32), torch.float32)
    values[0] = (values[0].detach() * 1e-3).requires_grad_()
    assert_within_twice(modulate, reference.definition, values, douts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_tokens_are_not_of_16_bits(dtype):
    """torch's own layer norm adds up its weights' gradients in the input's dtype on a CPU."""
    values, douts = inputs((1, 1500, 32), dtype)
    assert_within_twice(modulate, reference.definition, values, douts, dtype)


def test_a_norm_over_one_value_is_exactly_zero(triton_path):
    values, douts = inputs((1, 1, 1), torch.float32)
    assert_within_twice(modulate, reference.definition, values, douts, torch.float32)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_needed_has_a_gradient(path, needs):
    values, douts = inputs((2, 9, 32), torch.float32, needs)
    assert_within_twice(modulate, reference.definition, values, douts, torch.float32)


def test_slices_are_read_where_they_lie(path):
    joint = randn(2, 30, 64, seed=1, dtype=torch.float32, device=DEVICE).requires_grad_()
    modulation = randn(2, 6 * 64, seed=2, dtype=torch.float32, device=DEVICE).requires_grad_()

    def sliced(op):
        def run(joint, modulation):
            shift, scale = modulation.chunk(6, dim=1)[3:5]
            return op(joint[:, 11:], scale, shift)

        return run

    dout = randn(2, 19, 64, seed=3, dtype=torch.float32, device=DEVICE)
    assert_within_twice(sliced(modulate), sliced(reference.definition), [joint, modulation], [dout], torch.float32)


def test_backward_adds_the_residuals_gradient(path):
    (x, scale, shift), (dout,) = inputs((2, 21, 48), torch.float32)
    residual = randn(2, 21, 48, seed=9, dtype=torch.float32, device=DEVICE)
    _, mean, rstd = forward(x.detach(), scale.detach(), shift.detach())
    alone, *_ = backward(dout, x.detach(), mean, rstd, scale.detach())
    added, dscale, dshift = backward(dout, x.detach(), mean, rstd, scale.detach(), residual, need_modulation=False)
    torch.testing.assert_close(added, alone + residual)
    assert dscale is None and dshift is None


def test_every_element_is_written(triton_path, poisoned):
    values, (dout,) = inputs((2, 17, 96), torch.float32)
    x, scale, shift = (v.detach() for v in values)
    out, mean, rstd = forward(x, scale, shift)
    for result in (out, mean, rstd, *backward(dout, x, mean, rstd, scale)):
        assert torch.isfinite(result).all()


def test_gradients_are_the_same_every_time(path):
    values, (dout,) = inputs((2, 50, 96), torch.float32)
    first, second = (torch.autograd.grad(modulate(*values), values, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck(triton_path):
    values, (dout,) = inputs((2, 9, 32), torch.float32)
    torch.library.opcheck(torch.ops.megaflux.modulate.default, (*values, 1e-6))
    x, scale, shift = (v.detach() for v in values)
    _, mean, rstd = forward(x, scale, shift)
    for residual, need in ((None, True), (dout, False)):
        torch.library.opcheck(
            torch.ops.megaflux.modulate_backward.default, (dout, x, mean, rstd, scale, residual, need)
        )


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "use bfloat16"),
        ({"x": torch.zeros(3, 4)}, "3 dimensions"),
        ({"scale": torch.zeros(2, 4, dtype=torch.float16)}, "cast them"),
    ],
)
def test_unsupported_input_is_refused(bad, match):
    good = {"x": torch.zeros(2, 3, 4), "scale": torch.zeros(2, 4), "shift": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=match):
        modulate(**(good | bad))
