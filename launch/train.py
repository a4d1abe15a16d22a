"""Train Qwen2VL-Flux. Start with `deepspeed launch/train.py`, `torchrun launch/train.py` or plain python.

Without options: the tiny preset on the demo images. --config overrides the preset's values, and the options here
override both. --dry-run prints what a run would do and cost, and what is wrong with it, without loading anything.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError, exit_on_user_error, quiet_interrupt

if __name__ == "__main__":
    quiet_interrupt()  # the imports below take a second

from megaflux.common.command import Parser, count, positive, share
from megaflux.common.paths import path_option
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.schema import Config
from megaflux.training.checkpoint import extend, init_folder, saved
from megaflux.training.ds_config import load_ds_config, with_defaults
from megaflux.training.planning.checks import find_problems
from megaflux.training.planning.gpus import GPUS, Assumed, find_gpu
from megaflux.training.survival.watch import Watch

DS_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"


def main(
    load: Callable[..., Any] | None = None,
    problems: Callable[..., list[str]] = find_problems,
    parser: Parser | None = None,
) -> int | None:
    """Run the command line; returns the exit code. Heavy libraries are imported after parsing, so that bad input is answered
    at once.

    The arguments are for programs that train other models than the published ones (launch/train_random.py). load: makes the
    models, (config, device, dtype) -> Models; None: megaflux.models.pretrained.load_models. problems: (config, ds_config,
    ranks) -> one line for each thing that would stop the run. parser: None: build_parser().
    """
    args, config = parse_config(parser or build_parser(), saved=saved_values)
    ds_config, given_init = load_ds_config(args.deepspeed), config.model.init
    resumed = saved.begun(config.run.dir)
    if resumed is not None and resumed.values is not None:
        saved.refuse_changes(config, resumed.values)
        config = extend.extended(init_folder.settled(config, resumed), resumed)
    ds_config = with_defaults(ds_config, None if resumed is None else resumed.ds_config)
    if os.environ.get("RANK", "0") == "0":
        tell_of_resuming(config, resumed, args.kept, given_init)
    more_updates = None if resumed is None else extend.describe(config, resumed)
    assumed = Assumed(args.gpu, args.gpu_memory, args.peak_tflops, args.mfu)
    if args.dry_run:
        if os.environ.get("RANK", "0") != "0":
            return 0  # a launcher started several: one report is enough
        from megaflux.training.planning.dry_run import dry_run

        if more_updates:
            print(more_updates, file=sys.stderr)
        return dry_run(config, ds_config, args.world_size or visible_ranks(), args.json, assumed)
    if args.json or args.world_size:
        raise UserError(f"--{'json' if args.json else 'world-size'}: only with --dry-run; add it or drop this")
    ranks = started_ranks() or 1
    if found := problems(config, ds_config, ranks):
        raise UserError("; ".join(found))
    if more_updates and os.environ.get("RANK", "0") == "0":
        print(more_updates, file=sys.stderr)
    # Before the imports, which take seconds: a signal may arrive meanwhile.
    watch = Watch(config.train.hang_timeout, config.train.leave_within)
    # Libraries make a million objects that all stay: looking for garbage among them costs a tenth of a start.
    gc.disable()
    try:
        from megaflux.training.session import train
    finally:
        gc.enable()
    gc.freeze()
    return train(config, ds_config, watch, assumed=assumed, **({} if load is None else {"load": load}))


def tell_of_resuming(
    config: Config, resumed: saved.Begun | None, kept: dict[str, Any], given_init: str | None = None
) -> None:
    """Say on stderr which values a resumed run keeps, that its configuration is lost, and that it began from something else
    than is named now. kept: {dotted field: value}. given_init: model.init as given."""
    run_dir = config.run.dir
    if resumed is not None and resumed.values is None:
        print(f"{run_dir}: config.yaml is missing; what is not given is this version's default", file=sys.stderr)
    if kept:
        print(saved.describe(run_dir, kept), file=sys.stderr)
    if resumed is not None and (line := init_folder.describe(config, given_init)):
        print(line, file=sys.stderr)


def saved_values(run_dir: str) -> dict[str, Any] | None:
    """The saved values of the run in a folder; None: there is nothing to resume."""
    begun = saved.begun(run_dir)
    return None if begun is None else begun.values


def build_parser(prog: str = "launch/train.py", description: str | None = __doc__) -> Parser:
    """The parser of a training program. prog: its name; description: its help text."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{prog} [--preset tiny|dev] [--config FILE.yaml] [--FIELD VALUE ...] [--dry-run]",
    )
    parser.add_argument(
        "--deepspeed",
        type=path_option,
        default=str(DS_CONFIG),
        metavar="FILE.json",
        help="sharding and precision (default: ds_configs/zero2.json)",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    dry = parser.add_argument_group("dry run")
    dry.add_argument("--dry-run", action="store_true", help="print what a run would do and cost; exit code 2: problems")
    dry.add_argument("--world-size", type=count, metavar="N", help="GPUs to count with (default: those that are here)")
    dry.add_argument("--json", type=path_option, metavar="FILE", help="write the same as JSON")
    gpu = parser.add_argument_group(
        "GPUs", "assumed by the dry run, and by a run that chooses its micro-batch (train.micro_batch_size auto)"
    )
    gpu.add_argument(
        "--gpu",
        type=_gpu,
        metavar="NAME",
        help=f"{', '.join(GPUS)}, or a device's name (default: the GPU that the run is on; a dry run shows all three)",
    )
    gpu.add_argument(
        "--gpu-memory",
        type=positive,
        metavar="GB",
        help="of one GPU, instead of its real memory; a run stays within it",
    )
    gpu.add_argument("--peak-tflops", type=positive, metavar="X", help="peak of one GPU, dense bf16, likewise")
    gpu.add_argument(
        "--mfu",
        type=share,
        metavar="X",
        help="part of the peak at which FLUX computes, recomputation included (MFU leaves that out)",
    )
    add_config_arguments(parser)
    return parser


def visible_ranks() -> int:
    """Number of ranks that a launcher started, else of GPUs on this machine, else 1."""
    if started := started_ranks():
        return started
    import torch

    return max(1, torch.cuda.device_count())


def started_ranks() -> int | None:
    """Number of ranks that a launcher, or srun with MASTER_ADDR exported, started; None: this process is alone. UserError for
    an invalid WORLD_SIZE."""
    slurm = os.environ.get("SLURM_NTASKS") if "MASTER_ADDR" in os.environ else None
    started = os.environ.get("WORLD_SIZE") or slurm
    if started and not (started.isascii() and started.isdigit() and int(started) > 0):
        raise UserError(
            f"WORLD_SIZE {started}: must be a whole number above 0; unset it and RANK to train alone", own=True
        )
    return int(started) if started else None


def _gpu(text: str) -> str:
    if find_gpu(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not known; known: {', '.join(GPUS)} (for another one leave it out and "
            "give --gpu-memory, --peak-tflops and --mfu)"
        )
    return text


if __name__ == "__main__":
    exit_on_user_error(main)
