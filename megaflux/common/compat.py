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
import threading
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Versions whose imports are known; others are imported as they are.
DEEPSPEED, STREAMING = "0.19.8", "0.13.0"
# Its datasets of text and pictures for other trainings, which import all of transformers and torchvision.
STREAMING_DATASETS = ("text", "multimodal", "vision")

_loading = threading.RLock()
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
    """Stands for a module in sys.modules and loads it when one of its attributes is asked for."""

    def __init__(self, name: str, path: list[str] | None = None):
        """path: the folders of a package's modules; None: it is no package."""
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # import reads it, whether or not anything is used
        self.__file__ = None  # inspect asks every module for it
        if path is not None:
            self.__path__ = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} before it is loaded")
        return getattr(load_now(self.__name__), name)


class LateClass:
    """Stands for a class (or function) of a late module, of which libraries ask at first only whether something is an
    instance. Calling it and deriving from it load the module and use the class itself."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type]:
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        # Before the module is loaded nothing can be an instance.
        return not isinstance(sys.modules[self.module], Late) and isinstance(instance, self._real())

    def _real(self) -> type:
        return getattr(load_now(self.module), self.name)


def load_now(name: str) -> ModuleType:
    """The module itself, in the place of the one that stands for it."""
    with _loading:
        late = sys.modules.get(name)
        if not isinstance(late, Late):
            return importlib.import_module(name)
        del sys.modules[name]
        module = importlib.import_module(name)
        for part, inner in vars(late).items():  # modules of a package that were imported before it
            if isinstance(inner, ModuleType) and not hasattr(module, part):
                setattr(module, part, inner)
        return module


def _put_off_unused_imports() -> None:
    # diffusers' schedulers import them for sigmas and solvers that FLUX does not use (1.5 s, where scipy is installed).
    _put_off("scipy", "stats", "integrate", "optimize")
    # transformers' losses of detection models take it by name.
    if "scipy.optimize" in sys.modules:
        _put_off_class("scipy.optimize", "linear_sum_assignment")
    # None: httpx does without its command line, which would load rich and every lexer of pygments.
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # documented: None makes an import fail
    # DeepSpeed asks whether the optimizer is Muon, whose module compiles its kernels when it is imported (1 to 2 s).
    if _is_version("deepspeed", "deepspeed", DEEPSPEED):
        _put_off_class("deepspeed.runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam")
    if _is_version("streaming", "mosaicml-streaming", STREAMING) and "streaming" not in sys.modules:
        _put_off("streaming", *STREAMING_DATASETS)
        # streaming's own DataLoader alone imports transformers (3 s).
        _put_off_class("streaming.base.dataloader", "StreamingDataLoader")


def _is_version(package: str, distribution: str, known: str) -> bool:
    if importlib.util.find_spec(package) is None:
        return False
    try:
        return version(distribution) == known
    except PackageNotFoundError:
        return False


def _put_off(package: str, *names: str) -> None:
    """Put off packages inside an installed package."""
    spec = importlib.util.find_spec(package)
    for name in names if spec is not None and package not in sys.modules else ():
        folders = [str(Path(folder) / name) for folder in spec.submodule_search_locations or ()]  # type: ignore[union-attr]
        sys.modules.setdefault(f"{package}.{name}", Late(f"{package}.{name}", folders))


def _put_off_class(module: str, name: str) -> None:
    late = sys.modules.setdefault(module, Late(module))
    if isinstance(late, Late):
        setattr(late, name, LateClass(module, name))


_declare_missing_operators()
_share_local_world_size()
_hush_torchao()
_put_off_unused_imports()
