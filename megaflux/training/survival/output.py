"""Standard output and error of a run that may outlive whoever reads them.

A closed terminal answers writes with EIO, a pipe whose reader is gone with EPIPE (Ctrl-C ends the `tee` of `... | tee log`
as well), a log on a full disk with ENOSPC. None of them may cost a run the save that it is about to make.
"""

from __future__ import annotations

import io
import os
import sys


class _Unbreakable(io.FileIO):
    """A descriptor whose failed writes are dropped."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def survive_terminal() -> None:
    """From now on what this process prints is lost where it cannot be written, and raises nothing.

    Streams that are no files (a test's, a notebook's) stay as they are."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            below = getattr(stream.buffer, "raw", stream.buffer)  # under `python -u` nothing is between
            if stream.fileno() != number or isinstance(below, _Unbreakable):
                continue
            buffered = stream.buffer is not below
            stream.flush()
            os.fstat(number)
        except (AttributeError, OSError, ValueError):  # None, a test's, or closed
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
