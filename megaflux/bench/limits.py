"""The lower limit of a step's time on this machine: its matrix products and its attention, alone, in the same run.

For each linear: the forward; dX where something trainable lies upstream; dW where its weight is trainable. q, k and v of
a stream are one product. For each block: attention's forward and backward. Nothing is computed again. The same list gives
the FLOPs of MFU: 2 per multiply-add, attention's backward twice its forward.

A step reads its weights, 24 GB, from the GPU's memory, not from its L2 cache. The same is assumed of activations, though
one just written, 28 MB at FLUX.1-dev's width and 1024 px, may still be in the 50 MB of an H100's L2. So no tensor here is
read by two calls in a row: each shape has three tensors that take turns, and three sets of what the smallest product of a
block's tokens reads are about 66 MB. Cache effects were not measured. Attention gets q, k, v and its output's gradient
with the strides of a fused FLUX block.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import activations
from megaflux.bench.sizes import Sizes
from megaflux_kernels.bench.timing import kernel_ms, median

QKV = re.compile(r"(.*\.attn\.)(to_[qkv]|add_[qkv]_proj)")
TURNS = 3  # tensors of one shape. FLUX.1-dev at 4096 + 484 tokens, bf16: 1.10 GB of shapes, so 3.3; attention's 0.34 GB
LARGE = 1 / 100  # of the largest product's FLOPs; x_embedder and proj_out, 64 channels wide, are below it
FP8 = torch.float8_e4m3fn
FP8_SINCE = (8, 9)  # compute capability


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


class Turns:
    """Normal numbers by shape: TURNS tensors each, which are given out in turn."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.tensors: dict[tuple[int, ...], list[Tensor]] = {}

    def make(self, *shape: int) -> None:
        """Allocate the tensors of a shape, ahead of the calls that are timed."""
        if shape not in self.tensors:
            self.tensors[shape] = [torch.randn(shape, dtype=self.dtype, device=self.device) for _ in range(TURNS)]

    def next(self, *shape: int) -> Tensor:
        """The next tensor of a shape that `make` allocated, never the one given out last."""
        tensors = self.tensors[shape]
        tensors.append(tensors.pop(0))
        return tensors[-1]


def product_call(product: Product, turns: Turns) -> Callable[[], Tensor]:
    """A function that runs a product once, as a FLUX step writes it, on the next tensors of its shapes."""
    x, dout = (product.rows, product.inputs), (product.rows, product.outputs)
    weight, bias = (product.outputs, product.inputs), (product.outputs,)
    for shape in {"forward": (x, weight, bias), "dx": (dout, weight), "dw": (dout, x)}[product.kind]:
        turns.make(*shape)
    take = turns.next
    return {
        "forward": lambda: F.linear(take(*x), take(*weight), take(*bias)),
        "dx": lambda: take(*dout) @ take(*weight),
        "dw": lambda: take(*dout).t() @ take(*x),
    }[product.kind]


def run_products(counted: Counter[Product], dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A function that runs all the products of a step, one after the other, on normal numbers."""
    turns = Turns(dtype, device)
    calls = [(product_call(product, turns), count) for product, count in counted.items()]

    def run() -> None:
        with torch.no_grad():
            for call, count in calls:
                for _ in range(count):
                    call()

    return run


def attention_inputs(
    sizes: Sizes, image_tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient, (B, H, S, D) of normal numbers, laid out as in the fused blocks of FLUX.

    All four are views of (B, S, H, D) memory: q, k and v since qk_norm_rope writes them so, on its Triton path each
    into memory of its own; the gradient since `contiguous_gradient` makes it contiguous as (B, S, W).
    """
    shape = (sizes.batch, image_tokens + sizes.text, sizes.heads, sizes.head_dim)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def run_attention(sizes: Sizes, image_tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """A function that runs the attention of all blocks, forward and backward, on normal numbers."""
    turns = [attention_inputs(sizes, image_tokens, dtype, device) for _ in range(TURNS)]

    def run() -> None:
        for _ in range(sizes.double + sizes.single):
            turns.append(turns.pop(0))
            q, k, v, dout = turns[-1]
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), [q, k, v], dout)

    return run


def linears(sizes: Sizes, image_tokens: int, trainable: set[str]) -> list[Product]:
    """The distinct large forward products of a step, largest first.

    Left out are those with one row per image (modulations, embedders of the timestep and of the pooled vector) and
    those below a hundredth of the largest one's FLOPs (FLUX's input and output layers, which have 64 channels).
    """
    found = [p for p in products(sizes, image_tokens, trainable) if p.kind == "forward" and p.rows > sizes.batch]
    largest = max(p.flops for p in found)
    return sorted((p for p in found if p.flops >= LARGE * largest), key=lambda p: -p.flops)


def time_product(product: Product, dtype: torch.dtype, device: torch.device, samples: int) -> float:
    """TFLOP/s of a product alone, from the median of `samples` calls with a cold L2 cache."""
    call = product_call(product, Turns(dtype, device))
    with torch.no_grad():
        return _tflop_per_s(product, call, device, samples)


def time_product_fp8(product: Product, device: torch.device, samples: int) -> float:
    """TFLOP/s of a forward or dx product alone with operands in float8_e4m3fn, one scale per row and per column, and a
    bfloat16 result, without the cost of quantizing the operands.

    RuntimeError without a GPU that has fp8 (compute capability 8.9 or later); ValueError for dw, both of whose operands
    have the wrong memory order for it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_SINCE:
        this = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device}"
        raise RuntimeError(f"no fp8 products on {this}: they need an NVIDIA GPU of compute capability 8.9 or later")
    return _tflop_per_s(product, fp8_call(product, device), device, samples)


def fp8_call(product: Product, device: torch.device) -> Callable[[], Tensor]:
    """A function that runs a forward or dx product in fp8: (rows, rounded up to 16; outputs, or inputs for dx).

    torch._scaled_mm wants the second operand column-major, and its sides and the first one's columns in multiples of
    16 (aten/src/ATen/native/cuda/ScaledBlas.cpp). It has no condition on the rows, yet rows that 16 does not divide, such as
    4580, are padded here; the FLOPs stay those of the real rows.
    """
    if product.kind == "dw":
        raise ValueError("fp8 products are forward or dx, got dw")
    inner, outer = product.inputs, product.outputs
    if product.kind == "dx":
        inner, outer = outer, inner
    rows = -(-product.rows // 16) * 16

    def quantised(count: int) -> Tensor:
        return torch.randn((count, inner), dtype=torch.bfloat16, device=device).to(FP8)

    def scales(count: int) -> Tensor:
        # Longer than needed: the kernel for rows that no tile divides can read past their end (pytorch #133334).
        return torch.rand(-(-count // 256) * 256, device=device)[:count]

    turns: list[tuple[Any, ...]] = [
        (quantised(rows), quantised(outer).t(), scales(rows)[:, None], scales(outer)[None]) for _ in range(TURNS)
    ]

    def call() -> Tensor:
        turns.append(turns.pop(0))
        a, b, scale_a, scale_b = turns[-1]
        return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)

    return call


def _tflop_per_s(product: Product, call: Callable[[], Tensor], device: torch.device, samples: int) -> float:
    return product.flops / median(kernel_ms(call, device, samples)) / 1e9
