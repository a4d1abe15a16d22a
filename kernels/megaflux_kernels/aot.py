"""python -m megaflux_kernels.aot: compile every Triton kernel for real GPUs without one, and print what it uses.

Each op's triton_kernels.AOT lists (kernel, signature and constants, warps[, stages[, dtypes]]) at FLUX's sizes; a
type `D` is compiled for each dtype. Registers, shared memory and spills come from the cubin (`cuobjdump -res-usage`,
which Triton carries). Exit code 1 where a kernel does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflux_kernels import OPS
from megaflux_kernels.bench.report import path

DTYPES = ("bf16", "fp16", "fp32")
ARCHITECTURES = (80, 90)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megaflux_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, help="one op (default: all)")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities x 10")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    print(f"{'op':<18}{'kernel':<33}{'dtype':<7}{'arch':>5}{'registers':>11}{'shared B':>10}{'spill B':>9}")
    for op in [args.op] if args.op else OPS:
        for row in compile_op(op, args.arch):
            rows.append(row)
            print(f"{row['op']:<18}{row['kernel']:<33}{row['dtype']:<7}{row['arch']:>5}{row['registers']:>11}"
                  f"{row['shared']:>10}{row['spills']:>9}", flush=True)  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def compile_op(op: str, architectures: list[int]) -> Iterator[dict[str, Any]]:
    """{"op", "kernel", "dtype", "arch", "registers", "shared", "spills" (bytes)} of each kernel of an op."""
    module = importlib.import_module(f"megaflux_kernels.{op}.triton_kernels")
    for kernel, arguments, warps, *more in module.AOT:
        stages, dtypes = more[:1], more[1] if len(more) > 1 else DTYPES
        typed = any("D" in str(kind).lstrip("*") for kind in arguments.values() if isinstance(kind, str))
        for dtype in dtypes if typed else ("-",):
            for arch in architectures:
                cubin, shared = compile_kernel(kernel, arguments, dtype, arch, warps, *stages)
                yield {"op": op, "kernel": kernel.fn.__name__, "dtype": dtype, "arch": arch, **resources(cubin, shared)}


def compile_kernel(kernel, arguments: dict[str, Any], dtype: str, arch: int, warps: int, stages: int = 3):
    """(cubin, shared memory in bytes) of a kernel. arguments: Triton types by name, and values of constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: kind for name, kind in arguments.items() if not isinstance(kind, str)}
    signature = {name: kind.replace("D", dtype) if isinstance(kind, str) else "constexpr"
                 for name, kind in arguments.items()}  # fmt: skip
    # What Triton's launcher would find out of the real arguments: pointers and FLUX's sizes are multiples of 16.
    names = list(arguments)
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items()
               if kind.startswith(("*", "i32", "i64"))}  # fmt: skip
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options={"num_warps": warps, "num_stages": stages})  # fmt: skip
    return compiled.asm["cubin"], compiled.metadata.shared


def resources(cubin: bytes, shared: int) -> dict[str, int]:
    """Registers per thread, shared memory and spills (stack and local memory, bytes) of a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": used["REG"], "shared": max(shared, used["SHARED"]), "spills": used["STACK"] + used["LOCAL"]}


if __name__ == "__main__":
    sys.exit(main())
