"""The options of python -m megaflux.infer, and those that the panel's command line shares with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from megaflux.common.command import EMA_HELP, Parser, add_folder_options
from megaflux.common.paths import keyed_path_option, path_option
from megaflux.generation.job import MODES

DESCRIPTION = """Pictures from a reference, a prompt, or both.

  variation   --reference cat.png                      new pictures of what is in it (the default)
  text        --prompt "a red fox"
  img2img     --mode img2img --image sketch.png --reference style.png
  inpaint     --mode inpaint --image room.png --mask window.png --reference sea.png
  controlnet  --mode controlnet --image room.png --control line:0.4 --control depth:0.2 --controlnet DIR --depth-model DIR

Writes DIR/<name>-seed7.png, ... and a contact sheet; never overwrites. Each PNG holds its settings: --from-image replays
it, with the changes that other options name.
"""


def add_checkpoint_options(add: Callable[..., Any]) -> None:
    """--checkpoint, --update, --ema, --flux, --vlm and --vae. add: a parser's add_argument, here and below."""
    add("--checkpoint", type=path_option, metavar="DIR", help="a run's folder, or an export's")
    add("--update", type=int, metavar="N", help="the run's checkpoint after N updates (default: the newest)")
    add("--ema", action=argparse.BooleanOptionalAction, help=EMA_HELP)
    add_folder_options(add)


def add_network_options(add: Callable[..., Any], masks: str) -> None:
    """ControlNets and detectors. masks: what Segment Anything is for, as the help says it."""
    add(
        "--controlnet",
        type=keyed_path_option,
        action="append",
        metavar="[KIND=]DIR",
        help="a FLUX ControlNet (union or for one kind)",
    )
    add("--depth-model", type=path_option, metavar="DIR", help="Depth Anything in transformers' layout")
    add("--line-model", type=path_option, metavar="DIR", help="folder of Anyline's MTEED.pth (default: Canny edges)")
    add("--sam-model", type=path_option, metavar="DIR", help=f"Segment Anything 2 in transformers' layout, {masks}")


def add_device_options(add: Callable[..., Any], kernels_off: str) -> None:
    """Device, dtype and ways to save memory. kernels_off: what --kernels off means, as the help says it."""
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), help="auto (default): bfloat16 on a GPU, float32 on the CPU"
    )
    add("--kernels", choices=("on", "off"), help=f"off: {kernels_off}")
    add(
        "--offload",
        choices=("model", "sequential"),
        help="keep weights in the host's memory: a part, or a layer, at a time on the GPU",
    )
    add("--quantize", choices=("fp8",), help="FLUX's block weights in float8")
    add("--compile", action="store_true", help="torch.compile FLUX's blocks: minutes at the start, then faster")


def _add_job_options(add: Callable[..., Any]) -> None:
    """What to make: mode, inputs, seeds, size and sampling."""
    add("--mode", choices=MODES, help="default: from what is given (a reference: variation; a prompt alone: text; ...)")
    add(
        "--reference",
        type=path_option,
        nargs="+",
        action="extend",
        metavar="IMG[:STRENGTH]",
        help="one or more pictures; strength 1 is as trained, 0.5 counts half",
    )
    add("--prompt", metavar="TEXT", help="words beside the references, or alone")
    add("--negative", metavar="TEXT", help="with --cfg: words to lead away from (default: the empty condition)")
    add(
        "--text-encoder",
        choices=("qwen", "t5"),
        help="who reads the prompts (default: what the weights were trained with)",
    )
    add("--reference-tokens", type=int, metavar="N", help="most tokens of a reference (default: as trained)")
    add(
        "--image",
        type=path_option,
        metavar="IMG",
        help="where img2img, inpaint and control begin (default: the first reference)",
    )
    add("--mask", type=path_option, metavar="IMG", help="inpaint: white is painted anew")
    add(
        "--mask-point",
        action="append",
        metavar="X,Y[,0]",
        help="inpaint: a point in the thing to paint (,0: not in it)",
    )
    add(
        "--strength",
        type=float,
        metavar="X",
        help="share of the steps taken from the image (default 0.8; 1: from noise)",
    )
    add("--count", type=int, metavar="N", help="pictures (default 4)")
    add("--seed", type=int, metavar="S", help="seeds are S, S + 1, ... (default 0)")
    add("--batch-size", type=int, metavar="N", help="pictures at a time (default 1)")
    add("--aspect", metavar="W:H", help="shape (default: the image's own, else 1:1)")
    add(
        "--sizes",
        choices=("training", "release"),
        help="what an aspect means: the training bucket, or the released "
        "tool's table of equal areas (default: the weights')",
    )
    add("--width", type=int, metavar="PX", help="with --height, instead of an aspect; multiples of 16")
    add("--height", type=int, metavar="PX")
    add("--match-input-size", action="store_true", help="the size of the image, or of the first reference")
    add("--steps", type=int, metavar="N", help="Euler steps (default 28)")
    add("--guidance", type=float, metavar="X", help="guidance value (default: the weights', usually 3.5)")
    add(
        "--cfg",
        type=float,
        metavar="S",
        help="true classifier-free guidance, which takes twice the time (default 1: off); for weights trained with "
        "data.condition.none",
    )
    add(
        "--release-compatible",
        action=argparse.BooleanOptionalAction,
        help="prepare pictures, and a ControlNet's tokens, as the released tool of Qwen2VL-Flux does",
    )
    add("--shift", type=float, metavar="X", help="fixed timestep shift (default: the scheduler's own)")


