"""Standard output and error of a run that may outlive their reader.

A write fails with EIO on a closed terminal, EPIPE on a pipe without a reader (Ctrl-C also ends the `tee` of `... | tee log`),
ENOSPC on a full disk. None of these may keep a run from saving.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Unbreakable(io.FileIO):
    """A file descriptor that discards failed writes."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def survive_terminal() -> None:
    """Make failed writes to stdout and stderr harmless: the text is lost, and nothing is raised.

    Streams that are not descriptors 1 and 2 (in a test or a notebook) are left alone."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            below = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer between
            if stream.fileno() != number or isinstance(below, _Unbreakable):
                continue
            buffered = stream.buffer is not below
            stream.flush()
            os.fstat(number)
        except (AttributeError, OSError, ValueError):  # None, replaced by a test, or closed
            continue
        raw = _Unbreakable(number, "w", closefd=False)
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(raw) if buffered else raw,
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            ),
        )
