"""Step networks: the frozen networks before FLUX with random weights: the VAE, and Qwen2-VL without its last layer."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux.bench.random_models import VAE_SCALES, random_vae, random_vlm
from megaflux.config.presets import FLUX_VAE, dev, tiny
from megaflux.models import latents
from megaflux.models.scratch import TINY
from megaflux.models.vlm import Trunk
from megaflux.models.vlm_parts import split_vlm
from megaflux_kernels.bench.timing import median, samples_ms

VAE_BATCHES = (1, 2, 8)
TRUNK_BATCHES = (1, 2, 8)


def run(recorder: Recorder, setting: Setting) -> None:
    for part in (vae, trunk):
        with recorder.measuring(f"{part.__name__}: built"):
            part(recorder, setting)


def vae(recorder: Recorder, setting: Setting) -> None:
    device, dtype, (bucket, _) = setting.device, setting.dtype, setting.pictures()[0]
    config = json.loads((TINY / "vae" / "config.json").read_text()) if setting.small else VAE_SCALES | FLUX_VAE
    model = random_vae(config, dtype, device)
    recorder.add("vae: built", sum(p.numel() for p in model.parameters()) / 1e9, "B parameters")
    channels = model.config["block_out_channels"]
    for batch in VAE_BATCHES:
        pixels = torch.randint(0, 256, (batch, 3, bucket.height, bucket.width), dtype=torch.uint8, device=device)
        packed = latents.encode(model, pixels)
        encode, decode = latents.coding_peak(channels, batch, bucket.height, bucket.width, dtype.itemsize)
        encoding, decoding = partial(latents.encode, model, pixels), partial(latents.decode, model, packed)
        _measure(recorder, f"VAE encode at {batch}", encoding, setting, encode / 1e9)
        _measure(recorder, f"VAE decode at {batch}", decoding, setting, decode / 1e9)
    # The effect of another memory layout, and of a search for the fastest convolutions: the VAE is a tenth of an update.
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper loses the signature
        _measure(recorder, "VAE encode at 2, channels last", lambda: latents.encode(model, pixels[:2]), setting)
        _measure(recorder, "VAE decode at 2, channels last", lambda: latents.decode(model, packed[:2]), setting)
        torch.backends.cudnn.benchmark = True
        _measure(
            recorder, "VAE encode at 2, channels last, searched", lambda: latents.encode(model, pixels[:2]), setting
        )
        torch.backends.cudnn.benchmark = False


def trunk(recorder: Recorder, setting: Setting) -> None:
    device, (bucket, _) = setting.device, setting.pictures()[0]
    config = (tiny() if setting.small else dev())["model"]["vlm_config"]
    names = [f"trunk at {batch}" for batch in TRUNK_BATCHES]
    vlm, processor = random_vlm(config, setting.dtype, device)
    frozen, _ = split_vlm(vlm)
    model = Trunk(frozen, processor)
    recorder.add("trunk: built", sum(p.numel() for p in frozen.parameters()) / 1e9, "B parameters")
    for batch, name in zip(TRUNK_BATCHES, names, strict=True):
        pixels = torch.randint(0, 256, (batch, 3, bucket.height, bucket.width), dtype=torch.uint8, device=device)
        _measure(recorder, name, partial(model.encode, pixels), setting)
    if device.type == "cuda":
        with recorder.measuring(name := "trunk: forced waits"):
            if recorder.missing(name):
                recorder.add(name, waits(lambda: model.encode(pixels)))


def _measure(
    recorder: Recorder, name: str, call: Callable[[], Any], setting: Setting, formula: float | None = None
) -> None:
    """Record milliseconds of a call and, on a GPU, its peak memory beside what was allocated; formula: predicted, GB."""
    device = setting.device
    facts = [name, *([f"{name}: memory"] if device.type == "cuda" else ())]
    if not recorder.missing(*facts):
        return
    with recorder.measuring(*facts):
        started = time.perf_counter()
        ms = median(samples_ms(call, device, setting.samples, setting.warmup))
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call()
            peak = torch.cuda.max_memory_allocated(device) - before
            recorder.add(facts[1], peak / 1e9, "GB", formula)
        recorder.add(name, ms, "ms", seconds=time.perf_counter() - started)


def waits(call: Callable[[], Any]) -> int:
    """How often a call makes the host wait for the GPU, as torch's sync debug mode counts; prints where."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    for warning in found:
        print(f"waits for the GPU at {warning.filename}:{warning.lineno}")
    return len(found)
