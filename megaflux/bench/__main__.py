"""python -m megaflux.bench step|activations|traffic|memory|loader|infer|start|recipes|guidance: speed and memory; --help after each.

step         forward and backward of FLUX: diffusers, diffusers compiled, ours
activations  bytes that the backward pass keeps, counted without a GPU
traffic      bytes that a block moves beside its matrix products, counted without a GPU
memory       the memory formulas beside what is counted, without a GPU
loader       samples per second of the data loader
infer        seconds per picture of the pipeline
start        seconds to the first update of a training process
recipes      updates that the tiny preset needs with the connector trained first, or all at once
guidance     the tiny preset trained at guidance 1 and at 3.5, its weights and their average
"""

from __future__ import annotations

import importlib
import sys

from megaflux_kernels.bench.report import Parser

BENCHES = ("step", "activations", "traffic", "memory", "loader", "infer", "start", "recipes", "guidance")
MODULES = {"activations": "count"}  # the counting itself is megaflux.bench.activations


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    outer = Parser(prog="python -m megaflux.bench", description=__doc__)
    outer.add_argument("bench", choices=BENCHES)
    name = outer.parse_args(argv[:1]).bench
    # Each imports what it measures and no more: step runs where training's libraries are missing.
    module = importlib.import_module(f"megaflux.bench.{MODULES.get(name, name)}")
    parser = Parser(prog=f"python -m megaflux.bench {name}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parser, parser.parse_args(argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
