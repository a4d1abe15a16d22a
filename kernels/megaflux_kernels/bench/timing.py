"""Samples of time, and the highest rates of the same machine in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than any L2 cache
HEAD_START_CYCLES = 2_000_000  # GPU cycles, about 1 ms, in which Python enqueues a call


def samples_ms(
    run: Callable[[], Any], device: torch.device, samples: int, warmup: int, before: Callable[[], Any] | None = None
) -> list[float]:
    """Milliseconds of each call of `run`, by events on a GPU and by the clock on a CPU. before: called ahead of each, not
    timed."""
    for _ in range(warmup):
        if before is not None:
            before()
        run()
    times = []
    for _ in range(samples):
        if before is not None:
            before()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e3)
    return times


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between samples; 0.5 is the median."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def kernel_ms(run: Callable[[], Any], device: torch.device, samples: int, warmup: int = 3) -> list[float]:
    """Milliseconds of a short call as within a step: with cold caches, and on a GPU with the launches enqueued before, so
    that Python's own time does not count."""
    if device.type != "cuda":
        return samples_ms(run, device, samples, warmup)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def before() -> None:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)

    return samples_ms(run, device, samples, warmup, before)


def copy_gb_per_s(device: torch.device, samples: int = 20) -> float:
    """Bytes read and written per second by a large copy, in GB/s."""
    n = (1 << 30) if device.type == "cuda" else (1 << 26)
    source = torch.zeros(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / median(samples_ms(lambda: target.copy_(source), device, samples, 3)) / 1e6


def matmul_tflop_per_s(device: torch.device, dtype: torch.dtype, samples: int = 10) -> float:
    """TFLOP/s of a large matrix product of normal numbers in a dtype."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median(samples_ms(lambda: a @ b, device, samples, 3)) / 1e9
