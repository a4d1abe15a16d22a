"""GELU beside the attention output: both paths against plain torch, output and gradients, any widths and layout."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megaflux_kernels.gelu_concat import backward, backward_, forward, gelu_concat, reference
from tests.kernels.accuracy import assert_within_twice, randn
from tests.kernels.conftest import DEVICE, DTYPES


def inputs(B, S, W, M, dtype, needs=(True, True)):
    """([attn_output, hidden_states], [dout]); attn_output None where W is None."""
    attn = None if W is None else randn(B, S, W, seed=1, dtype=dtype, device=DEVICE).requires_grad_(needs[0])
    hidden = (randn(B, S, M, seed=2, dtype=dtype, device=DEVICE) * 2).requires_grad_(needs[1])
    return [attn, hidden], [randn(B, S, (W or 0) + M, seed=3, dtype=dtype, device=DEVICE)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 37, 96, 384), (8, 3, 100, 70), (1, 5, 1100, 2060), (3, 5, None, 33)]
)
def test_is_gelu_beside_the_attention_output(path, shape, dtype):
    values, douts = inputs(*shape, dtype)
    assert_within_twice(gelu_concat, reference.definition, values, douts, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_the_torch_path(dtype, monkeypatch):
    monkeypatch.setattr("megaflux_kernels.dispatch.CHOICE", "torch")
    values, douts = inputs(2, 37, 96, 130, dtype)
    assert_within_twice(gelu_concat, reference.definition, values, douts, dtype)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_what_is_needed_has_a_gradient(path, needs):
    values, douts = inputs(2, 9, 32, 48, torch.float32, needs)
    assert_within_twice(gelu_concat, reference.definition, values, douts, torch.float32)


def test_slices_are_read_where_they_lie(path):
    # As in a single block: one linear gives q, k, v and the MLP's input; attention is transposed to tokens first.
    joint = randn(2, 30, 3 * 24 + 96, seed=1, dtype=torch.float32, device=DEVICE).requires_grad_()
    attn = randn(2, 41, 24, seed=2, dtype=torch.float32, device=DEVICE).requires_grad_()

    def sliced(op):
        return lambda attn, joint: (op(attn[:, 11:], joint[..., 72:]), op(None, joint[:, 3:, 72:]))

    douts = [
        randn(2, 30, 130, seed=3, dtype=torch.float32, device=DEVICE)[..., 10:],
        randn(2, 30, 96, seed=4, dtype=torch.float32, device=DEVICE)[:, 3:],
    ]
    assert_within_twice(sliced(gelu_concat), sliced(reference.definition), [attn, joint], douts, torch.float32)


def test_the_gradient_may_be_written_over_dgelu_in_a_wider_tensor(path):
    for shape in ((2, 17, 40), (1, 3, 1100)):
        hidden = randn(*shape, seed=2, dtype=torch.float32, device=DEVICE)
        wide = randn(*shape[:2], 24 + shape[2], seed=3, dtype=torch.float32, device=DEVICE)
        before, dgelu = wide.clone(), wide[..., 24:]
        want = backward(dgelu, hidden)
        assert backward_(dgelu, hidden) is dgelu
        assert torch.equal(dgelu, want) and torch.equal(wide[..., :24], before[..., :24])
    with pytest.raises(ValueError, match="unit stride"):
        backward_(torch.zeros(1, 4, 3).transpose(1, 2), torch.zeros(1, 3, 4))


def test_large_values_saturate(path):
    largest = [0.0, 1.0, 5.5, 10.0, 29.0, 31.0, 300.0, 6e4]
    hidden = torch.tensor([*largest, *(-v for v in largest)], device=DEVICE)[None, None]
    torch.testing.assert_close(forward(None, hidden), reference.definition(None, hidden))
    plain = torch.ops.aten.gelu_backward(torch.ones_like(hidden), hidden, approximate="tanh")
    torch.testing.assert_close(backward(torch.ones_like(hidden), hidden), plain)


def test_values_whose_cube_overflows_are_finite(triton_path):
    # Plain torch gives NaN for the derivative here.
    hidden = torch.tensor([[[1e30, -1e30]]], device=DEVICE)
    assert forward(None, hidden).tolist() == [[[hidden[0, 0, 0].item(), 0.0]]]
    assert backward(torch.ones_like(hidden), hidden).tolist() == [[[1.0, 0.0]]]


def test_nan_is_not_hidden(path):
    hidden = torch.full((1, 1, 4), float("nan"), device=DEVICE)
    assert forward(None, hidden).isnan().all() and backward(torch.ones_like(hidden), hidden).isnan().all()


def test_backward_keeps_hidden_states_only(path):
    values, _ = inputs(2, 9, 32, 48, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu_concat(*values)
    assert [t.data_ptr() for t in saved] == [values[1].data_ptr()]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gelu_concat(values[0], values[1].detach())
    assert not saved


def test_every_element_is_written(triton_path, poisoned):
    for shape in ((2, 17, 96, 40), (1, 3, 5, 1100)):
        (attn, hidden), (dout,) = inputs(*shape, torch.float32)
        out = forward(attn.detach(), hidden.detach())
        assert torch.isfinite(out).all()
        assert torch.isfinite(backward(dout[..., attn.shape[-1] :], hidden.detach())).all()


def test_gradients_are_the_same_every_time(path):
    values, (dout,) = inputs(2, 50, 96, 64, torch.float32)
    first, second = (torch.autograd.grad(gelu_concat(*values), values, dout) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_attention_of_no_width_is_none(path):
    values, (dout,) = inputs(2, 3, 0, 40, torch.float32)
    assert torch.equal(gelu_concat(*values), gelu_concat(None, values[1]))
    dattn, dhidden = torch.autograd.grad(gelu_concat(*values), values, dout)
    assert dattn.shape == (2, 3, 0) and torch.equal(dhidden, backward(dout, values[1].detach()))


def test_no_tokens(path):
    values, (dout,) = inputs(2, 0, 8, 16, torch.float32)
    grads = torch.autograd.grad(gelu_concat(*values), values, dout)
    assert [g.shape for g in grads] == [v.shape for v in values]


def test_opcheck(triton_path):
    values, (dout,) = inputs(2, 9, 32, 48, torch.float32)
    torch.library.opcheck(torch.ops.megaflux.gelu_concat.default, tuple(values))
    torch.library.opcheck(torch.ops.megaflux.gelu_concat.default, (None, values[1]))
    torch.library.opcheck(torch.ops.megaflux.gelu_concat_backward.default, (dout[..., 32:], values[1].detach()))
    torch.library.opcheck(
        torch.ops.megaflux.gelu_concat_backward_.default, (dout[..., 32:].clone(), values[1].detach())
    )


def test_compiles_and_checkpoints(triton_path):
    values, (dout,) = inputs(2, 9, 32, 48, torch.float32)
    eager = torch.autograd.grad(gelu_concat(*values), values, dout)
    compiled = torch.compile(gelu_concat, fullgraph=True, backend="aot_eager")
    for out in (compiled(*values), checkpoint(gelu_concat, *values, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, values, dout), eager))


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"hidden_states": torch.zeros(2, 3, 4, dtype=torch.int32)}, "use bfloat16"),
        ({"hidden_states": torch.zeros(3, 4)}, "3 dimensions"),
        ({"attn_output": torch.zeros(2, 3, 4, dtype=torch.float16)}, "cast them"),
        ({"attn_output": torch.zeros(2, 4, 4)}, r"want attn_output \(2, 3, any width\)"),
    ],
)
def test_unsupported_input_is_refused(bad, match):
    good = {"attn_output": torch.zeros(2, 3, 5), "hidden_states": torch.zeros(2, 3, 4)}
    with pytest.raises(ValueError, match=f"gelu_concat.*{match}"):
        gelu_concat(**(good | bad))
    with pytest.raises(ValueError, match="slice dout"):
        backward(torch.zeros(2, 3, 9), torch.zeros(2, 3, 4))
