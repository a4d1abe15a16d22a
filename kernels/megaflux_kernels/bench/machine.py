"""What a bench ran on: device, versions, commit, the attention backend that really ran; and how errors are reported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megaflux_kernels import cudnn


def facts(device: torch.device, attention_backend: str | None) -> dict[str, Any]:
    """The facts of this process for a report."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "attention_backend": attention_backend,
        "commit": commit(),
    }


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU. torch chooses cuDNN's attention only if that is correct from then on."""
    if why := cudnn.leave_out_if_wrong():
        print(f"warning: {why}", file=sys.stderr)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None: not installed."""
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "diffusers", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"torch": torch.__version__, "python": platform.python_version(), "cuda": torch.version.cuda}


def commit() -> str | None:
    """HEAD of the repository that holds this file, with "+changes" if files differ; None outside a repository."""
    here = str(Path(__file__).resolve().parent)
    try:
        head = _run("git", "-C", here, "rev-parse", "HEAD")
        return head + ("+changes" if _run("git", "-C", here, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def clocks(device: torch.device) -> str:
    """Clocks, power and temperature of a GPU in a human-readable line; empty without nvidia-smi."""
    if device.type != "cuda":
        return ""
    query = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    try:
        values = _run("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", visible_gpu())
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"SM clock, memory clock, power, limit, temperature: {values} C"


def visible_gpu() -> str:
    """The number or name, for nvidia-smi, of the first GPU that torch may use."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"


def attention_backend(
    device: torch.device, dtype: torch.dtype, heads: int = 24, head_dim: int = 128, tokens: int = 1024
) -> str:
    """The backend that scaled_dot_product_attention really uses for these sizes, with gradients, by the operator that it
    calls: flash, cudnn, efficient or math.

    tokens: the real number, since the choice can depend on it. q, k and v are (1, tokens, heads, head_dim) in memory, as
    in FLUX. RuntimeError where no allowed backend supports these tensors.
    """
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    with _Called() as called:
        F.scaled_dot_product_attention(q, k, v)
    for backend in ("flash", "cudnn", "efficient"):
        if any(f"scaled_dot_product_{backend}" in name for name in called.names):
            return backend
    return "math"


def first_line(error: BaseException, limit: int = 120) -> str:
    """An exception in one line: the first line of its message, cut at `limit` characters, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


class _Called(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
