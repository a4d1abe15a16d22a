"""What runs between the products of fused FLUX's blocks, and that it changes no gradient."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from megaflux.bench import activations
from megaflux.models import flux_functions
from megaflux.models.flux import _following, fuse
from megaflux.models.packing import columns, side_by_side
from megaflux_kernels import dispatch
from tests.models.test_flux import DEVICE, IMAGE, SIZES, build, freeze, given, relative, same, step

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mm.out", "aten::addmm.out"}
MOVES_NOTHING = {
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::empty_like",
    "aten::_unsafe_view",
    "prim::device",
}


class Ops(TorchDispatchMode):
    """Names of the ops that run and are no views."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.name() not in MOVES_NOTHING:
            self.seen[function.name()] += 1
        return function(*args, **(kwargs or {}))


def backward_ops(kind, batch, components, monkeypatch):
    """Counter of the ops that one more block of a kind ("double", "single") adds to the backward pass, on a GPU's path.
    components: None where the blocks are frozen."""
    monkeypatch.setattr(flux_functions, "copies_gradients", lambda x: True)  # as on a GPU
    seen = []
    for blocks in (2, 3):
        sizes = SIZES | {"num_layers": 1, "num_single_layers": 1}
        sizes["num_layers" if kind == "double" else "num_single_layers"] = blocks
        names = activations.trainable_flux(sizes, range(blocks + 1), components) if components else set()
        with FakeTensorMode(), dispatch.as_on_a_gpu(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            flux = activations.build(sizes, torch.bfloat16)
            activations.freeze(flux, names)
            activations.set_arm(flux, "ours-none")
            flux.fused.keep_input, flux.fused.forwards = [False] * (blocks + 1), 1
            out = flux(**activations.inputs(flux.config, batch, 40, 20, torch.bfloat16), return_dict=False)[0]
            with Ops() as ops:
                out.sum().backward()
        seen.append(ops.seen)
    seen[1].subtract(seen[0])
    return Counter({name: count for name, count in seen[1].items() if count})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_nothing_but_products_and_fused_ops_runs_in_a_frozen_blocks_backward_pass(kind, batch, monkeypatch):
    ops = backward_ops(kind, batch, None, monkeypatch)
    ours = {name for name in ops if name.startswith("megaflux::") or "scaled_dot_product" in name}
    assert set(ops) - ours - PRODUCTS == set()
    assert ours


@pytest.mark.parametrize("kind, most", [("double", 0), ("single", 1)])
def test_trained_attention_adds_no_gradients_of_activations(kind, most, monkeypatch):
    """A single block's q, k, v weights lie in an optimizer's buffer then, apart from the MLP's: a product each."""
    ops = backward_ops(kind, 1, "attention", monkeypatch)
    assert not {name for name in ops if "slice_backward" in name or "zeros" in name or "fill" in name}
    assert ops["aten::addmm.out"] - (6 if kind == "double" else 3) <= most, ops


# --- gradients ---


def gradients(flux, arguments, **options):
    """(result, gradients of the condition and of what trains) by autograd.grad."""
    arguments = arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"].detach().requires_grad_()}
    out = flux(**arguments, return_dict=False)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    wanted = [arguments["encoder_hidden_states"], *(p for p in flux.parameters() if p.requires_grad)]
    return out, wanted, weights


@pytest.mark.parametrize("stage", ["attention", "model"])
@pytest.mark.parametrize("policies", ["none", ["full", "none", "mlp", "full", "mlp"]])
def test_a_graph_may_be_used_twice(stage, policies):
    flux = build().train()
    freeze(flux, stage)
    fuse(flux, policies)
    out, wanted, weights = gradients(flux, given(flux))
    once = torch.autograd.grad(out, wanted, weights, retain_graph=True)
    twice = torch.autograd.grad(out, wanted, 2 * weights)  # of another gradient, so that nothing left over fits
    assert all(relative(b, 2 * a) < 1e-6 for a, b in zip(once, twice, strict=True))


def test_a_second_derivative_is_refused():
    flux = build().train()
    freeze(flux, "model")
    fuse(flux)
    out, wanted, weights = gradients(flux, given(flux))
    with pytest.raises(RuntimeError):
        first = torch.autograd.grad(out, wanted, weights, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


@pytest.mark.parametrize("policies", ["none", "full", ["full", "none", "mlp", "none", "full", "full", "none"]])
def test_gradients_past_controlnet_samples_are_diffusers_own(policies):
    flux = build(num_layers=3, num_single_layers=4).train()
    freeze(flux, "block")
    arguments = given(flux)
    samples = torch.randn(5, 2, IMAGE, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
    arguments |= {"controlnet_block_samples": samples[:2], "controlnet_single_block_samples": samples[2:]}
    plain, dplain = step(flux, arguments), samples.grad
    samples.grad = None
    fuse(flux, policies)
    found = step(flux, arguments)
    assert {n: relative(found[n], plain[n]) for n in plain if relative(found[n], plain[n]) > 1e-5} == {}
    assert relative(samples.grad, dplain) < 1e-5


def test_policies_side_by_side_give_the_same_bits():
    flux = build(num_layers=4, num_single_layers=4).train()
    freeze(flux, "attention")
    arguments = given(flux, 1)
    fuse(flux, "none")
    plain = step(flux, arguments)
    for policies in (["full", "none", "full", "full"] * 2, ["none", "full", "mlp", "full"] * 2, ["mlp", "full"] * 4):
        fuse(flux, policies)
        found = step(flux, arguments)
        assert [n for n in plain if not same(found[n], plain[n])] == [], policies


@pytest.mark.parametrize("missing", ["attention", "mlp"])
def test_a_missing_gradient_is_none_and_what_was_left_over_is_not_used(missing):
    """A single block's parts by themselves: only one of the two gradients comes back, after both did."""
    torch.manual_seed(0)
    width, heads = 64, 2
    layers = [torch.nn.Linear(width, width).requires_grad_(False) for _ in range(3)]
    proj_mlp, proj_out = torch.nn.Linear(width, 256).requires_grad_(False), torch.nn.Linear(320, width)
    proj_out.requires_grad_(False)
    x = torch.randn(2, 5, width, requires_grad=True)
    scale, shift, norm = torch.zeros(2, width), torch.zeros(2, width), torch.ones(width // heads)
    rope = torch.ones(5, width // heads), torch.zeros(5, width // heads)
    handover = flux_functions.Handover()
    adaln = flux_functions.AdaLN(x, scale, shift)
    n, _ = flux_functions.modulated(adaln)
    qkv, pre = flux_functions.modulated_linears(n, adaln, layers, (proj_mlp,), handover=handover)
    stream = flux_functions.Stream(qkv, norm, norm)
    q, k, v = flux_functions.norm_and_rotate(stream, rope, heads, 1e-6, False, handover)
    attention = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = flux_functions.gelu_linear(pre, attention, adaln, proj_mlp, proj_out, False, handover)

    whole = torch.autograd.grad(out.sum(), x, retain_graph=True)[0]
    assert handover.qkv_gradient is None and handover.n is None  # seven hidden states would live on with the graph
    parts = {}
    for name, source, held in (("mlp", pre, pre), ("attention", attention, attention)):
        gradient = torch.autograd.grad(out.sum(), held, retain_graph=True)[0]
        parts[name] = torch.autograd.grad(source, x, gradient, retain_graph=True)[0]
    torch.testing.assert_close(parts["mlp"] + parts["attention"], whole, rtol=1e-4, atol=1e-5)
    assert relative(parts[missing], whole) > 1e-3
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], whole)


@pytest.mark.parametrize("missing", ["image", "text"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_without_a_gradient_gives_attention_zeros(missing, batch):
    torch.manual_seed(0)
    attention = torch.randn(batch, 7, 8, requires_grad=True)
    to_out, to_add_out = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    image, text = flux_functions.stream_linears(attention, 3, to_out, to_add_out)
    (text if missing == "image" else image).sum().backward()
    rows, other = (slice(3, None), slice(0, 3)) if missing == "image" else (slice(0, 3), slice(3, None))
    used, unused = (to_add_out, to_out) if missing == "image" else (to_out, to_add_out)
    assert (attention.grad[:, rows] == 0).all()
    assert relative(attention.grad[:, other], used.weight.sum(0).expand(batch, other.stop or 4, 8)) < 1e-5
    assert unused.weight.grad is None and unused.bias.grad is None and used.weight.grad is not None


@pytest.mark.parametrize(
    "policies, dtype, added, without",
    [
        ("none", torch.float32, (False, False), {2}),  # the last double block
        ("none", torch.float32, (True, False), {0, 1, 2}),
        ("none", torch.float32, (False, True), {2, 3, 4, 5}),
        ("none", torch.float16, (False, False), {0, 1, 2, 3, 4, 5}),  # which is clipped in between
        ("full", torch.float32, (False, False), {0, 1, 2, 3, 4}),  # the last norm is no block's
        (["none", "full", "mlp", "none", "full", "none"], torch.float32, (False, False), {0, 2, 3}),
    ],
)
def test_which_blocks_make_the_norm_of_the_next(policies, dtype, added, without):
    flux = build(num_layers=3, num_single_layers=3)
    fuse(flux, policies)
    following = _following(flux, [(i,) for i in range(7)], dtype, added)
    assert {i for i, modulation in enumerate(following) if modulation is None} == without
    assert all(modulation in (None, (i + 1,)) for i, modulation in enumerate(following))
    with torch.no_grad():  # nothing is computed again
        assert (_following(flux, [(i,) for i in range(7)], torch.float32, (False, False))).count(None) == 1


# --- memory side by side ---


def test_frozen_projections_of_a_single_block_are_one_product_and_let_go_of_what_trains():
    flux = build().requires_grad_(False)
    fuse(flux)
    block = flux.single_transformer_blocks[0]
    attn, mlp = block.attn, block.proj_mlp
    layers = [attn.to_q, attn.to_k, attn.to_v, mlp]
    arguments, where = given(flux), mlp.weight.data_ptr()
    with torch.no_grad():  # generation, which has no gradients for one product
        flux(**arguments)
    assert mlp.weight.data_ptr() == where and mlp.weight.untyped_storage().nbytes() == mlp.weight.nbytes
    assert side_by_side([layer.weight for layer in layers[:3]])
    flux(**arguments)
    assert side_by_side([layer.weight for layer in layers]) and side_by_side([layer.bias for layer in layers])
    before = mlp.weight.clone()
    freeze(flux, "model")
    block.proj_mlp.requires_grad_(False)
    for layer in layers[:3]:  # as ZeRO does
        layer.weight.data = layer.weight.data.clone()
    fuse(flux)
    assert mlp.weight.untyped_storage().nbytes() == mlp.weight.nbytes and torch.equal(mlp.weight, before)


def test_weights_packed_in_inference_mode_can_be_trained_through():
    flux = build().requires_grad_(False)
    fuse(flux)
    flux.transformer_blocks[0].attn.to_q.weight.data = flux.transformer_blocks[0].attn.to_q.weight.data.clone()  # moved
    arguments = given(flux)
    with torch.inference_mode():
        flux(**arguments)
    assert not any(parameter.is_inference() for parameter in flux.parameters())
    freeze(flux, "attention")
    flux(**arguments, return_dict=False)[0].sum().backward()


def test_columns_are_one_tensor_only_where_they_are_neighbours():
    whole = torch.arange(24.0).view(2, 3, 4)
    assert columns([whole[..., :1], whole[..., 1:]]).data_ptr() == whole.data_ptr()
    assert torch.equal(columns([whole[..., 1:2], whole[..., 2:]]), whole[..., 1:])
    for parts in (
        [whole[..., 1:], whole[..., :1]],
        [whole[..., :1], whole[..., 2:]],
        [whole[..., :1], None],
        [whole[..., :1], whole[..., 1:].clone()],
        [whole[..., :1], whole[:1, ..., 1:]],
    ):
        assert columns(parts) is None