def _add_weighting_options(add: Callable[..., Any]) -> None:
    """How the tokens of references are weighted."""
    add(
        "--dot",
        action="append",
        metavar="[N:]X,Y,R,W",
        help="on reference N (default 1): centre 0..1, radius as a "
        "fraction of the shorter side, weight (0 leaves out, 1 neutral, 2 doubles); repeatable",
    )
    add(
        "--dots",
        type=path_option,
        metavar="FILE.json",
        help='the same: {"dots": [{"x", "y", "radius", "weight", "reference"}], "background"}',
    )
    add("--background", type=float, metavar="W", help="weight where no dot is (default 1; 0: only the dots)")
    add("--preserve-mass", action="store_true", help="rescale weights to the mean 1")
    add("--variety", type=float, metavar="P", help="share of the reference's tokens left out, other ones for each seed")
    add("--downsample", type=int, metavar="K", help="average K x K tokens: a vaguer reference (default 1)")
    add("--attention-map", action="store_true", help="also write where each picture looked; slower")


def _add_control_options(add: Callable[..., Any]) -> None:
    """Control maps and the networks for them."""
    add("--control", action="append", metavar="KIND[:SCALE]", help="a map made from the image: depth, line or canny")
    add("--control-image", type=keyed_path_option, action="append", metavar="KIND=IMG[:SCALE]", help="a ready map")
    add("--control-start", type=float, metavar="X", help="share of the steps before control acts (default 0)")
    add("--control-end", type=float, metavar="X", help="share of the steps after which it stops (default 1)")
    add("--save-control", action="store_true", help="write the control maps and the mask, too")
    add_network_options(add, masks="for --mask-point")


def _add_output_options(add: Callable[..., Any]) -> None:
    """Where the pictures go, and the device."""
    add("--out", type=path_option, metavar="DIR", help="folder for the pictures (default outputs)")
    add("--no-metadata", action="store_true", help="write no settings into the PNG")
    add("--embed-inputs", action="store_true", help="put the input files into the PNG: it can be run again anywhere")
    add_device_options(add, kernels_off="diffusers' own path instead of megaflux_kernels")


def build_parser() -> argparse.ArgumentParser:
    """Options that are not given stay out of the namespace, so that --from-image knows which to change."""
    parser = Parser(
        hint="see python -m megaflux.infer --help",
        allow_abbrev=True,
        prog="python -m megaflux.infer",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_checkpoint_options(add)
    add("--from-image", type=path_option, metavar="PNG", help="replay what made this picture, to the same pixels")
    add(
        "--interactive",
        action="store_true",
        help="keep the model loaded and read pictures, prompts and options by line",
    )
    add("--dry-run", action="store_true", help="print what would be loaded and made, and what is missing; load nothing")
    _add_job_options(parser.add_argument_group("what to make").add_argument)
    _add_weighting_options(parser.add_argument_group("dots: what in a reference matters").add_argument)
    _add_control_options(parser.add_argument_group("control").add_argument)
    _add_output_options(parser.add_argument_group("where to and on what").add_argument)
    return parser
