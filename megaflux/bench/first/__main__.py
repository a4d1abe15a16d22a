"""python -m megaflux.bench.first --out DIR: what can be learned in ten minutes on one GPU; `make gpu-first OUT=DIR`.

Steps run one after the other, each in its own process with its own time limit; each fact is a line of DIR/facts.jsonl
as soon as it is known, what is printed goes to DIR/log.txt, and a table of all comes last. Given again with the same DIR
it measures what is missing, and tries again what failed. `python -m megaflux.bench.first.results DIR` makes a section
of docs/gpu-results.md of it. --small: sizes that a CPU can do.

Exit code: 0 all asked for is known; 1 something failed or did not fit into the time; 2 the options are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import signal
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import IO

from megaflux.bench.first import steps
from megaflux.bench.first.facts import AGAIN, FINISHED, Fact, Facts, GpuLost, Recorder, in_a_line
from megaflux.bench.first.processes import lock
from megaflux.bench.first.runner import SINCE, Outcome, is_finished, run
from megaflux.bench.first.table import table
from megaflux.common.paths import path_option
from megaflux_kernels.bench.machine import visible_gpu
from megaflux_kernels.bench.report import Parser, one_of, positive

SESSION = "session"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m megaflux.bench.first", description=__doc__)
    parser.add_argument(
        "--out", type=path_option, required=True, metavar="DIR", help="where facts.jsonl and log.txt are, or shall be"
    )
    parser.add_argument("--small", action="store_true", help="sizes of a test, for a CPU")
    parser.add_argument(
        "--steps",
        type=partial(one_of, known=steps.TABLE, what="step"),
        metavar="A,B",
        help=f"some of {','.join(steps.TABLE)} (default: all)",
    )
    parser.add_argument(
        "--work",
        type=path_option,
        metavar="DIR",
        default="runs/gpu-first",
        help="for data and runs of the training loop, about 30 GB (default runs/gpu-first)",
    )
    parser.add_argument(
        "--again",
        type=partial(one_of, known=steps.TABLE, what="step"),
        metavar="A,B",
        help="steps whose facts are out of date, and measured again",
    )
    parser.add_argument("--seconds", type=positive, default=560, metavar="N", help="for all of it (default 560)")
    parser.add_argument("--commit", help="that is measured (default: git's HEAD here)")
    parser.add_argument("--step", choices=steps.TABLE, help="run one step in this process")
    args = parser.parse_args(argv)
    out, work = Path(args.out), Path(args.work)
    facts = Facts(out / "facts.jsonl")
    if args.step:
        out.mkdir(parents=True, exist_ok=True)
        return one_step(args.step, facts, work, args.small)

    with contextlib.ExitStack() as held:
        for option, folder in (("--out", out), ("--work", work)):
            held.enter_context(hold(parser, option, folder))
        return all_steps(parser, args, facts)


def all_steps(parser: Parser, args: argparse.Namespace, facts: Facts) -> int:
    """Run what is chosen and not finished, each step in its own process. Returns the exit code."""
    out, device = Path(args.out), gpu_name() or ("CPU" if args.small else None)
    if facts.path.is_dir():
        parser.error(f"--out {out}: facts.jsonl is a folder; give another")
    if device is None:
        parser.error("no NVIDIA GPU here, and FLUX.1-dev's sizes need one; --small is for a CPU")
    if problem := joins(facts, args.small, device):
        parser.error(f"--out {out}: {problem}; give another folder")
    chosen = args.steps or steps.names(args.small)
    for name in args.again or ():
        facts.add(Fact(name, AGAIN, datetime.datetime.now().isoformat(timespec="seconds")))
    if not all(is_finished(facts, name) for name in chosen):
        note_session(facts, args.small, device, args.commit)
    outcome = Outcome()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as `timeout` ends it: what is known is still shown
    try:
        todo = steps.steps(chosen, out, Path(args.work), args.small)
        run(todo, facts, out / "log.txt", args.seconds, outcome)
    except KeyboardInterrupt:
        return 1
    finally:
        show(facts, out / "table.txt", outcome)
    complete = all(is_finished(facts, name) for name in chosen if name not in outcome.left_out)
    asked_for = set(args.steps or ()) & set(outcome.left_out)
    return 0 if complete and not asked_for and "no time left" not in outcome.left_out.values() else 1


def hold(parser: Parser, option: str, folder: Path) -> IO[bytes]:
    """A lock on a folder; ends the process with a message where it cannot be had."""
    try:
        file = lock(folder)
    except OSError as error:
        parser.error(f"{option} {folder}: {error.strerror}; give a folder that can be written")
    if file is None:
        parser.error(f"{option} {folder}: another invocation is at work there; wait for it, or give another")
    return file


def show(facts: Facts, file: Path, outcome: Outcome) -> None:
    """The table of all facts, printed and written, and what was left out."""
    text = table(facts)
    print("\n" + text)
    for name, why in outcome.left_out.items():
        print(f"left out: {name}: {why}")
    with contextlib.suppress(OSError):  # a full disk; it has been printed
        file.write_text(text + "\n")


def one_step(name: str, facts: Facts, work: Path, small: bool) -> int:
    """Measure a step's facts in this process. An error outside of any fact is recorded as the step's."""
    import torch

    from megaflux.bench.first.settings import Setting

    if small:
        torch.set_num_threads(1)  # on a shared CPU, threads wait for each other
    recorder = Recorder(facts, name, small, int(os.environ.get(SINCE, len(facts.rows()))))
    try:
        steps.module(name).run(recorder, Setting(small, work))
    except GpuLost:
        return 1
    except Exception as error:
        traceback.print_exc()
        facts.add(Fact(name, FINISHED, error=in_a_line(error)))
        return 1
    return 0


def joins(facts: Facts, small: bool, device: str) -> str | None:
    """Why facts of this device, these sizes and these libraries cannot be added to those in the file, or None."""
    known = {row.fact: row.value for row in facts.rows() if row.step == SESSION}
    for name, value in here(small, device).items():
        if name in known and known[name] != value:
            return f"holds facts of {name} {known[name]}, and this is {value}"
    return None


def here(small: bool, device: str) -> dict[str, str]:
    return {"sizes": "small" if small else "FLUX.1-dev", "device": device, "libraries": libraries()}


def note_session(facts: Facts, small: bool, device: str, commit: str | None) -> None:
    """Record what the following facts were measured on."""
    from megaflux_kernels.bench.machine import commit as head

    now = {"commit": commit or head() or "unknown", "date": datetime.date.today().isoformat()}
    for name, value in (here(small, device) | now).items():
        facts.add(Fact(SESSION, name, value))


def libraries() -> str:
    """Names and versions, without loading them: "torch 2.11.0, triton 3.6.0"."""
    found = []
    for name in ("torch", "triton", "transformers", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def gpu_name() -> str | None:
    """The name of the GPU that torch would use, from its driver or a process with torch; None without a GPU."""
    asks = [
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", visible_gpu()],
        [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(0))"],
    ]
    for command in asks:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if name := done.stdout.strip():
            return name.splitlines()[0]
    return None


if __name__ == "__main__":
    sys.exit(main())
