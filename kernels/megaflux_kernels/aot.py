"""python -m megaflux_kernels.aot: compile every Triton kernel for real GPUs without one, and print what it uses.

Each op's triton_kernels.AOT lists (kernel, signature and constants, warps[, stages[, dtypes]]) at FLUX's sizes; a
type `D` is compiled for each dtype. Registers, shared memory and spills come from the cubin (`cuobjdump -res-usage`),
calls and divisions from its instructions in bf16 (`nvdisasm`, which is slow); Triton carries both. Exit code 1 where a
kernel does not compile.
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
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of kernels that take several")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    rows = []
    print(
        f"{'op':<18}{'kernel':<33}{'dtype':<7}{'arch':>5}{'registers':>11}{'shared B':>10}{'spill B':>9}"
        f"{'calls':>7}{'divisions':>11}"
    )
    for op in [args.op] if args.op else OPS:
        for row in compile_op(op, args.arch, args.dtype):
            rows.append(row)
            print(
                f"{row['op']:<18}{row['kernel']:<33}{row['dtype']:<7}{row['arch']:>5}{row['registers']:>11}"
                f"{row['shared']:>10}{row['spills']:>9}{row.get('calls', '-'):>7}{row.get('divisions', '-'):>11}",
                flush=True,
            )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def compile_op(op: str, architectures: list[int], chosen: list[str]) -> Iterator[dict[str, Any]]:
    """{"op", "kernel", "constants", "dtype", "arch"} of each kernel of an op, with its `resources` and, in bf16 or where
    its arguments leave no choice of dtype, its `code`. chosen: dtypes; others are left out."""
    module = importlib.import_module(f"megaflux_kernels.{op}.triton_kernels")
    for kernel, arguments, warps, *more in module.AOT:
        stages, dtypes = more[:1], more[1] if len(more) > 1 else DTYPES
        constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
        typed = any("D" in str(kind).lstrip("*") for kind in arguments.values() if isinstance(kind, str))
        for dtype in [dtype for dtype in dtypes if dtype in chosen] if typed else ("-",):
            for arch in architectures:
                cubin, shared = compile_kernel(kernel, arguments, dtype, arch, warps, *stages)
                row = {"op": op, "kernel": kernel.fn.__name__, "constants": constants, "dtype": dtype, "arch": arch}
                yield row | resources(cubin, shared) | (code(cubin) if dtype in ("bf16", "-") else {})


def compile_kernel(kernel, arguments: dict[str, Any], dtype: str, arch: int, warps: int, stages: int = 3):
    """(cubin, shared memory in bytes) of a kernel. arguments: Triton types by name, and values of constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: kind for name, kind in arguments.items() if not isinstance(kind, str)}
    signature = {
        name: kind.replace("D", dtype) if isinstance(kind, str) else "constexpr" for name, kind in arguments.items()
    }
    # What Triton's launcher would see in the real arguments: pointers and FLUX's sizes are multiples of 16.
    names = list(arguments)
    aligned = {
        (names.index(n),): [["tt.divisibility", 16]]
        for n, kind in signature.items()
        if kind.startswith(("*", "i32", "i64"))
    }
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return compiled.asm["cubin"], compiled.metadata.shared


def resources(cubin: bytes, shared: int) -> dict[str, int]:
    """Registers per thread, shared memory and spills (stack and local memory, bytes) of a cubin."""
    text = _read(cubin, "cuobjdump", "-res-usage")
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": used["REG"], "shared": max(shared, used["SHARED"]), "spills": used["STACK"] + used["LOCAL"]}


def code(cubin: bytes) -> dict[str, int]:
    """What a cubin's instructions (SASS) do besides arithmetic:

    calls       of subroutines, such as a 64-bit integer division, of some 70 instructions
    divisions   of integers by a variable: each takes the reciprocal of its divisor, rounded up (I2F.RP)
    late_loads  from global memory after the first store to it, in the order of the code
    loops       backward jumps; the endless one after each kernel's end is not counted
    """
    # Either a label, `.L_x_0:`, or an instruction, `/*01f0*/ @!P1 BRA `(.L_x_0) ;`.
    line = re.compile(r"^(?:(\.L\w+):|\s*/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);)", re.M)
    seen, found = set(), {"calls": 0, "divisions": 0, "late_loads": 0, "loops": 0}
    stored, last = False, ""
    for label, name, operands in line.findall(_read(cubin, "nvdisasm", "-c")):
        target = re.search(r"`\(([^)]*)\)", operands)
        kind = name.split(".")[0]
        if label:
            seen.add(label)
        elif kind == "CALL" and target and target[1].startswith("$"):  # one to a label is a jump
            found["calls"] += 1
        elif kind == "I2F" and name.endswith(".RP"):
            found["divisions"] += 1
        elif kind in ("BRA", "CALL") and target and target[1] in seen and target[1] != last:
            found["loops"] += 1
        elif kind in ("STG", "LDG"):
            found["late_loads"] += kind == "LDG" and stored
            stored |= kind == "STG"
        last = label
    return found


def _read(cubin: bytes, tool: str, option: str) -> str:
    """The output of one of Triton's tools for a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
