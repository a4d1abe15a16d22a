"""Sizes at which the benches of FLUX run: FLUX.1-dev's on a GPU, a small width on a CPU; an option for each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megaflux.config.presets import PUBLISHED_STAGES, dev
from megaflux_kernels.bench.report import positive

GPU_GRIDS = ("64x64", "36x64", "27x64")  # 1024x1024, 1024x576, 1024x432 px; the last with 512 makes 17.5 x 128 tokens
CPU_GRIDS = ("24x24", "18x24", "13x24")
TOKEN_PIXELS = 16  # each way: an image token is 16 x 16 px


@dataclass(frozen=True)
class Sizes:
    """A FLUX and what one step of it is given."""

    double: int
    """Double blocks."""
    single: int
    """Single blocks."""
    heads: int
    head_dim: int
    joint_dim: int
    """Channels of encoder_hidden_states."""
    text: int
    """T, text tokens."""
    batch: int
    components: str
    """Trainable part of the trainable blocks: attention or block."""
    train_blocks: tuple[int, ...]
    """Trainable blocks, double ones counted first."""

    def flux_config(self, double: int | None = None, single: int | None = None) -> dict[str, Any]:
        """Arguments of FluxTransformer2DModel, at another depth if asked."""
        quarter = self.head_dim // 8 // 2 * 2  # FLUX.1: 16, 56, 56 of 128
        rest = (self.head_dim - quarter) // 2
        return dev()["model"]["flux_config"] | {
            "num_layers": self.double if double is None else double,
            "num_single_layers": self.single if single is None else single,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.joint_dim,
            "axes_dims_rope": [quarter, rest, rest],
        }

    def shape(self, grid: tuple[int, int], dtype: str) -> str:
        """All that a time depends on: "64x64+512 b1 19+38x24x128 attention bfloat16"."""
        rows, columns = grid
        trains = (
            self.components
            if self.train_blocks == published(self.double, self.single)
            else (f"{self.components}[{','.join(map(str, self.train_blocks))}]")
        )
        return (
            f"{rows}x{columns}+{self.text} b{self.batch} {self.double}+{self.single}x{self.heads}x{self.head_dim} "
            f"{trains} {dtype}"
        )


def published(double: int, single: int) -> tuple[int, ...]:
    """The blocks of stage 1: the published list for 19 + 38 blocks, about a quarter of others."""
    if (double, single) == (19, 38):
        return tuple(PUBLISHED_STAGES["stage1"])
    return tuple(sorted({*range(1, double + single, 4), min(1, double + single - 1)}))


def add_size_arguments(parser: argparse.ArgumentParser, full: bool, components: str) -> None:
    """One option per size. full: FLUX.1-dev's sizes are the defaults, else small ones. components: its default."""

    def add(name: str, large: int, small: int, text: str) -> None:
        value = large if full else small
        parser.add_argument(name, type=positive, default=value, metavar="N", help=f"{text} (default {value})")

    add("--double", 19, 2, "double blocks")
    add("--single", 38, 4, "single blocks")
    add("--heads", 24, 8, "attention heads; the width is heads x head-dim")
    add("--head-dim", 128, 64, "channels of a head, a multiple of 16")
    add("--joint-dim", 4096, 256, "channels of the condition")
    add("--text", 512, 64, "condition tokens")
    add("--batch", 1, 1, "images per step")
    grids = GPU_GRIDS if full else CPU_GRIDS
    parser.add_argument(
        "--grids",
        type=_grids,
        default=_grids(",".join(grids)),
        metavar="HxW,...",
        help=f"rows x columns of image tokens, 16 px each way (default {','.join(grids)})",
    )
    parser.add_argument(
        "--components",
        choices=("attention", "block"),
        default=components,
        help=f"which part of a trained block trains (default {components})",
    )
    parser.add_argument(
        "--train-blocks",
        type=_numbers,
        metavar="N,...",
        help="blocks that train (default: stage 1's; about a quarter at other depths)",
    )


def sizes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Sizes:
    """The chosen sizes; invalid ones end the process with one line."""
    if args.head_dim % 16:
        parser.error(f"--head-dim {args.head_dim}: use a multiple of 16")
    blocks = args.train_blocks or published(args.double, args.single)
    if max(blocks) >= args.double + args.single:
        parser.error(f"--train-blocks {max(blocks)}: there are {args.double + args.single} blocks, counted from 0")
    return Sizes(
        args.double,
        args.single,
        args.heads,
        args.head_dim,
        args.joint_dim,
        args.text,
        args.batch,
        args.components,
        tuple(blocks),
    )


def pixels(grid: tuple[int, int]) -> str:
    """ "1024x576" (width x height) of a grid (rows, columns)."""
    return f"{grid[1] * TOKEN_PIXELS}x{grid[0] * TOKEN_PIXELS}"


def _grids(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        rows, x, columns = part.strip().partition("x")
        try:
            found.append((positive(rows), positive(columns)))
        except argparse.ArgumentTypeError:
            raise argparse.ArgumentTypeError(f"want HxW in image tokens, as 64x64, got {part!r}") from None
    return found


def _numbers(text: str) -> Sequence[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"want block numbers as 1,5, got {text!r}")
    return sorted({int(part) for part in parts})
