"""Pictures on disk: files that are never overwritten, settings stored in each PNG, contact sheets.

A PNG with settings has the text chunks `megaflux` (JSON: job, runtime, source, versions, seed) and `parameters` (for
the web interfaces of Stable Diffusion). With `embed` it also holds the input files, each in a private chunk `mfIn`: the
SHA-256 of its bytes, then the bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megaflux.common.errors import UserError
from megaflux.generation.job import Job, Runtime

if TYPE_CHECKING:  # heavy to import; the functions that need it import it themselves
    from PIL import Image

FORMAT = 1  # of the chunk `megaflux`
MAX_NAME = 60  # characters of a reference's name in the names of its pictures
CELL_GAP = 8  # px between the pictures of a contact sheet
INPUT_CHUNK = b"mfIn"


def check_out(path: str) -> None:
    """UserError if the folder `path` cannot be created or written to. Creates nothing."""
    folder = Path(path).absolute()
    try:
        os.fsencode(folder)
        if "\0" in path:
            raise ValueError("NUL")
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "no file system holds such a name"
        raise UserError(f"--out {ascii(path)[:80]}: {why}; give another folder") from None
    if not folder.is_dir():
        raise UserError(f"--out {path}: {folder} is a file; give a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {path}: {folder} cannot be written; give another folder")


def safe_stem(path: str) -> str:
    """A picture's name as the start of other file names: only letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^\w.-]+|^\.+", "_", Path(path).stem)[:MAX_NAME] or "image"


def stem_of(job: Job) -> str:
    """How the names of a job's files start: with its first reference's name, its image's, or `text`."""
    source = job.references[0] if job.references else job.image
    return safe_stem(source.file) if source is not None else "text"


