"""Step compiled: diffusers' blocks under torch.compile. Compiling takes minutes, so this step comes last."""

from __future__ import annotations

from megaflux.bench.first.blocks import compare, measure
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting

ARMS = ("diffusers-compile", "diffusers-compile-full")
RATIOS = (("diffusers-compile", "ours-none"), ("diffusers-compile-full", "ours-mlp"))


def run(recorder: Recorder, setting: Setting) -> None:
    measure(recorder, setting, ARMS)
    compare(recorder, RATIOS)
