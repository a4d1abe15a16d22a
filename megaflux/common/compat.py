"""Import this before diffusers, transformers or streaming.

torchvision's wheel is linked against CUDA. With a CPU build of torch its C++ part does not load, and `import torchvision`
fails with "operator torchvision::nms does not exist". So does everything that imports torchvision: mosaicml-streaming,
Qwen2-VL's processor, diffusers. Only its Python image transforms are used here, so it is enough to declare the two
operators that its import decorates.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import torch

_library: torch.library.Library | None = None  # kept for the life of the process, or the schemas are dropped again


def _torchvision_extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: its importers report that
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
    # DeepSpeed's launcher sets LOCAL_SIZE, torchrun and streaming use LOCAL_WORLD_SIZE. Without it two ranks of one node
    # both create the same shared memory, and one dies with FileExistsError.
    if "LOCAL_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["LOCAL_SIZE"])


def _hush_torchao() -> None:
    # diffusers imports torchao where it is installed, which logs five irrelevant lines about kernels.
    if importlib.util.find_spec("torchao") is not None:
        for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
            logging.getLogger(name).setLevel(logging.ERROR)


_declare_missing_operators()
_share_local_world_size()
_hush_torchao()
