"""The command line of megaflux.infer.make: options -> Job and Runtime, checked as far as that needs no model."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from megaflux.common.errors import UserError
from megaflux.common.paths import keyed_path_option, path_option
from megaflux.generation.dots import dots as dotting
from megaflux.generation.job import (
    MAX_COUNT,
    MAX_SIDE,
    MODES,
    Input,
    Job,
    JobControl,
    JobReference,
    Runtime,
    check,
    check_background,
)
from megaflux.generation.request import MAX_SEED, check_prompt

DESCRIPTION = """Pictures from a reference, a prompt, or both.

  variation   --reference cat.png                      new pictures of what is in it (the default)
  text        --prompt "a red fox"
  img2img     --mode img2img --image sketch.png --reference style.png
  inpaint     --mode inpaint --image room.png --mask window.png --reference sea.png
  controlnet  --mode controlnet --image room.png --control line:0.4 --control depth:0.2 --controlnet DIR --depth-model DIR

Writes DIR/<name>-seed7.png, ... and a contact sheet; never overwrites. Each PNG holds its settings: --from-image runs
it again, and other options given beside it change what they name.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m megaflux.infer --help")


def add_networks(add: Callable[..., Any], masks: str) -> None:
    """The options that name other people's networks, here and of the panel. add: a parser's add_argument; masks: what Segment
    Anything is for."""
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


def build_parser() -> argparse.ArgumentParser:
    """Options left out stay out of the namespace, so that --from-image knows which were given."""
    parser = _Parser(
        prog="python -m megaflux.infer",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=path_option, metavar="DIR", help="a run's folder, or an export's")
    add("--update", type=int, metavar="N", help="the run's checkpoint after N updates (default: the newest)")
    add("--from-image", type=path_option, metavar="PNG", help="run again what made this picture, to the same pixels")
    add(
        "--interactive",
        action="store_true",
        help="keep the model loaded and read pictures, prompts and options by line",
    )
    add("--dry-run", action="store_true", help="say what would be loaded and made, and what is missing; load nothing")

    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add("--mode", choices=MODES, help="default: by what is given (a reference: variation; a prompt alone: text; ...)")
    add(
        "--reference",
        type=path_option,
        nargs="+",
        action="extend",
        metavar="IMG[:STRENGTH]",
        help="one or more pictures; strength 1 is as trained, 0.5 counts half",
    )
    add("--prompt", metavar="TEXT", help="words beside the references, or alone")
    add(
        "--text-encoder",
        choices=("qwen", "t5"),
        help="who reads the prompt (default: what the weights were trained with)",
    )
    add("--reference-tokens", type=int, metavar="N", help="most tokens of a reference (default: as trained)")
    add(
        "--image",
        type=path_option,
        metavar="IMG",
        help="where img2img, inpaint and control begin (default: the first reference)",
    )
    add("--mask", type=path_option, metavar="IMG", help="inpaint: white is painted anew; of the image's size")
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
    add("--width", type=int, metavar="PX", help="with --height, in the place of an aspect; multiples of 16")
    add("--height", type=int, metavar="PX")
    add("--match-input-size", action="store_true", help="the size of the image, or of the first reference")
    add("--steps", type=int, metavar="N", help="Euler steps (default 28)")
    add("--guidance", type=float, metavar="X", help="guidance value (default: that of training, usually 3.5)")
    add("--shift", type=float, metavar="X", help="fixed timestep shift (default: the scheduler's own)")

    group = parser.add_argument_group("dots: what in a reference matters")
    add = group.add_argument
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

    group = parser.add_argument_group("control")
    add = group.add_argument
    add("--control", action="append", metavar="KIND[:SCALE]", help="a map made from the image: depth, line or canny")
    add("--control-image", type=keyed_path_option, action="append", metavar="KIND=IMG[:SCALE]", help="a ready map")
    add("--control-start", type=float, metavar="X", help="share of the steps before control acts (default 0)")
    add("--control-end", type=float, metavar="X", help="share of the steps after which it stops (default 1)")
    add("--save-control", action="store_true", help="write the control maps and the mask, too")
    add_networks(add, masks="for --mask-point")

    group = parser.add_argument_group("where to and on what")
    add = group.add_argument
    add("--out", type=path_option, metavar="DIR", help="folder for the pictures (default outputs)")
    add("--no-metadata", action="store_true", help="write no settings into the PNG")
    add("--embed-inputs", action="store_true", help="put the input files into the PNG: it can be run again anywhere")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add(
        "--dtype", choices=("auto", "bfloat16", "float32"), help="auto (default): bfloat16 on a GPU, float32 on the CPU"
    )
    add("--kernels", choices=("on", "off"), help="off: diffusers' own path instead of megaflux_kernels")
    add(
        "--offload",
        choices=("model", "sequential"),
        help="keep weights in the host's memory: a part, or a layer, at a time on the GPU",
    )
    add("--quantize", choices=("fp8",), help="FLUX's block weights in float8")
    add("--compile", action="store_true", help="torch.compile FLUX's blocks: minutes at the start, then faster")
    return parser


