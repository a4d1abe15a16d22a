"""MEGAFLUX_KERNELS chooses the path once, and says what is wrong."""

import os
import subprocess
import sys

import pytest
import torch

from megaflux_kernels import dispatch
from tests.kernels.conftest import DEVICE

CODE = """
import torch
from megaflux_kernels import dispatch
from megaflux_kernels.modulate import modulate
x = torch.randn(1, 3, 32)
print(dispatch.describe("cpu"), dispatch.describe("cuda"))
modulate(x, torch.zeros(1, 32), torch.zeros(1, 32))
"""


def run(**env):
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MEGAFLUX_KERNELS")}
    return subprocess.run([sys.executable, "-c", CODE], env=clean | env, capture_output=True, text=True)


@pytest.mark.parametrize("choice, printed", [("auto", "torch triton"), ("torch", "torch torch")])
def test_cpu_tensors_take_the_torch_path(choice, printed):
    done = run(MEGAFLUX_KERNELS=choice)
    assert (done.returncode, done.stdout.strip()) == (0, printed), done.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    done = run(MEGAFLUX_KERNELS="triton")
    assert done.returncode == 1
    assert "Triton needs a CUDA device (or TRITON_INTERPRET=1); use auto" in done.stderr.splitlines()[-1]
    assert run(MEGAFLUX_KERNELS="triton", TRITON_INTERPRET="1").returncode == 0


def test_an_unknown_choice_is_named():
    assert "MEGAFLUX_KERNELS=cuda: use one of auto, triton, torch" in run(MEGAFLUX_KERNELS="cuda").stderr


def test_float64_stays_on_the_torch_path(triton_path):
    with pytest.raises(ValueError, match="float64 runs on the torch path only"):
        dispatch.use_triton(torch.zeros(1, dtype=torch.float64, device=DEVICE))
