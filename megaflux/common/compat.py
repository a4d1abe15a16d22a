"""Import this before diffusers, transformers or streaming.

torchvision's wheel is linked against CUDA. Beside a CPU build of torch its C++ part does not load, and
`import torchvision` then dies with "operator torchvision::nms does not exist", taking with it everything
that imports torchvision: mosaicml-streaming, Qwen2-VL's processor, diffusers. Only its Python image
transforms are used here, so declaring the two operators that its import decorates is enough.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # alive as long as the process, or the schemas go again


def _torchvision_extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to cure; whoever needs torchvision says so
    extension = next(Path(spec.origin).parent.glob("_C*.so"), None)
    if extension is None:
        return True
    try:
        torch.ops.load_library(str(extension))
    except OSError:
        return False
    return True


def _declare_missing_operators() -> None:
    global _library
    if _library is None and not _torchvision_extension_loads():
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _share_local_world_size() -> None:
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun and streaming say LOCAL_WORLD_SIZE; without it two
    # ranks of one node both create the same shared memory and one dies with FileExistsError.
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])


def _hush_torchao() -> None:
    # diffusers imports torchao where it is installed, and that says five lines about kernels that nobody asked for.
    if importlib.util.find_spec("torchao") is not None:
        for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
            logging.getLogger(name).setLevel(logging.ERROR)


_declare_missing_operators()
_share_local_world_size()
_hush_torchao()