def parse(
    argv: list[str] | None, base: tuple[Job, Runtime] | None = None
) -> tuple[Job, Runtime | None, dict[str, Any]]:
    """(checked Job, Runtime, the other options given). base: what options change; Runtime None: no --checkpoint, which
    only a base may supply. UserError: one line per problem."""
    given = vars(build_parser().parse_args(argv))
    return to_job(given, base)


def to_job(given: dict[str, Any], base: tuple[Job, Runtime] | None = None) -> tuple[Job, Runtime, dict[str, Any]]:
    """Options as argparse gives them -> (checked Job, Runtime, the rest)."""
    given = dict(given)
    check_values(given)
    job = base[0] if base else Job()
    changes: dict[str, Any] = {}
    if "reference" in given:
        texts = given.pop("reference")
        changes["references"] = tuple(in_place(reference(t), t, job.references[i : i + 1]) for i, t in enumerate(texts))
    for name in ("image", "mask"):
        if name in given:
            changes[name] = Input(file=path_of(given.pop(name), f"--{name}"))
    if "mask_point" in given:
        from megaflux.generation.control.detectors import parse_point

        changes["mask_points"] = tuple(parse_point(text) for text in given.pop("mask_point"))
    controls = [control(text) for text in given.pop("control", [])] + [
        control_image(text) for text in given.pop("control_image", [])
    ]
    if controls:
        changes["controls"] = tuple(controls)
    if "prompt" in given and not check_prompt(given["prompt"]).strip():
        print("--prompt is empty: " + ("the references alone are used" if changes.get("references") else "ignored"))
        given["prompt"] = ""
    count, seed = given.pop("count", None), given.pop("seed", None)
    if base is None or count is not None or seed is not None:
        if (count or 1) > MAX_COUNT:
            raise UserError(f"--count {count}: use at most {MAX_COUNT}")
        first, many = (job.seeds[0] if base else 0) if seed is None else seed, count or (len(job.seeds) if base else 4)
        if not 0 <= first <= MAX_SEED - many:
            raise UserError(f"--seed {first}: use 0 to {MAX_SEED - many}")
        changes["seeds"] = tuple(range(first, first + many))
    dots: dict[int, list] = {}
    if "dots" in given:
        dots, rest = dotting.read_dots(given.pop("dots"))
        changes |= rest
    for text in given.pop("dot", []):
        number, dot = dotting.parse_dot(text)
        dots.setdefault(number, []).append(dot)
    changes |= {name: given.pop(name) for name in list(given) if name in Job.model_fields}
    # One way of saying the size takes the place of another.
    if {"aspect", "sizes", "match_input_size"} & set(changes):
        changes = {"width": None, "height": None, "match_input_size": False} | changes
    # Which mode, where none was named: by what is given.
    merged = job.model_copy(update=changes)
    if "mode" not in changes and (base is None or {"references", "image", "mask", "controls"} & set(changes)):
        merged = merged.model_copy(update={"mode": mode_of(merged) if base is None else merged.mode})
    merged = validated(Job, merged.model_dump(), "")
    merged = with_dots(check(merged), dots)
    dotting.check_weighting(merged.weighting)
    check_background(merged)
    runtime_values = {name: given.pop(name) for name in list(given) if name in Runtime.model_fields}
    if "controlnet" in runtime_values:
        runtime_values["controlnet"] = dict(net(text) for text in runtime_values["controlnet"])
    for name in ("depth_model", "line_model", "sam_model"):
        if name in runtime_values:
            runtime_values[name] = source_of(runtime_values[name], f"--{name.replace('_', '-')}")
    if base is None and "checkpoint" not in runtime_values:
        raise UserError("--checkpoint: missing; give a run's folder or an export's")
    runtime = validated(Runtime, (base[1].model_dump() if base else {}) | runtime_values, "")
    if not os.path.isdir(runtime.checkpoint):  # Path's own raises where a name is too long
        what = "not a folder" if is_there(runtime.checkpoint) else "no such folder"
        raise UserError(f"--checkpoint {runtime.checkpoint}: {what}; give a run's folder or an export's")
    runtime = runtime.model_copy(update={"checkpoint": str(Path(runtime.checkpoint).absolute())})
    if merged.controls and not runtime.controlnet:
        raise UserError("--control: no ControlNet; give --controlnet DIR")
    if runtime.quantize or runtime.offload == "sequential":
        if merged.attention_map:
            raise UserError("--attention-map: needs megaflux's own path; leave out --quantize and sequential offload")
        runtime = runtime.model_copy(update={"kernels": "off"})
    if runtime.kernels == "off" and merged.attention_map:
        raise UserError("--attention-map: needs megaflux's own path; leave out --kernels off")
    if runtime.quantize and runtime.offload == "sequential":
        raise UserError(
            "--quantize with --offload sequential: torchao's weights cannot be moved layer by layer; use model"
        )
    return merged, runtime, given


