"""The errors a person can mend, and the exit codes they leave with.

0   done
2   bad input: configuration, command line, checkpoint or data; one line says what and how to mend it
3   `megaflux.data.prepare` refused more images than `--max-bad`
10  training was asked to leave by SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP and has saved: the same command goes on from there
11  training gave up: a rank died, hung, ran out of GPU memory or did not find rank 0; stacks are on stderr, and the same command goes on from the last checkpoint
130 Ctrl-C: nothing is half written; of training, a second Ctrl-C, or one before anything was loaded, and nothing was saved
131 SIGQUIT (Ctrl-\\) to training: it left at once with its stacks on stderr, and nothing was saved
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

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
    """Bad input. The message is one line: the file or field, what is wrong with it, and the mend.

    agreed: all ranks raise the same, so rank 0 speaks for them. own: others may not raise it, so each machine's first rank
    speaks even before the ranks know each other. code: what the process leaves with; STUCK where the same command may well
    succeed later, for 2 ends a supervised run for good.
    """

    def __init__(self, message: str, agreed: bool = False, own: bool = False, code: int = 2):
        super().__init__(" ".join(message.splitlines()))  # names and values that it quotes may hold line breaks
        self.agreed, self.own, self.code = agreed, own, code


class FrozenParameterError(RuntimeError):
    """A gradient reached a parameter that the active stage keeps frozen. Always a bug, never skipped."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was not enough: for torch's allocator, or for a library that asks CUDA itself (cuBLAS,
    cuDNN, Triton, NCCL), which torch passes on as some RuntimeError."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, for this file is read before torch
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUTSIDE_TORCH)


def quiet_interrupt() -> None:
    """Ctrl-C that nobody catches ends this process with a word and exit code 130 in the place of a traceback. For programs,
    before their imports, which may take seconds; `exit_on_user_error` does it from then on."""

    def hook(kind: type[BaseException], error: BaseException, trace: object, before=sys.excepthook) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            return before(kind, error, trace)
        _say_interrupted()
        os._exit(INTERRUPTED)  # Python's own way would be to die of the signal: launchers make another code of that

    sys.excepthook = hook


def _say_interrupted() -> None:
    try:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
    except OSError:  # a terminal that is gone
        pass


def exit_on_user_error(main: Callable[[], int | None]) -> None:
    """Run a command's `main`, print a UserError as one line on stderr, and leave with its exit code; Ctrl-C is one
    word and 130.

    Before the ranks know each other rank 0 speaks for all: they read the same command line. Afterwards each speaks
    for itself, because it may be the only one that saw the fault, unless they have agreed on it."""
    try:
        code = main() or 0
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        dist = sys.modules.get("torch.distributed")
        together = dist is not None and dist.is_available() and dist.is_initialized()
        own = error.own and os.environ.get("LOCAL_RANK", "0") == "0"
        if rank == "0" or own or (together and not error.agreed):
            line = " ".join(str(error).split())
            print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr)
        code = error.code
        if together:
            # Python's way out would take the process group apart under gloo's running threads, and now and then C++
            # aborts (exit code -6). Nothing is left to be saved.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except KeyboardInterrupt:
        _say_interrupted()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # one more, on Python's way out, is no traceback either
        code = INTERRUPTED
    except Exception as error:
        dist = sys.modules.get("torch.distributed")
        if dist is None or not dist.is_available() or not dist.is_initialized():
            raise
        # A bug, or a peer that is gone. Either way the others wait for this rank, and Python's way out may hang.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STUCK if re.search(_PEER_GONE, str(error)) else 1)
    sys.exit(code)
