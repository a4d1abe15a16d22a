"""Errors that the user can fix, and the exit codes of commands.

0   done
2   bad input: configuration, command line, checkpoint or data; one line says what is wrong and how to fix it
3   `megaflux.data.prepare` could not use more images than `--max-bad` allows
10  training was asked to leave by SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP and has saved: the same command resumes from there
11  training gave up: a rank died, hung, ran out of GPU memory or did not find rank 0; stacks are on stderr, and the same command resumes from the last checkpoint
130 Ctrl-C: no file is half written; in training a second Ctrl-C, or one before anything was loaded, and nothing was saved
131 SIGQUIT (Ctrl-\\) to training: it left at once with its stacks on stderr, and nothing was saved
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

STOPPED, STUCK, INTERRUPTED = 10, 11, 130
OUTSIDE_TORCH = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "[CUDA]: out of memory",
    "Cuda failure 2 'out of memory'",
    "Failed to CUDA malloc",
    "Failed to CUDA calloc",
)
_PEER_GONE = r"by peer|[Rr]emote worker|NCCL|Socket Timeout|[Tt]imed out waiting"


class UserError(Exception):
    """Bad input. The message is one line: the file or field, what is wrong with it, and how to fix it.

    agreed: all ranks raise the same error, so only rank 0 prints it. own: other machines may not raise it, so each
    machine's first rank prints it, even before the process group exists. code: the exit code; STUCK where the same
    command may succeed later, because 2 ends a supervised run for good.
    """

    def __init__(self, message: str, agreed: bool = False, own: bool = False, code: int = 2):
        super().__init__(" ".join(message.splitlines()))  # quoted names and values may contain line breaks
        self.agreed, self.own, self.code = agreed, own, code


class FrozenParameterError(RuntimeError):
    """A gradient reached a parameter that the active stage keeps frozen. Always a bug, never skipped."""


def one_line(error: object, most: int | None = 200) -> str:
    """The text of an exception or message without line breaks and repeated spaces, cut after `most` characters (None: whole)."""
    return " ".join(str(error).split())[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU ran out of memory: in torch's allocator, or in a library that allocates from CUDA itself (cuBLAS,
    cuDNN, Triton, NCCL), which torch reports as a RuntimeError."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, because this module is imported before torch
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUTSIDE_TORCH)


def quiet_interrupt() -> None:
    """From now on an uncaught Ctrl-C ends this process with one word and exit code 130 instead of a traceback.

    Programs call it before their slow imports; afterwards `exit_on_user_error` does the same."""

    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, trace)
        _say_interrupted()
        os._exit(INTERRUPTED)  # Python itself would die of the signal, which launchers turn into another code

    sys.excepthook = hook


def _say_interrupted() -> None:
    try:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
    except OSError:  # the terminal is closed
        pass


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code. A UserError is printed as one line on stderr; Ctrl-C prints one word
    and exits with 130.

    Before the process group exists only rank 0 prints, because all ranks read the same command line. Afterwards each rank
    prints its own error, which the others may not have seen, unless it is `agreed`."""
    try:
        code = main() or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        dist = sys.modules.get("torch.distributed")
        together = dist is not None and dist.is_available() and dist.is_initialized()
        own = error.own and os.environ.get("LOCAL_RANK", "0") == "0"
        if rank == "0" or own or (together and not error.agreed):
            line = one_line(error, None)
            print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr)
        code = error.code
        if together:
            # A normal exit would destroy the process group under gloo's running threads, and C++ sometimes aborts then
            # (exit code -6). Nothing is left to be saved.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except KeyboardInterrupt:
        _say_interrupted()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another one while Python exits prints no traceback either
        code = INTERRUPTED
    except Exception as error:
        dist = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_available() or not dist.is_initialized():
            raise
        # A bug, or a peer that has died. Either way the others wait for this rank, and a normal exit may hang.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STUCK if re.search(_PEER_GONE, str(error)) else 1)
    sys.exit(code)