def check_values(given: dict[str, Any]) -> None:
    """UserError for a number that cannot be, named by its option."""
    for name, least in (("count", 1), ("steps", 1), ("batch_size", 1), ("downsample", 1), ("reference_tokens", 4)):
        if given.get(name, least) < least:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: use at least {least}")
    for name in ("width", "height"):
        if name in given and not (16 <= given[name] <= MAX_SIDE and given[name] % 16 == 0):
            raise UserError(f"--{name} {given[name]}: use a positive multiple of 16, at most {MAX_SIDE}")
    if "guidance" in given and not (math.isfinite(given["guidance"]) and given["guidance"] >= 0):
        raise UserError(f"--guidance {given['guidance']}: use a number of at least 0")
    if "shift" in given and not (math.isfinite(given["shift"]) and given["shift"] > 0):
        raise UserError(f"--shift {given['shift']}: use a number above 0 (1 is none)")
    if "strength" in given and not 0 < given["strength"] <= 1:
        raise UserError(f"--strength {given['strength']}: use a number above 0 and at most 1")
    for name in ("control_start", "control_end"):
        if name in given and not 0 <= given[name] <= 1:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: use a number from 0 to 1")
    if given.get("control_start", 0.0) >= given.get("control_end", 1.0):
        raise UserError("--control-start: is not before --control-end")
    if "aspect" in given:
        from megaflux.data.buckets import make_buckets

        try:
            make_buckets([given["aspect"]], 1024)
        except UserError as error:
            raise UserError(f"--aspect: {error}") from None


def mode_of(job: Job) -> str:
    """The mode that what is given means."""
    masked = job.mask is not None or job.mask_points
    if job.controls:
        return "controlnet-inpaint" if masked else "controlnet"
    if masked:
        return "inpaint"
    if job.image is not None:
        return "img2img"
    return "variation" if job.references or not job.prompt.strip() else "text"


def with_dots(job: Job, dots: dict[int, list]) -> Job:
    """The job with dots on its references, in the place of those it had. UserError for a reference that is not there."""
    if not dots:
        return job
    if max(dots) >= len(job.references):
        there = f"there are {len(job.references)}" if job.references else "there is none"
        raise UserError(f"dot on reference {max(dots) + 1}: {there}; dots count references from 1")
    references = [
        r.model_copy(update={"dots": tuple(dots[i])}) if i in dots else r for i, r in enumerate(job.references)
    ]
    return job.model_copy(update={"references": tuple(references)})


def reference(text: str) -> JobReference:
    """IMG or IMG:STRENGTH. A file whose name ends like that is taken as it stands."""
    file, strength = with_number(text, "--reference")
    if not 0 < strength < math.inf:
        raise UserError(f"--reference {text}: strength {strength:g}; use a number above 0, or leave the picture out")
    return JobReference(file=path_of(file, "--reference"), strength=strength)


def control(text: str) -> JobControl:
    """KIND or KIND:SCALE."""
    kind, scale = with_number(text, "--control", exists=False)
    return JobControl(kind=known_kind(kind, "--control"), scale=check_scale(scale, f"--control {text}"))


