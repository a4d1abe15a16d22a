"""Step ops: microseconds of each op, not compiled; image and text rows separately where a block runs them separately."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux_kernels import OPS
from megaflux_kernels.bench import cases, timing, trials

STREAMS = ("modulate", "gate_residual")  # called once per stream by double blocks, on both joined by single ones


def run(recorder: Recorder, setting: Setting) -> None:
    device, dtype, tokens = setting.device, setting.dtype, setting.square()
    base = cases.SMALL
    if not setting.small:
        base = replace(cases.Sizes(), text=tokens.condition, image=tokens.image)
    rates = timing.copy_gb_per_s(device) * 1e6, timing.matmul_tflop_per_s(device, dtype) * 1e9  # a millisecond
    for op in OPS:
        rows = {"joint": base}
        if op in STREAMS:
            rows |= {"image": replace(base, text=0), "text": replace(base, image=0)}
        for stream, sizes in rows.items():
            for case in cases.make(op, sizes, dtype, device):
                where = stream if op != "qk_norm_rope" or "+" not in case.shape else "image + text"
                name = f"{op} {where}" + (" with modulate" if case.shape.endswith("+modulate") else "")
                measure(recorder, setting, name, case, rates)
    compare(recorder)


def measure(recorder: Recorder, setting: Setting, name: str, case: cases.Case, rates: tuple[float, float]) -> None:
    """Record microseconds of each arm of a case; for ours on a GPU also the fraction of the GPU's highest rate of bytes or
    FLOPs.

    rates: the highest rates, bytes and FLOPs per millisecond.
    """
    arms = {"ours": case.ours, "eager": case.reference, **case.others}
    if case.op == "biased_attention":
        arms["attention without a bias"] = lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v)
    for arm, call in arms.items():
        label = name if arm == "ours" else f"{name}, {arm}"
        facts = [f"{label}: forward", f"{label}: with backward"]
        if arm == "ours" and setting.device.type == "cuda":
            facts += [f"{name}: share forward", f"{name}: share backward"]
        if not recorder.missing(*facts):
            continue
        with recorder.measuring(*facts):
            forward, both = trials.times(case, call, setting.device, 2 * setting.samples)
            recorder.add(facts[0], 1e3 * forward, "us")
            recorder.add(facts[1], 1e3 * both, "us")
            if len(facts) > 2:
                amounts, rate = (case.bytes, rates[0]) if case.bytes else (case.flops, rates[1])
                recorder.add(facts[2], amounts[0] / forward / rate)
                recorder.add(facts[3], (amounts[1] - amounts[0]) / (both - forward) / rate)


def compare(recorder: Recorder) -> None:
    """Record how fast attention with a bias is relative to attention without one."""
    known = recorder.facts.numbers(recorder.step)
    ours, plain = (
        [known.get(f"biased_attention joint{arm}: {part}", 0.0) for part in ("forward", "with backward")]
        for arm in ("", ", attention without a bias")
    )
    if all(ours) and all(plain):
        name = "biased_attention joint over attention without a bias"
        recorder.add(f"{name}: forward", plain[0] / ours[0])
        recorder.add(f"{name}: backward", (plain[1] - plain[0]) / (ours[1] - ours[0]))
