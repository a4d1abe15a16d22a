"""`python -m megaflux.bench traffic`: bytes that operations move, of graphs whose bytes are known and of FLUX's blocks."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import activations, traffic
from megaflux.bench.__main__ import main
from megaflux.bench.moved_bytes import MovedBytes, Sizes
from megaflux.models.flux_functions import contiguous_gradient
from megaflux_kernels.dispatch import as_on_a_gpu
from megaflux_kernels.gelu_concat import gelu_concat
from megaflux_kernels.modulate import modulate
from tests.bench.runs import TRAFFIC, metrics, read

SMALL = Sizes(batch=1, image=40, text=7, heads=4, head_dim=32)
PAIR = Sizes(batch=2, image=40, text=7, heads=4, head_dim=32)
W, S, T = 128, 47, 7


@torch.library.custom_op("megaflux_test::into", mutates_args=("out", "total"))
def into(x: torch.Tensor, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    out.copy_(x)
    total.add_(x)
    return x + 1


@into.register_fake
def _(x, out, total):
    return torch.empty_like(x)


def tensor(*shape):
    return torch.empty(shape or (1, S, W), dtype=torch.bfloat16)


def moved(run, *shapes, sizes=SMALL):
    """{sum: hidden states} of an operation on hidden states, or on tensors of these shapes."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), as_on_a_gpu():
        given = [tensor(*shape) for shape in shapes or [(1, S, W)] * run.__code__.co_argcount]
        with MovedBytes(sizes) as counted:
            run(*given)
    unit, sums = sizes.state * 2, {"between": 0.0, "products": 0.0}
    for move, count in counted.bytes.items():
        sums[move.sum] = sums.get(move.sum, 0.0) + count / unit
    return sums


@pytest.mark.parametrize(
    "states, run",
    [
        (3, lambda x, y: x + y),
        (2, lambda x: x * x),  # one input, read once
        (3, lambda x, y: x.add_(y)),
        (2, lambda x, y: x.copy_(y)),
        (2, lambda x: x.clone()),
        (0, lambda x: x.contiguous()),
        (1.5, lambda x: x[..., ::2].float()),  # half of it, read as 2 bytes, written as 4
        (3, lambda x: x.float()),
        (1, lambda x: torch.zeros_like(x)),
        (T / S, lambda x: x[:, :T].zero_()),
        (2 * T / S, lambda x: x[:, :T].clone()),
        (4, lambda x, y: torch.cat([x, y], dim=-1)),
        (3, lambda x: torch.cat([x, x], dim=-1)),
        (1, lambda x: x.sum()),
        (0, lambda x: (x[:, T:].transpose(1, 2), x.view(S, 4, 32), x.detach(), x.unsqueeze(0), torch.empty_like(x))),
        (0, lambda x: (x.split(32, -1), x.expand(2, S, W), x.as_strided((S, W), (W, 1)))),
    ],
)
def test_operations_between_the_products(states, run):
    assert moved(run) == pytest.approx({"between": states, "products": 0})


def test_what_is_broadcast_is_read_once():
    found = moved(lambda x, shift: x + shift.expand(1, S, W), (1, S, W), (1, 1, W))
    assert found["between"] == pytest.approx(2 + 1 / S)
    assert moved(lambda x, shift: x + shift, (1, S, W), (1, 1, W))["between"] == 2  # no tokens: a modulation


def test_statistics_and_positions_are_apart():
    found = moved(lambda x, rows, table: (x * rows, x.view(1, S, 4, 32) * table), (1, S, W), (1, S, 1), (1, S, 1, 32))
    assert found["between"] == 4 and found["small"] == pytest.approx((1 + 32) / W)


@pytest.mark.parametrize("run", [lambda x, w, out: out.addmm_(x, w), lambda x, w, out: torch.addmm(out, x, w, out=out)])
def test_what_a_product_adds_to_is_read_between(run):
    assert moved(run, (S, W), (W, W), (S, W)) == {"between": 1, "products": 2}


@pytest.mark.parametrize(
    "states, run, shapes",
    [
        (2, F.linear, [(1, S, W), (W, W), (W,)]),  # weights and biases are not counted
        (5, F.linear, [(1, S, W), (4 * W, W), (4 * W,)]),
        (2, lambda out, bias, x, w: torch.addmm(bias, x, w, out=out), [(S, W), (W,), (S, W), (W, W)]),
        (2, lambda g, x: g.flatten(0, 1).t() @ x.flatten(0, 1), [(1, S, W)] * 2),  # nor is a weight's gradient
        (
            4,
            lambda q, k, v: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))),
            [(1, S, 4, 32)] * 3,
        ),
    ],
)
def test_products(states, run, shapes):
    found = moved(run, *shapes)
    assert (found["between"], found["products"]) == (0, states) and found.get("small", 0) < 4 * 4 / W


def test_the_backward_of_two_slices_fills_copies_and_adds():
    def run(x):
        x.requires_grad_()
        torch.autograd.backward([x[:, :T], x[:, T:]], [tensor(1, T, W), tensor(1, S - T, W)])

    assert moved(run)["between"] == pytest.approx(2 + 2 + 3)


