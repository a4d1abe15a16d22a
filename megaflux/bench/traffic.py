"""python -m megaflux.bench traffic: bytes that one block's forward and backward move, counted; no GPU is needed.

In units of one hidden state, (condition + image tokens) x width numbers in bfloat16. `between`: what operations other than
matrix products and attention read and write; `floor`: the part of it that megaflux's fused ops move; `added`: the rest,
which autograd moves between them; `products`: activations that matrix products and attention read and write; `small`:
statistics and positions. Weights and their gradients are not counted. A count, not a measurement: caches are ignored.

A block's numbers are those of a stack of three minus those of a stack of two.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import activations, moved_bytes, sizes
from megaflux.bench.moved_bytes import OURS, SUMS, Move, MovedBytes
from megaflux.models import flux_functions
from megaflux.training.parameter_order import products_together
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, positive, table
from megaflux_kernels.dispatch import as_on_a_gpu

BENCH = "traffic"
ARMS = {"diffusers": "diffusers-eager", "ours-none": "ours-none", "ours-mlp": "ours-mlp"}
"""Arm -> that of bench.activations."""
KINDS = ("single", "double")
TRAINS = ("frozen", "attention", "block")
DTYPE = torch.bfloat16
STACK = 2  # blocks: the first and the last of a stack differ from those between them


def add_arguments(parser: Parser) -> None:
    def names(option: str, known: Any, what: str) -> None:
        parser.add_argument(
            f"--{option}",
            type=partial(one_of, known=known, what=what),
            default=list(known),
            metavar="A,B",
            help=f"of {', '.join(known)} (default: all)",
        )

    def number(option: str, default: int, text: str) -> None:
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{text} (default {default})")

    names("arms", ARMS, "arm")
    names("kinds", KINDS, "kind of block")
    names("trains", TRAINS, "set of what trains in a block")
    number("--image", 4096, "image tokens")
    number("--text", 484, "condition tokens")
    number("--batch", 1, "images")
    number("--heads", 24, "attention heads; the width is heads x head-dim")
    number("--head-dim", 128, "channels of a head: 32, 64 or 128, which the kernels have")
    parser.add_argument("--ops", action="store_true", help="print each operation's share of `between`, too")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    given = moved_bytes.Sizes(args.batch, args.image, args.text, args.heads, args.head_dim)
    try:
        given.check()
        if args.head_dim not in (32, 64, 128):
            raise ValueError(f"--head-dim {args.head_dim}: use 32, 64 or 128")
    except ValueError as error:
        parser.error(str(error))
    report = open_report(parser, args, facts(default_device(), "flash"))
    for kind in args.kinds:
        for trains in args.trains:
            for arm in args.arms:
                shape = f"{kind} {trains} {args.image}+{args.text} b{args.batch} {args.heads}x{args.head_dim} bfloat16"
                if not report.has(BENCH, arm, shape):
                    add_rows(report, arm, shape, block_states(kind, trains, arm, given))
    print(table(row for row in report.rows if row.bench == BENCH))
    if args.ops:
        for row in report.rows:
            if row.bench == f"{BENCH}-ops":
                print(f"{row.shape}  {row.arm}  {row.metric:60} {row.value:6.2f}")
    return 0


def add_rows(report: Any, arm: str, shape: str, states: Counter[Move]) -> None:
    found = totals(states)
    report.add(
        *(Row(BENCH, arm, shape, name, value, "states") for name, value in found.items()),
        *(
            Row(f"{BENCH}-ops", arm, shape, f"{move.phase} {move.op}", value, "states")
            for move, value in states.items()
            if move.sum == "between"
        ),
    )


def totals(states: Counter[Move]) -> dict[str, float]:
    """{"between", "forward", "backward" (its two parts), "floor", "added", "products", "small"} in hidden states."""

    def total(**wanted: str) -> float:
        return float(sum(n for move, n in states.items() if all(getattr(move, k) == v for k, v in wanted.items())))

    sums = {name: total(sum=name) for name in SUMS}
    floor = float(sum(n for move, n in states.items() if move.sum == "between" and move.op.startswith(OURS)))
    parts = {phase: total(sum="between", phase=phase) for phase in ("forward", "backward")}
    return (
        {"between": sums["between"]}
        | parts
        | {"floor": floor, "added": sums["between"] - floor, "products": sums["products"], "small": sums["small"]}
    )


def block_states(kind: str, trains: str, arm: str, given: moved_bytes.Sizes) -> Counter[Move]:
    """Hidden states that each operation of one block moves, forward and backward, inside a stack of equal blocks.

    kind: of KINDS; trains: of TRAINS, of all blocks of the stack; arm: of ARMS. ValueError for sizes at which shapes are
    ambiguous (`Sizes.check`).
    """
    more, less = (_moved(blocks, kind, trains, arm, given) for blocks in (STACK + 1, STACK))
    unit = given.state * DTYPE.itemsize
    return Counter({move: (more[move] - less[move]) / unit for move in more if more[move] != less[move]})


def _moved(blocks: int, kind: str, trains: str, arm: str, given: moved_bytes.Sizes) -> Counter[Move]:
    stack = sizes.Sizes(0, 0, given.heads, given.head_dim, 64, given.text, given.batch, "block", ())
    config = stack.flux_config(double=blocks * (kind == "double"), single=blocks * (kind == "single"))
    with ExitStack() as contexts:
        contexts.enter_context(FakeTensorMode())
        contexts.enter_context(sdpa_kernel(SDPBackend.FLASH_ATTENTION))
        for as_gpus_have_it in (as_on_a_gpu, _contiguous_gradients, activations.rms_norm_of_gpus):
            contexts.enter_context(as_gpus_have_it())
        transformer = activations.build(config, DTYPE)
        names = set() if trains == "frozen" else activations.trainable_flux(config, range(blocks), trains)
        activations.freeze(transformer, names)
        _lay_together(transformer, names)
        activations.set_arm(transformer, ARMS[arm])
        activations.assume_even_norms(transformer)
        arguments = activations.inputs(transformer.config, given.batch, given.image, given.text, DTYPE)
        with MovedBytes(given) as moved:
            output = transformer(**arguments, return_dict=False)[0]
            moved.phase = "backward"
            output.sum().backward()
    return moved.bytes


def _lay_together(transformer: nn.Module, names: set[str]) -> None:
    """Move trainable parameters into one buffer in ZeRO's order, as training does: q, k and v are one product there."""
    parameters = dict(transformer.named_parameters())
    ordered = products_together([name for name in parameters if name in names])
    flat, start = torch.empty(sum(parameters[name].numel() for name in ordered), dtype=DTYPE), 0
    for name in ordered:
        parameter = parameters[name]
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


@contextmanager
def _contiguous_gradients() -> Iterator[None]:
    """Inside, `flux_functions.contiguous_gradient` does what it does on a GPU."""
    plain = flux_functions.copies_gradients
    flux_functions.copies_gradients = lambda x: True
    try:
        yield
    finally:
        flux_functions.copies_gradients = plain
