"""A Runtime -> the loaded pipeline and its detectors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaflux.common.errors import UserError
from megaflux.generation.job import Runtime
from megaflux.generation.layout import is_export
from megaflux.infer.values import option_of

if TYPE_CHECKING:  # torch takes seconds to import: --help and bad input do not wait for it
    from megaflux.generation.control.detectors import Detectors
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline


@dataclass(frozen=True)
class Loaded:
    """What makes pictures."""

    pipeline: Qwen2VLFluxPipeline
    detectors: Detectors
    """Each is loaded when it is first used."""
    runtime: Runtime
    """As asked for, with the run's update filled in."""


def load(runtime: Runtime) -> Loaded:
    """The pipeline with its ControlNets, quantized, offloaded and compiled as the runtime says. UserError for sources that
    are missing or not complete."""
    import torch

    from megaflux.generation import runtime as fitting
    from megaflux.generation.control.detectors import Detectors, Sources
    from megaflux.generation.runtime import device_and_dtype
    from megaflux.runs import Folders, load_pipeline

    quiet_libraries()
    check_sources(runtime)
    device, default = device_and_dtype(runtime.device, None)
    if runtime.offload and device.type == "cpu":
        raise UserError("--offload: keeps weights off a GPU, and there is none here; leave it out")
    dtype = {"auto": default, "bfloat16": torch.bfloat16, "float32": torch.float32}[runtime.dtype]
    load_on = "cpu" if runtime.offload else device
    folders = Folders(runtime.flux, runtime.vlm, runtime.vae)
    kernels = runtime.kernels == "on"
    pipeline = load_pipeline(runtime.checkpoint, runtime.update, dtype, load_on, kernels, folders, runtime.ema)
    if runtime.controlnet:
        nets = runtime.controlnet
        pipeline.load_controlnet(nets[""] if set(nets) == {""} else nets)
    if runtime.quantize:
        fitting.quantize_fp8(pipeline.models.trainable.transformer)
    if runtime.offload == "model":
        pipeline.enable_model_cpu_offload(device)
    elif runtime.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device)
    if runtime.compile:
        fitting.compile_blocks(pipeline.models.trainable.transformer)
    if not is_export(runtime.checkpoint):
        runtime = runtime.model_copy(update={"update": pipeline.source.get("update")})
    sources = Sources(runtime.depth_model, runtime.line_model, runtime.sam_model)
    return Loaded(pipeline, Detectors(sources, device), runtime)


def check_sources(runtime: Runtime) -> None:
    """UserError for a ControlNet or detector that is neither a folder nor a hub's OWNER/NAME, or whose folder is not
    complete. Loads nothing."""
    from megaflux.generation.control.detectors import Sources, lacking
    from megaflux.models.sources import DIFFUSERS_MODEL, folder_problems, hub_name, problem

    nets = {f"--controlnet {kind}".strip(): source for kind, source in runtime.controlnet.items()}
    detectors = {name: getattr(runtime, name) for name in ("depth_model", "line_model", "sam_model")}
    given = nets | {option_of(name): source for name, source in detectors.items() if source is not None}
    for option, source in given.items():
        if why := problem(source):
            raise UserError(f"{option} {source}: {why}")
        local_net = option in nets and hub_name(source) is None
        if local_net and (found := folder_problems(Path(source), {"": DIFFUSERS_MODEL})):
            raise UserError("; ".join(f"{option} {line}" for line in found))
    if found := lacking(Sources(runtime.depth_model, runtime.line_model, runtime.sam_model)):
        raise UserError("; ".join(found))


def quiet_libraries() -> None:
    """No progress bars and hints of diffusers and transformers between our own lines."""
    import diffusers
    import transformers

    # diffusers' own ControlNet imports FluxPosEmbed from its old place
    warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated", category=FutureWarning)
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
