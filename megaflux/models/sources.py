"""Where weights are: a folder or the hub; and whether a folder is complete, by names, sizes and headers. No weight is read.

What a name means, here as in training, generation, export and conversion:

- `hub:owner/name` is the hub's, whatever folders exist.
- A folder that exists is that folder.
- `owner/name` is the hub's, unless the working directory holds a folder `owner`: then a missing `owner/name` is taken for
  a mistyped path and refused.
- Anything else (`/x`, `./x`, `x`, `a/b/c`) is a path, and refused where it does not exist.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import HUB, SHIPPED
from megaflux.models.loading_errors import named
from megaflux.models.safetensors_files import INDEX, SAFETENSORS, is_pointer, read_header, read_index, read_json
from megaflux.models.shipped import VAES, vlm_problem

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Part:
    """What a folder of one part must hold."""

    files: tuple[tuple[str, ...], ...]
    """Alternatives: one of each tuple must exist; a name with + in it stands for several files."""
    weights: tuple[str, ...] = ()
    """Names of weight files in the order in which the loader looks for them; the first that exists counts."""


DIFFUSERS_WEIGHTS = tuple(f"diffusion_pytorch_model{end}" for end in (INDEX, SAFETENSORS))
TRANSFORMERS_WEIGHTS = tuple(f"model{end}" for end in (SAFETENSORS, INDEX))
"""Names of weight files in the order in which the libraries look for them."""
_TOKENS = (("tokenizer_config.json",), ("tokenizer.json", "vocab.json+merges.txt"))
TOKENIZER = Part(_TOKENS)
DIFFUSERS_MODEL = Part((("config.json",),), DIFFUSERS_WEIGHTS)
TRANSFORMERS_MODEL = Part((("config.json",),), TRANSFORMERS_WEIGHTS)
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")  # the second as transformers 5 writes it
VLM = Part((("config.json",), _PROCESSOR, *_TOKENS), TRANSFORMERS_WEIGHTS)
DETECTOR = Part((("config.json",), _PROCESSOR), TRANSFORMERS_WEIGHTS)
FLUX = {
    "transformer": DIFFUSERS_MODEL,
    "vae": DIFFUSERS_MODEL,
    "scheduler": Part((("scheduler_config.json",),)),
    "text_encoder": TRANSFORMERS_MODEL,
    "tokenizer": TOKENIZER,
}
"""The parts of a FLUX.1 folder in diffusers' layout that a run reads."""


# --- a folder or the hub --------------------------------------------------------------------------------------------


def hub_name(source: str) -> str | None:
    """`owner/name` where the source means the hub's; None where it means a path."""
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        return name if _HUB_NAME.fullmatch(name) else None
    if not _HUB_NAME.fullmatch(source) or os.path.exists(source) or os.path.isdir(source.partition("/")[0]):
        return None
    return source


def problem(source: str) -> str | None:
    """Why a source can be neither read nor fetched, with the remedy, to follow its name; None: it can be tried."""
    if source.startswith(HUB):
        return None if hub_name(source) else "is not a hub name; give hub:owner/name"
    if os.path.isdir(source) or hub_name(source):
        return None
    if os.path.exists(source):
        return "is a file; give the folder it belongs to"
    if _HUB_NAME.fullmatch(source):
        owner = source.partition("/")[0]
        return (
            f"does not exist in the folder {owner} that is here; correct the path, or give {HUB}{source} for the hub's"
        )
    return (
        f"does not exist; give a folder, or a hub name ({HUB}owner/name, or owner/name where no folder owner is here)"
    )


def opened(source: str, patterns: Iterable[str]) -> str:
    """The source as the libraries' from_pretrained takes it: a folder, or a hub name. UserError for any other.

    The libraries prefer a local folder of the hub's name. Where `hub:` asks for the hub's although such a folder exists,
    the files of these patterns are fetched here and their folder is returned."""
    if why := problem(source):
        raise UserError(f"{source}: {why}")
    name = hub_name(source)
    if name is None or not os.path.isdir(name):
        return name or source
    from huggingface_hub import snapshot_download

    with named(source):
        return snapshot_download(name, allow_patterns=list(patterns))


# --- a folder's files -----------------------------------------------------------------------------------------------


