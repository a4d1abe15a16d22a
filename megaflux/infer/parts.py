"""The parts that a Runtime loads: where each comes from and how many parameters it has. Reads configurations and the
headers of files, no weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaflux.common.errors import UserError
from megaflux.generation.job import Job, Runtime
from megaflux.generation.layout import Settings, is_export, read_manifest
from megaflux.generation.request import DETECTED

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from torch import nn

    from megaflux.config.schema import Model


@dataclass(frozen=True)
class Part:
    """One thing to load."""

    name: str
    source: str
    parameters: int | None
    """None: unknown until it is fetched from the hub."""


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint or export without its weights."""

    settings: Settings
    parts: list[Part]
    width: int
    """Of FLUX's hidden states."""
    cell: int
    """px per reference token, each way."""


def facts_of(runtime: Runtime) -> Facts:
    """Of the runtime's checkpoint or export. UserError where it is missing or not complete."""
    return _export_facts(runtime) if is_export(runtime.checkpoint) else _run_facts(runtime)


def _export_facts(runtime: Runtime) -> Facts:
    """From an export's manifest, its config.json files and the headers of its weights."""
    root = Path(runtime.checkpoint)
    settings = read_manifest(root).settings
    flux = json.loads((root / "transformer/config.json").read_text())
    vlm = json.loads((root / "text_encoder/config.json").read_text())["vision_config"]
    names = {"FLUX": "transformer", "Qwen2-VL": "text_encoder", "connector": "connector", "VAE": "vae"}
    if "t5" in settings.text_encoders:
        names |= {"T5": "text_encoder_2", "T5's linear": "t5_embedder"}
    parts = [Part(name, str(root / folder), parameters_in(root / folder)) for name, folder in names.items()]
    return Facts(
        settings,
        parts,
        flux["num_attention_heads"] * flux["attention_head_dim"],
        vlm["patch_size"] * vlm["spatial_merge_size"],
    )


def _run_facts(runtime: Runtime) -> Facts:
    """From a run's configuration, and its modules on the meta device."""
    from megaflux.models.pretrained import meta_models
    from megaflux.runs import Folders, check_sources, find

    run = find(runtime.checkpoint, runtime.update, Folders(runtime.flux, runtime.vlm, runtime.vae), runtime.ema)
    check_sources(run)
    model = run.config.model
    trainable, trunk = meta_models(run.config)
    weights = (
        f"update {run.manifest['update']}{', averaged,' * runtime.ema} over {model.flux or 'weights from the seed'}"
    )
    parts = [
        Part("FLUX", weights, _count(trainable.transformer)),
        Part("Qwen2-VL", model.vlm or "weights from the seed", _count(trainable.vlm, trunk)),
        Part("connector", str(run.checkpoint), _count(trainable.connector)),
        _vae_part(model),
    ]
    flux: Any = trainable.transformer.config
    vision: Any = trunk.config.vision_config
    return Facts(
        Settings.of(run.config),
        parts,
        flux.num_attention_heads * flux.attention_head_dim,
        vision.patch_size * vision.spatial_merge_size,
    )


def _count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _vae_part(model: Model) -> Part:
    from megaflux.models.shipped import VAES

    if model.vae is not None:
        source, folder = model.vae, VAES.get(model.vae) or Path(model.vae)
    elif model.flux is not None:
        source, folder = model.flux, Path(model.flux) / "vae"
    else:
        raise UserError("model.vae: neither it nor model.flux names a VAE; set one in the run's config.yaml")
    return Part("VAE", source, parameters_in(folder) if folder.is_dir() else None)


def extra_parts(job: Job, runtime: Runtime) -> tuple[list[Part], list[str]]:
    """(the ControlNets and detectors that a job needs, one line for each that is missing or not complete)."""
    from megaflux.generation.control.detectors import NEEDED, OPTIONS, Sources, lacking

    made = [control.kind for control in job.controls if control.image is None and control.kind in DETECTED]
    given = {"depth": runtime.depth_model, "line": runtime.line_model, "sam": runtime.sam_model}
    needed = {
        "depth": "depth" in made,
        "line": "line" in made and bool(runtime.line_model),
        "sam": bool(job.mask_points),
    }
    sources = {name: given[name] for name, is_needed in needed.items() if is_needed}
    problems = [NEEDED[name] for name, source in sources.items() if source is None] + lacking(Sources(**sources))
    parts, found = _controlnet_parts(runtime.controlnet)
    problems += found
    for name, source in sources.items():
        if source is not None:
            parts += _part_of(OPTIONS[name][2:], source)
    return parts, problems


def _controlnet_parts(nets: Mapping[str, str]) -> tuple[list[Part], list[str]]:
    """(the part of each complete ControlNet, one line for each fault of the others). nets: {kind: source}."""
    from megaflux.models.sources import DIFFUSERS_MODEL, source_problems

    parts: list[Part] = []
    problems: list[str] = []
    for kind, source in nets.items():
        if found := source_problems(source, {"": DIFFUSERS_MODEL}):
            problems += [f"--controlnet {line}" for line in found]
        else:
            parts += _part_of(f"ControlNet {kind}".strip(), source)
    return parts, problems


def _part_of(name: str, source: str) -> list[Part]:
    """The part of a hub name or a folder; [] for a folder that is missing."""
    from megaflux.models.sources import hub_name

    if hub_name(source):
        return [Part(name, f"{source} (hub)", None)]
    folder = Path(source)
    if not folder.is_dir():
        return []
    anyline = sum(file.stat().st_size // 4 for file in folder.glob("**/MTEED.pth"))  # float32
    return [Part(name, source, parameters_in(folder) or anyline)]


def parameters_in(folder: Path) -> int:
    """Number of elements of all tensors in a folder's safetensors files, from their headers; without lm_head, which is not
    kept. UserError naming a file that cannot be read."""
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length < 1e8 else {}
        except (OSError, struct.error, ValueError):
            raise UserError(f"{file}: cannot be read as safetensors; get it again") from None
        total += sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if name not in ("__metadata__", "lm_head.weight")
        )
    return total
