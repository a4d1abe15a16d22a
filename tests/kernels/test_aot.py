"""Every Triton kernel compiles for A100 and H100 without one, within registers and shared memory, unspilled, and its
instructions do what its source means to save."""

import json
import os
import subprocess
import sys

import pytest

from megaflux_kernels import OPS

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA programming guide, compute capabilities)
# One load and store per pass of the loop: the tile without them sends its weights through shared memory instead.
SPILLS = {("biased_attention_dkdv", 80): 8}
# Backward kernels of blocks whose modulation is frozen, by the constants that say so.
FROZEN = {
    "modulate_backward": {"MODULATION": False},
    "gate_residual_backward": {"GATE": False},
    "gate_residual_modulate_backward": {"GATE": False, "MODULATION": False},
}


# (dtypes, architectures). What trains on an H100; the others are compiled by `make test-slow`, and what is computed in all
# dtypes is tested in the interpreter.
H100, ALL = (("bf16",), (90,)), (("bf16", "fp16", "fp32"), (80, 90))


@pytest.fixture(scope="module", params=[H100, pytest.param(ALL, marks=pytest.mark.slow)], ids=["h100", "all"])
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "megaflux_kernels.aot", "--json", str(folder / "rows.json")]
    dtypes, architectures = request.param
    command += ["--dtype", *dtypes, "--arch", *map(str, architectures)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "rows.json").read_text())


def test_every_kernel_of_every_op_compiles(compiled, request):
    import importlib

    import triton

    found = {(row["op"], row["kernel"], row["dtype"], row["arch"]) for row in compiled}
    for op in OPS:
        module = importlib.import_module(f"megaflux_kernels.{op}.triton_kernels")
        # A kernel has no caller in Triton: those whose names begin with _ are parts of others.
        kernels = [n for n, v in vars(module).items() if isinstance(v, triton.runtime.KernelInterface) and n[0] != "_"]
        assert kernels
        for kernel in kernels:
            dtypes, architectures = request.node.callspec.params["compiled"]
            assert {(op, kernel, dtype, arch) for dtype in dtypes for arch in architectures} <= found


def test_resources_are_bounded(compiled):
    over = [
        row
        for row in compiled
        if row["spills"] > SPILLS.get((row["kernel"], row["arch"]), 0)
        or row["shared"] > SHARED[row["arch"]]
        or not 16 <= row["registers"] <= 255
    ]
    assert over == []


def test_rows_are_found_without_a_division(compiled):
    """A 64-bit division is a subroutine of some 70 instructions, a 32-bit one 20, before the first load of a row."""
    assert not [row["kernel"] for row in compiled if row.get("calls")]
    ours = [r for r in compiled if r["op"] in ("modulate", "gate_residual", "gelu_concat", "qk_norm_rope")]
    architectures = {row["arch"] for row in ours}
    assert sum("divisions" in row for row in ours) >= 13 * len(architectures)  # kernels and their variants
    assert not any(row.get("divisions") for row in ours)


def test_frozen_backward_kernels_load_a_row_and_then_store_it(compiled):
    ours = [row for row in compiled if row["kernel"] in FROZEN]
    frozen = [row for row in ours if FROZEN[row["kernel"]].items() <= row["constants"].items()]
    assert {(r["kernel"], r["arch"]) for r in frozen if "loops" in r} == {
        (kernel, arch) for kernel in FROZEN for arch in {row["arch"] for row in compiled}
    }
    assert [r for r in frozen if r["constants"]["ROWS"] != 1 or r.get("loops") or r.get("late_loads")] == []
    # Where sums are taken, rows are summed in a loop, as ever, and each row's loads come before its stores, too.
    summed = [row for row in ours if row not in frozen]
    assert summed and all(r["constants"]["ROWS"] == 16 for r in summed)
    assert not any(r["late_loads"] or not r["loops"] for r in summed if r["dtype"] == "bf16")
