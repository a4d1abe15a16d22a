"""Qwen2VLFluxPipeline: a reference picture, and perhaps a prompt, -> variations of it.

Three steps, each usable alone: `encode` (reference and prompt -> Condition), `sample` (Condition and seed ->
one picture, by diffusers' FluxPipeline), and `__call__`, which does both for each seed.

An export folder, as `python -m megaflux.export` writes it and `from_pretrained` reads it:

    transformer/ vae/ scheduler/          diffusers' layout
    text_encoder/                         Qwen2-VL with the trained last layer, and its processor's files
    connector/                            config.json, model.safetensors (weight, bias)
    pooled_prompt_embeds.safetensors      (1, P): CLIP's pooled vector of the empty prompt
    model_index.json                      diffusers' list of the parts
    megaflux.json                         Settings, where the weights come from, every file's size and SHA-256
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from megaflux.config import Config, Section
from megaflux.data import images
from megaflux.data.buckets import MULTIPLE, make_buckets
from megaflux.errors import UserError
from megaflux.generation.prompt import check_prompt
from megaflux.generation.sampling import flux_pipeline, generate
from megaflux.models import pretrained
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition

FORMAT = 1
MANIFEST = "megaflux.json"
CONNECTOR = "connector/model.safetensors"
POOLED = "pooled_prompt_embeds.safetensors"


class Settings(Section):
    """What generation must know of the run that trained the weights."""

    longest_side: int
    """Longest side of a training picture, px: the size of references and of pictures made."""
    aspect_ratios: tuple[str, ...]
    """Width : height of the sizes trained."""
    guidance: float
    """Value fed to FLUX's guidance embedding in training."""
    vlm_max_tokens: int
    """Most image tokens of a reference."""
    caption_max_tokens: int
    """Prompts are cut after this many tokens."""
    modes: tuple[str, ...]
    """Kinds of condition that training drew: image, image_text, text."""
    attention: str = "sdpa"
    """Attention of Qwen2-VL in transformers' words."""

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The settings of a run's configuration."""
        drawn = config.data.condition.model_dump()
        return cls(
            longest_side=config.data.longest_side,
            aspect_ratios=config.data.aspect_ratios,
            guidance=config.flow.guidance,
            vlm_max_tokens=config.model.vlm_max_tokens,
            caption_max_tokens=config.model.caption_max_tokens,
            modes=tuple(mode for mode, probability in drawn.items() if probability > 0),
            attention=config.model.attention,
        )


class FileInfo(BaseModel):
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """megaflux.json."""

    format: int
    settings: Settings
    source: dict[str, Any]
    """Run, update, stage and SHA-256 of the checkpoint the weights come from."""
    attribution: str | None
    """The credit that the training pictures ask for."""
    versions: dict[str, str]
    files: dict[str, FileInfo]
    """Every other file of the folder."""


@dataclass
class Qwen2VLFluxPipelineOutput:
    """`images`: one PIL picture (mode RGB) per seed; `notes`: what was done to the input, for people."""

    images: list[Image.Image]
    notes: list[str] = field(default_factory=list)


