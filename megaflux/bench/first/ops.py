"""Step ops: microseconds of each op, without compile; image and text rows apart where a block runs them apart."""

from __future__ import annotations

from dataclasses import replace

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux_kernels import OPS
from megaflux_kernels.bench import cases, timing, trials

STREAMS = ("modulate", "gate_residual")  # which double blocks call once a stream, single ones on both joined


def run(recorder: Recorder, setting: Setting) -> None:
    device, dtype, tokens = setting.device, setting.dtype, setting.square()
    base = cases.SMALL if setting.small else cases.Sizes()
    if not setting.small:
        base = replace(base, text=tokens.condition, image=tokens.image)
    copy, product = timing.copy_gb_per_s(device), timing.matmul_tflop_per_s(device, dtype)
    for op in OPS:
        rows = {"joint": base}
        if op in STREAMS:
            rows |= {"image": replace(base, text=0), "text": replace(base, image=0)}
        for stream, sizes in rows.items():
            for case in cases.make(op, sizes, dtype, device):
                where = stream if op != "qk_norm_rope" or "+" not in case.shape else "image + text"
                name = f"{op} {where}" + (" with modulate" if case.shape.endswith("+modulate") else "")
                for arm, call in {"ours": case.ours, "eager": case.reference, **case.others}.items():
                    label = name if arm == "ours" else f"{name}, {arm}"
                    facts = [f"{label}: forward", f"{label}: with backward"]
                    if not recorder.missing(*facts):
                        continue
                    with recorder.measuring(*facts):
                        found = trials.times(case, call, device, 2 * setting.samples)
                        for fact, ms in zip(facts, found, strict=True):
                            recorder.add(fact, 1e3 * ms, "us")
                        if arm == "ours" and setting.device.type == "cuda":
                            amounts, limit = (case.bytes, copy * 1e6) if case.bytes else (case.flops, product * 1e9)
                            for part, amount, ms in zip(("forward", "with backward"), amounts, found, strict=True):
                                recorder.add(f"{name}: share {part}", amount / ms / limit)
