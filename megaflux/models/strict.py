"""Strict loading by the libraries' own from_pretrained, and of single safetensors files: no key more, none less.

A missing or unexpected key, a wrong shape, a truncated or a pickle file is a UserError that names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)

# isort: split
import diffusers
import transformers
from transformers import PreTrainedModel

from megaflux.common.errors import UserError
from megaflux.models.loading_errors import named
from megaflux.models.reading import refuse, some
from megaflux.models.sources import opened

FOLDER_FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")
"""Files of a hub's folder that are fetched where the libraries cannot be given its name (`sources.opened`)."""


def load_strict(
    cls: Any,
    source: str,
    allow_missing: Callable[[str], bool] = lambda key: False,
    allow_unexpected: Callable[[str], bool] = lambda key: False,
    **kwargs: Any,
) -> Any:
    """cls.from_pretrained(source, **kwargs), a model of the class cls, from safetensors alone.

    source: a folder or a hub name. allow_missing, allow_unexpected: which keys may be missing from the files or be in
    them without a place. UserError naming the source for any other, for wrong shapes and for files that cannot be read.
    """
    where = "/".join(filter(None, (source, kwargs.get("subfolder"))))
    if issubclass(cls, PreTrainedModel):
        kwargs["ignore_mismatched_sizes"] = True  # listed in info and refused below; the error itself has no name
    place = opened(source, (f"{kwargs['subfolder']}/*",) if "subfolder" in kwargs else FOLDER_FILES)
    with named(where), silent_libraries():
        model, info = cls.from_pretrained(place, use_safetensors=True, output_loading_info=True, **kwargs)
    problems = {
        "missing key": [key for key in info["missing_keys"] if not allow_missing(key)],
        "unexpected key": [key for key in info["unexpected_keys"] if not allow_unexpected(key)],
        "wrong shape": [str(item[0] if isinstance(item, tuple | list) else item) for item in info["mismatched_keys"]],
        "error": list(info.get("error_msgs") or ()),
    }
    refuse(where, cls, problems)
    return model


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Silence the libraries' warnings while they load: what they warn of is refused by megaflux, or intended."""
    levels = [(library, library.logging.get_verbosity()) for library in (diffusers, transformers)]
    for library, _ in levels:
        library.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        for library, level in levels:
            library.logging.set_verbosity(level)


def read_tensors(file: Path, keys: set[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file of exactly these keys. UserError naming the file, and the key, otherwise."""
    if not file.is_file():
        raise UserError(f"{file}: missing")
    with named(str(file)):
        tensors = load_file(file)
    for what, found in (("missing key", keys - set(tensors)), ("unexpected key", set(tensors) - keys)):
        if found:
            raise UserError(f"{file}: {what} {some(sorted(found))}")
    return tensors


def load_linear(file: Path) -> nn.Linear:
    """The linear of a safetensors file of exactly `weight` (out, in) and `bias` (out,). UserError for any other."""
    tensors = read_tensors(file, {"weight", "bias"})
    weight, bias = tensors["weight"], tensors["bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{file}: wrong shape: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}")
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict(tensors, assign=True)
    return linear
