"""Gated residual, alone and with the next norm: both paths against plain torch, outputs and gradients, any shape."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaflux_kernels import modulate
from megaflux_kernels.gate_residual import (
    backward,
    backward_modulate,
    forward,
    forward_modulate,
    gate_residual,
    reference,
)
from tests.kernels.accuracy import assert_within_twice, randn
from tests.kernels.conftest import DEVICE, DTYPES

NAMES = ("residual", "x", "gate", "scale", "shift")
SHAPES = [(1, 1, 2), (2, 37, 96), (3, 16, 128), (8, 5, 100), (1, 17, 1100)]


def inputs(shape, dtype, modulated, needs="residual x gate scale shift"):
    """([residual, x, gate (, scale, shift)], [dhidden (, dout)])"""
    B, _, W = shape
    shapes = [shape, shape, (B, W), (B, W), (B, W)][: 5 if modulated else 3]
    values = [randn(*s, seed=i, dtype=dtype, device=DEVICE) for i, s in enumerate(shapes)]
    values[0] = values[0] * 3 + 1
    douts = [randn(*shape, seed=9 + i, dtype=dtype, device=DEVICE) for i in range(2 if modulated else 1)]
    return [v.requires_grad_(name in needs.split()) for v, name in zip(values, NAMES)], douts


def detached(values):
    return [v.detach() for v in values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_gated_residual_and_norm(path, shape, modulated, dtype):
    values, douts = inputs(shape, dtype, modulated)
    assert_within_twice(gate_residual, reference.definition, values, douts, dtype)


def test_small_rows_feel_epsilon_as_in_torch(path):
    values, douts = inputs((2, 9, 32), torch.float32, True)
    values[:2] = [(v.detach() * 1e-3).requires_grad_() for v in values[:2]]
    assert_within_twice(gate_residual, reference.definition, values, douts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_the_torch_path(dtype, monkeypatch):
    monkeypatch.setattr("megaflux_kernels.dispatch.CHOICE", "torch")
    for modulated in (False, True):
        values, douts = inputs((2, 37, 96), dtype, modulated)
        assert_within_twice(gate_residual, reference.definition, values, douts, dtype)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("needs", [*NAMES, "residual x", "x gate shift"])
def test_only_what_is_needed_has_a_gradient(path, needs, modulated):
    values, douts = inputs((2, 19, 32), torch.float32, modulated, needs)
    pick = slice(None)
    if not set(needs.split()) & set(NAMES[:3]):  # hidden has no gradient then
        if not modulated:
            return
        pick = slice(1, None)
    ours, plain = (lambda *v, op=op: _listed(op(*v))[pick] for op in (gate_residual, reference.definition))
    assert_within_twice(ours, plain, values, douts[pick], torch.float32)


def _listed(out):
    return list(out) if isinstance(out, tuple) else [out]


def test_either_output_alone_has_gradients(path):
    values, douts = inputs((2, 19, 32), torch.float32, True)
    for i in range(2):
        assert_within_twice(
            lambda *v, i=i: gate_residual(*v)[i],
            lambda *v, i=i: reference.definition(*v)[i],
            values,
            [douts[i]],
            torch.float32,
        )


def test_slices_are_read_where_they_lie(path):
    tokens = randn(2, 30, 64, seed=1, dtype=torch.float32, device=DEVICE).requires_grad_()
    joint = randn(2, 30, 128, seed=2, dtype=torch.float32, device=DEVICE).requires_grad_()
    modulation = randn(2, 6 * 64, seed=3, dtype=torch.float32, device=DEVICE).requires_grad_()

    def sliced(op):
        def run(tokens, joint, modulation):
            gate, shift, scale = modulation.chunk(6, dim=1)[2:5]
            x = joint[:, :19, 64:]
            return op(tokens[:, 11:], x, gate), *op(tokens[:, 11:], x, gate, scale, shift)

        return run

    # Gradients are slices too: those of a concatenation over tokens.
    douts = [randn(2, 30, 64, seed=i, dtype=torch.float32, device=DEVICE)[:, 11:] for i in range(4, 7)]
    values = [tokens, joint, modulation]
    assert_within_twice(sliced(gate_residual), sliced(reference.definition), values, douts, torch.float32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_modulate_rebuilds_out_bit_for_bit(path, dtype):
    if path == "triton" and dtype not in DTYPES:
        pytest.skip("bfloat16 needs a GPU in Triton")
    values, _ = inputs((2, 13, 96), dtype, True)
    residual, x, gate, scale, shift = detached(values)
    hidden, out, mean, rstd = forward_modulate(residual, x, gate, scale, shift)
    assert torch.equal(hidden, forward(residual, x, gate))
    rebuilt = modulate.forward(hidden, scale, shift)
    assert all(torch.equal(a, b) for a, b in zip((out, mean, rstd), rebuilt))
    assert mean.dtype == rstd.dtype == torch.float32 and mean.shape == rstd.shape == (2, 13)


def test_raw_backward_gives_only_what_is_asked_for(path):
    values, (dhidden, dout) = inputs((2, 19, 48), torch.float32, True)
    residual, x, gate, scale, shift = detached(values)
    hidden, _, mean, rstd = forward_modulate(residual, x, gate, scale, shift)
    kept = hidden, mean, rstd, scale, gate
    dresidual, dx, dgate, dscale, dshift = backward_modulate(dhidden, dout, *kept, x)
    lean = backward_modulate(dhidden, dout, *kept, None, need_modulation=False)
    assert torch.equal(lean[0], dresidual) and torch.equal(lean[1], dx) and lean[2:] == (None, None, None)

    alone = backward_modulate(None, dout, *kept, x)
    torch.testing.assert_close(alone[0] + dhidden, dresidual)
    assert torch.equal(alone[3], dscale) and torch.equal(alone[4], dshift)

    alone = backward_modulate(dhidden, None, *kept, x)
    assert torch.equal(alone[0], dhidden) and not alone[3].any() and not alone[4].any()
    for mine, plain in zip(alone[1:3], backward(dhidden, gate, x)):
        assert torch.equal(mine, plain)
    assert backward(dhidden, gate)[1] is None


@pytest.mark.parametrize("needs, big", [("residual x", 1), ("x gate scale", 2)])
def test_backward_keeps_hidden_and_x_only_for_the_gate(path, needs, big):
    values, _ = inputs((2, 19, 48), torch.float32, True, needs)
    for arguments, expected in ((values[:3], big - 1), (values, big)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            gate_residual(*arguments)
        assert sum(t.shape == (2, 19, 48) for t in saved) == expected


def test_every_element_is_written(triton_path, poisoned):
    for shape in ((2, 17, 96), (1, 18, 1100)):
        values, (dhidden, dout) = inputs(shape, torch.float32, True)
        residual, x, gate, scale, shift = detached(values)
        hidden, out, mean, rstd = forward_modulate(residual, x, gate, scale, shift)
        results = [
            hidden,
            out,
            mean,
            rstd,
            forward(residual, x, gate),
            *backward(dhidden, gate, x),
            *backward_modulate(dhidden, dout, hidden, mean, rstd, scale, gate, x),
        ]
        assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_are_the_same_every_time(path, modulated):
    values, douts = inputs((2, 50, 96), torch.float32, modulated)
    first, second = (torch.autograd.grad(gate_residual(*values), values, douts) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_no_tokens(path):
    values, douts = inputs((2, 0, 32), torch.float32, True)
    grads = torch.autograd.grad(gate_residual(*values), values, douts)
    assert [g.shape for g in grads] == [v.shape for v in values] and not grads[2].any()


def test_opcheck(triton_path):
    ops = torch.ops.megaflux
    values, (dhidden, dout) = inputs((2, 9, 32), torch.float32, True)
    torch.library.opcheck(ops.gate_residual.default, tuple(values[:3]))
    torch.library.opcheck(ops.gate_residual_modulate.default, (*values, 1e-6))
    residual, x, gate, scale, shift = detached(values)
    hidden, _, mean, rstd = forward_modulate(residual, x, gate, scale, shift)
    for read, need, add in ((x, True, dhidden), (None, False, None)):
        torch.library.opcheck(ops.gate_residual_backward.default, (dhidden, gate, read))
        arguments = (add, dout, hidden, mean, rstd, scale, gate, read, need)
        torch.library.opcheck(ops.gate_residual_modulate_backward.default, arguments)


def both(residual, x, gate, scale, shift):
    hidden, out = gate_residual(residual, x, gate, scale, shift)
    return gate_residual(hidden, out, gate)


def test_compiles_and_checkpoints(triton_path):
    values, (dout, _) = inputs((2, 9, 32), torch.float32, True)
    eager = torch.autograd.grad(both(*values), values, dout)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for out in (compiled(*values), checkpoint(both, *values, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, values, dout), eager))


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"residual": torch.zeros(2, 3, 4, dtype=torch.int32)}, "use bfloat16"),
        ({"residual": torch.zeros(3, 4)}, "3 dimensions"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float16)}, "cast them"),
        ({"x": torch.zeros(2, 1, 4)}, "one shape"),
        ({"gate": torch.zeros(2, 5)}, r"shape \(2, 4\)"),
        ({"shift": torch.zeros(1, 4)}, r"shape \(2, 4\)"),
        ({"shift": None}, "both or neither"),
    ],
)
def test_unsupported_input_is_refused(bad, match):
    good = {name: torch.zeros(2, 3, 4) if name in ("residual", "x") else torch.zeros(2, 4) for name in NAMES}
    with pytest.raises(ValueError, match=f"gate_residual.*{match}"):
        gate_residual(**(good | bad))
    with pytest.raises(ValueError, match="neither dhidden nor dout"):
        backward_modulate(None, None, *[torch.zeros(1)] * 5)
