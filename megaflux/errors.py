"""The errors a person can mend, and the exit codes they leave with.

0   done
2   bad input: configuration, command line, checkpoint or data; one line says what and how to mend it
3   `megaflux.data.prepare` refused more images than `--max-bad`
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: the file or field, what is wrong with it, and the mend.

    agreed: all ranks raise the same, so rank 0 speaks for them.
    """

    def __init__(self, message: str, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


class FrozenParameterError(RuntimeError):
    """A gradient reached a parameter that the active stage keeps frozen. Always a bug, never skipped."""


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command's `main`, print a UserError as one line on stderr, and leave with its exit code.

    Before the ranks know each other rank 0 speaks for all: they read the same command line. Afterwards each speaks
    for itself, because it may be the only one that saw the fault, unless they have agreed on it."""
    try:
        code = main() or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        dist = sys.modules.get("torch.distributed")
        together = dist is not None and dist.is_available() and dist.is_initialized()
        if rank == "0" or (together and not error.agreed):
            line = " ".join(str(error).split())
            print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr)
        code = 2
        if together:
            # Python's way out would take the process group apart under gloo's running threads, and now and then C++
            # aborts (exit code -6). Nothing is left to be saved.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)
