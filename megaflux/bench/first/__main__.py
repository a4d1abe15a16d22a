"""python -m megaflux.bench.first --out DIR: what ten minutes on one GPU can tell; `make gpu-first OUT=DIR`.

Steps run one after the other, each in its own process with its own time limit; each fact is a line of DIR/facts.jsonl
as soon as it is known, what is printed goes to DIR/log.txt, and a table of all comes last. Given again with the same DIR
it goes on with what is missing, and tries again what failed. `python -m megaflux.bench.first.results DIR` makes a section
of docs/gpu-results.md of it. --small: sizes that a CPU can do.

Exit code: 0 all asked for is known; 1 something failed or did not fit into the time; 2 the options are wrong.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path

from megaflux.bench.first import steps
from megaflux.bench.first.facts import FINISHED, Fact, Facts, GpuLost, Recorder, in_a_line
from megaflux.bench.first.runner import SINCE, is_finished, run
from megaflux.bench.first.table import table
from megaflux_kernels.bench.report import Parser, one_of, positive

SESSION = "session"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m megaflux.bench.first", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="where facts.jsonl and log.txt are, or shall be")
    parser.add_argument("--small", action="store_true", help="sizes of a test, for a CPU")
    parser.add_argument("--steps", type=partial(one_of, known=steps.TABLE, what="step"), metavar="A,B",
                        help=f"some of {','.join(steps.TABLE)} (default: all)")  # fmt: skip
    parser.add_argument("--work", metavar="DIR", default="runs/gpu-first",
                        help="for data and runs of the training loop, about 30 GB (default runs/gpu-first)")  # fmt: skip
    parser.add_argument("--seconds", type=positive, default=600, metavar="N", help="for all of it (default 600)")
    parser.add_argument("--commit", help="that is measured (default: git's HEAD here)")
    parser.add_argument("--step", choices=steps.TABLE, help="run one step in this process")
    args = parser.parse_args(argv)
    out, work = Path(args.out), Path(args.work)
    try:
        out.mkdir(parents=True, exist_ok=True)
        facts = Facts(out / "facts.jsonl")
        facts.path.touch()
    except OSError as error:
        parser.error(f"--out {out}: {error.strerror}; give a folder that can be written")
    if args.step:
        return one_step(args.step, facts, work, args.small)

    if problem := note_session(facts, args.small, args.commit):
        parser.error(f"--out {out}: {problem}; give another folder")
    chosen = args.steps or steps.names(args.small)
    outcome = run(steps.steps(chosen, out, work, args.small), facts, out / "log.txt", args.seconds)
    text = table(facts)
    (out / "table.txt").write_text(text + "\n")
    print("\n" + text)
    for name, why in outcome.left_out.items():
        print(f"left out: {name}: {why}")
    complete = all(is_finished(facts, name) for name in chosen if name not in outcome.left_out)
    return 0 if complete and "no time left" not in outcome.left_out.values() else 1


def one_step(name: str, facts: Facts, work: Path, small: bool) -> int:
    """Find the facts of a step in this process. An error outside of any fact is that of the step."""
    import torch

    from megaflux.bench.first.settings import Setting

    if small:
        torch.set_num_threads(1)  # on a CPU that others use too, threads wait for each other
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


def note_session(facts: Facts, small: bool, commit: str | None) -> str | None:
    """Keep what the facts to come are of. Returns why they cannot join those that are there, or None."""
    from megaflux_kernels.bench.machine import commit as head

    known = {row.fact: row.value for row in facts.rows() if row.step == SESSION}
    here = {"sizes": "small" if small else "FLUX.1-dev", "device": gpu_name() or "CPU"}
    for name, value in here.items():
        if name in known and known[name] != value:
            return f"holds facts of {name} {known[name]}, and this is {value}"
    now = {"commit": commit or head() or "unknown", "date": datetime.date.today().isoformat()}
    for name, value in (here | now).items():
        facts.add(Fact(SESSION, name, value))
    return None


def gpu_name() -> str | None:
    """The first GPU's name as its driver says it, without loading torch; None: no GPU, or no nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=30, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]


if __name__ == "__main__":
    sys.exit(main())
