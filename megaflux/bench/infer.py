"""python -m megaflux.bench infer: seconds per picture, and peak memory, of our pipeline and of diffusers', by mode.

Three arms on the same weights and the same condition, in turns: `ours` (kernels on), `ours-kernels-off`, and `diffusers`,
the mode's plain pipeline with our condition as prompt_embeds. All encode the reference anew. Weights: a run's or an
export's, or random tiny ones; the ControlNet's are random. Memory: the allocator's peak on a GPU, `peak_bytes`; on a CPU
how much the process grows while an arm runs, `rss_growth_bytes`, sampled.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megaflux.common.paths import path_option
from megaflux_kernels.bench.machine import attention_backend, default_device, facts
from megaflux_kernels.bench.report import Parser, Row, add_report_arguments, one_of, open_report, positive, table
from megaflux_kernels.bench.timing import median, quantile, samples_ms

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from megaflux.generation.control.nets import ControlNets
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline

BENCH = "infer"
ARMS = ("diffusers", "ours", "ours-kernels-off")
MODES = ("variation", "img2img", "inpaint", "controlnet", "controlnet-inpaint")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=path_option,
        metavar="DIR",
        help="a run's or an export's folder (default: random tiny weights)",
    )
    parser.add_argument(
        "--arms",
        type=partial(one_of, known=ARMS, what="arm"),
        default=list(ARMS),
        metavar="A,B",
        help=f"of {', '.join(ARMS)} (default: all)",
    )
    parser.add_argument(
        "--modes",
        type=partial(one_of, known=MODES, what="mode"),
        default=["variation"],
        metavar="A,B",
        help=f"of {', '.join(MODES)} (default: variation)",
    )
    parser.add_argument("--steps", type=positive, default=28, metavar="N", help="Euler steps (default 28)")
    parser.add_argument("--side", type=positive, metavar="PX", help="of a square picture (default: that of training)")
    parser.add_argument("--samples", type=positive, default=4, metavar="N", help="pictures of each arm (default 4)")
    add_report_arguments(parser)


def run(parser: Parser, args: argparse.Namespace) -> int:
    from megaflux.common.errors import UserError

    if args.checkpoint and not Path(args.checkpoint).is_dir():
        parser.error(f"--checkpoint {args.checkpoint}: no such folder; give a run's or an export's")
    device = default_device()
    try:
        pipeline = load(args.checkpoint, device)
        side = args.side or pipeline.settings.longest_side
        from megaflux.generation.limits import check_numbers

        guidance = pipeline.settings.guidance
        check_numbers({"height": side, "width": side, "steps": args.steps, "guidance": guidance})
    except UserError as error:
        parser.error(str(error))
    transformer = pipeline.models.trainable.transformer
    heads, head_dim = transformer.config["num_attention_heads"], transformer.config["attention_head_dim"]
    report = open_report(
        parser, args, facts(device, attention_backend(device, transformer.dtype, heads, head_dim, 256))
    )
    blocks = f"{len(transformer.transformer_blocks)}+{len(transformer.single_transformer_blocks)}"
    size = f"{side}x{side} {args.steps} steps {blocks}x{heads}x{head_dim} {str(transformer.dtype).split('.')[-1]}"
    if any("controlnet" in mode for mode in args.modes):
        pipeline.controlnet = random_controlnet(pipeline)
    for mode in args.modes:
        shape = f"{mode} {size}"
        names = [arm for arm in args.arms if not report.has(BENCH, arm, shape)]
        times, peaks = measure(pipeline, mode, names, side, args.steps, args.samples, device)
        for arm, values in times.items():
            seconds = [value / 1e3 for value in values]
            memory = "peak_bytes" if device.type == "cuda" else "rss_growth_bytes"
            report.add(
                Row(BENCH, arm, shape, "image_s", median(seconds), "s", len(seconds)),
                Row(BENCH, arm, shape, "image_s_p10", quantile(seconds, 0.1), "s", len(seconds)),
                Row(BENCH, arm, shape, "image_s_p90", quantile(seconds, 0.9), "s", len(seconds)),
                Row(BENCH, arm, shape, memory, peaks[arm], "bytes"),
            )
    print(table(row for row in report.rows if row.bench == BENCH))
    return 0


def load(checkpoint: str | None, device: torch.device) -> Qwen2VLFluxPipeline:
    """The pipeline of a folder, or of the tiny preset with random weights. UserError for a folder that is neither."""
    from megaflux.generation.layout import Settings
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline
    from megaflux.runs import load_pipeline

    if checkpoint:
        return load_pipeline(checkpoint, device=device)
    from megaflux.config.parse import build_config
    from megaflux.config.presets import tiny
    from megaflux.models.pretrained import load_models

    config = build_config(tiny())
    models = load_models(config)
    with torch.no_grad():
        for parameter in models.trainable.transformer.parameters():
            if not parameter.any():  # weights that start at zero would make a blank picture
                parameter.normal_(0, 0.02)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Qwen2VLFluxPipeline(models.to(device, dtype), Settings.of(config))


def random_controlnet(pipeline: Qwen2VLFluxPipeline) -> ControlNets:
    """A union ControlNet of the transformer's width with 5 + 10 blocks, like the public one, or fewer if FLUX has fewer."""
    from diffusers.models import FluxControlNetModel

    from megaflux.generation.control.nets import ControlNets

    config = dict(pipeline.models.trainable.transformer.config)
    known = (
        "patch_size",
        "in_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "axes_dims_rope",
    )
    net = FluxControlNetModel(
        **{name: config[name] for name in known},
        num_layers=min(5, config["num_layers"]),
        num_single_layers=min(10, config["num_single_layers"]),
        num_mode=10,
    )
    num_blocks = config["num_layers"], config["num_single_layers"]
    nets = ControlNets({"": net.requires_grad_(False).eval()}, num_blocks)
    nets.to(pipeline.device, pipeline.dtype)
    return nets


