"""The options that were given -> a Request: what to make, with which weights, and how to write it.

Checks all that can be checked without opening a file or loading a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED_SOURCES
from megaflux.generation.dots import dots as dotting
from megaflux.generation.job import Input, Job, JobReference, Mode, Runtime, check
from megaflux.generation.layout import is_export, read_manifest
from megaflux.generation.limits import check_numbers
from megaflux.generation.request import check_prompt, check_seeds
from megaflux.infer import values

FOLDERS = ("flux", "vlm", "vae")
"""Fields of a Runtime that say where a run's base weights are now."""
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Output:
    """Where pictures go, and what is written beside and into them."""

    folder: Path = Path("outputs")
    metadata: bool = True
    """Write the settings into each PNG."""
    embed_inputs: bool = False
    """Write the input files into each PNG as well, so that it can be replayed anywhere."""
    save_control: bool = False
    """Write the control maps and the mask as pictures, too."""


@dataclass(frozen=True)
class Request:
    """A checked command line."""

    job: Job
    runtime: Runtime
    output: Output


def to_request(given: Mapping[str, Any], base: tuple[Job, Runtime] | None = None) -> Request:
    """The request of options as argparse returns them (those not given are absent).

    base: what the options change, of the picture that is replayed; None: the defaults, and --checkpoint is required.
    UserError, one line, for invalid options and for options that do not fit together.
    """
    job = to_job(given, None if base is None else base[0])
    runtime = to_runtime(given, None if base is None else base[1])
    if job.controls and not runtime.controlnet:
        raise UserError("--control: no ControlNet; give --controlnet DIR")
    if job.attention_map and runtime.kernels == "off":
        cause = "--quantize and sequential offload" if _moves_weights(runtime) else "--kernels off"
        raise UserError(f"--attention-map: needs megaflux's own path; leave out {cause}")
    output = Output(
        folder=Path(given.get("out", Output.folder)),
        metadata=not given.get("no_metadata", False),
        embed_inputs=given.get("embed_inputs", False),
        save_control=given.get("save_control", False),
    )
    return Request(job, runtime, output)


def to_job(given: Mapping[str, Any], base: Job | None = None) -> Job:
    """The checked job of the options. base: the job that they change. UserError as for `to_request`."""
    check_numbers(given, values.option_of)
    job = base or Job()
    changes = _pictures(given, job.references)
    if controls := [
        *map(values.control, given.get("control", ())),
        *map(values.control_image, given.get("control_image", ())),
    ]:
        changes["controls"] = tuple(controls)
    if base is None or {"count", "seed"} & set(given):
        changes["seeds"] = _seeds(given, base)
    dots, weighting = _dots(given)
    changes |= weighting | {name: given[name] for name in Job.model_fields if name in given and name not in changes}
    if "prompt" in given and not check_prompt(given["prompt"]).strip():
        print("--prompt is empty: " + ("the references alone are used" if changes.get("references") else "ignored"))
        changes["prompt"] = ""
    if "negative" in given and not check_prompt(given["negative"], "--negative").strip():
        print("--negative is empty: with --cfg, the empty condition is used")
        changes["negative"] = ""
    if changes.get("cfg") == 1 and "negative" not in given:  # the base's would be without effect
        changes["negative"] = ""
    if {"aspect", "sizes", "match_input_size"} & set(changes):  # replaces the base's way of giving the size
        changes = {"width": None, "height": None, "match_input_size": False} | changes
    job = job.model_copy(update=changes)
    if base is None and "mode" not in changes:
        job = job.model_copy(update={"mode": implied_mode(job)})
    return check(_validated(Job, job.model_dump()), values.option_of, dots)


