"""Steps gate-OP: an op's errors in bf16 against float64, at training's token counts, beside its eager reference."""

from __future__ import annotations

from dataclasses import replace

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux_kernels.bench import cases, trials


def run(recorder: Recorder, setting: Setting) -> None:
    """Record the largest error of each case's results, as a multiple of what is allowed: above 1 is an error."""
    op = recorder.step.removeprefix("gate-")
    sizes = cases.SMALL if setting.small else cases.Sizes()
    for tokens in {tokens.condition: tokens for _, tokens in setting.pictures()}.values():
        at = replace(sizes, text=tokens.condition, image=tokens.image)
        for case in cases.make(op, at, setting.dtype, setting.device):
            with recorder.measuring(name := f"{case.shape}: error / allowed"):
                if recorder.missing(name):
                    worst = max(trials.errors(case, setting.dtype), key=lambda error: error.of_allowed)
                    if not worst.of_allowed <= 1:
                        raise ArithmeticError(str(worst))
                    recorder.add(name, worst.of_allowed)