class Qwen2VLFluxPipeline:
    """Generation with finished models. `source` says where they come from; it is stored with each picture. `kernels`:
    FLUX and the connector run on megaflux_kernels; False: on diffusers' own path."""

    def __init__(self, models: Models, settings: Settings, source: dict[str, Any] | None = None, kernels: bool = True):
        self.models = models
        self.settings = settings
        self.source = source or {}
        models.trainable.requires_grad_(False).eval()
        models.trainable.configure(kernels)
        self.flux = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None,
        kernels: bool = True,
    ) -> Qwen2VLFluxPipeline:  # fmt: skip
        """Assemble an export folder; `megaflux.runs.load_pipeline` takes run folders as well.

        dtype None: bfloat16 on a GPU, float32 on the CPU; device None: the GPU if there is one. UserError
        where a file or a key is missing, left over or of a wrong shape: no weight is ever left random.
        """
        root, device, dtype = Path(path), *device_and_dtype(device, dtype)
        manifest = read_manifest(root)
        settings = manifest.settings
        transformer = pretrained.load_transformer(str(root), dtype)
        vlm, processor = pretrained.load_vlm(str(root / "text_encoder"), settings.attention, dtype)
        models = pretrained.assemble(
            transformer, pretrained.load_connector(root / CONNECTOR), vlm, processor,
            pretrained.load_vae(None, str(root)), pretrained.load_scheduler(str(root)),
            pretrained.read_tensors(root / POOLED, {"pooled_prompt_embeds"})["pooled_prompt_embeds"],
            settings.vlm_max_tokens, settings.caption_max_tokens,
        )  # fmt: skip
        return cls(models.to(device, dtype), settings, manifest.source, kernels)

    @torch.no_grad()
    def __call__(
        self,
        reference: Image.Image,
        prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Qwen2VLFluxPipelineOutput:
        """Variations of a reference, one per seed (or per generator, which then goes instead of the seed).

        reference: any PIL picture; its size is not the output's. height, width: px, multiples of 16; None:
        the longest side trained. guidance_scale None: the value of training. Each picture is made alone, so
        it is a function of its own seed and never of the others asked for. UserError for values that cannot
        be.
        """
        side = self.settings.longest_side
        height, width = height or side, width or side
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        check_sampling(height, width, num_inference_steps, guidance)
        condition, notes = self.encode(reference, prompt)
        starts = generator if generator is not None else seed
        starts = list(starts) if isinstance(starts, Sequence) else [starts]
        made = [
            self.sample(condition, start, height, width, num_inference_steps, guidance, on_step) for start in starts
        ]
        return Qwen2VLFluxPipelineOutput(made, notes)

    @torch.no_grad()
    def encode(self, reference: Image.Image, prompt: str | None = None) -> tuple[Condition, list[str]]:
        """(the Condition of one reference, notes): just what training computes for a picture it is given."""
        trunk, prompt = self.models.trunk, check_prompt(prompt)
        pixel_values, notes = reference_tensor(reference, self.settings.longest_side)
        tokens = trunk.caption_tokens(prompt)
        if tokens > trunk.max_caption_tokens:
            notes.append(f"prompt: {tokens} tokens, cut to the first {trunk.max_caption_tokens}")
        if not tokens:  # no prompt, or nothing but blanks
            return trunk.encode(pixel_values, mode="image"), notes
        if "image_text" not in self.settings.modes:
            notes.append("prompt: these weights were trained without captions, so it may do little or harm")
        return trunk.encode(pixel_values, [prompt], mode="image_text"), notes

    @torch.no_grad()
    def sample(
        self, condition: Condition, seed: int | torch.Generator, height: int, width: int,
        num_inference_steps: int = 28, guidance_scale: float | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Image.Image:  # fmt: skip
        """One picture from a Condition of batch 1."""
        guidance = self.settings.guidance if guidance_scale is None else guidance_scale
        check_sampling(height, width, num_inference_steps, guidance)
        pixels = generate(
            self.flux, self.models.trainable, condition, self.models.pooled_projections, [seed],
            height, width, num_inference_steps, guidance, on_step,
        )  # fmt: skip
        return Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())


def device_and_dtype(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """The defaults: the GPU if there is one; bfloat16 there, float32 on the CPU. UserError: no such
    device."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"device: {device} cannot be used here ({line}); use cpu") from None
    return chosen, dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)


def output_size(aspect: str, longest_side: int) -> tuple[int, int]:
    """(height, width) in px of an aspect WIDTH:HEIGHT at the longest side given: the training bucket of that
    ratio, and any other ratio rounded like it. UserError for what is not a ratio."""
    bucket = make_buckets([aspect], longest_side)[0]
    return bucket.height, bucket.width


def reference_tensor(picture: Image.Image, longest_side: int) -> tuple[Tensor, list[str]]:
    """(uint8 (1, 3, H, W), notes): a PIL picture upright, in RGB on white, scaled down to the longest side.

    A picture of that size or smaller keeps its pixels; bringing them to whole tokens is the image
    processor's.
    """
    notes: list[str] = []
    picture = images.to_rgb(picture, notes)
    if max(picture.size) > images.MAX_ASPECT * min(picture.size):
        why = images.REASONS["extreme_ratio"]
        raise UserError(f"reference: {picture.width}x{picture.height}: {why}; crop it")
    scale = longest_side / max(picture.size)
    if scale < 1:
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        notes.append(f"reference: {picture.width}x{picture.height} scaled down to {size[0]}x{size[1]}")
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None], notes


def check_sampling(height: int, width: int, steps: int, guidance: float) -> None:
    """UserError for values that nothing can be sampled with."""
    for name, side in (("height", height), ("width", width)):
        if side < MULTIPLE or side % MULTIPLE:
            raise UserError(f"{name}: {side} px; use a positive multiple of {MULTIPLE}")
    if steps < 1:
        raise UserError(f"steps: {steps}; use at least 1")
    if not (0 <= guidance < float("inf")):
        raise UserError(f"guidance: {guidance}; use a number of at least 0")


def read_manifest(root: Path) -> Manifest:
    """megaflux.json of an export whose files are all there at their sizes. UserError naming the first that
    isn't.

    Sizes only: to hash 40 GB at each start would outlast the generation. Who doubts a file has its SHA-256.
    """
    file = root / MANIFEST
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        hint = f"; {root} is a run: use megaflux.runs.load_pipeline" if (root / "config.yaml").is_file() else ""
        raise UserError(f"{file}: missing, so this is no export of python -m megaflux.export{hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export again") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise UserError(f"{file}: format {version}, this code reads {FORMAT}; update megaflux or export again")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {where}: {first['msg']}; export again") from None
    for name, known in manifest.files.items():
        part = root / name
        if not part.is_file():
            raise UserError(f"{part}: missing; export the run again")
        if part.stat().st_size != known.bytes:
            raise UserError(f"{part}: {part.stat().st_size} bytes, not {known.bytes} as written; export again")
    return manifest
