"""python -m megaflux.bench start: seconds from the start of launch/train.py to its first update, and of its imports alone.

imports  from the start of a Python until it has imported megaflux.training.session
ready    `python launch/train.py` in a new folder of a run, until the event `ready` (the first update begins): the preset
         tiny on the demo pictures, or what --train says; data are prepared and caches filled before anything is timed
With --against DIR another checkout runs in turns with this one, with this Python's libraries.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megaflux.common.paths import path_option
from megaflux.training.survival import events
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Report, Row, add_report_arguments, open_report, positive, table
from megaflux_kernels.bench.timing import median

BENCH = "start"
ROOT = Path(__file__).parents[2]


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--against", type=path_option, metavar="DIR", help="another checkout, in turns with this one")
    parser.add_argument("--train", default="", metavar="OPTIONS", help="of launch/train.py, in one word")
    parser.add_argument("--samples", type=positive, default=5, metavar="N", help="starts of each (default 5)")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    report = open_report(parser, args, facts(default_device(), None))
    checkouts = {"ours": ROOT}
    if args.against:
        checkouts["against"] = Path(args.against).resolve()
        if not (checkouts["against"] / "launch" / "train.py").is_file():
            parser.error(f"--against {args.against}: no checkout of megaflux (launch/train.py is missing)")
    options = shlex.split(args.train)
    try:
        for metric, seconds in (("imports_s", imports), ("ready_s", partial(ready, options))):
            measure(report, metric, seconds, checkouts, args.samples)
    except subprocess.CalledProcessError as error:
        parser.error(f"{shlex.join(map(str, error.cmd))}: exit code {error.returncode}\n{error.stderr}")
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0


def measure(
    report: Report, metric: str, seconds: Callable[[Path], float], checkouts: dict[str, Path], samples: int
) -> None:
    """A row of each checkout: the median of its starts, which take turns."""
    shape = f"median of {samples}"
    if all(report.has(BENCH, arm, shape, metric) for arm in checkouts):
        return
    for checkout in checkouts.values():  # compiles what is not compiled yet, prepares data, fills caches
        seconds(checkout)
    found: dict[str, list[float]] = {arm: [] for arm in checkouts}
    for _ in range(samples):
        for arm, checkout in checkouts.items():
            found[arm].append(seconds(checkout))
    report.add(*(Row(BENCH, arm, shape, metric, median(times), "s", samples) for arm, times in found.items()))


def imports(checkout: Path) -> float:
    """Seconds from the start of a Python until it has imported what training imports."""
    code = "import time, psutil, megaflux.training.session; print(time.time() - psutil.Process().create_time())"
    return float(_python(checkout, "-P", "-c", code).splitlines()[-1])


def ready(options: list[str], checkout: Path) -> float:
    """Seconds from the start of a training process to its first update."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = str(checkout / "launch" / "train.py")
        _python(checkout, train, "--run.dir", str(run), "--train.stop_after", "1", *options)
        times = {event["kind"]: event["time"] for event in reversed(list(events.read(run)))}
        return times[events.Kind.READY] - times[events.Kind.START]


def _python(checkout: Path, *command: str) -> str:
    paths = os.pathsep.join((str(checkout), str(checkout / "kernels")))
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout
