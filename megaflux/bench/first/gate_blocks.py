"""Step gate-blocks: 2 + 2 blocks of FLUX at full width against diffusers: velocity and every gradient, all policies."""

from __future__ import annotations

from megaflux.bench import numerics
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting, grid

ARMS = ("ours-none", "ours-mlp", "ours-full")


def run(recorder: Recorder, setting: Setting) -> None:
    """The largest error, over what diffusers' own path has in the same dtype; above 2 is an error."""
    pictures = setting.pictures()
    shortest = min(pictures, key=lambda picture: picture[1].image)
    for bucket, tokens in (pictures[0], shortest):
        names = {arm: f"{arm}, {tokens.image} + {tokens.condition} tokens: error / diffusers'" for arm in ARMS}
        if not recorder.missing(*names.values()):
            continue
        with recorder.measuring(*names.values()):
            found = numerics.gate(setting.flux(tokens.condition), grid(bucket), setting.dtype, setting.device, ARMS)
            for arm, errors in found.items():
                with recorder.measuring(names[arm]):
                    worst = errors[0]
                    if not worst.passes:
                        raise ArithmeticError(
                            f"{worst.name} is off by {worst.ours:.2e}, diffusers by {worst.eager:.2e}"
                        )
                    recorder.add(names[arm], worst.ours / max(worst.eager, worst.floor))
