"""RMSNorm and a linear in one product: both paths against Qwen2RMSNorm and nn.Linear, outputs and gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaflux_kernels.rmsnorm_linear import backward, forward, reference, rmsnorm_linear
from tests.kernels.accuracy import assert_within_twice, randn
from tests.kernels.conftest import DEVICE, DTYPES

# (leading shape, K, N): one row, sizes that no tile divides, several tiles each way
SHAPES = [((1,), 5, 3), ((2, 37), 100, 70), ((3, 43), 72, 131), ((130,), 64, 64)]


def inputs(shape, dtype, needs=(True,) * 4):
    leading, K, N = shape
    values = [
        randn(*leading, K, seed=1, dtype=dtype, device=DEVICE) * 2,
        1 + randn(K, seed=2, dtype=dtype, device=DEVICE) / 4,
        randn(N, K, seed=3, dtype=dtype, device=DEVICE) / K**0.5,
        randn(N, seed=4, dtype=dtype, device=DEVICE),
    ]
    return [v.requires_grad_(n) for v, n in zip(values, needs)], [
        randn(*leading, N, seed=5, dtype=dtype, device=DEVICE)
    ]


def test_definition_is_transformers_norm_and_a_linear():
    from megaflux.common import compat  # noqa: F401, I001  (before transformers)
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    (x, norm_weight, weight, bias), _ = inputs(SHAPES[1], torch.bfloat16)
    norm = Qwen2RMSNorm(100, eps=1e-6).to(DEVICE, torch.bfloat16)
    norm.weight.data = norm_weight.detach()
    assert torch.equal(
        reference.definition(x, norm_weight, weight, bias), torch.nn.functional.linear(norm(x), weight, bias)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_op_is_its_definition(path, shape, dtype):
    values, douts = inputs(shape, dtype)
    assert_within_twice(rmsnorm_linear, reference.definition, values, douts, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_path_in_other_types(dtype):
    values, douts = inputs(SHAPES[1], dtype)
    if DEVICE == "cpu":
        assert_within_twice(rmsnorm_linear, reference.definition, values, douts, dtype)


def test_no_bias(path):
    (x, norm_weight, weight, _), douts = inputs(SHAPES[1], torch.float32)
    assert_within_twice(rmsnorm_linear, reference.definition, [x, norm_weight, weight], douts, torch.float32)


@pytest.mark.parametrize("which", range(4))
def test_only_what_is_needed_is_computed(path, which):
    needs = tuple(i == which for i in range(4))
    values, douts = inputs(SHAPES[2], torch.float32, needs)
    assert_within_twice(rmsnorm_linear, reference.definition, values, douts, torch.float32)
    x, norm_weight, weight, bias = (v.detach() for v in values)
    _, rstd = forward(x, norm_weight, weight, bias)
    found = backward(douts[0], x, rstd, norm_weight, weight, needs)
    assert [g is not None for g in found] == list(needs)


def test_small_rows_feel_epsilon_as_in_torch(path):
    values, douts = inputs(SHAPES[1], torch.float32)
    values[0] = (values[0].detach() * 1e-3).requires_grad_()
    assert_within_twice(rmsnorm_linear, reference.definition, values, douts, torch.float32)


def test_large_values_stay_in_float16s_range(path):
    # Qwen's hidden states have outliers: x times the norm's weight would be over 65504 before it is scaled.
    (x, norm_weight, weight, bias), _ = inputs((((4,)), 64, 32), torch.float16)
    with torch.no_grad():
        x[1, 3], norm_weight[3] = 30000.0, 6.0
        assert torch.isfinite(rmsnorm_linear(x, norm_weight, weight, bias)).all()
    assert_within_twice(
        rmsnorm_linear, reference.definition, [v.detach() for v in (x, norm_weight, weight, bias)], None, torch.float16
    )


def test_slices_are_read_where_they_lie(path):
    wide = randn(9, 3 * 64, seed=1, dtype=torch.float32, device=DEVICE).requires_grad_()
    (_, norm_weight, weight, bias), _ = inputs(((9,), 64, 40), torch.float32)
    dout = randn(9, 40, seed=5, dtype=torch.float32, device=DEVICE)
    ours, plain = (lambda w, *o, op=op: op(w[:, 64:128], *o) for op in (rmsnorm_linear, reference.definition))
    assert_within_twice(ours, plain, [wide, norm_weight, weight, bias], [dout], torch.float32)


def test_weights_of_any_strides_are_read(path):
    values, douts = inputs(((9,), 64, 40), torch.float32)
    values[1:] = [torch.stack([v.detach(), v.detach() * 9], dim=-1).requires_grad_() for v in values[1:]]
    ours, plain = (lambda x, *o, op=op: op(x, *(w[..., 0] for w in o)) for op in (rmsnorm_linear, reference.definition))
    assert_within_twice(ours, plain, values, douts, torch.float32)
    x, *weights = (v.detach() for v in values)
    torch.testing.assert_close(forward(x, *(w[..., 0] for w in weights))[0], plain(x, *weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_in_groups(triton_path, monkeypatch, dtype):
    from megaflux_kernels.rmsnorm_linear import triton_kernels

    monkeypatch.setattr(triton_kernels, "tiles", lambda *_: (16, 16, 16, 4, 2))
    values, _ = inputs(((150,), 40, 50), dtype)  # 10 tiles of rows, 8 of which go together, by 4 of columns
    values = [v.detach() for v in values]
    assert_within_twice(rmsnorm_linear, reference.definition, values, None, dtype)
    torch.testing.assert_close(forward(*values)[1], values[0].float().square().mean(-1).add(1e-6).rsqrt())


def test_no_rows(path):
    values, douts = inputs(((2, 0), 24, 8), torch.float32)
    out = rmsnorm_linear(*values)
    assert out.shape == (2, 0, 8) == forward(*(v.detach() for v in values))[0].shape
    for value, grad in zip(values, torch.autograd.grad(out, values, douts)):
        assert grad.shape == value.shape and not grad.any()


def test_every_element_is_written(triton_path, poisoned):
    (x, norm_weight, weight, bias), _ = inputs(SHAPES[2], torch.float32)
    for result in forward(x.detach(), norm_weight.detach(), weight.detach(), bias.detach()):
        assert torch.isfinite(result).all()


def test_backward_keeps_x_and_one_number_a_row(path):
    (x, norm_weight, weight, bias), _ = inputs(((64,), 64, 48), torch.float32)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        rmsnorm_linear(x, norm_weight, weight, bias)
        theirs = {t.data_ptr() for t in (x, norm_weight, weight)}
        assert sum(t.numel() for t in seen if t.data_ptr() not in theirs) == 64
        seen.clear()
        rmsnorm_linear(x.detach(), norm_weight.detach(), weight.detach(), bias)
        assert x.data_ptr() not in {t.data_ptr() for t in seen}


def test_gradients_are_the_same_every_time(path):
    values, douts = inputs(SHAPES[1], torch.float32)
    first, second = (torch.autograd.grad(rmsnorm_linear(*values), values, douts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(triton_path, bias):
    (x, norm_weight, weight, b), _ = inputs(((9,), 40, 24), torch.float32)
    torch.library.opcheck(
        torch.ops.megaflux.rmsnorm_linear.default, (x, norm_weight, weight, b if bias else None, 1e-6)
    )


def test_compiles_and_checkpoints(triton_path):
    values, douts = inputs(SHAPES[0], torch.float32)
    want = torch.autograd.grad(rmsnorm_linear(*values), values, douts)
    compiled = torch.compile(rmsnorm_linear, fullgraph=True, backend="aot_eager")(*values)
    for out in (compiled, checkpoint(rmsnorm_linear, *values, use_reentrant=False)):
        for a, b in zip(torch.autograd.grad(out, values, douts), want):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"x": torch.zeros(3, 5)}, "want x"),
        ({"norm_weight": torch.zeros(4, dtype=torch.bfloat16)}, "cast them"),
        ({"bias": torch.zeros(7)}, "want x"),
        ({"weight": torch.zeros(4)}, "want x"),
        ({"weight": torch.zeros(0, 4), "bias": None}, "want x"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "use bfloat16"),
    ],
)
def test_unsupported_input_is_refused(bad, match):
    good = {"x": torch.zeros(3, 4), "norm_weight": torch.zeros(4), "weight": torch.zeros(6, 4), "bias": torch.zeros(6)}
    rmsnorm_linear(**good)
    with pytest.raises(ValueError, match=match):
        rmsnorm_linear(**(good | bad))