def control_image(text: str) -> JobControl:
    """KIND=IMG or KIND=IMG:SCALE."""
    kind, equals, rest = text.partition("=")
    if not equals or not rest:
        raise UserError(f"--control-image {text}: use KIND=IMG, as in depth=map.png")
    file, scale = with_number(rest, "--control-image")
    image = Input(file=path_of(file, "--control-image"))
    return JobControl(
        kind=known_kind(kind, "--control-image"), scale=check_scale(scale, f"--control-image {text}"), image=image
    )


def known_kind(kind: str, option: str) -> str:
    from megaflux.generation.control.detectors import UNION_MODES

    if kind not in UNION_MODES:
        raise UserError(f"{option} {kind}: no such kind; use {', '.join(UNION_MODES)}")
    return kind


def check_scale(scale: float, where: str) -> float:
    if not 0 <= scale < math.inf:
        raise UserError(f"{where}: scale {scale:g}; use a number of at least 0")
    return scale


def net(text: str) -> tuple[str, str]:
    """[KIND=]DIR; the kind "" reads any map."""
    kind, equals, source = text.partition("=")
    kind, source = (known_kind(kind, "--controlnet"), source) if equals else ("", text)
    return kind, source_of(source, f"--controlnet {kind}".strip())


def source_of(text: str, option: str) -> str:
    """A model's folder as an absolute path; what is no folder here may be a hub's OWNER/NAME and stays as it is."""
    return path_of(text, option) if is_there(text) else text


def sources(runtime: Runtime) -> dict[str, str]:
    """{option: folder or hub name} of everything beside the checkpoint that a runtime loads."""
    nets = {f"--controlnet {kind}".strip(): source for kind, source in runtime.controlnet.items()}
    given = {name: getattr(runtime, name) for name in ("depth_model", "line_model", "sam_model")}
    return nets | {f"--{name.replace('_', '-')}": source for name, source in given.items() if source is not None}


def check_sources(runtime: Runtime) -> None:
    """UserError, before anything is loaded, for a source that is neither a folder nor a hub's OWNER/NAME
    (megaflux/models/sources.py), and for the folder of a ControlNet or detector that is not whole."""
    from megaflux.generation.control.detectors import Sources, lacking
    from megaflux.models.sources import DIFFUSERS_MODEL, folder_problems, hub_name, problem

    for option, source in sources(runtime).items():
        if why := problem(source):
            raise UserError(f"{option} {source}: {why}")
        local_net = option.startswith("--controlnet") and hub_name(source) is None
        if local_net and (found := folder_problems(Path(source), {"": DIFFUSERS_MODEL})):
            raise UserError("; ".join(f"{option} {line}" for line in found))
    detectors = Sources(depth=runtime.depth_model, line=runtime.line_model, sam=runtime.sam_model)
    if found := lacking(detectors):
        raise UserError("; ".join(found))


def in_place(new: JobReference, text: str, before: tuple[JobReference, ...]) -> JobReference:
    """A reference given in the place of another: the dots stay, and the strength where `text` names none."""
    for old in before:
        strength = old.strength if with_number(text, "--reference")[0] == text else new.strength
        return new.model_copy(update={"dots": old.dots, "strength": strength})
    return new


def with_number(text: str, option: str, exists: bool = True) -> tuple[str, float]:
    """`NAME:NUMBER` -> (NAME, NUMBER); NAME alone has the number 1. exists: a file of the whole name goes first."""
    name, colon, number = text.rpartition(":")
    if not colon or (exists and is_there(text)):
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        if exists:
            return text, 1.0  # a colon in a file's name
        raise UserError(f"{option} {text}: {number!r} is no number") from None


def path_of(file: str, option: str) -> str:
    """An absolute path: what is stored must be found from another folder, too. UserError for a name that no text holds."""
    try:
        file.encode()
    except UnicodeEncodeError:
        raise UserError(f"{option} {ascii(file)}: the name is not valid UTF-8; rename the file") from None
    return str(Path(file).absolute())


def is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or a NUL in it
        return False


def validated(cls: type, values: dict[str, Any], where: str) -> Any:
    """A pydantic model of values. UserError naming the option."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        raise UserError(f"{where}--{name} {first['input']}: {first['msg']}") from None
