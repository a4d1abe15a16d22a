"""Import this before diffusers, transformers or streaming.

torchvision's wheel is linked against CUDA. With a CPU build of torch its C++ part does not load, and `import torchvision`
fails with "operator torchvision::nms does not exist". So does everything that imports torchvision: mosaicml-streaming,
Qwen2-VL's processor, diffusers. Only its Python image transforms are used here, so it is enough to declare the two
operators that its import decorates.

And what these libraries import for uses that megaflux does not have is put off until it is used (`Late`), which saves a
process three to four seconds of start.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# The versions whose imports are known; others are imported as they are.
DEEPSPEED, STREAMING = "0.19.8", "0.13.0"
# Its datasets of text and pictures for other trainings, which import all of transformers and torchvision.
STREAMING_DATASETS = ("streaming.text", "streaming.multimodal", "streaming.vision")

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


class Late(ModuleType):
    """Stands for a module in sys.modules and loads it when one of its attributes is asked for, so nothing is missing."""

    def __init__(self, name: str, package: bool = True):
        super().__init__(name)
        self._package = package
        self.__spec__ = ModuleSpec(name, None)  # import reads it, whether or not anything is used
        self.__file__ = None  # inspect asks every module for it

    def __getattr__(self, name: str) -> Any:
        # `from ... import` asks for __path__ in any case; a package's says where its modules are.
        if name.startswith("__") and not (name == "__path__" and self._package):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} before it is loaded")
        return getattr(load_now(self.__name__), name)


def late_class(module: str, name: str) -> type:
    """Stands for a class of a late module, of which libraries only need to know that nothing is an instance. Calling it
    loads the module and makes an instance of the class itself."""

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        return getattr(load_now(module), name)(*args, **kwargs)

    return type(name, (), {"__new__": new, "__module__": module})


def load_now(name: str) -> ModuleType:
    """The module itself, in the place of the one that stands for it."""
    if isinstance(sys.modules.get(name), Late):
        del sys.modules[name]
    return importlib.import_module(name)


def _is_version(distribution: str, known: str) -> bool:
    try:
        return version(distribution) == known
    except PackageNotFoundError:
        return False


def _put_off_unused_imports() -> None:
    # diffusers' schedulers import them for sigmas and solvers that FLUX does not use (1.5 s, where scipy is installed).
    if importlib.util.find_spec("scipy") is not None:
        for name in ("scipy.stats", "scipy.integrate"):
            sys.modules.setdefault(name, Late(name))
    # None: httpx does without its command line, which would load rich and every lexer of pygments.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # documented: None makes an import fail
    # DeepSpeed asks whether the optimizer is Muon, whose module compiles its kernels when it is imported (1 to 2 s).
    if _is_version("deepspeed", DEEPSPEED):
        _put_off_class("deepspeed.runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam")
    if _is_version("mosaicml-streaming", STREAMING) and "streaming" not in sys.modules:
        for name in STREAMING_DATASETS:
            sys.modules.setdefault(name, Late(name))
        # streaming's own DataLoader alone imports transformers (3 s).
        _put_off_class("streaming.base.dataloader", "StreamingDataLoader")


def _put_off_class(module: str, name: str) -> None:
    late = Late(module, package=False)
    setattr(late, name, late_class(module, name))
    sys.modules.setdefault(module, late)


_declare_missing_operators()
_share_local_world_size()
_hush_torchao()
_put_off_unused_imports()
