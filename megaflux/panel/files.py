"""Pictures that a job of the page can name, kept under the output folder, so that a replay finds them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from megaflux.common.errors import UserError
from megaflux.data.reference_size import MAX_ASPECT
from megaflux.generation.outputs import safe_stem
from megaflux.panel.state import Stored


def store(upload: str | Path, out: Path) -> Stored:
    """Copy a picture's file to out/inputs/<hash>/<its name>, unless it is under `out` already. UserError for a file that is not
    a usable picture, naming the file and the fault."""
    from megaflux.data.images import REASONS, BadImage, decode

    upload = Path(upload)
    try:
        data = upload.read_bytes()
    except OSError as error:
        raise UserError(f"{upload.name}: {error.strerror}; give it again") from None
    try:
        picture, _ = decode(data, max_aspect=MAX_ASPECT)
    except BadImage as error:
        # the detail of "not an image" is the file's first bytes, which help nobody on a page
        detail = f" ({error.detail})" if error.detail and error.reason != "not_an_image" else ""
        raise UserError(f"{upload.name}: {REASONS[error.reason]}{detail}; give another picture") from None
    return keep(upload, data, picture.size, out)


def keep(name: str | Path, data: bytes, size: tuple[int, int], out: Path) -> Stored:
    """`store` for the bytes of a picture of known (width, height). UserError where they cannot be written."""
    name, digest = Path(name), hashlib.sha256(data).hexdigest()
    if name.is_file() and name.resolve().is_relative_to(out.resolve()):
        return Stored(str(name.absolute()), digest, size)
    suffix = name.suffix if re.fullmatch(r"\.\w{1,5}", name.suffix) else ""
    file = out.absolute() / "inputs" / digest[:16] / (safe_stem(name.name) + suffix)
    try:
        if not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give another --out") from None
    return Stored(str(file), digest, size)
