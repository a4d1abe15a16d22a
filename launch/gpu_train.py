"""make gpu-train: launch/train.py's loop on one GPU at FLUX.1-dev's sizes, saved, resumed and measured.

    python launch/gpu_train.py [--run runs/gpu-train] [--small] [--json FILE] [options of launch/train.py]

launch/train_random.py makes the models on the GPU from a seed, so no weights are needed on the disk; pictures of 1024 px are
generated once. Then stage 1 of the preset dev is trained under ZeRO-2: half of the updates, a checkpoint, and the other half in
a second process that resumes. The optimizer is on the GPU if it fits (ds_configs/zero2.json), else on the host
(zero2_offload.json). --run needs disk space for the checkpoints. --small: the same at the sizes of a test.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflux.common.command import whole_numbers
from megaflux.common.errors import UserError, exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.config.presets import PUBLISHED_STAGES, dev, tiny
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, open_report, positive, table

ROOT = Path(__file__).resolve().parent.parent
RATIOS = ("16:9", "2:1", "2.35:1", "1:1", "1:2")  # of the preset's buckets
WARM_UP = 2  # updates of each process that are not counted
FEW_BLOCKS = [1, 19, 56]  # a third of stage 1's parameters, for a small disk
KEEP = 2  # train.keep_checkpoints: its minimum


def main() -> int:
    parser = Parser(prog="launch/gpu_train.py", description=__doc__)
    parser.add_argument(
        "--run",
        type=path_option,
        default="runs/gpu-train",
        metavar="DIR",
        help="for data, training run and checkpoints",
    )
    parser.add_argument("--small", action="store_true", help="sizes of a test, which a CPU can do")
    parser.add_argument(
        "--updates", type=positive, default=20, metavar="N", help="half before, half after (default 20)"
    )
    parser.add_argument("--micro-batch", type=positive, default=1, metavar="N", help="images per step (default 1)")
    parser.add_argument("--accumulation", type=positive, default=4, metavar="N", help="steps per update (default 4)")
    parser.add_argument(
        "--blocks",
        type=whole_numbers(f"indices of FLUX blocks as {_listed(FEW_BLOCKS)}"),
        metavar="1,19,56",
        help="trainable FLUX blocks (default: all of stage 1 if the disk has room for its checkpoints, "
        f"else {_listed(FEW_BLOCKS)})",
    )
    add_report_arguments(parser)
    args, train_options = parser.parse_known_args()
    if args.updates < 2 * (WARM_UP + 1):
        parser.error(f"--updates {args.updates}: use at least {2 * (WARM_UP + 1)}")

    import torch

    from megaflux.training.survival import events
    from megaflux_kernels.bench.machine import attention_backend, facts

    if not args.small and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU here, and FLUX.1-dev's sizes need one; --small trains a small model on a CPU")
    device, root = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(args.run)
    report = open_report(parser, args, facts(device, attention_backend(device, torch.bfloat16)))
    root.mkdir(parents=True, exist_ok=True)
    if line := unused(root):
        print(line, flush=True)
    values = settings(root, args)
    run = root / "run"

    def plan(blocks: list[int]) -> tuple[dict[str, Any], Path, str]:
        chosen = values | {"stages": [values["stages"][0] | {"blocks": blocks}]}
        sharding = choose_sharding(chosen, device)
        return chosen, sharding, shape_of(args, chosen, sharding)

    choices = [values["stages"][0]["blocks"], FEW_BLOCKS]
    if args.blocks is not None or args.small:
        choices = [args.blocks or choices[0]]
    blocks = choose_blocks(run, values, choices, lambda blocks: report.has("train", "ours", plan(blocks)[-1]))
    values, sharding, shape = plan(blocks)
    if report.has("train", "ours", shape):
        print(table(row for row in report.rows if row.bench == "train"))
        return 0
    print(f"blocks that train: {_listed(blocks)}; {sharding.name}", flush=True)
    config = write(root / "gpu-train.yaml", values)
    make_data(root / "data", values["data"]["longest_side"], tuple(values["data"]["aspect_ratios"]))

    if run.exists():
        shutil.rmtree(run)  # each measurement is a new run; the data are kept
    half = args.updates // 2
    train(config, sharding, "--train.stop_after", str(half), *train_options)
    train(config, sharding, *train_options)
    starts = [event.get("update") for event in events.read(run) if event["kind"] == "start"]
    if starts[-1:] != [half]:
        raise UserError(f"{run}: the second process did not resume at update {half}; see its output")
    report.add(*measured(run, args.updates, shape, half))
    print(table(row for row in report.rows if row.bench == "train"))
    return 0


def settings(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration with stage 1 only: of the preset dev, or with --small 2 + 2 blocks of width 64 and pictures of
    64 px, which take seconds."""
    values, half = dev(), args.updates // 2
    values["model"] |= {"flux": None, "vlm": None, "vae": None}  # None: FLUX.1's VAE
    values["data"] |= {"path": str(root / "data"), "aspect_ratios": list(RATIOS), "num_workers": 4}
    values["stages"] = [values["stages"][0] | {"blocks": PUBLISHED_STAGES["stage1"]}]
    if args.small:
        small = tiny()["model"]
        flux = small["flux_config"] | {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}
        values["model"] |= {
            "flux_config": flux,
            "vlm_config": small["vlm_config"],
            "clip_config": small["clip_config"],
            "latent_channels": small["latent_channels"],
            "vlm_max_tokens": 16,
            "vae": "tiny",
        }
        values["data"] |= {"longest_side": 64, "num_workers": 0, "aspect_ratios": ["1:1", "2:1"]}
        values["stages"] = [values["stages"][0] | {"blocks": [1, 3]}]
    values["run"] = {"dir": str(root / "run")}
    values["train"] |= {
        "updates": args.updates,
        "global_batch_size": args.micro_batch * args.accumulation,
        "micro_batch_size": args.micro_batch,
        "checkpoint_every": half,
        "keep_checkpoints": KEEP,
    }
    values["validation"] = {"every": 0, "panel_every": 0, "samples": 2, "panel_samples": 1, "steps": 2}
    values["monitor"] = {"every": 1, "grad_norms_every": 0}
    return values


