"""The limit of a step: the right products, on memory that no cache holds, and attention on the strides of real blocks."""

from collections import Counter, defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megaflux.bench import limits
from megaflux.bench.activations import ATTENTION_FLOPS, freeze, trainable_flux
from megaflux.bench.arms import Arms, random_flux, random_inputs
from megaflux.bench.limits import Product
from megaflux.bench.sizes import Sizes, published
from megaflux.models import flux_functions
from megaflux_kernels import dispatch

CPU = torch.device("cpu")
DEV = Sizes(19, 38, 24, 128, 4096, 484, 1, "attention", published(19, 38))


def test_products_are_the_flops_of_a_step():
    """Against torch's counter on diffusers' own path; its attention backward counts the second product of Q and K."""
    sizes = Sizes(2, 2, 2, 32, 16, 5, 2, "block", (1, 3))
    config = sizes.flux_config()
    trainable = trainable_flux(config, sizes.train_blocks, sizes.components)
    arms = Arms(random_flux(config, torch.float32, CPU))
    freeze(arms.transformer, trainable)
    arms.set("diffusers-eager")
    given = random_inputs(arms.transformer, 2, (3, 4), 5, CPU)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        arms.step(given)
    assert limits.step_flops(sizes, 12, limits.products(sizes, 12, trainable)) == counter.get_total_flops()


class Operands(TorchDispatchMode):
    """Memory of the matrices that each product is given, in the order of the calls."""

    def __init__(self):
        super().__init__()
        self.found = defaultdict(list)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            matrices = [x for x in args if x.ndim == 2]
            for x in matrices:
                self.found[tuple(sorted(x.shape))].append(x.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


def test_no_two_products_in_a_row_read_the_same_memory():
    counted = Counter(
        {
            Product("forward", 5, 8, 16): 7,
            Product("dx", 5, 8, 16): 4,
            Product("dw", 5, 8, 16): 1,
            Product("forward", 5, 8, 24): 3,
        }
    )
    run = limits.run_products(counted, torch.float32, CPU)
    with Operands() as operands:
        run()
        run()  # the next sample goes on where this one ended
    assert {shape: len(found) for shape, found in operands.found.items()} == {
        (5, 8): 2 * (7 + 1 + 3),
        (8, 16): 2 * (7 + 4),
        (5, 16): 2 * (4 + 1),
        (8, 24): 2 * 3,
    }
    for shape, found in operands.found.items():
        assert all(a != b for a, b in zip(found, found[1:])), shape
        assert len(set(found)) >= 3


def test_attention_in_a_row_reads_other_memory(monkeypatch):
    found = []
    attention = F.scaled_dot_product_attention

    def noted(*qkv):
        found.append({x.untyped_storage().data_ptr() for x in qkv})
        return attention(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    limits.run_attention(Sizes(2, 3, 2, 32, 16, 5, 1, "attention", (1,)), 12, torch.float32, CPU)()
    assert len(found) == 5 and all(len(group) == 3 for group in found)
    assert len(set.union(*found)) == 9 and not any(a & b for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("path", ["torch", "triton"])
def test_attention_has_the_strides_of_fused_blocks(monkeypatch, path):
    """Double and single blocks, on both paths of the ops; the gradient as on a GPU, where it is made contiguous."""
    sizes = Sizes(1, 1, 2, 32, 16, 5, 2, "attention", (0, 1))
    config = sizes.flux_config()
    arms = Arms(random_flux(config, torch.float32, CPU))
    freeze(arms.transformer, trainable_flux(config, sizes.train_blocks, sizes.components))
    arms.set("ours-none")
    monkeypatch.setattr(dispatch, "CHOICE", path)
    monkeypatch.setattr(flux_functions, "copies_gradients", lambda x: True)
    attention, found = F.scaled_dot_product_attention, []

    def noted(q, k, v):
        out = attention(q, k, v)
        strides = [x.stride() for x in (q, k, v)]
        out.register_hook(lambda dout: found.append(strides + [dout.stride()]))
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    arms.step(random_inputs(arms.transformer, 2, (3, 4), 5, CPU))
    of_bench = limits.attention_inputs(sizes, 12, torch.float32, CPU)
    assert [x.shape for x in of_bench] == [(2, 2, 17, 32)] * 4
    assert found == [[x.stride() for x in of_bench]] * 2


def test_large_linears_of_flux_dev():
    found = limits.linears(DEV, 4096, trainable_flux(DEV.flux_config(), DEV.train_blocks, DEV.components))
    W = 3072
    single = [(4580, 5 * W, W), (4580, W, 4 * W), (4580, W, 3 * W)]
    double = [(rows, *io) for rows in (4096, 484) for io in ((W, 4 * W), (4 * W, W), (W, 3 * W), (W, W))]
    assert {(p.rows, p.inputs, p.outputs) for p in found} == {*single, *double, (484, 4096, W)}
    assert (found[0].rows, found[0].inputs) == (4580, 5 * W)
    assert len(found) == 12 and {p.kind for p in found} == {"forward"}


def test_buffers_of_flux_dev_fit_beside_its_weights():
    from torch._subclasses.fake_tensor import FakeTensorMode

    counted = limits.products(DEV, 4096, trainable_flux(DEV.flux_config(), DEV.train_blocks, DEV.components))
    turns = limits.Turns(torch.bfloat16, CPU)
    with FakeTensorMode():
        for product in counted:
            limits.product_call(product, turns)
    assert 3.2e9 < sum(x.nbytes for tensors in turns.tensors.values() for x in tensors) < 3.4e9


def test_a_product_is_timed_alone():
    rate = limits.time_product(Product("forward", 32, 64, 48), torch.float32, CPU, 2)
    assert 0 < rate < 100  # TFLOP/s
    with pytest.raises(RuntimeError, match="no fp8 products on the device cpu: they need an NVIDIA GPU of compute"):
        limits.time_product_fp8(Product("forward", 32, 64, 48), CPU, 2)


def test_a_gpu_before_fp8_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(RuntimeError, match="^no fp8 products on NVIDIA A100-SXM4-80GB: they need"):
        limits.time_product_fp8(Product("forward", 32, 64, 48), torch.device("cuda"), 2)


@pytest.mark.parametrize("kind, inner, outer", [("forward", 64, 48), ("dx", 48, 64)])
def test_fp8_products_take_the_operands_that_torch_wants(monkeypatch, kind, inner, outer):
    plain, given = torch._scaled_mm, []

    def noted(*operands, **options):
        given.append(operands)
        return plain(*operands, **options)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    call = limits.fp8_call(Product(kind, 37, 64, 48), CPU)
    for _ in range(4):
        out = call()
        a, b, scale_a, scale_b = given[-1]
        assert a.shape == (48, inner) and b.shape == (inner, outer)  # 37 rows, padded to 48
        exact = (a.float() * scale_a) @ (b.float() * scale_b)
        assert out.dtype == torch.bfloat16 and torch.allclose(out.float(), exact, rtol=0.01, atol=0.1)
    assert len({operands[1].untyped_storage().data_ptr() for operands in given}) == 3
    with pytest.raises(ValueError, match="forward or dx, got dw"):
        limits.fp8_call(Product("dw", 37, 64, 48), CPU)
