"""--dry-run of megaflux.infer.make: what would be loaded and made, how much memory that takes, and what is missing."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.generation.job import Job, Runtime
from megaflux.generation.request import DETECTED
from megaflux.generation.run import Opened, read_inputs, resolve_size, steps_taken

GB = 1e9
WIDTHS_ALIVE = 15  # (B, S, width) tensors alive at once inside a single block: streams, q, k, v, attention, MLP, joined
VAE_CHANNELS = (128, 256)  # of FLUX's VAE, its two outermost levels


@dataclass(frozen=True)
class Part:
    """One thing to load."""

    name: str
    source: str
    parameters: int | None
    """None: not known before it is fetched."""


@dataclass(frozen=True)
class Facts:
    """What a dry run knows of the weights."""

    settings: Any
    parts: list[Part]
    width: int
    cell: int
    """px per reference token, each way."""


def report(job: Job, runtime: Runtime, embedded: Mapping[str, bytes] | None = None) -> int:
    """Print the report; 0, or 2 where something is missing (each a `problem:` line). Loads no weights."""
    from megaflux.generation.control.detectors import read_mask

    problems: list[str] = []
    opened = Opened({}, {}, [])
    try:
        job, opened = read_inputs(job, embedded)
        if job.mask is not None:
            read_mask(opened.masks[job.mask.sha256], opened[job.image].size)
    except UserError as error:
        problems.append(str(error))
    try:
        facts = export_facts(runtime) if is_export(runtime.checkpoint) else run_facts(runtime)
    except UserError as error:
        problems.append(str(error))
        facts = None
    extra, lacking = extra_parts(job, runtime)
    problems += lacking
    if facts is not None:
        wants_t5 = job.prompt and (job.text_encoder or facts.settings.text_encoders[0]) == "t5"
        if wants_t5 and "t5" not in facts.settings.text_encoders:
            problems.append("--text-encoder t5: these weights have none; use qwen")
        try:
            describe(job, opened, facts)
        except UserError as error:
            problems.append(str(error))
        print_memory([*facts.parts, *extra], job, runtime, facts)
    for problem in problems:
        print(f"problem: {' '.join(problem.split())}")
    return 2 if problems else 0


def describe(job: Job, opened: Opened, facts: Facts) -> None:
    """The job's lines of the report."""
    print(f"mode        {job.mode}")
    if all(item.sha256 in opened.data for item in job.inputs()):
        job = resolve_size(job, opened, facts.settings.longest_side, facts.settings.sizes)
    picture_tokens = condition = 0
    if job.width is not None:
        picture_tokens = (job.height // 16) * (job.width // 16)
        print(f"size        {job.width}x{job.height} px, {picture_tokens} tokens")
    print(f"pictures    {len(job.seeds)}, seeds {job.seeds[0]} to {job.seeds[-1]}, {job.batch_size} at a time")
    print(f"steps       {steps_taken(job)} in all")
    for reference in job.references:
        if reference.sha256 in opened.pictures:
            tokens = reference_tokens(opened[reference].size, facts, job.reference_tokens)
            condition += math.prod(-(-side // job.downsample) for side in tokens)
            print(
                f"reference   {Path(reference.file).name}: {tokens[0]}x{tokens[1]} = {math.prod(tokens)} tokens, strength "
                f"{reference.strength:g}, {len(reference.dots)} dots"
            )
    if job.prompt:
        print(f"prompt      {len(job.prompt)} characters, at most {facts.settings.caption_max_tokens} tokens")
    if picture_tokens:
        print(f"attention   over {condition + picture_tokens} tokens, the prompt's not counted")


def reference_tokens(size: tuple[int, int], facts: Facts, most: int | None) -> tuple[int, int]:
    """(rows, columns) of a reference of (width, height) px, as Qwen2-VL's image processor rounds."""
    from megaflux.models.tokens import condition_grid

    scale = min(1.0, facts.settings.longest_side / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    most = most or facts.settings.vlm_max_tokens
    return condition_grid(height, width, most, facts.cell, min(most, facts.settings.vlm_min_tokens))


@dataclass(frozen=True)
class Memory:
    """Estimated bytes."""

    sizes: dict[str, float]
    """Of each part's weights."""
    weights: float
    """On the device at the same time."""
    working: float

    @property
    def peak(self) -> float:
        return self.weights + self.working


def estimate(parts: list[Part], job: Job, runtime: Runtime, facts: Facts) -> Memory:
    """Memory on the device: weights in their dtype, as far as offload keeps them there, and the larger of FLUX's and the
    VAE decoder's working memory."""
    width = bytes_each(runtime)
    sizes = {p.name: (p.parameters or 0) * (1.1 if p.name == "FLUX" and runtime.quantize else width) for p in parts}
    from megaflux.models.latents import coding_peak  # late: torch

    height, wide = job.height or facts.settings.longest_side, job.width or facts.settings.longest_side
    decoding = coding_peak(VAE_CHANNELS, 1, height, wide, width)[1]  # pictures are decoded one by one
    tokens = height * wide / 256 + facts.settings.vlm_max_tokens * max(1, len(job.references))
    working = max(job.batch_size * WIDTHS_ALIVE * tokens * facts.width * width, decoding)
    weights = {"model": max(sizes.values()), "sequential": 0.02 * max(sizes.values())}.get(
        runtime.offload, sum(sizes.values())
    )
    return Memory(sizes, weights, working)


def print_memory(parts: list[Part], job: Job, runtime: Runtime, facts: Facts) -> None:
    """A table of the parts and the estimated peak on the device."""
    memory = estimate(parts, job, runtime, facts)
    print(f"\nto load, in {'float32' if bytes_each(runtime) == 4 else 'bfloat16'}:")
    for part in parts:
        amount = "   would be fetched     "
        if part.parameters is not None:
            amount = f"{part.parameters / 1e6:10.1f} M {memory.sizes[part.name] / GB:8.2f} GB"
        print(f"  {part.name:<14}{amount}  {part.source}")
    print(
        f"  estimated peak on the device: {memory.peak / GB:.1f} GB: {memory.weights / GB:.1f} weights"
        f"{' at a time' if runtime.offload else ''}, {memory.working / GB:.1f} working memory"
    )
    if on_gpu(runtime):
        print(f"  free there: {free_bytes(runtime) / GB:.1f} GB; {advice(memory, runtime) or 'fits'}")


def warn_of_memory(job: Job, runtime: Runtime) -> None:
    """On a GPU, before anything is loaded: a line if the estimate is above what is free."""
    if not on_gpu(runtime):
        return
    facts = export_facts(runtime) if is_export(runtime.checkpoint) else run_facts(runtime)
    memory = estimate([*facts.parts, *extra_parts(job, runtime)[0]], job, runtime, facts)
    if said := advice(memory, runtime):
        print(f"memory: about {memory.peak / GB:.1f} GB wanted, {free_bytes(runtime) / GB:.1f} free: {said}")


def advice(memory: Memory, runtime: Runtime) -> str:
    """Empty where it fits."""
    return "" if memory.peak < free_bytes(runtime) else "does not fit; try --offload model or --quantize fp8"


def free_bytes(runtime: Runtime) -> float:
    import torch

    return float(torch.cuda.mem_get_info(torch.device(runtime.device or "cuda"))[0])


def bytes_each(runtime: Runtime) -> int:
    """Of one weight in the runtime's dtype."""
    return 4 if runtime.dtype == "float32" or (runtime.dtype == "auto" and not on_gpu(runtime)) else 2


def on_gpu(runtime: Runtime) -> bool:
    import torch

    return torch.cuda.is_available() and (runtime.device or "cuda").startswith("cuda")


def is_export(path: str) -> bool:
    from megaflux.generation.layout import MANIFEST

    return any((Path(path) / name).is_file() for name in (MANIFEST, "model_index.json"))


def export_facts(runtime: Runtime) -> Facts:
    """From an export's manifest, its files' headers and config.json's."""
    from megaflux.generation.layout import read_manifest

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


def run_facts(runtime: Runtime) -> Facts:
    """From a run's configuration and the modules it describes, on the meta device."""
    from megaflux.generation.layout import Settings
    from megaflux.models.pretrained import meta_models
    from megaflux.models.scratch import TINY
    from megaflux.models.sources import model_problems
    from megaflux.runs import find

    run = find(runtime.checkpoint, runtime.update)
    model = run.config.model
    if found := list(model_problems(model)):
        raise UserError("; ".join(found))
    trainable, trunk = meta_models(run.config)
    count = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())  # noqa: E731
    weights = f"update {run.manifest['update']} over {model.flux or 'weights from the seed'}"
    if model.vae == "tiny":
        vae = parameters_in(TINY / "vae")
    else:
        folder = Path(model.vae) if model.vae else Path(model.flux) / "vae"
        vae = parameters_in(folder) if folder.is_dir() else None
    parts = [
        Part("FLUX", weights, count(trainable.transformer)),
        Part("Qwen2-VL", model.vlm or "weights from the seed", count(trainable.vlm, trunk)),
        Part("connector", str(run.checkpoint), count(trainable.connector)),
        Part("VAE", model.vae or model.flux, vae),
    ]
    flux, vision = trainable.transformer.config, trunk.config.vision_config
    return Facts(
        Settings.of(run.config),
        parts,
        flux.num_attention_heads * flux.attention_head_dim,
        vision.patch_size * vision.spatial_merge_size,
    )


def extra_parts(job: Job, runtime: Runtime) -> tuple[list[Part], list[str]]:
    """(ControlNets and detectors that the job needs, what of them is missing)."""
    from megaflux.generation.control.detectors import NEEDED, OPTIONS, Sources, lacking
    from megaflux.models.sources import DIFFUSERS_MODEL, hub_name, source_problems

    made = [c.kind for c in job.controls if c.image is None and c.kind in DETECTED]
    needs = [
        name
        for name, wanted in {
            "depth": "depth" in made,
            "line": "line" in made and runtime.line_model,
            "sam": job.mask_points,
        }.items()
        if wanted
    ]
    given = {"depth": runtime.depth_model, "line": runtime.line_model, "sam": runtime.sam_model}
    problems = [NEEDED[name] for name in needs if given[name] is None]
    wanted = {OPTIONS[name][2:]: given[name] for name in needs if given[name] is not None}
    problems += lacking(Sources(**{name: given[name] for name in needs}))
    parts = []
    for name, source in (
        {f"ControlNet {kind}".strip(): net for kind, net in runtime.controlnet.items()} | wanted
    ).items():
        folder = Path(source)
        if name not in wanted:
            found = source_problems(source, {"": DIFFUSERS_MODEL})
            problems += [f"--controlnet {line}" for line in found]
            if found:
                continue
        if hub_name(source):
            parts.append(Part(name, f"{source} (hub)", None))
            continue
        if not folder.is_dir():
            continue
        files = list(folder.glob("**/MTEED.pth"))
        parts.append(Part(name, source, parameters_in(folder) or sum(f.stat().st_size // 4 for f in files)))
    return parts, problems


def parameters_in(folder: Path) -> int:
    """Elements of all tensors in a folder's safetensors files, by their headers; lm_head, which is let go, left out."""
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