def test_a_product_of_what_is_not_contiguous_shows_its_copy():
    tall = moved(lambda x, w: F.linear(x[:, T:].contiguous(), w), (2, S, W), (W, W), sizes=PAIR)
    assert tall == pytest.approx({"between": 2 * 40 / S, "products": 2 * 40 / S})
    assert moved(lambda x, w: F.linear(x[:, T:].contiguous(), w), (1, S, W), (W, W))["between"] == 0


def test_fused_ops_are_one_pass():
    assert moved(lambda x, scale, shift: modulate(x, scale, shift), (1, S, W), (1, W), (1, W))["between"] == 2
    assert moved(lambda attention, pre: gelu_concat(attention, pre), (1, S, W), (1, S, 4 * W))["between"] == 10


def test_custom_ops_read_what_they_change_unless_it_is_called_out():
    assert moved(lambda x, out, total: into(x, out, total))["between"] == 1 + 1 + 2 + 1


def test_the_even_gradient_is_a_copy_as_on_a_gpu():
    def run(x, wide):
        contiguous_gradient(x.requires_grad_() * 1).backward(wide[..., :W])

    with traffic._contiguous_gradients():
        found = moved(run, (1, S, W), (1, S, 5 * W))
    assert found["between"] == 2 + 2 + 2  # forward and backward of the product with 1, and the copy


def test_the_rms_norm_is_a_gpus():
    def run(x, weight):
        F.rms_norm(x.requires_grad_(), (W,), weight.requires_grad_()).backward(tensor())

    with activations.rms_norm_of_gpus():
        assert moved(run, (1, S, W), (W,))["between"] == 2 + 3


@functools.cache
def states(kind, trains, arm, sizes=SMALL):
    return traffic.block_states(kind, trains, arm, sizes)


@pytest.mark.parametrize("kind", traffic.KINDS)
@pytest.mark.parametrize("trains", traffic.TRAINS)
def test_ours_move_less_than_diffusers(kind, trains):
    diffusers = traffic.totals(states(kind, trains, "diffusers"))
    assert diffusers["floor"] == 0
    for arm in ("ours-none", "ours-mlp"):
        ours = traffic.totals(states(kind, trains, arm))
        assert ours["between"] < diffusers["between"] / 2
        assert 0 < ours["floor"] <= ours["between"] and ours["added"] >= 0
        assert ours["between"] == pytest.approx(ours["forward"] + ours["backward"])
        assert ours["products"] >= 30  # q, k, v, the MLP and attention, both ways


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_q_and_k_and_v_pass_once_each_way(kind):
    """Three read and three written; three gradients, q and k read and three gradients written."""
    found = {move.op: count for move, count in states(kind, "frozen", "ours-none").items() if move.sum == "between"}
    assert found["megaflux.qk_norm_rope"] == pytest.approx(6)
    backward = found.get("megaflux.qk_norm_rope_backward") or found["megaflux.qk_norm_rope_backward_out"]
    assert backward == pytest.approx(8)


@pytest.mark.parametrize("kind, most", [("single", 46), ("double", 52)])
def test_a_frozen_block_moves_at_most(kind, most):
    assert traffic.totals(states(kind, "frozen", "ours-none"))["between"] <= most + 1e-6


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_the_unit_does_not_depend_on_sizes(kind):
    large = Sizes(batch=1, image=4096, text=484, heads=24, head_dim=128)
    found = [traffic.totals(states(kind, "frozen", "ours-none", sizes)) for sizes in (SMALL, large)]
    for name in ("between", "forward", "backward", "floor", "products"):
        assert found[0][name] == pytest.approx(found[1][name])


def test_report(tmp_path, capsys):
    file = tmp_path / "traffic.json"
    command = [
        "traffic",
        *TRAFFIC,
        "--kinds",
        "single",
        "--trains",
        "frozen",
        "--arms",
        "ours-none",
        "--json",
        str(file),
    ]
    assert main([*command, "--ops"]) == 0
    content, said = read(file), capsys.readouterr().out
    (found,) = metrics(content, "traffic").values()
    assert list(found) == ["between", "forward", "backward", "floor", "added", "products", "small"]
    ops = metrics(content, "traffic-ops")["ours-none", "single frozen 40+7 b1 4x32 bfloat16"]
    assert sum(ops.values()) == pytest.approx(found["between"])
    assert "forward megaflux.qk_norm_rope" in said and "traffic-ops" not in said
    before = json.loads(file.read_text())
    assert main([*command, "--resume"]) == 0 and json.loads(file.read_text()) == before


@pytest.mark.parametrize(
    "options, says",
    [
        (["--image", "128"], "128 is a number of tokens and a width at once"),  # such a weight counts as hidden states
        (["--batch", "3", "--image", "4096", "--heads", "24", "--head-dim", "128"], "12288 is a number of tokens"),
        (["--heads", "2"], "--heads 2: use 4 or more"),
        (["--head-dim", "48"], "--head-dim 48"),
        (["--kinds", "triple"], "unknown kind of block 'triple'"),
    ],
)
def test_sizes_that_tell_nothing_are_refused_in_one_line(options, says, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["traffic", *TRAFFIC, *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and said.count("\n") == 1
