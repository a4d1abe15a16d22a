"""What a step cannot be faster than on this machine: its matrix products and its attention, alone, in the same run.

For each linear: the forward; dX where something that trains lies upstream; dW where its weight trains. q, k and v of
a stream are one product. For each block: attention's forward and backward. Nothing is computed again. The
same list gives the FLOPs of MFU: 2 per multiply-add, attention's backward twice its forward.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import activations
from megaflux.bench.sizes import Sizes

QKV = re.compile(r"(.*\.attn\.)(to_[qkv]|add_[qkv]_proj)")


@dataclass(frozen=True)
class Product:
    """A matrix product of a linear with `inputs` and `outputs` features on `rows` tokens. kind: forward, dx or dw."""

    kind: str
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


def products(sizes: Sizes, image_tokens: int, trainable: set[str]) -> Counter[Product]:
    """How often a step runs each product."""
    config = sizes.flux_config()
    uses: dict[str, list] = {}  # product's name -> [rows, inputs, outputs, needs dx, needs dw]
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        transformer = activations.build(config, torch.bfloat16)
        activations.freeze(transformer, trainable)

        def note(name: str) -> Callable:
            def hook(module: nn.Linear, args: tuple, output: object) -> None:
                x = args[0]
                qkv = QKV.fullmatch(name)
                use = uses.setdefault(qkv[1] + qkv[2][:3] if qkv else name, [0, 0, 0, False, False])
                use[0], use[1] = x.numel() // module.in_features, module.in_features
                use[2] += module.out_features
                use[3] |= x.requires_grad
                use[4] |= module.weight.requires_grad

            return hook

        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(note(name))
        given = activations.inputs(transformer.config, sizes.batch, image_tokens, sizes.text, torch.bfloat16)
        transformer(**given, return_dict=False)
    counted: Counter[Product] = Counter()
    for rows, inputs, outputs, needs_dx, needs_dw in uses.values():
        for kind, needed in (("forward", True), ("dx", needs_dx), ("dw", needs_dw)):
            counted[Product(kind, rows, inputs, outputs)] += needed
    return +counted


def attention_flops(sizes: Sizes, image_tokens: int) -> int:
    """Forward and backward of all blocks' attention."""
    width, tokens = sizes.heads * sizes.head_dim, image_tokens + sizes.text
    return 3 * 4 * sizes.batch * tokens**2 * width * (sizes.double + sizes.single)


def step_flops(sizes: Sizes, image_tokens: int, counted: Counter[Product]) -> int:
    """Model FLOPs of a step."""
    return sum(p.flops * n for p, n in counted.items()) + attention_flops(sizes, image_tokens)


def run_products(counted: Counter[Product], dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A function that runs all the products of a step, one after the other, on normal numbers."""
    calls = []
    buffers: dict[tuple[int, ...], torch.Tensor] = {}  # by shape: a weight is as good as another

    def randn(*shape: int) -> torch.Tensor:
        if shape not in buffers:
            buffers[shape] = torch.randn(shape, dtype=dtype, device=device)
        return buffers[shape]

    for product, count in counted.items():
        x, dout = randn(product.rows, product.inputs), randn(product.rows, product.outputs)
        weight, bias = randn(product.outputs, product.inputs), randn(product.outputs)
        call = {
            "forward": lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias),
            "dx": lambda dout=dout, weight=weight: dout @ weight,
            "dw": lambda dout=dout, x=x: dout.t() @ x,
        }[product.kind]
        calls += [call] * count

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return run


def run_attention(sizes: Sizes, image_tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A function that runs the attention of all blocks, forward and backward, on normal numbers."""
    shape = (sizes.batch, sizes.heads, image_tokens + sizes.text, sizes.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run() -> None:  # dout is dense, as `flux_functions.even_gradient` says that it must always be
        for _ in range(sizes.double + sizes.single):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaves, dout)

    return run
