"""Step blocks: forward and backward of all of FLUX's blocks, batch 1, ours and diffusers', and the limit of the machine.

One after the other, each recorded as soon as it is measured; the first is measured again at the end, to show how the
clocks have changed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from megaflux.bench import limits
from megaflux.bench.activations import freeze, trainable_flux
from megaflux.bench.arms import Arms, random_flux, random_inputs
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting, grid
from megaflux.training.planning.gpus import peak_tflops_for
from megaflux_kernels.bench.timing import median, samples_ms

ARMS = ("ours-none", "ours-mlp", "ours-full", "diffusers-eager", "diffusers-eager-full")
AGAIN = "ours-none, once more"
RATIOS = (("diffusers-eager", "ours-none"), ("diffusers-eager-full", "ours-mlp"), ("diffusers-eager-full", "ours-full"))
LIMITS = ("matrix products", "attention")


def run(recorder: Recorder, setting: Setting) -> None:
    measure(recorder, setting, (*ARMS, AGAIN))
    compare(recorder)


def measure(recorder: Recorder, setting: Setting, names: tuple[str, ...]) -> None:
    """Record milliseconds of each arm's step, its MFU and its memory; in the step `blocks` also the limit's two parts."""
    bucket, tokens = setting.pictures()[0]
    sizes, device, dtype = setting.flux(tokens.condition), setting.device, setting.dtype
    config = sizes.flux_config()
    trained = trainable_flux(config, sizes.train_blocks, sizes.components)
    products = limits.products(sizes, tokens.image, trained)
    flops = limits.step_flops(sizes, tokens.image, products)
    peak = peak_tflops_for(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if recorder.step == "blocks":
        made = (
            partial(limits.run_products, products, dtype, device),
            partial(limits.run_attention, sizes, tokens.image, dtype, device),
        )
        for name, make in zip(LIMITS, made, strict=True):
            with recorder.measuring(fact := f"limit: {name}"):
                if recorder.missing(fact):
                    recorder.add(fact, median(samples_ms(make(), device, setting.samples, 2)), "ms")
            _free(device)
    if not recorder.missing(*names):
        return
    arms = Arms(random_flux(config, dtype, device))
    freeze(arms.transformer, trained)
    given = random_inputs(arms.transformer, 1, grid(bucket), tokens.condition, device)
    clear, step = partial(arms.clear, given), partial(arms.step, given)
    for name in names:
        facts = [name]
        if name != AGAIN and device.type == "cuda":
            facts += [f"{name}: memory beside weights", *([f"{name}: MFU"] if peak else ())]
        if not recorder.missing(*facts):
            continue
        with recorder.measuring(*facts):
            started = time.perf_counter()
            arms.set(name.partition(",")[0])
            samples_ms(step, device, 0, setting.warmup, clear)
            clear()
            before = _restart_peak(device)
            ms = median(samples_ms(step, device, setting.samples, 0, clear))
            recorder.add(name, ms, "ms", seconds=time.perf_counter() - started)
            if len(facts) > 1:
                held = torch.cuda.max_memory_allocated(device) - before
                recorder.add(facts[1], held / 1e9, "GB")
            if peak is not None and len(facts) > 2:
                recorder.add(facts[2], flops / ms / 1e9 / peak)
        clear()
        _free(device)


def compare(recorder: Recorder, pairs: Sequence[tuple[str, str]] = RATIOS) -> None:
    """Record ratios of milliseconds of these pairs (slow, fast), and the limit's share of each arm's."""
    known = recorder.facts.numbers("blocks", recorder.step)
    for slow, fast in pairs:
        if slow in known and fast in known:
            recorder.add(f"{slow} over {fast}", known[slow] / known[fast])
    parts = [f"limit: {name}" for name in LIMITS]
    if recorder.step == "blocks" and all(part in known for part in parts):
        limit = sum(known[part] for part in parts)
        recorder.add("limit: matrix products and attention", limit, "ms")
        for arm in ARMS:
            if arm in known:
                recorder.add(f"share of the limit, {arm}", limit / known[arm])


def _restart_peak(device: torch.device) -> int:
    """Bytes allocated now, from which a peak is counted; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
