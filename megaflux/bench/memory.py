"""python -m megaflux.bench memory: the formulas of training/planning/memory.py beside what is counted, for the preset dev.

Activations of one micro-batch, forward and backward through all 57 blocks, and the VAE's maps, on fake tensors; ZeRO's
bytes per trainable parameter from a small real engine of DeepSpeed (where it is installed). No GPU is needed; about ten
seconds per row. Not counted: workspaces of convolutions and attention, fragmentation, the CUDA context.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaflux.bench.update_memory import update_peak, vae_peaks, zero_peak
from megaflux.config.parse import build_config
from megaflux.config.presets import PRESETS
from megaflux.config.schema import Config
from megaflux.data.buckets import make_buckets
from megaflux.models.latents import coding_peak
from megaflux.models.pretrained import Models, load_models, meta_models
from megaflux.training.planning import memory
from megaflux.training.planning.activations import activation_bytes
from megaflux.training.planning.costs import token_counts, vae_config
from megaflux.training.planning.sizes import Sizes
from megaflux_kernels.bench.machine import default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, positive, table

BENCH = "memory"
PLANS = ("none", "mlp", "full", "auto")
STAGES = ("stage1", "stage2", "stage3")
ZERO_CONFIG = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
BUCKET_ELEMENTS = 200_000  # of the small engine: a bucket holds some of its parameters, not all, as in a real run


def add_arguments(parser: Parser) -> None:
    def add(name: str, known: tuple[str, ...], default: list[str], what: str) -> None:
        parser.add_argument(
            f"--{name}",
            type=partial(one_of, known=known, what=what),
            default=default,
            metavar="A,B",
            help=f"of {', '.join(known)} (default {','.join(default)})",
        )

    add("stages", STAGES, ["stage1", "stage3"], "stage")
    add("plans", PLANS, list(PLANS), "plan")
    parser.add_argument(
        "--batches",
        type=positive,
        nargs="+",
        default=[1, 2, 8],
        metavar="N",
        help="images per micro-batch (default 1 2 8)",
    )
    parser.add_argument("--ranks", type=positive, default=8, metavar="N", help="GPUs that the plan auto is for")
    parser.add_argument("--gpu-memory", type=positive, default=80, metavar="GB", help="of each of them (default 80)")
    parser.add_argument("--all-buckets", action="store_true", help="every aspect ratio, not the square alone")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    report = open_report(parser, args, facts(default_device(), "flash"))
    config, ds_config = build_config(PRESETS["dev"]()), json.loads(ZERO_CONFIG.read_text())
    buckets = make_buckets(config.data.aspect_ratios, config.data.longest_side)
    square = max(buckets, key=lambda bucket: bucket.height * bucket.width)
    module, trunk = meta_models(config)

    def add(arm: str, shape: str, counted: int, formula: int) -> None:
        report.add(
            Row(BENCH, arm, shape, "counted", float(counted), "bytes"),
            Row(BENCH, arm, shape, "formula", float(formula), "bytes"),
            Row(BENCH, arm, shape, "formula_of_counted", formula / counted, "1"),
        )

    for batch in args.batches:
        values = PRESETS["dev"]()
        values["train"] |= {"micro_batch_size": batch, "global_batch_size": batch * args.ranks}
        sized = build_config(values)
        for stage in (stage for stage in sized.stages if stage.name in args.stages):
            for plan in args.plans:
                policies = [plan] * _blocks(module)
                if plan == "auto":
                    budget = memory.usable(args.gpu_memory * 1e9)
                    sizes = Sizes(sized, ds_config, args.ranks, module, trunk)
                    policies = memory.policies_for(sizes, stage, budget)
                for bucket in buckets if args.all_buckets else [square]:
                    arm, shape = f"{stage.name}-{plan}", f"{bucket} b{batch}: {memory.counted(policies)}"
                    if not report.has(BENCH, arm, shape):
                        formula = batch * activation_bytes(module, stage, token_counts(sized, bucket), 2, policies)
                        add(arm, shape, update_peak(sized, module, stage, bucket, batch, policies), formula)
    for dtype in (torch.bfloat16, torch.float32):
        for pictures in (1, 2, 8):
            counted = vae_peaks(vae_config(config), pictures, square, dtype)
            channels = vae_config(config)["block_out_channels"]
            formulas = coding_peak(channels, pictures, square.height, square.width, dtype.itemsize, False)
            for arm, found, formula in zip(("vae-encode", "vae-decode"), counted, formulas, strict=True):
                add(arm, f"{square} b{pictures} {str(dtype).removeprefix('torch.')}", found, formula)
    if importlib.util.find_spec("deepspeed") is not None:
        from megaflux.training import distributed

        distributed.start()
        for averaged in (False, True):
            for name, (found, formula) in small_zero(ds_config, averaged).items():
                add(name, f"tiny, 1 rank, bfloat16{', ema' * averaged}", found, formula)
        distributed.stop()
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0


def small_zero(ds_config: dict[str, Any], averaged: bool = False) -> dict[str, tuple[int, int]]:
    """{"zero-in-flight", "zero-kept"}: (counted, by the formula) bytes of a small engine in bfloat16, on one rank. averaged: with
    an average of the weights."""
    zero = ds_config["zero_optimization"] | {"reduce_bucket_size": BUCKET_ELEMENTS}
    ds_config = ds_config | {"zero_optimization": zero}
    config, models = _tiny()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"ema_decay": 0.9 * averaged})})
    module, stage = models.trainable, config.stages[1]
    in_flight, kept = zero_peak(config, module, 1, ds_config)
    gradients, optimizer, host = memory.zero_bytes(ds_config, 1, module, stage, 2, averaged)
    return {"zero-in-flight": (in_flight, gradients), "zero-kept": (kept, optimizer + host)}


def _tiny() -> tuple[Config, Models]:
    values = PRESETS["tiny"]()
    values["train"] |= {"global_batch_size": 2, "micro_batch_size": 1}
    config = build_config(values)
    return config, load_models(config).to("cpu", torch.bfloat16)


def _blocks(module: Any) -> int:
    return len(module.transformer.transformer_blocks) + len(module.transformer.single_transformer_blocks)
