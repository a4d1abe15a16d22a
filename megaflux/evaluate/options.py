"""The command line of `python -m megaflux.evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megaflux.common.command import EMA_HELP, Parser, add_folder_options, count, positive
from megaflux.common.errors import UserError
from megaflux.common.paths import path_option

PARTS = ("loss", "pictures", "words", "grid")


@dataclass(frozen=True)
class Settings:
    """All that figures depend on, beside weights and data."""

    samples: int
    """The most held-out samples that are looked at."""
    cells: int | None
    """The most held-out cells of a grid, and cells of held-out contents; None: all."""
    seeds: tuple[int, ...]
    """Of the pictures; the first is every picture's."""
    steps: int | None
    """Euler steps; None: as the run validates, 28 for an export."""
    guidance: float | None
    """Value of FLUX's guidance embedding in pictures; None: the weights' default."""
    cfg: float
    """Scale of true guidance; 1: none."""
    references: int
    """References that a sample is given, at most."""
    condition: str | None
    """image, image_text or text; None: by data and weights."""
    batch_size: int
    dtype: str
    parts: tuple[str, ...]
    """Which of PARTS."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Request:
    """A command line."""

    checkpoint: str
    against: str | None
    data: str
    out: str
    update: int | None
    ema: bool
    folders: dict[str, str | None]
    judge: str | None
    judge_steps: int | None
    judge_data: str | None
    clip: str | None
    dino: str | None
    device: str | None
    settings: Settings


def build_parser() -> Parser:
    """The parser of the command."""
    parser = Parser(
        prog="python -m megaflux.evaluate",
        description="Measure a run or an export on held-out pictures (docs/evidence.md).",
        epilog="Exit codes: 0 done; 2 bad input, in one line; 130 Ctrl-C: the same command continues.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, type=path_option, metavar="DIR", help="folder of a run or an export")
    add("--data", required=True, type=path_option, metavar="DIR", help="folder of a prepared dataset")
    add("--out", required=True, type=path_option, metavar="DIR", help="folder of the results; continued if it is begun")
    add("--against", type=path_option, metavar="DIR", help="a second run or export, to compare with")
    add("--update", type=count, metavar="N", help="the run's checkpoint after N updates (default: the newest)")
    add("--ema", action="store_true", help=EMA_HELP)
    add_folder_options(add)
    add("--samples", type=count, default=64, metavar="N", help="held-out samples that are looked at (default 64)")
    add("--cells", type=count, metavar="N", help="held-out cells of a grid, of each kind (default: all)")
    add("--seed", type=_seed, default=0, metavar="N", help="first seed of pictures, and of noise (default 0)")
    add("--seeds", type=count, default=2, metavar="N", help="pictures of each of the samples (default 2)")
    add("--steps", type=count, metavar="N", help="Euler steps (default: as the run validates; an export: 28)")
    add("--guidance", type=_guidance, metavar="G", help="guidance value of pictures (default: the weights')")
    add("--cfg", type=_guidance, default=1.0, metavar="S", help="true guidance of pictures (default 1: none)")
    add("--references", type=count, default=1, metavar="N", help="references that a sample is given (default 1)")
    add("--condition", choices=("image", "image_text", "text"), help="what samples are conditioned by")
    add("--batch-size", type=count, default=16, metavar="N", help="samples computed at once (default 16)")
    add("--only", type=_parts, default=PARTS, metavar="PARTS", help=f"some of {','.join(PARTS)} (default: all)")
    add(
        "--judge",
        type=path_option,
        metavar="PATH",
        help="judge.safetensors of an evaluation of these data, or its folder",
    )
    add(
        "--judge-data",
        type=path_option,
        metavar="DIR",
        help="a larger grid to train the judge on; DATA holds some of its contents, with the same cells held out",
    )
    add(
        "--judge-steps",
        type=count,
        metavar="N",
        help="updates of the judge (default: 1300 on a grid, where its readers of styles get two and three times as many, else 100)",
    )
    add("--clip", type=path_option, metavar="DIR", help="folder of a CLIP, for CLIP-I and CLIP-T")
    add("--dino", type=path_option, metavar="DIR", help="folder of a DINO or DINOv2, for DINO-I")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on a GPU, else float32"
    )
    return parser


def parse(argv: Sequence[str] | None = None) -> Request:
    """UserError for what cannot be."""
    args = build_parser().parse_args(argv)
    if args.seeds > 64:
        raise UserError(f"--seeds {args.seeds}: at most 64")
    if args.judge is not None and args.judge_data is not None:
        raise UserError("--judge-data trains a judge: not with --judge, which is one")
    settings = Settings(
        samples=args.samples,
        cells=args.cells,
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        steps=args.steps,
        guidance=args.guidance,
        cfg=args.cfg,
        references=args.references,
        condition=args.condition,
        batch_size=args.batch_size,
        dtype=args.dtype,
        parts=tuple(args.only),
    )
    folders = {name: getattr(args, name) for name in ("flux", "vlm", "vae")}
    return Request(
        checkpoint=args.checkpoint,
        against=args.against,
        data=args.data,
        out=args.out,
        update=args.update,
        ema=args.ema,
        folders=folders,
        judge=args.judge,
        judge_steps=args.judge_steps,
        judge_data=args.judge_data,
        clip=args.clip,
        dino=args.dino,
        device=args.device,
        settings=settings,
    )


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**53):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^53, got {text!r}")
    return int(text)


def _guidance(text: str) -> float:
    value = 0.0 if text in ("0", "0.0") else positive(text)
    if value > 100:
        raise argparse.ArgumentTypeError(f"must be at most 100, got {text!r}")
    return value


def _parts(text: str) -> tuple[str, ...]:
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"knows {', '.join(PARTS)}, not {unknown[0]!r}")
    return tuple(part for part in PARTS if part in parts)
