"""The authors' released weights <-> an export of ours: `python -m megaflux.convert SRC DST`.

    SRC/flux/       transformer/ vae/ scheduler/ text_encoder/ tokenizer/ (CLIP), text_encoder_2/ tokenizer_2/ (T5)
    SRC/qwen2-vl/   Qwen2-VL and its processor; connector.pt (linear.weight, linear.bias); t5_embedder.pt (weight, bias)

becomes the layout of generation/layout.py, and a folder of that layout becomes the authors'. Every part is loaded once,
strictly, as a check, and then copied as files, so that all tensors keep their bits. Only the scheduler's shift is changed, to
the 1 that the released tool forces. `.pt` files are read with
weights_only=True. The folder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error, one_line
from megaflux.common.paths import path_option
from megaflux.generation.layout import (
    CONNECTOR,
    MANIFEST,
    POOLED,
    T5_EMBEDDER,
    Settings,
    check_new_folder,
    read_manifest,
    whole_folder,
    write_indexes,
    write_linear,
)
from megaflux.models import sources

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from torch import Tensor, nn

CONNECTOR_PT, T5_EMBEDDER_PT = "connector.pt", "t5_embedder.pt"
# {folder of the release's flux/: folder of an export}
FLUX_PARTS = {"transformer": "transformer", "vae": "vae", "scheduler": "scheduler"}
CLIP_PARTS = {"text_encoder": "text_encoder_clip", "tokenizer": "tokenizer_clip"}
T5_PARTS = {"text_encoder_2": "text_encoder_2", "tokenizer_2": "tokenizer_2"}
MODES: tuple[Literal["image"], ...] = ("image",)  # kinds of condition that the release knows
RELEASE_RATIOS = ("1:1", "16:9", "9:16", "2.4:1", "3:4", "4:3")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m megaflux.convert", description=__doc__.splitlines()[0], allow_abbrev=True)
    parser.add_argument(
        "source", type=path_option, metavar="SRC", help="the authors' folder (flux/, qwen2-vl/), or an export"
    )
    parser.add_argument("out", type=path_option, metavar="DST", help="folder to write; must not exist")
    parser.add_argument(
        "--flux",
        type=path_option,
        metavar="DIR",
        help="with an export as SRC: a FLUX.1 folder to take CLIP and T5 from if the export holds none",
    )
    args = parser.parse_args(argv)
    source, out = Path(args.source), Path(args.out)
    if not os.path.isdir(source):
        raise UserError(
            f"{source}: {'not a folder' if os.path.exists(source) else 'no such folder'}; give the released weights"
        )
    check_new_folder(out)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if (source / MANIFEST).is_file():
        to_release(source, out, Path(args.flux) if args.flux else None)
        print(f"{out}: the authors' layout")
        return 0
    if args.flux:
        raise UserError("--flux: is for converting an export; leave it out")
    for note in from_release(source, out):
        print(note)
    print(
        f"{out}: give it as --checkpoint to python -m megaflux.infer; with --release-compatible it does as the released tool"
    )
    return 0


def from_release(source: Path, out: Path) -> list[str]:
    """Convert the authors' folder to an export at `out`; returns notes for the user. UserError, before anything is written,
    naming the first file that is missing, damaged or of another model."""
    import torch
    from safetensors.torch import save_file

    from megaflux.models import pretrained
    from megaflux.models.vlm_folder import open_vlm

    flux, qwen = source / "flux", source / "qwen2-vl"
    for folder in (flux, qwen, *(flux / name for name in (*FLUX_PARTS, *CLIP_PARTS))):
        if not folder.is_dir():
            raise UserError(f"{folder}: missing; the released weights have flux/ and qwen2-vl/ with all their parts")
    if found := sources.folder_problems(flux, sources.FLUX) + sources.folder_problems(qwen, {"": sources.VLM}):
        raise UserError("; ".join(found))
    opened = open_vlm(str(qwen))
    opened.check_turns(MODES)
    notes = []
    transformer: Any = pretrained.load_transformer(str(flux), torch.bfloat16)  # diffusers declares no attributes
    joint, width = transformer.config.joint_attention_dim, transformer.context_embedder.out_features
    del transformer
    pretrained.load_vae(None, str(flux))
    pretrained.load_scheduler(str(flux))
    pooled = pretrained.empty_prompt_pooled(*pretrained.load_clip(str(flux)))
    vlm, _ = pretrained.load_vlm(opened)
    hidden = vlm.config.text_config.hidden_size
    del vlm
    connector = read_linear(qwen / CONNECTOR_PT, "linear.", (joint, hidden))
    has_t5 = (qwen / T5_EMBEDDER_PT).is_file()
    t5_embedder = read_linear(qwen / T5_EMBEDDER_PT, "", (width, joint)) if has_t5 else None
    encoder = all((flux / name).is_dir() for name in T5_PARTS)
    if t5_embedder is not None and encoder:
        pretrained.load_t5_encoder(flux)
    else:
        missing = T5_EMBEDDER_PT if t5_embedder is None else "flux/text_encoder_2 or tokenizer_2"
        notes.append(f"no T5 text path: {missing} is missing")

    with whole_folder(out) as partial:
        parts = FLUX_PARTS | CLIP_PARTS | (T5_PARTS if encoder else {})
        for name, ours in parts.items():
            copy(flux / name, partial / ours)
        copy(qwen, partial / "text_encoder", leave=(CONNECTOR_PT, T5_EMBEDDER_PT))
        name_architecture(partial / "text_encoder/config.json")
        notes += fix_shift(partial / "scheduler/scheduler_config.json")
        write_linear(connector, partial / CONNECTOR)
        if t5_embedder is not None:
            write_linear(t5_embedder, partial / T5_EMBEDDER)
        save_file({"pooled_prompt_embeds": pooled.contiguous()}, partial / POOLED)
        settings = Settings(
            longest_side=1024,
            aspect_ratios=RELEASE_RATIOS,
            guidance=3.5,
            vlm_max_tokens=512,
            vlm_min_tokens=512,
            caption_max_tokens=256,
            modes=MODES,
            sizes="release",
            text_encoders=("t5",) if t5_embedder is not None and encoder else ("qwen",),
        )
        digest = hashlib.sha256((qwen / CONNECTOR_PT).read_bytes()).hexdigest()
        write_indexes(partial, settings, {"released": source.resolve().name, "connector_sha256": digest}, None)
    return notes


def to_release(source: Path, out: Path, flux: Path | None = None) -> None:
    """Convert an export to the authors' layout at `out`.

    flux: a FLUX.1 folder to take CLIP and T5 from if the export, made from one of our runs, holds none. UserError as for
    `from_release`.
    """
    import torch

    from megaflux.models import pretrained
    from megaflux.models.strict import load_linear
    from megaflux.models.vlm_folder import rewrite_as_published

    read_manifest(source)
    if flux is not None and not flux.is_dir():
        raise UserError(f"--flux {flux}: no such folder; files are copied from it, so a hub name will not do")
    connector = load_linear(source / CONNECTOR)
    t5_embedder = load_linear(source / T5_EMBEDDER) if (source / T5_EMBEDDER).is_file() else None
    copies = {source / ours: f"flux/{name}" for name, ours in FLUX_PARTS.items()}
    for parts, needed in ((CLIP_PARTS, True), (T5_PARTS, False)):
        for name, ours in parts.items():
            if (source / ours).is_dir():
                copies[source / ours] = f"flux/{name}"
            elif flux is not None and (flux / name).is_dir():
                copies[flux / name] = f"flux/{name}"
            elif needed and flux is not None:
                raise UserError(f"--flux {flux}: {name}/ is missing; give a FLUX.1 folder in diffusers' layout")
            elif needed:
                raise UserError(
                    f"{source}: an export holds no CLIP, and the authors' layout does; give --flux DIR of a "
                    "FLUX.1 folder"
                )
    if flux is not None:
        pretrained.load_clip(str(flux))
    with whole_folder(out) as partial:
        for folder, name in copies.items():
            copy(folder, partial / name)
        copy(source / "text_encoder", partial / "qwen2-vl")
        rewrite_as_published(partial / "qwen2-vl")
        tensors = {f"linear.{name}": p.detach().contiguous() for name, p in connector.named_parameters()}
        torch.save(tensors, partial / "qwen2-vl" / CONNECTOR_PT)
        if t5_embedder is not None:
            tensors = {name: p.detach().contiguous() for name, p in t5_embedder.named_parameters()}
            torch.save(tensors, partial / "qwen2-vl" / T5_EMBEDDER_PT)


def read_linear(file: Path, prefix: str, shape: tuple[int, int]) -> nn.Linear:
    """The Linear of a .pt file that holds exactly PREFIXweight (shape: out, in) and PREFIXbias (out). Keys may start with
    `module.`, as DistributedDataParallel saves them. UserError naming the file and the key."""
    import torch
    from torch import nn

    if not file.is_file():
        raise UserError(f"{file}: missing")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        line = one_line(error, 160)
        raise UserError(f"{file}: holds more than tensors, or is damaged ({line}); get it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds no dictionary of tensors; get it again")
    tensors: dict[str, Tensor] = {str(key).removeprefix("module."): value for key, value in content.items()}
    wanted = {f"{prefix}weight": shape, f"{prefix}bias": shape[:1]}
    for what, keys in (("missing key", set(wanted) - set(tensors)), ("unexpected key", set(tensors) - set(wanted))):
        if keys:
            raise UserError(f"{file}: {what} {', '.join(sorted(keys)[:3])}; it is not the file of that name")
    for key, want in wanted.items():
        if not isinstance(tensors[key], torch.Tensor) or tuple(tensors[key].shape) != want:
            found = tuple(getattr(tensors[key], "shape", ()))
            raise UserError(f"{file}: {key} has the shape {found}, not {want}; it does not belong to these models")
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0])
    linear.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items()}, assign=True)
    return linear


def name_architecture(config: Path) -> None:
    """Set the class in a config.json to Qwen2VLForConditionalGeneration, unless it names one of transformers' two; the
    release may name a class of its own, or none."""
    content = json.loads(config.read_text())
    if content.get("architectures") not in (["Qwen2VLForConditionalGeneration"], ["Qwen2VLModel"]):
        content["architectures"] = ["Qwen2VLForConditionalGeneration"]
        config.write_text(json.dumps(content, indent=2) + "\n")


def fix_shift(config: Path) -> list[str]:
    """Set a scheduler's `shift` to 1, as the release does when it loads one; with dynamic shifting nothing reads it. Returns a
    line on that, or none."""
    content = json.loads(config.read_text())
    shift = content.get("shift")
    if shift == 1:
        return []
    config.write_text(json.dumps(content | {"shift": 1.0}, indent=2) + "\n")
    return [f"scheduler: shift {shift} is written as 1, as the released tool forces it"]


def copy(source: Path, out: Path, leave: Sequence[str] = ()) -> None:
    """Copy a folder's files (links are followed), without hidden ones and those named in `leave`."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        if file.is_file() and relative.name not in leave and not any(part.startswith(".") for part in relative.parts):
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / relative)


if __name__ == "__main__":
    exit_on_user_error(main)
