"""Step gate-blocks: 2 + 2 blocks of FLUX at full width beside diffusers: velocity and every gradient, all policies."""

from __future__ import annotations

import traceback

from megaflux.bench import numerics
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting, grid

ARMS = ("ours-none", "ours-mlp", "ours-full")


def run(recorder: Recorder, setting: Setting) -> None:
    """Record the largest errors against float32, ours and diffusers'; ours above twice diffusers' plus a rounding is an
    error."""
    pictures = setting.pictures()
    shortest = min(pictures, key=lambda picture: picture[1].image)
    for bucket, tokens in (pictures[0], shortest):
        names = {arm: f"{arm}, {tokens.image} + {tokens.condition} tokens" for arm in ARMS}
        lost = {arm: name for arm, name in names.items() if recorder.missing(f"{name}: ours over diffusers'")}
        if not lost:
            continue
        sizes = setting.flux(tokens.condition), grid(bucket), setting.dtype, setting.device
        try:
            found = numerics.gate(*sizes, tuple(lost))
        except Exception:  # of one arm or of all: each is tried by itself below
            traceback.print_exc()
            found = {}
        for arm, name in lost.items():
            with recorder.measuring(f"{name}: ours over diffusers'", f"{name}: diffusers' own"):
                errors = found.get(arm) or numerics.gate(*sizes, (arm,))[arm]
                worst = errors[0]
                if not worst.passes:
                    raise ArithmeticError(f"{worst.name} is off by {worst.ours:.2e}, diffusers by {worst.eager:.2e}")
                recorder.add(f"{name}: diffusers' own", max(error.eager for error in errors))
                recorder.add(
                    f"{name}: ours over diffusers'", max(error.ours / max(error.eager, 1e-12) for error in errors)
                )
