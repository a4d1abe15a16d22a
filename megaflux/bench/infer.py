"""python -m megaflux.bench infer: seconds per picture, and peak memory, of our pipeline and of diffusers'.

Three arms on the same weights and the same condition, turn and turn about: `ours` (kernels on), `ours-kernels-off`, and
`diffusers`, FluxPipeline fed our condition as prompt_embeds. Weights: a run's or an export's, or random tiny ones.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaflux_kernels.bench.machine import attention_backend, default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, positive, table
from megaflux_kernels.bench.timing import median, quantile, samples_ms

if TYPE_CHECKING:
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline

BENCH = "infer"
ARMS = ("diffusers", "ours", "ours-kernels-off")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="a run's or an export's folder (default: random tiny weights)"
    )
    parser.add_argument("--arms", type=partial(one_of, known=ARMS, what="arm"), default=list(ARMS), metavar="A,B",
                        help=f"of {', '.join(ARMS)} (default: all)")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=28, metavar="N", help="Euler steps (default 28)")
    parser.add_argument("--side", type=positive, metavar="PX", help="of a square picture (default: that of training)")
    parser.add_argument("--samples", type=positive, default=4, metavar="N", help="pictures of each arm (default 4)")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    from megaflux.errors import UserError

    if args.checkpoint and not Path(args.checkpoint).is_dir():
        parser.error(f"--checkpoint {args.checkpoint}: no such folder; give a run's or an export's")
    device = default_device()
    try:
        pipeline = load(args.checkpoint, device)
        side = args.side or pipeline.settings.longest_side
        from megaflux.generation.pipeline import check_sampling

        check_sampling(side, side, args.steps, pipeline.settings.guidance)
    except UserError as error:
        parser.error(str(error))
    transformer = pipeline.models.trainable.transformer
    heads, head_dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    report = open_report(
        parser, args, facts(device, attention_backend(device, transformer.dtype, heads, head_dim, 256))
    )  # fmt: skip
    blocks = f"{len(transformer.transformer_blocks)}+{len(transformer.single_transformer_blocks)}"
    shape = f"{side}x{side} {args.steps} steps {blocks}x{heads}x{head_dim} {str(transformer.dtype).split('.')[-1]}"
    names = [arm for arm in args.arms if not report.has(BENCH, arm, shape)]
    times, peaks = measure(pipeline, names, side, args.steps, args.samples, device)
    for arm, values in times.items():
        seconds = [value / 1e3 for value in values]
        found = [
            Row(BENCH, arm, shape, "image_s", median(seconds), "s", len(seconds)),
            Row(BENCH, arm, shape, "image_s_p10", quantile(seconds, 0.1), "s", len(seconds)),
            Row(BENCH, arm, shape, "image_s_p90", quantile(seconds, 0.9), "s", len(seconds)),
        ]
        report.add(*found, *([Row(BENCH, arm, shape, "peak_bytes", peaks[arm], "bytes")] if arm in peaks else []))
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0


def load(checkpoint: str | None, device: torch.device) -> Qwen2VLFluxPipeline:
    """The pipeline of a folder, or of the tiny preset with random weights. UserError for a folder that is neither."""
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline, Settings
    from megaflux.runs import load_pipeline

    if checkpoint:
        return load_pipeline(checkpoint, device=device)
    from megaflux.config import build_config
    from megaflux.models.pretrained import load_models
    from megaflux.presets import tiny

    config = build_config(tiny())
    models = load_models(config)
    with torch.no_grad():
        for parameter in models.trainable.transformer.parameters():
            if not parameter.any():  # what starts at zero would be a picture of nothing
                parameter.normal_(0, 0.02)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Qwen2VLFluxPipeline(models.to(device, dtype), Settings.of(config))


@torch.no_grad()
def measure(
    pipeline: Qwen2VLFluxPipeline, names: list[str], side: int, steps: int, samples: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(milliseconds by arm, peak bytes by arm on a GPU), the arms there and back."""
    from PIL import Image

    models = pipeline.models
    condition, _ = pipeline.encode(Image.linear_gradient("L").resize((side, side)).convert("RGB"))
    models.trainable.configure(False)
    prompt_embeds = models.trainable.encode_condition(condition)

    def plain() -> None:
        pipeline.flux(
            prompt_embeds=prompt_embeds, pooled_prompt_embeds=models.pooled_projections.to(prompt_embeds),
            height=side, width=side, num_inference_steps=steps, guidance_scale=pipeline.settings.guidance,
            generator=torch.Generator().manual_seed(0), output_type="pil",
        )  # fmt: skip

    def ours() -> None:
        pipeline.sample(condition, 0, side, side, steps)

    runs: dict[str, tuple[bool, Callable[[], None]]] = {
        "diffusers": (False, plain), "ours": (True, ours), "ours-kernels-off": (False, ours),
    }  # fmt: skip
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = defaultdict(float)
    rounds = min(2, samples)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            kernels, sample = runs[name]
            models.trainable.configure(kernels)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            share = samples * (turn + 1) // rounds - samples * turn // rounds
            times[name] += samples_ms(sample, device, share, warmup=1)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], float(torch.cuda.max_memory_allocated(device)))
    return times, peaks
