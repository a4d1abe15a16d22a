"""Step attention: which backend torch chooses for FLUX's attention, and the speed of each, on FLUX's own strides."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.bench import limits
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux_kernels import cudnn
from megaflux_kernels.bench.timing import kernel_ms, median

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LENGTHS = (4580, 2240)  # of 1:1 with 484 condition tokens: no multiple of 16; and one that 128 does not divide
SMALL_LENGTHS = (89, 64)


def run(recorder: Recorder, setting: Setting) -> None:
    for length in SMALL_LENGTHS if setting.small else LENGTHS:
        at_length(recorder, setting, length)


def at_length(recorder: Recorder, setting: Setting, length: int) -> None:
    device, sizes, attend = setting.device, setting.flux(), F.scaled_dot_product_attention
    q, k, v, dout = limits.attention_inputs(replace(sizes, text=0), length, setting.dtype, device)
    with recorder.measuring(f"chosen at S = {length}", f"chosen at S = {length}, backward"):
        out = attend(q, k, v)
        recorder.add(f"chosen at S = {length}", _backend(out.grad_fn))
        recorder.add(f"chosen at S = {length}, backward", type(out.grad_fn).__name__.removesuffix("0"))
    flops = 4 * sizes.batch * length**2 * sizes.heads * sizes.head_dim
    for name in BACKENDS if device.type == "cuda" else ("flash",):
        facts = [f"{name} at S = {length}, {part}" for part in ("forward", "backward")]
        if not recorder.missing(*facts):
            continue
        with recorder.measuring(*facts), sdpa_kernel(BACKENDS[name]):
            if name == "cudnn" and (problem := cudnn.problem(length)):
                raise RuntimeError(problem)
            with torch.no_grad():
                forward = median(kernel_ms(lambda: attend(q, k, v), device, setting.samples))
            recorder.add(facts[0], flops / forward / 1e9, "TFLOP/s")
            out = attend(q, k, v)
            gradients = partial(torch.autograd.grad, out, [q, k, v], dout, retain_graph=True)
            recorder.add(facts[1], 2 * flops / median(kernel_ms(gradients, device, setting.samples)) / 1e9, "TFLOP/s")


def _backend(node: object) -> str:
    """The backend of a tensor's grad_fn: cudnn, flash, efficient or math."""
    name = type(node).__name__.lower()
    return next((backend for backend in ("cudnn", "flash", "efficient") if backend in name), "math")
