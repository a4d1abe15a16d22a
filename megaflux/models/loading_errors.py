"""A library's loading errors as one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megaflux.common.errors import UserError, is_out_of_memory, one_line
from megaflux.models.safetensors_files import is_pointer


class named:
    """Turn a library's loading error into a UserError of one line that names the source.

    Running out of GPU memory (`is_out_of_memory`) is not the source's fault and passes unchanged: training handles it."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if is_out_of_memory(error):
            return
        file = _unreadable(self.where)
        if file is not None and is_pointer(file):
            raise UserError(f"{file}: is a git-lfs pointer, not the file; fetch it with `git lfs pull`") from error
        raise UserError(f"{file or self.where}: cannot be loaded: {one_line(error, 400)}") from error


def _unreadable(where: str) -> Path | None:
    """The first safetensors file of a local folder that cannot be opened, which the libraries' errors do not name."""
    for file in sorted(Path(where).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    return None