def shape_of(args: argparse.Namespace, values: dict[str, Any], sharding: Path) -> str:
    """The setup of a measurement for the report, such as "1024 px micro 1 x 4 zero2_offload"."""
    shape = f"{values['data']['longest_side']} px micro {args.micro_batch} x {args.accumulation} {sharding.stem}"
    blocks = values["stages"][0]["blocks"]
    return shape if args.small or blocks == PUBLISHED_STAGES["stage1"] else f"{shape} blocks {_listed(blocks)}"


def unused(root: Path) -> str:
    """A line that names models in --run which an earlier version made and nothing reads any more; "" if there are none."""
    left = [path for path in (root / "flux", root / "qwen", root / "complete") if path.exists()]
    files = [file for path in left for file in (path, *path.rglob("*")) if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e9
    names = ", ".join(map(str, left))
    return f"{names}: {size:.1f} GB that an earlier version made and nothing uses any more; delete them" if left else ""


def choose_blocks(
    run: Path,
    values: dict[str, Any],
    choices: list[list[int]],
    measured: Callable[[list[int]], bool] = lambda blocks: False,
) -> list[int]:
    """The first of these lists of blocks that is measured already, which needs no disk, or whose checkpoints fit on the disk
    (files of an earlier run count as free). UserError, naming the space that is needed, where none fits."""
    from megaflux.config.parse import build_config
    from megaflux.models.pretrained import meta_models
    from megaflux.training.checkpoint.retention import most_at_once
    from megaflux.training.planning.costs import stage_table

    had = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    free = shutil.disk_usage(run.parent).free + had
    for blocks in choices:
        if measured(blocks):
            return blocks
        config = build_config(values | {"stages": [values["stages"][0] | {"blocks": blocks}]})
        trained = sum(stage_table(config, meta_models(config)[0])[0].trainable.values())
        count = most_at_once(config, 0)
        need = count * checkpoint_bytes(trained)
        if need <= free:
            return blocks
    fewer = "" if blocks == FEW_BLOCKS else f", or fewer blocks (--blocks {_listed(FEW_BLOCKS)})"
    raise UserError(
        f"--run {run.parent}: {free / 1e9:.1f} GB free, and training asks for {need / 1e9:.1f}, {count} checkpoints of "
        f"{trained / 1e9:.2f} B trained parameters; give another disk{fewer}"
    )


def checkpoint_bytes(trained: int) -> int:
    """Bytes of a checkpoint of `trained` parameters in bfloat16."""
    from megaflux.training.checkpoint import space

    return space.checkpoint_bytes(trained, trained, 2)


def choose_sharding(values: dict[str, Any], device: Any) -> Path:
    """zero2.json if training fits on the device with every block recomputed, by training's own estimate (16 bytes for each
    trained parameter are part of it); else zero2_offload.json."""
    import torch

    from megaflux.config.parse import build_config
    from megaflux.training.ds_config import load_ds_config, with_defaults
    from megaflux.training.planning.memory import memory_per_gpu, usable
    from megaflux.training.planning.sizes import Sizes

    here, offloaded = (ROOT / "ds_configs" / name for name in ("zero2.json", "zero2_offload.json"))
    if device.type != "cuda":
        return here
    config = build_config(values)
    need = memory_per_gpu(Sizes.of(config, with_defaults(load_ds_config(here)), 1)).total
    free, total = torch.cuda.mem_get_info(device)
    return here if need <= free - (total - usable(total)) else offloaded


def make_data(folder: Path, side: int, ratios: tuple[str, ...]) -> None:
    """A prepared dataset of generated pictures in every bucket, some of them held out."""
    if (folder / "dataset.json").is_file():
        return
    from megaflux.bench.loader import make_pictures
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    make_pictures(folder.parent / "pictures", 20 * len(ratios), side, ratios)
    options = Options(longest_side=side, aspect_ratios=ratios, held_out=0.2)
    prepare(str(folder.parent / "pictures"), folder, options, progress=False)


def write(path: Path, values: dict[str, Any]) -> Path:
    """The run's YAML file."""
    import yaml

    path.write_text(yaml.safe_dump(values))
    return path


def train(config: Path, sharding: Path, *options: str) -> None:
    """Run launch/train_random.py in DeepSpeed's launcher. Exits with its code if it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As a module, because the commands of packages that were installed into a folder (--target) are not on the PATH.
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "1",
        "--master_port",
        str(port),
        str(ROOT / "launch" / "train_random.py"),
        "--deepspeed",
        str(sharding),
        "--preset",
        "dev",
        "--config",
        str(config),
        *options,
    ]
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    print("$ " + " ".join(command), flush=True)
    if code := subprocess.run(command, env=env, stderr=subprocess.STDOUT).returncode:
        sys.exit(code)


def measured(run: Path, updates: int, shape: str, half: int) -> list[Row]:
    """Rows from the run's TensorBoard points; rates leave out the first updates of each process."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megaflux_kernels.bench.timing import median

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()

    def points(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    losses = points("train/loss")
    if set(losses) != set(range(1, updates + 1)):
        raise UserError(f"{run}: points of {len(losses)} updates, not of {updates}; see its output")
    counted = [u for u in losses if not (u <= WARM_UP or half < u <= half + WARM_UP)]
    n = len(counted)

    def row(metric: str, name: str, unit: str, scale: float = 1.0) -> Row:
        found = points(name)
        return Row("train", "ours", shape, metric, scale * median([found[u] for u in counted]), unit, n)

    peak = max(points("memory/peak_gb").values())
    return [
        row("images_per_s", "speed/images_per_second", "1/s"),
        row("mfu", "speed/mfu", "1"),
        row("data_wait_fraction", "speed/data_wait_fraction", "1"),
        Row("train", "ours", shape, "peak_bytes", peak * 1e9, "bytes", updates),
        Row("train", "ours", shape, "loss_first", losses[1], "1"),
        Row("train", "ours", shape, "loss_last", losses[updates], "1"),
    ]


def _listed(blocks: list[int]) -> str:
    return ",".join(map(str, blocks))


if __name__ == "__main__":
    exit_on_user_error(main)
