"""The export folder: what generation knows of its weights, written by `save_pretrained` and python -m megaflux.export.

transformer/ vae/ scheduler/          diffusers' layout
text_encoder/                         Qwen2-VL with the trained last layer, and its processor's files
connector/                            config.json, model.safetensors (weight, bias)
pooled_prompt_embeds.safetensors      (1, P): CLIP's pooled vector of the empty prompt
text_encoder_2/ tokenizer_2/          T5, where the weights have the T5 text path, ...
t5_embedder/                          ... and its own linear: config.json, model.safetensors (weight, bias)
text_encoder_clip/ tokenizer_clip/    CLIP itself, kept by python -m megaflux.convert for the way back
model_index.json                      diffusers' list of the parts
megaflux.json                         Settings, where the weights come from, every file's size and SHA-256
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ValidationError

from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.config.parse import Config, Section
from megaflux.models.sources import is_pointer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megaflux.models.pretrained import Models

FORMAT = 1
MANIFEST = "megaflux.json"
CONNECTOR = "connector/model.safetensors"
T5_EMBEDDER = "t5_embedder/model.safetensors"
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
    vlm_min_tokens: int = 4
    """Fewest image tokens of a reference: a smaller picture is enlarged. The released weights: 512."""
    text_encoders: tuple[Literal["qwen", "t5"], ...] = ("qwen",)
    """What can read a prompt; the first is the default."""
    sizes: Literal["training", "release"] = "training"
    """What an aspect ratio means: the training bucket, or the released tool's table."""

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
    """Run, update, stage and SHA-256 of the checkpoint the weights come from; of others, a hash of all weight files."""
    attribution: str | None
    """The credit that the training pictures ask for."""
    versions: dict[str, str]
    files: dict[str, FileInfo]
    """Every other file of the folder."""


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
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); export again") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        version = str(version)[:80]
        raise UserError(f"{file}: format {version}, this code reads {FORMAT}; update megaflux or export again")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {where}: {first['msg']}; export again") from None
    for name, known in manifest.files.items():
        part = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: {name} lies outside the export; do not use it")
        if not os.path.isfile(part):
            raise UserError(f"{part}: missing; export the run again")
        if is_pointer(part):
            raise UserError(f"{part}: is a git-lfs pointer, not the file; fetch it with `git lfs pull`")
        if part.stat().st_size != known.bytes:
            raise UserError(f"{part}: {part.stat().st_size} bytes, not {known.bytes} as written; export again")
    return manifest


def check_out(out: Path) -> None:
    """UserError where `out` exists or cannot be made."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists; an export never overwrites, give another folder")
    parent = out.absolute().parent
    while not os.path.exists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, {parent} is not a folder that can be written")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into under a temporary name, which becomes `out` when all went well and is gone otherwise.

    UserError where `out` exists or the disk fails."""
    check_out(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        check_out(out)  # rename() would replace an empty folder
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parts(models: Models, lm_head: Tensor | None, folder: Path) -> None:
    """All weights and their config.json. Trunk and last layer are joined for it and cut apart again, so whoever holds
    one of them must take the new ones from `models`."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import Qwen2VLForConditionalGeneration

    from megaflux.models.vlm import join_vlm, split_vlm

    # transformers' save_pretrained imports DeepSpeed, which would look for accelerators and say so.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    trainable = models.trainable
    trainable.transformer.save_pretrained(folder / "transformer")
    models.vae.save_pretrained(folder / "vae")
    models.scheduler.save_pretrained(folder / "scheduler")

    text_encoder = whole = join_vlm(models.trunk.vlm, trainable.vlm)
    try:
        if lm_head is not None:
            with torch.device("meta"):
                text_encoder = Qwen2VLForConditionalGeneration(whole.config)
            text_encoder.model = whole
            text_encoder.lm_head.weight = nn.Parameter(lm_head.to(whole.dtype))
        text_encoder.save_pretrained(folder / "text_encoder")
        architecture = type(text_encoder).__name__
    finally:
        models.trunk.vlm, trainable.vlm = split_vlm(whole)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    # transformers 4 puts Qwen2-VL's class name into text_config only; loaders look for it at the top.
    write_json(
        folder / "text_encoder/config.json", {"architectures": [architecture], **config}, indent=2, sort_keys=False
    )
    models.trunk.processor.save_pretrained(folder / "text_encoder")

    write_linear(trainable.connector, folder / CONNECTOR)
    save_file({"pooled_prompt_embeds": models.pooled_projections.contiguous()}, folder / POOLED)
    if models.t5 is not None:
        models.t5.encoder.save_pretrained(folder / "text_encoder_2")
        models.t5.tokenizer.save_pretrained(folder / "tokenizer_2")
        write_linear(models.t5.embedder, folder / T5_EMBEDDER)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)  # safetensors makes its files readable by their owner only


def write_linear(linear: nn.Linear, file: Path) -> None:
    """A linear's weight and bias, and its config.json beside them."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in linear.named_parameters()}, file)
    write_json(
        file.parent / "config.json",
        {"_class_name": "Linear", "in_features": linear.in_features, "out_features": linear.out_features},
        indent=2,
        sort_keys=False,
    )


def write_indexes(folder: Path, settings: Settings, source: dict[str, Any], attribution: str | None) -> None:
    """model_index.json and, last, megaflux.json, of a folder that holds all its parts."""
    import diffusers

    architecture = json.loads((folder / "text_encoder/config.json").read_text())["architectures"][0]
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "Qwen2VLFluxPipeline",
            "_diffusers_version": diffusers.__version__,
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", architecture],
        },
        indent=2,
        sort_keys=False,
    )
    files = inventory(folder)
    if "weights_sha256" not in source:
        listed = "".join(
            f"{name} {entry['sha256']}\n" for name, entry in files.items() if name.endswith(".safetensors")
        )
        source = source | {"weights_sha256": hashlib.sha256(listed.encode()).hexdigest()}
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "settings": settings.model_dump(mode="json"),
            "source": source,
            "attribution": attribution,
            "versions": versions(),
            "files": files,
        },
        indent=2,
        sort_keys=False,
    )


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """{"vae/config.json": {"bytes", "sha256"}, ...} of all files in a folder."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def versions() -> dict[str, str]:
    """What made a file: this project and the libraries its numbers depend on."""
    found = {"megaflux": "unknown"}
    for name in ("megaflux", "torch", "diffusers", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