def model_problems(model: Any, moved: str | None = None) -> Iterator[str]:
    """What is wrong with the sources of a configuration's `model` section (flux, vlm, vae), a line per source and kind of
    fault. moved: how the options begin that say where a folder is now, of a run that has begun (`--model.`); None: of a new one.
    """
    parts = {name: part for name, part in FLUX.items() if name != "vae" or not model.vae}
    vae, vlm = None if model.vae in VAES else model.vae, None if model.vlm == SHIPPED else model.vlm
    if model.vlm == SHIPPED and (why := vlm_problem(model.vlm_config)):
        yield why
    for key, source, needed in (
        ("flux", model.flux, parts),
        ("vlm", vlm, {"": VLM}),
        ("vae", vae, {"": DIFFUSERS_MODEL}),
    ):
        if source is not None and moved and hub_name(source) is None and not os.path.exists(source):
            yield f"model.{key}: {source} does not exist; give {moved}{key} with the folder where it is now"
        elif source is not None:
            for line in source_problems(source, needed):
                yield f"model.{key}: {line}"


def source_problems(source: str, parts: dict[str, Part]) -> list[str]:
    """What is wrong with a source, a line per kind of fault, beginning with its name. parts: what a folder must hold, by
    the name of its subfolder ("": itself); the hub's folders are not checked."""
    if why := problem(source):
        return [f"{source} {why}"]
    return [] if hub_name(source) else folder_problems(Path(source), parts)


def folder_problems(root: Path, parts: dict[str, Part]) -> list[str]:
    """What a folder lacks, and which of its files are not what they should be, a line per kind of fault."""
    faults = _Faults()
    for name, part in parts.items():
        _look(root / name, f"{name}/" if name else "", part, faults)
    return [f"{root} {line}" for line in faults.lines()]


@dataclass
class _Faults:
    """Names of files, by what is wrong with them."""

    missing: list[str] = field(default_factory=list)
    pointers: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        if self.missing:
            yield f"lacks {_listed(self.missing)}; give a complete folder"
        if self.pointers:
            yield (
                f"holds git-lfs pointers in the place of {_listed(self.pointers)}; fetch the files with `git lfs pull`"
            )
        if self.damaged:
            yield f"holds damaged files: {_listed(self.damaged, '; ')}; fetch them again"


def _look(folder: Path, prefix: str, part: Part, faults: _Faults) -> None:
    for alternatives in part.files:
        options = [option.split("+") for option in alternatives]
        chosen = next((names for names in options if all((folder / name).is_file() for name in names)), None)
        if chosen is None:
            faults.missing.append(prefix + " or ".join(" and ".join(names) for names in options))
        for name in chosen or ():
            _look_at_file(folder / name, prefix + name, faults)
    if part.weights:
        _look_at_weights(folder, prefix, part.weights, faults)


def _look_at_file(file: Path, name: str, faults: _Faults) -> None:
    if is_pointer(file):
        faults.pointers.append(name)
    elif name.endswith(".json"):
        try:
            if read_json(file) is None:
                faults.damaged.append(f"{name} is not JSON")
        except OSError as error:
            faults.damaged.append(f"{name} cannot be read ({error.strerror})")


def _look_at_weights(folder: Path, prefix: str, names: Sequence[str], faults: _Faults) -> None:
    name = next((name for name in names if (folder / name).is_file()), None)
    if name is None:
        pickles = " (pickle files are not read)" if any(folder.glob("*.bin")) else ""
        faults.missing.append(f"{prefix}{' or '.join(names)}{pickles}")
    elif not name.endswith(INDEX):
        _weights(folder / name, prefix, faults)
    elif is_pointer(folder / name):
        faults.pointers.append(prefix + name)
    else:
        try:
            keys = read_index(folder / name)
        except (OSError, ValueError) as error:
            faults.damaged.append(f"{prefix}{error}")
            return
        shards = {shard: _weights(folder / shard, prefix, faults) for shard in sorted(set(keys.values()))}
        for key, shard in keys.items():
            stored = shards[shard]
            if stored is not None and key not in stored:
                faults.damaged.append(f"{prefix}{shard} lacks {key}, which the index says it holds")


def _weights(file: Path, prefix: str, faults: _Faults) -> set[str] | None:
    """The names of a safetensors file's tensors; None, with a fault noted, where the file is missing or incomplete."""
    name = prefix + file.name
    if not file.is_file():
        faults.missing.append(name)
    elif is_pointer(file):
        faults.pointers.append(name)
    else:
        try:
            keys, size = read_header(file)
            if (there := file.stat().st_size) == size:
                return keys
            faults.damaged.append(f"{name} has {there:,} bytes, its header says {size:,}")
        except (OSError, ValueError) as error:
            faults.damaged.append(f"{name} {getattr(error, 'strerror', None) or error}")
    return None


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