@torch.no_grad()
def measure(
    pipeline: Qwen2VLFluxPipeline,
    mode: str,
    names: list[str],
    side: int,
    steps: int,
    samples: int,
    device: torch.device,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(milliseconds by arm, bytes by arm), the arms there and back."""
    from PIL import Image

    from megaflux.generation.condition import prompt_embeds
    from megaflux.generation.dots.dots import NEUTRAL
    from megaflux.generation.request import ControlMaps, Reference
    from megaflux.generation.sampling import Control, SamplingRequest, Start, flux_pipeline, sample, scheduler_like

    models = pipeline.models
    picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    mask = Image.new("L", (side, side))
    mask.paste(255, (side // 4, side // 4, side // 2, side // 2))
    given: dict = {}
    start: Start | None = None
    control: Control | None = None
    if mode != "variation" and mode != "controlnet":
        given |= {"image": picture, "strength": 0.8}
        start = Start(picture, 0.8, mask if "inpaint" in mode else None)
    if "inpaint" in mode:
        given["mask_image"] = mask
    if "controlnet" in mode and pipeline.controlnet is not None:
        given |= {
            "control_image": [picture, picture],
            "control_mode": ["depth", "line"],
            "controlnet_conditioning_scale": [0.2, 0.4],
        }
        control = pipeline.controlnet.control(ControlMaps([picture, picture], ["depth", "line"], [0.2, 0.4]))
    request = SamplingRequest(side, side, steps, pipeline.settings.guidance, start, control)

    def plain() -> None:
        embeds = prompt_embeds(pipeline.encode_all([Reference(picture)]), NEUTRAL, 0)
        flux = flux_pipeline(
            models.trainable.transformer,
            models.vae,
            scheduler_like(models.scheduler, None, pipeline.dtype),
            start,
            control,
        )
        sample(flux, models, embeds, [torch.Generator().manual_seed(0)], request)

    def ours() -> None:
        pipeline(picture, None, side, side, steps, seed=0, **given)

    runs: dict[str, tuple[bool, Callable[[], None]]] = {
        "diffusers": (False, plain),
        "ours": (True, ours),
        "ours-kernels-off": (False, ours),
    }
    times: dict[str, list[float]] = defaultdict(list)
    peaks: dict[str, float] = defaultdict(float)
    rounds = min(2, samples)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            kernels, make = runs[name]
            models.trainable.configure(kernels)
            share = samples * (turn + 1) // rounds - samples * turn // rounds
            with peak_memory(device) as peak:
                times[name] += samples_ms(make, device, share, warmup=1)
            peaks[name] = max(peaks[name], peak())
    return times, peaks


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Yields a function that returns the peak bytes: the allocator's, or the growth of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device))
        return
    import threading

    import psutil

    process, done = psutil.Process(), threading.Event()
    first = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: float(most - first)
    finally:
        done.set()
        thread.join()
