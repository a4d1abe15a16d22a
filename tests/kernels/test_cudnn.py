"""cuDNN's attention before 9.15.1 is refused, or left out, where it is wrong. No GPU is asked."""

import logging

import pytest
import torch

from megaflux.generation import runtime
from megaflux_kernels import cudnn
from megaflux_kernels.bench import machine


@pytest.mark.parametrize(
    "version, tokens, name",
    [
        (91500, 4580, "9.15.0"),
        (91002, 4580, "9.10.2"),
        (8902, 100, "8.9.2"),
        (91501, 4580, None),
        (92000, 1, None),
        (91002, 4608, None),
    ],
)
def test_cudnn_before_9_15_1_is_wrong_where_128_does_not_divide(version, tokens, name):
    problem = cudnn.problem(tokens, version)
    if name is None:
        assert problem is None
    else:
        assert problem.startswith(f"attention of cuDNN {name} is wrong at {tokens} tokens") and "\n" not in problem


def test_without_cudnn_nothing_is_wrong_with_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert cudnn.problem(4580) is None


@pytest.fixture
def version(monkeypatch):
    """torch as it is with a cuDNN of this version, and its switch put back after."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield lambda number: monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_torch_does_not_choose_a_cudnn_that_is_wrong(version):
    version(91002)
    assert cudnn.leave_out_if_wrong() == (
        "attention of cuDNN 9.10.2 is wrong at lengths that 128 does not divide, and left out; cuDNN 9.15.1 is right"
    )
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert cudnn.leave_out_if_wrong() is None  # said once


def test_the_benches_and_generation_see_to_it(version, capsys, caplog, monkeypatch):
    version(91002)
    machine.default_device()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert capsys.readouterr().err.startswith("warning: attention of cuDNN 9.10.2 is wrong")
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING, logger="megaflux"):
        runtime.device_and_dtype("cuda", None)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and "cuDNN 9.10.2" in caplog.text


@pytest.mark.parametrize("number", [91501, 92000, None])
def test_a_right_one_is_left_alone(version, number):
    version(number)
    assert cudnn.leave_out_if_wrong() is None and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_torch_without_a_gpu_is_left_alone(version, monkeypatch):
    version(91002)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cudnn.leave_out_if_wrong() is None and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_cudnn_that_does_not_fit_torch_ends_nothing_here(version, monkeypatch):
    def version_of_another():
        raise RuntimeError("cuDNN version incompatibility")

    version(0)
    monkeypatch.setattr(torch.backends.cudnn, "version", version_of_another)
    assert cudnn.leave_out_if_wrong() is None
