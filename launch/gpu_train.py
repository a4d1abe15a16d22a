"""make gpu-train: the real thing on one GPU: launch/train.py at FLUX.1-dev's sizes, saved, resumed and measured.

    python launch/gpu_train.py [--run runs/gpu-train] [--small] [--json FILE] [options of launch/train.py]

Random weights in the published layouts (bfloat16, safetensors: FLUX, its VAE and CLIP, Qwen2-VL) and generated pictures
at 1024 px; then stage 1 of the preset dev under ds_configs/zero2_offload.json: half of the updates, a checkpoint, and
the other half by a second process that resumes. Weights and data are made once. --small: the same at sizes of a test.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from megaflux.errors import UserError, exit_on_user_error
from megaflux.presets import PUBLISHED_STAGES, dev, tiny
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, open_report, positive, table

ROOT = Path(__file__).parent.parent
RATIOS = ("16:9", "2:1", "2.35:1", "1:1", "1:2")  # of the preset's buckets
WARM_UP = 2  # updates of each process that are not counted
DONE = "complete"  # file that says that a folder's weights are whole
# config.json of black-forest-labs/FLUX.1-dev, vae/ and scheduler/
VAE_SCALES = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True}
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
             "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip


def main() -> int:
    parser = Parser(prog="launch/gpu_train.py", description=__doc__)
    parser.add_argument("--run", default="runs/gpu-train", metavar="DIR", help="for weights, data and the training run")
    parser.add_argument("--small", action="store_true", help="sizes of a test, which a CPU can do")
    parser.add_argument(
        "--updates", type=positive, default=20, metavar="N", help="half before, half after (default 20)"
    )
    parser.add_argument("--micro-batch", type=positive, default=1, metavar="N", help="images per step (default 1)")
    parser.add_argument("--accumulation", type=positive, default=4, metavar="N", help="steps per update (default 4)")
    add_report_arguments(parser)
    args, train_options = parser.parse_known_args()
    if args.updates < 2 * (WARM_UP + 1):
        parser.error(f"--updates {args.updates}: use at least {2 * (WARM_UP + 1)}")

    import torch

    from megaflux_kernels.bench.machine import attention_backend, facts

    if not args.small and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU here, and FLUX.1-dev's sizes need one; --small trains a small model on a CPU")
    device, root = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Path(args.run)
    report = open_report(parser, args, facts(device, attention_backend(device, torch.bfloat16)))
    values = small_values() if args.small else dev()
    values["data"].setdefault("aspect_ratios", RATIOS)
    if report.has("train", "ours", shape_of(args, values)):
        print(table(row for row in report.rows if row.bench == "train"))
        return 0
    root.mkdir(parents=True, exist_ok=True)
    if not args.small:
        check_space(root)
    make_weights(root, values, device)
    config = configuration(root, values, args)
    make_data(root / "data", values["data"]["longest_side"], tuple(values["data"]["aspect_ratios"]))

    run = root / "run"
    if run.exists():
        shutil.rmtree(run)  # a measurement starts anew; weights and data stay
    half = args.updates // 2
    train(config, "--train.stop_after", str(half), *train_options)
    said = train(config, *train_options)
    if not any(f"at update {half}" in line for line in said):
        raise UserError(f"{run}: the second process did not say that it resumes at update {half}")
    report.add(*measured(run, args, values, half))
    print(table(row for row in report.rows if row.bench == "train"))
    return 0


def shape_of(args: argparse.Namespace, values: dict[str, Any]) -> str:
    return f"{values['data']['longest_side']} px micro {args.micro_batch} x {args.accumulation}"


def small_values() -> dict[str, Any]:
    """The preset dev with a model of seconds: 2 + 2 blocks of width 64, pictures of 64 px."""
    values, small = dev(), tiny()["model"]
    flux = small["flux_config"] | {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2}
    values["model"] |= {"flux_config": flux, "vlm_config": small["vlm_config"], "clip_config": small["clip_config"],
                        "latent_channels": small["latent_channels"], "vlm_max_tokens": 16}  # fmt: skip
    values["data"] |= {"longest_side": 64, "num_workers": 0, "aspect_ratios": ("1:1", "2:1")}
    values["stages"] = [values["stages"][0] | {"blocks": [1, 3]}]
    return values


def check_space(root: Path) -> None:
    """UserError where the disk has no room for the weights and two checkpoints."""
    weights = 24 + 17 + 1
    have = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) / 1e9
    need = weights + 2 * 26 - have  # a checkpoint: weights and float32 master and moments of about 1.6 B parameters
    free = shutil.disk_usage(root).free / 1e9
    if free < need:
        raise UserError(f"--run {root}: {free:.0f} GB free, about {need:.0f} more are needed; give another disk")


def make_weights(root: Path, values: dict[str, Any], device: Any) -> None:
    """root/flux and root/qwen: random weights in the published layouts, one part at a time."""
    import torch  # noqa: I001  (compat before diffusers and transformers)

    from megaflux import compat  # noqa: F401  (before diffusers and transformers)
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from transformers import Qwen2VLForConditionalGeneration

    from megaflux.bench.arms import random_flux
    from megaflux.models import pretrained, scratch
    from megaflux.training.costs import FLUX_VAE

    model, flux, qwen = values["model"], root / "flux", root / "qwen"
    wanted = json.dumps({name: model[name] for name in ("flux_config", "vlm_config", "clip_config")}, sort_keys=True)
    stamp = root / DONE
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    for folder in (flux, qwen):
        shutil.rmtree(folder, ignore_errors=True)
    print("making random weights in the published layouts ...", flush=True)
    transformer = random_flux(model["flux_config"], torch.bfloat16, device)
    transformer.save_pretrained(flux / "transformer")
    del transformer
    _free()
    if model["latent_channels"] == 16:
        vae = AutoencoderKL(**FLUX_VAE, **VAE_SCALES).to(torch.bfloat16)
    else:
        vae = pretrained.load_vae("tiny", None)
    vae.save_pretrained(flux / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(flux / "scheduler")
    clip, tokenizer = scratch.build_clip(model["clip_config"], 0)
    clip.save_pretrained(flux / "text_encoder")
    tokenizer.save_pretrained(flux / "tokenizer")
    processor = scratch.tiny_processor()
    config = scratch.vlm_configuration(model["vlm_config"], processor.tokenizer)
    config.tie_word_embeddings = False  # as the 7B has it
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            vlm = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    vlm.save_pretrained(qwen)
    del vlm
    _free()
    processor.save_pretrained(qwen)
    processor.image_processor.save_pretrained(qwen)  # transformers 5 saves it within processor_config.json alone
    stamp.write_text(wanted)


def make_data(folder: Path, side: int, ratios: tuple[str, ...]) -> None:
    """A prepared dataset of generated pictures in every bucket, some of them held out."""
    if (folder / "dataset.json").is_file():
        return
    from megaflux.bench.loader import make_pictures
    from megaflux.data.prepare import Options, prepare

    make_pictures(folder.parent / "pictures", 20 * len(ratios), side, ratios)
    options = Options(longest_side=side, aspect_ratios=ratios, held_out=0.2)
    prepare(str(folder.parent / "pictures"), folder, options, progress=False)


def configuration(root: Path, values: dict[str, Any], args: argparse.Namespace) -> Path:
    """The run's YAML file."""
    import yaml

    half = args.updates // 2
    stage = values["stages"][0]
    changes = {
        "run": {"dir": str(root / "run")},
        "model": {
            "flux": str(root / "flux"), "vlm": str(root / "qwen"), "flux_config": values["model"]["flux_config"],
            "vlm_config": values["model"]["vlm_config"], "clip_config": values["model"]["clip_config"],
            "latent_channels": values["model"]["latent_channels"],
            **({"vlm_max_tokens": values["model"]["vlm_max_tokens"]} if args.small else {}),
        },
        "data": {"path": str(root / "data"), "longest_side": values["data"]["longest_side"],
                 "aspect_ratios": list(values["data"]["aspect_ratios"]),
                 "num_workers": 0 if args.small else 4},
        "stages": [stage if args.small else stage | {"blocks": PUBLISHED_STAGES["stage1"]}],
        "train": {"updates": args.updates, "global_batch_size": args.micro_batch * args.accumulation,
                  "micro_batch_size": args.micro_batch, "checkpoint_every": half, "keep_checkpoints": 2},
        "validation": {"every": 0, "panel_every": 0, "samples": 2, "panel_samples": 1, "steps": 2},
        "monitor": {"every": 1, "grad_norms_every": 0},
    }  # fmt: skip
    path = root / "gpu-train.yaml"
    path.write_text(yaml.safe_dump(changes))
    return path


def train(config: Path, *options: str) -> list[str]:
    """One process of launch/train.py through DeepSpeed's launcher; returns the lines that it said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["deepspeed", "--num_accelerators", "1", "--master_port", str(port), str(ROOT / "launch" / "train.py"),
               "--deepspeed", str(ROOT / "ds_configs" / "zero2_offload.json"), "--preset", "dev",
               "--config", str(config), *options]  # fmt: skip
    print("$ " + " ".join(command), flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return lines


def measured(run: Path, args: argparse.Namespace, values: dict[str, Any], half: int) -> list[Row]:
    """Rows from the run's TensorBoard points, without the first updates of each process."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megaflux_kernels.bench.timing import median

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    shape = shape_of(args, values)

    def points(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    losses = points("train/loss")
    if set(losses) != set(range(1, args.updates + 1)):
        raise UserError(f"{run}: points of {len(losses)} updates, not of {args.updates}; see its output")
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
        Row("train", "ours", shape, "peak_bytes", peak * 1e9, "bytes", args.updates),
        Row("train", "ours", shape, "loss_first", losses[1], "1"),
        Row("train", "ours", shape, "loss_last", losses[args.updates], "1"),
    ]


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    exit_on_user_error(main)