def to_runtime(given: Mapping[str, Any], base: Runtime | None = None) -> Runtime:
    """The runtime of the options, its paths absolute. base: the runtime that they change. UserError as for `to_request`."""
    changes = {name: given[name] for name in Runtime.model_fields if name in given}
    if "controlnet" in changes:
        changes["controlnet"] = dict(values.controlnet(text) for text in changes["controlnet"])
    for name in ("depth_model", "line_model", "sam_model", *FOLDERS):
        if name in changes and changes[name] not in SHIPPED_SOURCES.get(name, ()):
            changes[name] = values.model_source(changes[name], values.option_of(name))
    if "checkpoint" in changes:  # those of a replayed picture belong to its own checkpoint
        changes = dict.fromkeys(FOLDERS) | changes
    if base is None and "checkpoint" not in changes:
        raise UserError("--checkpoint: missing; give a run's folder or an export's")
    runtime = _validated(Runtime, ({} if base is None else base.model_dump()) | changes)
    if not os.path.isdir(runtime.checkpoint):  # Path.is_dir raises where a name is too long
        what = "not a folder" if values.exists(runtime.checkpoint) else "no such folder"
        raise UserError(f"--checkpoint {runtime.checkpoint}: {what}; give a run's folder or an export's")
    runtime = runtime.model_copy(update={"checkpoint": str(Path(runtime.checkpoint).absolute())})
    if is_export(runtime.checkpoint):
        if moved := [name for name in FOLDERS if name in given]:
            raise UserError(
                f"{values.option_of(moved[0])}: {runtime.checkpoint} is an export, which holds all its weights; leave it out"
            )
        if "ema" in given:
            _check_averaged(runtime.checkpoint, given["ema"])
        # a replayed picture's are of the run that is exported here
        unset = {"update": None, "ema": False}
        runtime = runtime.model_copy(update={name: value for name, value in unset.items() if name not in given})
    if runtime.quantize and runtime.offload == "sequential":
        raise UserError(
            "--quantize with --offload sequential: torchao's weights cannot be moved layer by layer; use model"
        )
    # megaflux's own path reads plain weights that stay where they are.
    return runtime.model_copy(update={"kernels": "off"}) if _moves_weights(runtime) else runtime


def _check_averaged(export: str, ema: bool) -> None:
    """UserError where an export's weights are not what --ema or --no-ema asks for: it holds one set of them."""
    if bool(read_manifest(Path(export)).source.get("ema")) != ema:
        option, there = ("--ema", "weights, not their averages") if ema else ("--no-ema", "averaged weights")
        again = "export the run again, with --ema" if ema else "leave it out, or export the run again, without --ema"
        raise UserError(f"{option}: {export} is an export of a run's {there}; {again}")


def _moves_weights(runtime: Runtime) -> bool:
    return runtime.quantize is not None or runtime.offload == "sequential"


def _pictures(given: Mapping[str, Any], before: Sequence[JobReference]) -> dict[str, Any]:
    """The job's fields for --reference, --image, --mask and --mask-point. before: the references that new ones replace."""
    changes: dict[str, Any] = {}
    if "reference" in given:
        changes["references"] = tuple(
            _replacing(before[i], text) if i < len(before) else values.reference(text)
            for i, text in enumerate(given["reference"])
        )
    for name in ("image", "mask"):
        if name in given:
            changes[name] = Input(file=values.absolute(given[name], f"--{name}"))
    if "mask_point" in given:
        from megaflux.generation.control.detectors import parse_point

        changes["mask_points"] = tuple(parse_point(text) for text in given["mask_point"])
    return changes


def _replacing(old: JobReference, text: str) -> JobReference:
    """A reference in place of another one: it keeps the dots, and the strength unless `text` names one."""
    new = values.reference(text)
    strength = old.strength if values.with_number(text, "--reference")[0] == text else new.strength
    return new.model_copy(update={"dots": old.dots, "strength": strength})


def _seeds(given: Mapping[str, Any], base: Job | None) -> tuple[int, ...]:
    """The seeds of --seed and --count; what is not given is the base's, or 0 and 4."""
    first = given.get("seed", base.seeds[0] if base else 0)
    count = given.get("count", len(base.seeds) if base else 4)
    check_seeds(first, count, values.option_of)
    return tuple(range(first, first + count))


def _dots(given: Mapping[str, Any]) -> tuple[dict[int, list[dotting.Dot]], dict[str, Any]]:
    """({index of a reference: its dots}, the weighting that a file of dots sets) of --dots and --dot."""
    dots: dict[int, list[dotting.Dot]] = {}
    weighting: dict[str, Any] = {}
    if "dots" in given:
        dots, found = dotting.read_dots(given["dots"])
        weighting = {name: given.get(name, value) for name, value in found.items()}
    for text in given.get("dot", ()):
        index, dot = dotting.parse_dot(text)
        dots.setdefault(index, []).append(dot)
    return dots, weighting


def implied_mode(job: Job) -> Mode:
    """The mode of a job for which none was named, from what it holds."""
    masked = job.mask is not None or job.mask_points
    if job.controls:
        return "controlnet-inpaint" if masked else "controlnet"
    if masked:
        return "inpaint"
    if job.image is not None:
        return "img2img"
    return "variation" if job.references or not job.prompt.strip() else "text"


def _validated(model: type[Model], fields: dict[str, Any]) -> Model:
    """A pydantic model of its fields. UserError that names the option of the first invalid one."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = values.option_of(str(first["loc"][0])) if first["loc"] else "--options"
        raise UserError(f"{name} {first['input']}: {first['msg']}") from None
