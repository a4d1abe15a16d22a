"""python -m megaflux.bench loader: samples per second of the data loader, by number of worker processes.

--data is a dataset of megaflux.data.prepare; without it a small one is made in a temporary folder. Per number of
workers: how fast batches come to a consumer that does nothing else, and how long one that is busy between batches waits
for each.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

from megaflux.common.command import whole_numbers
from megaflux.common.paths import path_option
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Report, Row, add_report_arguments, open_report, positive, table
from megaflux_kernels.bench.timing import median

BENCH = "loader"


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--data", type=path_option, metavar="DIR", help="a prepared dataset (default: one made for the bench)"
    )
    parser.add_argument("--images", type=positive, default=96, metavar="N", help="of a dataset made here (default 96)")
    parser.add_argument(
        "--side",
        type=positive,
        default=512,
        metavar="PX",
        help="longest side of a dataset made here, a multiple of 16 (default 512)",
    )
    parser.add_argument(
        "--workers",
        type=whole_numbers("numbers of workers as 0,1,2"),
        default=[0, 1, 2],
        metavar="N,...",
        help="default 0,1,2",
    )
    parser.add_argument("--micro-batch", type=positive, default=4, metavar="N", help="samples per batch (default 4)")
    parser.add_argument("--samples", type=positive, default=20, metavar="N", help="batches timed (default 20)")
    parser.add_argument(
        "--busy-ms",
        type=positive,
        default=100,
        metavar="MS",
        help="a training step's length, between batches, when the wait is measured (default 100)",
    )
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    report = open_report(parser, args, facts(default_device(), None))
    if args.data and not Path(args.data).is_dir():
        parser.error(f"--data {args.data}: no such folder; give a dataset of megaflux.data.prepare")
    from megaflux.common.errors import UserError

    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = Path(args.data) if args.data else make_dataset(Path(scratch), args.images, args.side)
            for workers in args.workers:
                measure(report, folder, workers, args)
        except UserError as error:
            parser.error(str(error))
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0


def measure(report: Report, folder: Path, workers: int, args: argparse.Namespace) -> None:
    """Rows of one number of workers."""
    from megaflux.common.ranks import World
    from megaflux.data.loader import build_loader
    from megaflux.data.reading.options import LoaderOptions

    what = f"of {args.data}" if args.data else f"{args.images} images {args.side} px"
    arm, shape = f"workers-{workers}", f"batch {args.micro_batch} {what} busy {args.busy_ms} ms"
    if report.has(BENCH, arm, shape):
        return
    loader = build_loader(folder, LoaderOptions(args.micro_batch, seed=0, num_workers=workers), World(0, 1))
    try:
        batches = iter(loader)
        for _ in range(2 + 2 * workers):  # start the workers, and empty what they load ahead
            next(batches)
        started = time.perf_counter()
        for _ in range(args.samples):
            next(batches)
        rate = args.samples * args.micro_batch / (time.perf_counter() - started)
        waits = []
        for _ in range(args.samples):
            time.sleep(args.busy_ms / 1e3)
            started = time.perf_counter()
            next(batches)
            waits.append((time.perf_counter() - started) * 1e3)
    finally:
        loader.close()
    report.add(
        Row(BENCH, arm, shape, "samples_per_s", rate, "1/s", args.samples),
        Row(BENCH, arm, shape, "wait_ms", median(waits), "ms", args.samples),
        Row(
            BENCH,
            arm,
            shape,
            "wait_fraction",
            sum(waits) / (sum(waits) + args.samples * args.busy_ms),
            "1",
            args.samples,
        ),
    )


def make_dataset(folder: Path, images: int, side: int) -> Path:
    """A prepared dataset of smooth random pictures in three shapes."""
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    source = folder / "pictures"
    ratios = ("1:1", "16:9", "9:16")
    make_pictures(source, images, side, ratios)
    options = Options(longest_side=side, held_out=0, aspect_ratios=ratios)
    prepare(str(source), folder / "data", options, progress=False)
    return folder / "data"


def make_pictures(folder: Path, count: int, side: int, ratios: tuple[str, ...], seed: int = 0) -> None:
    """JPEG files of smooth random pictures, longest side `side` px, of these shapes (width : height) in turn, and a
    caption beside each."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        width, height = map(float, ratios[index % len(ratios)].split(":"))
        longest = max(width, height)
        size = math.ceil(side * width / longest), math.ceil(side * height / longest)
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg", quality=95)
        (folder / f"{index:04d}.txt").write_text(f"picture number {index}")
