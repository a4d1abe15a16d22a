"""Variations of a picture: `python -m megaflux.infer --checkpoint RUN --reference IMG --count 4 --seed 7`.

Writes DIR/<name>-seed7.png, ... and a contact sheet DIR/<name>-sheet.png with the reference first. Nothing is
ever overwritten. Each picture is a function of its own seed and the settings, which it carries in its PNG
text chunks `megaflux` (JSON) and `parameters` (what other tools read).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaflux.errors import UserError, exit_on_user_error

if TYPE_CHECKING:  # torch and its friends take seconds to import: --help and bad input do not wait for them
    from PIL import Image

    from megaflux.generation.pipeline import Qwen2VLFluxPipeline

MAX_SEED = 2**63 - 1
MAX_NAME = 60  # characters of the reference's name that go into file names
CELL_GAP = 8  # px between the pictures of a contact sheet


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    reference = Reference.read(args.reference)
    check_out(args.out)
    out, stem = Path(args.out), safe_stem(args.reference)

    import torch

    from megaflux.generation.pipeline import output_size
    from megaflux.runs import load_pipeline

    _quiet_libraries()
    dtype = {"auto": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[args.dtype]
    pipeline = load_pipeline(args.checkpoint, args.update, dtype, args.device, args.kernels == "on")
    height, width = output_size(args.aspect, pipeline.settings.longest_side)
    guidance = pipeline.settings.guidance if args.guidance is None else args.guidance
    condition, notes = pipeline.encode(reference.picture, args.prompt)
    for note in [*reference.notes, *notes, pipeline.models.trainable.describe()]:
        print(note)

    settings = _settings(args, pipeline, reference, height, width, guidance)
    made, files = [], []
    with _progress(args.count * args.steps) as bar:
        for seed in range(args.seed, args.seed + args.count):
            picture = pipeline.sample(condition, seed, height, width, args.steps, guidance, bar.update)
            files.append(save(picture, out, f"{stem}-seed{seed}", {**settings, "seed": seed}))
            made.append(picture)
    seeds = list(range(args.seed, args.seed + args.count))
    sheet = contact_sheet(reference.picture, made)
    files.append(save(sheet, out, f"{stem}-sheet", {**settings, "seeds": seeds}))
    for file in files:
        print(file)
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with everything checked that needs no model. UserError: one line per problem."""
    parser = argparse.ArgumentParser(prog="python -m megaflux.infer", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a run's folder, or an export's")
    add("--update", type=int, metavar="N", help="the run's checkpoint after N updates (default: the newest)")
    add("--reference", required=True, metavar="IMG", help="the picture to make variations of")
    add("--prompt", metavar="TEXT", help="words to go with the reference (default: none)")
    add("--count", type=int, default=4, metavar="N", help="variations (default 4)")
    add("--seed", type=int, default=0, metavar="S", help="seeds are S, S + 1, ... (default 0)")
    add(
        "--aspect",
        default="1:1",
        metavar="W:H",
        help="shape of the output (default 1:1), at the longest side",
    )
    add("--steps", type=int, default=28, metavar="N", help="Euler steps (default 28)")
    add("--guidance", type=float, metavar="X", help="guidance value (default: that of training, usually 3.5)")
    add("--out", default="outputs", metavar="DIR", help="folder for the pictures (default outputs)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto (default): bfloat16 on a GPU, float32 on the CPU")  # fmt: skip
    add("--kernels", choices=("on", "off"), default="on", help="off: diffusers' own path instead of megaflux_kernels")
    args = parser.parse_args(argv)
    from megaflux.data.buckets import make_buckets
    from megaflux.generation.prompt import check_prompt

    if args.count < 1:
        raise UserError(f"--count {args.count}: use at least 1")
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: use at least 1")
    if not 0 <= args.seed <= MAX_SEED - args.count:
        raise UserError(f"--seed {args.seed}: use 0 to {MAX_SEED - args.count}")
    if args.guidance is not None and not (math.isfinite(args.guidance) and args.guidance >= 0):
        raise UserError(f"--guidance {args.guidance}: use a number of at least 0")
    if not check_prompt(args.prompt).strip() and args.prompt is not None:
        print("--prompt is empty: the reference alone is used")
    try:
        make_buckets([args.aspect], 1024)
    except UserError as error:
        raise UserError(f"--aspect: {error}") from None
    if not Path(args.checkpoint).is_dir():
        what = "not a folder" if Path(args.checkpoint).exists() else "no such folder"
        raise UserError(f"--checkpoint {args.checkpoint}: {what}; give a run's folder or an export's")
    return args


@dataclass(frozen=True)
class Reference:
    """The reference as read: an upright RGB picture, what was done to it, and the hash of its file."""

    picture: Image.Image
    notes: list[str]
    sha256: str

    @classmethod
    def read(cls, path: str) -> Reference:
        """UserError naming the file where there is no usable picture in it."""
        from megaflux.data.images import REASONS, BadImage, decode

        try:
            data = Path(path).read_bytes()
            picture, notes = decode(data)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise UserError(f"--reference {path}: {getattr(error, 'strerror', None) or error}") from None
        except BadImage as error:
            detail = f" ({error.detail})" if error.detail else ""
            raise UserError(f"--reference {path}: {REASONS[error.reason]}{detail}; give another picture") from None
        said = {
            "first_frame": "several frames, the first is used",
            "rotated": "turned upright as its EXIF says",
            "transparent": "transparent, put on white",
            "rescaled": "more than 8 bits a channel, rescaled",
        }
        return cls(picture, [f"reference: {said[note]}" for note in notes], hashlib.sha256(data).hexdigest())


def check_out(path: str) -> None:
    """UserError where no folder can be made, or written to, at `path`. Makes nothing."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--out {path}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {path}: {folder} cannot be written; give another folder")


def safe_stem(path: str) -> str:
    """The reference's name as the start of file names: letters, digits, `_`, `.`, `-` and no more."""
    return re.sub(r"[^\w.-]+|^\.+", "_", Path(path).stem)[:MAX_NAME] or "image"


def save(picture: Image.Image, folder: Path, name: str, settings: dict[str, Any]) -> Path:
    """Write folder/name.png, or name-2.png, name-3.png, ... if that exists; returns the file.

    The name is claimed by O_EXCL, so two processes never take the same. UserError where it cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("megaflux", json.dumps(settings))
    info.add_text("parameters", parameters_text(settings))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    for file in _names(folder, name):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = file.open("xb")
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--out {folder}: is a file; give a folder") from None
            continue
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror}") from None
        try:
            with stream:
                stream.write(buffer.getvalue())
        except OSError as error:
            file.unlink(missing_ok=True)  # half a picture is worth nothing
            raise UserError(f"{file}: {error.strerror}") from None
        return file
    raise AssertionError("names never end")


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.png"
    number = 2
    while True:
        yield folder / f"{name}-{number}.png"
        number += 1


def parameters_text(settings: dict[str, Any]) -> str:
    """The `parameters` chunk in the form that the web user interfaces of Stable Diffusion write."""
    seed = settings.get("seed", settings.get("seeds", [0])[0] if "seeds" in settings else 0)
    fields = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": 1,
        "Distilled CFG Scale": settings["guidance"],
        "Seed": seed,
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": Path(settings["checkpoint"]).name,
        "Version": f"megaflux {settings['versions']['megaflux']}",
    }
    prompt = f"{settings['prompt']}\n" if settings["prompt"] else ""
    return prompt + ", ".join(f"{key}: {value}" for key, value in fields.items())


def contact_sheet(reference: Image.Image, pictures: Sequence[Image.Image]) -> Image.Image:
    """The reference in a frame, then the pictures, in rows, on white; each cell is of the pictures' size."""
    from PIL import Image, ImageOps

    width, height = pictures[0].size
    columns = min(len(pictures) + 1, max(2, math.ceil(math.sqrt((len(pictures) + 1) * height / width * 1.5))))
    rows = math.ceil((len(pictures) + 1) / columns)
    size = (columns * (width + CELL_GAP) + CELL_GAP, rows * (height + CELL_GAP) + CELL_GAP)
    sheet = Image.new("RGB", size, "white")
    framed = Image.new("RGB", (width + CELL_GAP, height + CELL_GAP), "black")
    sheet.paste(framed, (CELL_GAP // 2, CELL_GAP // 2))
    sheet.paste(ImageOps.pad(reference.convert("RGB"), (width, height), color="white"), (CELL_GAP, CELL_GAP))
    for index, picture in enumerate(pictures, start=1):
        row, column = divmod(index, columns)
        sheet.paste(picture, (CELL_GAP + column * (width + CELL_GAP), CELL_GAP + row * (height + CELL_GAP)))
    return sheet


def _settings(
    args: argparse.Namespace, pipeline: Qwen2VLFluxPipeline, reference: Reference, height: int, width: int,
    guidance: float,
) -> dict[str, Any]:  # fmt: skip
    """All that the pictures depend on, but the seed, as plain data."""
    from megaflux.runs import versions

    models = pipeline.models
    return {
        "command": "megaflux.infer",
        "checkpoint": args.checkpoint,
        "source": pipeline.source,
        "reference": {"file": Path(args.reference).name, "sha256": reference.sha256},
        "prompt": args.prompt or "",
        "aspect": args.aspect,
        "width": width,
        "height": height,
        "steps": args.steps,
        "guidance": guidance,
        "kernels": args.kernels,
        "path": models.trainable.describe(),
        "dtype": str(models.trainable.transformer.dtype).removeprefix("torch."),
        "device": str(models.trainable.transformer.device),
        "versions": versions(),
    }


def _progress(total: int):
    from tqdm import tqdm

    # disable=None: no bar where the output is not a terminal
    return tqdm(total=total, desc="generating", unit="step", leave=False, disable=None)


def _quiet_libraries() -> None:
    """No progress bars and hints of the libraries between our own lines."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()


if __name__ == "__main__":
    exit_on_user_error(main)
