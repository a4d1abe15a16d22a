"""Step machine: what ran, and the GPU's highest rates: a copy, and matrix products at the shapes of FLUX's linears."""

from __future__ import annotations

import os
import time

import torch

from megaflux.bench import limits
from megaflux.bench.activations import trainable_flux
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux_kernels.bench import machine
from megaflux_kernels.bench.timing import copy_gb_per_s, matmul_tflop_per_s


def run(recorder: Recorder, setting: Setting) -> None:
    device, on_gpu = setting.device, setting.device.type == "cuda"
    add = recorder.add
    add("device", machine.device_name(device))
    for name, version in machine.versions().items():
        add(name, version or "none")
    add("cuDNN", torch.backends.cudnn.version() or 0)
    add("CPU cores", os.cpu_count() or 0)
    if on_gpu:
        found = torch.cuda.get_device_properties(device)
        add("memory", found.total_memory / 1e9, "GB")
        add("multiprocessors", found.multi_processor_count)
        add("compute capability", f"{found.major}.{found.minor}")
    with recorder.measuring("copy, read and written"):
        started = time.perf_counter()
        add("copy, read and written", copy_gb_per_s(device), "GB/s", seconds=time.perf_counter() - started)
    side = 8192 if on_gpu else 1024
    with recorder.measuring(name := f"product {side}x{side}x{side}, bf16"):
        add(name, matmul_tflop_per_s(device, setting.dtype), "TFLOP/s")
    tokens = setting.square()
    sizes = setting.flux(tokens.condition)
    trained = trainable_flux(sizes.flux_config(), sizes.train_blocks, sizes.components)
    for product in limits.linears(sizes, tokens.image, trained):
        shape = f"{product.inputs} -> {product.outputs}, {product.rows} rows"
        with recorder.measuring(name := f"linear {shape}, bf16"):
            if recorder.missing(name):
                add(name, limits.time_product(product, setting.dtype, device, 2 * setting.samples), "TFLOP/s")
        if on_gpu and torch.cuda.get_device_capability(device) >= limits.FP8_SINCE:
            with recorder.measuring(name := f"linear {shape}, fp8"):
                if recorder.missing(name):
                    add(name, limits.time_product_fp8(product, device, 2 * setting.samples), "TFLOP/s")
    if on_gpu:
        add("clocks under load", machine.clocks(device))
