"""The export folder: finished weights and what generation needs to know about them.

Written by `save_pretrained`, python -m megaflux.export and python -m megaflux.convert; read by `from_pretrained`.

transformer/ vae/ scheduler/          diffusers' layout
text_encoder/                         Qwen2-VL with the trained last layers, and its processor's files
connector/                            config.json, model.safetensors (weight, bias)
pooled_prompt_embeds.safetensors      (1, P): CLIP's pooled vector of the empty prompt
text_encoder_2/ tokenizer_2/          T5, if the weights have the T5 text path
t5_embedder/                          T5's own linear: config.json, model.safetensors (weight, bias)
text_encoder_clip/ tokenizer_clip/    CLIP itself, kept by python -m megaflux.convert for converting back
model_index.json                      diffusers' list of the parts
megaflux.json                         Manifest: Settings, where the weights come from, size and SHA-256 of every file
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
from megaflux.config.schema import GENERATION_GUIDANCE, Config, Section
from megaflux.models.safetensors_files import is_pointer

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from torch import Tensor, nn

    from megaflux.models.pretrained import Models

FORMAT = 1
MANIFEST, INDEX = "megaflux.json", "model_index.json"
CONNECTOR = "connector/model.safetensors"
T5_EMBEDDER = "t5_embedder/model.safetensors"
POOLED = "pooled_prompt_embeds.safetensors"


class Settings(Section):
    """What generation needs to know about the training of the weights."""

    longest_side: int
    """Longest side of a training picture in px: references are scaled down to it, and pictures are made in this size."""
    aspect_ratios: tuple[str, ...]
    """WIDTH:HEIGHT of the trained sizes."""
    guidance: float
    """Value that FLUX's guidance embedding gets where a request names none."""
    vlm_max_tokens: int
    """Most image tokens of a reference."""
    caption_max_tokens: int
    """Prompts are cut after this many tokens."""
    modes: tuple[str, ...]
    """Kinds of condition seen in training: image, image_text, text, none (empty)."""
    attention: str = "sdpa"
    """Attention implementation of Qwen2-VL, by transformers' name."""
    vlm_min_tokens: int = 4
    """Fewest image tokens of a reference: a smaller picture is enlarged. The released weights: 512."""
    text_encoders: tuple[Literal["qwen", "t5"], ...] = ("qwen",)
    """Which models can read a prompt; the first is the default."""
    sizes: Literal["training", "release"] = "training"
    """What an aspect ratio means: the training bucket, or the released tool's table."""

    @classmethod
    def of(cls, config: Config) -> Settings:
        """The settings of a run's configuration."""
        return cls(
            longest_side=config.data.longest_side,
            aspect_ratios=config.data.aspect_ratios,
            guidance=GENERATION_GUIDANCE,
            vlm_max_tokens=config.model.vlm_max_tokens,
            caption_max_tokens=config.model.caption_max_tokens,
            modes=config.data.condition.drawn,
            attention=config.model.attention,
        )


class FileInfo(BaseModel):
    """One file of the folder."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """megaflux.json."""

    format: int
    settings: Settings
    source: dict[str, Any]
    """Run, update, stage and SHA-256 of the checkpoint that the weights come from, or a hash of all weight files."""
    attribution: str | None
    """The credit that the training pictures ask for."""
    versions: dict[str, str]
    """Of megaflux and the libraries that wrote the folder."""
    files: dict[str, FileInfo]
    """Every other file of the folder, by its path in it."""


def is_export(path: str | Path) -> bool:
    """Whether a folder looks like an export, complete or not."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (MANIFEST, INDEX))


def read_manifest(root: Path) -> Manifest:
    """megaflux.json of an export whose files are all there in their sizes. UserError naming the first bad file.

    Only sizes are compared: hashing 40 GB at each start would take longer than generating. The manifest holds every
    file's SHA-256 for a check by hand.
    """
    file = root / MANIFEST
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        hint = f"; {root} is a run: use megaflux.runs.load_pipeline" if (root / "config.yaml").is_file() else ""
        raise UserError(f"{file}: missing, so this is not an export of python -m megaflux.export{hint}") from None
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


def check_new_folder(out: Path) -> None:
    """UserError if `out` exists or cannot be created."""
    if os.path.lexists(out):
        raise UserError(f"{out}: exists; an export never overwrites, give another folder")
    parent = out.absolute().parent
    while not os.path.exists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be made, {parent} is not a folder that can be written")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to write into, renamed to `out` on success and removed on any error.

    UserError if `out` exists or writing fails.
    """
    check_new_folder(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        check_new_folder(out)  # again: rename() would replace an empty folder
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_parts(models: Models, lm_head: Tensor | None, folder: Path) -> None:
    """Write all weights and their config.json. lm_head: Qwen2-VL's; None: leave it out.

    Qwen2-VL's trunk and last layers are joined for this and split again: `models` then holds new modules for both.
    """
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

    from megaflux.models.vlm_folder import write_processor
    from megaflux.models.vlm_parts import join_vlm, split_vlm

    # transformers' save_pretrained imports DeepSpeed, which would look for accelerators and report them.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    trainable = models.trainable
    trainable.transformer.save_pretrained(folder / "transformer")
    models.vae.save_pretrained(folder / "vae")
    models.scheduler.save_pretrained(folder / "scheduler")

    layers = len(trainable.vlm.layers)
    whole = join_vlm(models.trunk.vlm, trainable.vlm)
    text_encoder: PreTrainedModel = whole
    try:
        if lm_head is not None:
            with torch.device("meta"):
                text_encoder = Qwen2VLForConditionalGeneration(whole.config)
            text_encoder.model = whole
            text_encoder.lm_head.weight = nn.Parameter(lm_head.to(whole.dtype))
        text_encoder.save_pretrained(folder / "text_encoder")
        architecture = type(text_encoder).__name__
    finally:
        models.trunk.vlm, trainable.vlm = split_vlm(whole, layers)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    # transformers 4 writes Qwen2-VL's class name into text_config only; loaders expect it at the top level.
    write_json(
        folder / "text_encoder/config.json", {"architectures": [architecture], **config}, indent=2, sort_keys=False
    )
    write_processor(models.trunk.processor, folder / "text_encoder")

    write_linear(trainable.connector, folder / CONNECTOR)
    save_file({"pooled_prompt_embeds": models.pooled_projections.contiguous()}, folder / POOLED)
    if models.t5 is not None:
        models.t5.encoder.save_pretrained(folder / "text_encoder_2")
        models.t5.tokenizer.save_pretrained(folder / "tokenizer_2")
        write_linear(models.t5.embedder, folder / T5_EMBEDDER)
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)  # safetensors makes its files readable by the owner only


def write_linear(linear: nn.Linear, file: Path) -> None:
    """Write a linear's weight and bias to `file`, and its config.json to the same folder."""
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
    """Write model_index.json and, last, megaflux.json into a folder that holds all its parts."""
    import diffusers

    architecture = json.loads((folder / "text_encoder/config.json").read_text())["architectures"][0]
    write_json(
        folder / INDEX,
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
    """All files of a folder: {"vae/config.json": {"bytes", "sha256"}, ...}."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        found[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def versions() -> dict[str, str]:
    """Versions of megaflux and of the libraries that its numbers depend on, to store with a file."""
    found = {"megaflux": "unknown"}
    for name in ("megaflux", "torch", "diffusers", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
