"""cuDNN's attention, which torch prefers on Hopper: where its results are wrong."""

from __future__ import annotations

import torch

RIGHT_SINCE = 91501  # 9.15.1, as torch.backends.cudnn.version() returns it
TILE = 128  # tokens


def problem(tokens: int, version: int | None = None) -> str | None:
    """Why cuDNN's attention must not be used on this many tokens, in one line; None where it may be used, or without
    cuDNN.

    Before 9.15.1 its results are wrong at lengths that 128 does not divide (pytorch issue 169849). version: as
    torch.backends.cudnn.version() returns it, 91501 for 9.15.1; None: torch's.
    """
    version = torch.backends.cudnn.version() if version is None else version
    if version is None or version >= RIGHT_SINCE or tokens % TILE == 0:
        return None
    return f"attention of cuDNN {_name(version)} is wrong at {tokens} tokens, which {TILE} does not divide; cuDNN 9.15.1 is right"


def leave_out_if_wrong() -> str | None:
    """Keep torch from choosing cuDNN's attention by itself where it is wrong at some lengths; call it before a CUDA device
    is used. Returns why, in one line, if it changed the setting. The backend can still be chosen by name. torch 2.11
    requires a correct version itself (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    if not torch.cuda.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return None
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError:  # not the version that torch was built with, which torch reports when cuDNN is used
        return None
    if version is None or version >= RIGHT_SINCE:
        return None
    torch.backends.cuda.enable_cudnn_sdp(False)
    return f"attention of cuDNN {_name(version)} is wrong at lengths that {TILE} does not divide, and left out; cuDNN 9.15.1 is right"


def _name(version: int) -> str:
    major = 10000 if version >= 90000 else 1000  # cuDNN 8 counted in thousands: 8902 is 8.9.2
    return f"{version // major}.{version % major // 100}.{version % 100}"
