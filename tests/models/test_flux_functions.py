"""What runs between the products of fused FLUX's blocks, and that it changes no gradient."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from megaflux.bench import activations
from megaflux.models import flux_functions
from megaflux_kernels import dispatch
from tests.models.test_flux import SIZES

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