def png_bytes(
    picture: Image.Image, settings: dict[str, Any] | None = None, embed: Mapping[str, bytes] | None = None
) -> bytes:
    """The bytes of a PNG file. settings None: without any metadata. embed: input files by SHA-256."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if settings is not None:
        info.add_text("megaflux", json.dumps(settings))
        info.add_text("parameters", parameters_text(settings))
        for digest, data in (embed or {}).items():
            info.add(INPUT_CHUNK, bytes.fromhex(digest) + data)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save(
    picture: Image.Image,
    folder: Path,
    name: str,
    settings: dict[str, Any] | None = None,
    embed: Mapping[str, bytes] | None = None,
) -> Path:
    """Write folder/name.png, or name-2.png, name-3.png, ... if that exists; returns the file.

    The file is created with O_EXCL, so that two processes never write the same one. UserError if writing fails.
    """
    data = png_bytes(picture, settings, embed)
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
                stream.write(data)
        except OSError as error:
            file.unlink(missing_ok=True)  # half a picture is useless
            raise UserError(f"{file}: {error.strerror}") from None
        return file
    raise AssertionError("names never end")


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.png"
    number = 2
    while True:
        yield folder / f"{name}-{number}.png"
        number += 1


def settings_of(
    job: Job, runtime: Runtime, source: dict[str, Any], facts: dict[str, Any], seed: int | None = None
) -> dict[str, Any]:
    """All that a picture depends on, as plain data. seed None: for a sheet of all the job's seeds.

    source: where the weights come from. facts: of the run, such as versions and device.
    """
    own = {} if seed is None else {"seed": seed}
    return {
        "format": FORMAT,
        "command": "megaflux.infer",
        "job": job.model_dump(mode="json"),
        "runtime": runtime.model_dump(mode="json"),
        "source": source,
        **facts,
        **own,
    }


def read_settings(path: str) -> tuple[Job, Runtime, dict[str, Any], dict[str, bytes]]:
    """(job, runtime, all settings, embedded files by SHA-256) of a PNG that megaflux wrote.

    The job is the one that made the picture, with all its seeds. UserError for any other file.
    """
    from PIL import Image

    from megaflux.data.images import strict_pillow

    try:
        with strict_pillow(), Image.open(path, formats=("PNG",)) as picture:
            picture.load()
            text, chunks = dict(getattr(picture, "text", {})), list(getattr(picture, "private_chunks", []))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"--from-image {path}: has too many pixels; give a PNG that megaflux wrote") from None
    except Exception as error:  # Pillow's decoders raise all kinds
        why = getattr(error, "strerror", None) or "not a PNG picture"
        raise UserError(f"--from-image {path}: {why}; give a PNG that megaflux wrote") from None
    if "megaflux" not in text:
        raise UserError(f"--from-image {path}: holds no settings (made with --no-metadata, or by another program)")
    try:
        settings = json.loads(text["megaflux"])
        if settings.get("format") != FORMAT:
            found = str(settings.get("format"))[:80]
            raise UserError(f"--from-image {path}: settings of format {found}, this code reads {FORMAT}")
        job, runtime = Job.model_validate(settings["job"]), Runtime.model_validate(settings["runtime"])
        if not isinstance(settings["source"], dict):
            raise TypeError("source is not an object")
        maps = settings.get("maps") or {}
        if not isinstance(maps, dict) or not all(isinstance(digest, str) for digest in maps.values()):
            raise TypeError("maps is not an object of hashes")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise UserError(f"--from-image {path}: settings: {where}: {first['msg'][:200]}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--from-image {path}: settings cannot be read ({repr(error)[:200]})") from None
    embedded = {chunk[1][:32].hex(): chunk[1][32:] for chunk in chunks if chunk[0] == INPUT_CHUNK}
    return job, runtime, settings, embedded


def batch_of(job: Job, seed: int) -> tuple[int, ...]:
    """The seeds of the batch that a picture was made in: a replay makes all of them to get identical pixels."""
    index = job.seeds.index(seed)
    first = index - index % job.batch_size
    return job.seeds[first : first + job.batch_size]


def parameters_text(settings: dict[str, Any]) -> str:
    """The `parameters` chunk, as the web interfaces of Stable Diffusion write it."""
    job = settings["job"]
    fields = {
        "Steps": job["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{job['cfg']:g}",
        "Distilled CFG Scale": job["guidance"],
        "Seed": settings.get("seed", job["seeds"][0]),
        "Size": f"{job['width']}x{job['height']}",
        "Model": Path(settings["runtime"]["checkpoint"]).name,
    }
    weights = settings["source"].get("weights_sha256")
    if weights:
        fields["Model hash"] = weights[:10]
    if job["image"] is not None:
        fields["Denoising strength"] = job["strength"]
    fields["Version"] = f"megaflux {settings['versions']['megaflux']}"
    prompt = f"{job['prompt']}\n" if job["prompt"] else ""
    prompt += f"Negative prompt: {job['negative']}\n" if job["negative"] else ""
    return prompt + ", ".join(f"{key}: {value}" for key, value in fields.items())


def contact_sheet(given: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> Image.Image:
    """Inputs (references, image, control maps) in frames, then the pictures, in rows on white; all cells have the
    pictures' size."""
    from PIL import Image, ImageOps

    width, height = pictures[0].size
    count = len(given) + len(pictures)
    columns = min(count, max(2, math.ceil(math.sqrt(count * height / width * 1.5))))
    rows = math.ceil(count / columns)
    size = (columns * (width + CELL_GAP) + CELL_GAP, rows * (height + CELL_GAP) + CELL_GAP)
    sheet = Image.new("RGB", size, "white")
    framed = Image.new("RGB", (width + CELL_GAP, height + CELL_GAP), "black")
    for index in range(count):
        row, column = divmod(index, columns)
        left, top = CELL_GAP + column * (width + CELL_GAP), CELL_GAP + row * (height + CELL_GAP)
        if index < len(given):
            sheet.paste(framed, (left - CELL_GAP // 2, top - CELL_GAP // 2))
            picture = ImageOps.pad(given[index].convert("RGB"), (width, height), color="white")
        else:
            picture = pictures[index - len(given)]
        sheet.paste(picture, (left, top))
    return sheet
