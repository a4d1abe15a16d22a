"""Every Triton kernel compiles for A100 and H100 without one, within registers and shared memory, unspilled."""

import json
import os
import subprocess
import sys

import pytest

from megaflux_kernels import OPS

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have (CUDA programming guide, compute capabilities)
# One load and store per pass of the loop: the tile without them sends its weights through shared memory instead.
SPILLS = {("biased_attention_dkdv", 80): 8}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "megaflux_kernels.aot", "--json", str(folder / "rows.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "rows.json").read_text())


def test_every_kernel_of_every_op_compiles_in_every_dtype(compiled):
    import importlib

    import triton

    found = {(row["op"], row["kernel"], row["dtype"], row["arch"]) for row in compiled}
    for op in OPS:
        module = importlib.import_module(f"megaflux_kernels.{op}.triton_kernels")
        # A kernel has no caller in Triton: those whose names begin with _ are parts of others.
        kernels = [n for n, v in vars(module).items() if isinstance(v, triton.runtime.KernelInterface) and n[0] != "_"]
        assert kernels
        for kernel in kernels:
            for dtype in ("bf16", "fp16", "fp32"):
                assert {(op, kernel, dtype, 80), (op, kernel, dtype, 90)} <= found


def test_resources_are_bounded(compiled):
    over = [
        row
        for row in compiled
        if row["spills"] > SPILLS.get((row["kernel"], row["arch"]), 0)
        or row["shared"] > SHARED[row["arch"]]
        or not 16 <= row["registers"] <= 255
    ]
    assert over == []
