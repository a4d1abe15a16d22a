"""cuDNN's attention before 9.15.1 is refused, or left out, where it is wrong. No GPU is asked."""

import logging

import pytest
import torch

from megaflux import compat
from megaflux_kernels import cudnn


@pytest.mark.parametrize(
    "version, tokens, name",
    [(91500, 4580, "9.15.0"), (91002, 4580, "9.10.2"), (8902, 100, "8.9.2"), (91501, 4580, None), (92000, 1, None),
     (91002, 4608, None)],
)  # fmt: skip
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
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    yield lambda number: monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_torch_does_not_choose_a_cudnn_that_is_wrong(version, caplog):
    version(91002)
    with caplog.at_level(logging.WARNING, logger="megaflux"):
        compat.leave_out_wrong_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert [record.message for record in caplog.records] == [
        "attention of cuDNN 9.10.2 is wrong at lengths that 128 does not divide, and left out; cuDNN 9.15.1 is right"
    ]
    assert cudnn.leave_out_if_wrong() is None  # said once


@pytest.mark.parametrize("number", [91501, 92000, None])
def test_a_right_one_is_left_alone(version, number):
    version(number)
    assert cudnn.leave_out_if_wrong() is None and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_torch_without_cuda_is_left_alone(version, monkeypatch):
    version(91002)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cudnn.leave_out_if_wrong() is None and torch.backends.cuda.cudnn_sdp_enabled()
