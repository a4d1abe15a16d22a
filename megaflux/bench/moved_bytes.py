"""What operations read and write while code runs on fake tensors: bytes of hidden states between a GPU and its memory.

An operation is taken to read each input once and write each output once, as it must without a cache. Two sums: `products`
for matrix products and attention, `between` for all other operations: elementwise passes, copies, adds, fills, sums. The
tensor that a product is added to is read for the add, so that read counts in `between`.

Tensors are classified by their shapes. One without a dimension of tokens is a weight, its gradient, a bias or a modulation,
and is not counted. One with at most a head's numbers per token (statistics, FLUX's positions) is counted in `small`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SUMS = ("between", "products", "small")
OURS = "megaflux."  # namespace of the Triton kernels' custom ops

MATRIX_PRODUCTS = {
    "aten." + name
    for name in ("mm", "_addmm_activation", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "matmul", "linear")
}
ATTENTION = (
    "aten._scaled_dot_product_",
    "aten._flash_attention_",
    "aten._efficient_attention_",
    "aten._cudnn_attention_",
    OURS + "biased_attention",
)
NO_TRAFFIC = {
    "aten." + name
    for name in (
        "empty",
        "empty_like",
        "empty_strided",
        "empty_permuted",
        "new_empty",
        "new_empty_strided",
        "_unsafe_view",
        "set_",
        "resize_",
        "lift_fresh",
        "_local_scalar_dense",
        "is_same_size",
    )
}
FILLS = {
    "aten." + name
    for name in (
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "zero_",
        "fill_",
        "normal_",
        "uniform_",
    )
}
"""These write, and read nothing, though some take a tensor."""
FILLED_THEN_COPIED = {"aten.slice_backward", "aten.select_backward", "aten.constant_pad_nd"}
"""Two kernels in one operation: the whole output is filled, then the input is copied into its place in it."""


@dataclass(frozen=True)
class Sizes:
    """The sizes by which a tensor's shape is classified."""

    batch: int
    image: int
    """L, image tokens."""
    text: int
    """T, condition tokens."""
    heads: int
    head_dim: int

    @property
    def state(self) -> int:
        """Numbers of one hidden state: B x (T + L) x W."""
        return self.batch * (self.image + self.text) * self.heads * self.head_dim

    @property
    def tokens(self) -> dict[int, int]:
        """Size of a dimension of tokens -> tokens in the batch that it stands for."""
        streams = self.text, self.image, self.text + self.image
        return {n: self.batch * n for n in streams} | {self.batch * n: self.batch * n for n in streams}

    def check(self) -> None:
        """ValueError where a number of tokens is also a width: a weight would count as a hidden state."""
        width = self.heads * self.head_dim
        small = (1, 2, 3, self.batch, self.heads, self.head_dim, self.head_dim // 2)
        widths = {*(width * n for n in range(1, 13)), *small}
        if self.heads < 4:
            raise ValueError(
                f"--heads {self.heads}: use 4 or more; with fewer, shapes do not tell states from statistics"
            )
        clash = min(widths.intersection(self.tokens), default=None)
        if clash is not None:
            raise ValueError(
                f"{clash} is a number of tokens and a width at once; give another --image, --text or --batch"
            )


class Move(NamedTuple):
    """One row of `MovedBytes.bytes`."""

    phase: str
    sum: str
    """Of SUMS."""
    op: str


class MovedBytes(TorchDispatchMode):
    """`with MovedBytes(sizes) as moved:` counts inside: `moved.bytes[Move(phase, sum, op)]`. Set `moved.phase` on the way.

    Use it inside FakeTensorMode and `activations.rms_norm_of_gpus`: on CPUs RMSNorm is ten operations.
    """

    def __init__(self, sizes: Sizes):
        """ValueError for sizes at which shapes are ambiguous (`Sizes.check`)."""
        super().__init__()
        sizes.check()
        self.sizes, self.tokens = sizes, sizes.tokens
        self.phase = "forward"
        self.bytes: Counter[Move] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.replace("::", ".")
        if name.startswith("prim.") or name in NO_TRAFFIC or _is_view(func._schema):
            return result
        given, mutated, added_to = _arguments(func._schema, args, kwargs)
        changed = {_place(tensor) for tensor in mutated}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [*mutated, *(tensor for tensor in results if _place(tensor) not in changed)]
        if name in FILLS:
            self.add(name, (), made)
        elif name in FILLED_THEN_COPIED:
            self.add(name, given, [*made, given[0]])
        elif name in MATRIX_PRODUCTS and "add" in name:
            self.add(name, [*added_to, *given], made, accumulator=(added_to or given)[0])
        else:
            self.add(name, [*given, *added_to], made)
        return result

    def add(
        self, name: str, read: Sequence[Tensor], written: Sequence[Tensor], accumulator: Tensor | None = None
    ) -> None:
        """Count an operation. accumulator: of the tensors read, the one that a product is added to."""
        product = name in MATRIX_PRODUCTS or name.startswith(ATTENTION)
        seen = set()
        for tensor in read:
            if (place := _place(tensor)) not in seen:
                seen.add(place)
                self._count(name, tensor, product and tensor is not accumulator)
        for tensor in written:
            self._count(name, tensor, product)

    def _count(self, name: str, tensor: Tensor, product: bool) -> None:
        tokens = next((self.tokens[n] for n in tensor.shape if n in self.tokens), None)
        if tokens is None:
            return
        small = tensor.numel() <= tokens * max(self.sizes.head_dim, 2 * self.sizes.heads)
        kind = "small" if small else "products" if product else "between"
        self.bytes[Move(self.phase, kind, name)] += _nbytes(tensor)


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: a broadcast dimension counts once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride or size == 0 else 1
    return numbers * tensor.itemsize


def _place(tensor: Tensor) -> tuple:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _is_view(schema: Any) -> bool:
    """Whether an operation only returns a view of its input."""
    aliases = [value.alias_info for value in schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _arguments(schema: Any, args: tuple, kwargs: dict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(tensors that are only read, those that are written, those of the latter that are read as well).

    Of the written tensors, `out`, `out_...` and the target of copy_ are overwritten; all others count as read.
    """
    read, written, both = [], [], []
    for i, argument in enumerate(schema.arguments):
        value = args[i] if i < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors
            overwritten = argument.is_out or argument.name.startswith("out") or schema.name == "aten::copy_"
            both += [] if overwritten else tensors
        else:
            read += tensors
    return read, written, both
