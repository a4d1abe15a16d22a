"""Step compiled: diffusers' blocks under torch.compile. Compiling takes minutes, so this step comes last."""

from __future__ import annotations

from megaflux.bench.first.blocks import measure
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting

ARMS = ("diffusers-compile", "diffusers-compile-full")


def run(recorder: Recorder, setting: Setting) -> None:
    measure(recorder, setting, ARMS)
