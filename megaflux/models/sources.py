"""Where weights are: a folder or the hub; and whether a folder is whole, by names, sizes and headers. No weight is read.

Which of the two a name means, here as in training, generation, export and conversion:

- `hub:owner/name` is the hub's, whatever folders there are.
- A folder that exists is that folder.
- `owner/name` is the hub's where the working directory holds no folder `owner`. Where it does, and not `owner/name`, it is
  taken as a mistyped path and refused.
- Anything else (`/x`, `./x`, `x`, `a/b/c`) is a path, and refused where it is not there.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "hub:"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
POINTER = b"version https://git-lfs"
SAFETENSORS, INDEX = ".safetensors", ".safetensors.index.json"
MOST_HEADER = 100_000_000  # bytes, as the safetensors library allows
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Part:
    """What a folder of one part must hold."""

    files: tuple[tuple[str, ...], ...]
    """Alternatives: one of each tuple must be there, a name with + in it being several files."""
    weights: tuple[str, ...] = ()
    """Names of weight files in the order in which the loader looks for them; the first that is there counts."""


DIFFUSERS_WEIGHTS = tuple(f"diffusion_pytorch_model{end}" for end in (INDEX, SAFETENSORS))
TRANSFORMERS_WEIGHTS = tuple(f"model{end}" for end in (SAFETENSORS, INDEX))
"""Names of weight files in the order in which the libraries look for them."""
_TOKENS = (("tokenizer_config.json",), ("tokenizer.json", "vocab.json+merges.txt"))
DIFFUSERS_MODEL = Part((("config.json",),), DIFFUSERS_WEIGHTS)
TRANSFORMERS_MODEL = Part((("config.json",),), TRANSFORMERS_WEIGHTS)
VLM = Part((("config.json",), ("preprocessor_config.json",), *_TOKENS), TRANSFORMERS_WEIGHTS)
DETECTOR = Part((("config.json",), ("preprocessor_config.json", "processor_config.json")), TRANSFORMERS_WEIGHTS)
FLUX = {
    "transformer": DIFFUSERS_MODEL,
    "vae": DIFFUSERS_MODEL,
    "scheduler": Part((("scheduler_config.json",),)),
    "text_encoder": TRANSFORMERS_MODEL,
    "tokenizer": Part(_TOKENS),
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
    """Why a source can be neither read nor fetched, with the mend, to stand behind its name; None: it can be tried."""
    if source.startswith(HUB):
        return None if hub_name(source) else "is no hub name; give hub:owner/name"
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

    They prefer a folder of the hub's name, so that one beside which `hub:` asks for the hub's is fetched here: the files
    of these patterns."""
    if why := problem(source):
        from megaflux.common.errors import UserError

        raise UserError(f"{source}: {why}")
    name = hub_name(source)
    if name is None or not os.path.isdir(name):
        return name or source
    from huggingface_hub import snapshot_download

    from megaflux.models.loading_errors import named

    with named(source):
        return snapshot_download(name, allow_patterns=list(patterns))


# --- a folder's files -----------------------------------------------------------------------------------------------


def model_problems(model: Any) -> Iterator[str]:
    """What is wrong with the sources of a configuration's `model` section (flux, vlm, vae), one line for each and kind."""
    parts = {name: part for name, part in FLUX.items() if name != "vae" or not model.vae}
    vae = None if model.vae == "tiny" else model.vae
    for field, source, needed in (
        ("flux", model.flux, parts),
        ("vlm", model.vlm, {"": VLM}),
        ("vae", vae, {"": DIFFUSERS_MODEL}),
    ):
        if source is not None:
            for line in source_problems(source, needed):
                yield f"model.{field}: {line}"


def source_problems(source: str, parts: dict[str, Part]) -> list[str]:
    """What is wrong with a source, one line for each kind of fault, beginning with its name. parts: of a folder, by the
    name of the folder in it ("": itself); a hub's are not looked at."""
    if why := problem(source):
        return [f"{source} {why}"]
    return [] if hub_name(source) else folder_problems(Path(source), parts)


def folder_problems(root: Path, parts: dict[str, Part]) -> list[str]:
    """What a folder lacks, and which of its files are not what they should be, one line for each kind of fault."""
    faults = _Faults()
    for name, part in parts.items():
        _look(root / name, f"{name}/" if name else "", part, faults)
    return [f"{root} {line}" for line in faults.lines()]


class _Faults:
    """Names of files, by what is wrong with them."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.pointers: list[str] = []
        self.damaged: list[str] = []

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
            if is_pointer(folder / name):
                faults.pointers.append(prefix + name)
            elif name.endswith(".json"):
                try:
                    if _json(folder / name) is None:
                        faults.damaged.append(f"{prefix}{name} is no JSON")
                except OSError as error:
                    faults.damaged.append(f"{prefix}{name} cannot be read ({error.strerror})")
    if not part.weights:
        return
    name = next((name for name in part.weights if (folder / name).is_file()), None)
    if name is None:
        pickles = " (files of pickles are not read)" if any(folder.glob("*.bin")) else ""
        faults.missing.append(f"{prefix}{' or '.join(part.weights)}{pickles}")
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
        stored = {shard: _weights(folder / shard, prefix, faults) for shard in sorted(set(keys.values()))}
        for key, shard in keys.items():
            if stored[shard] is not None and key not in stored[shard]:
                faults.damaged.append(f"{prefix}{shard} lacks {key}, which the index says it holds")


def _weights(file: Path, prefix: str, faults: _Faults) -> set[str] | None:
    """The names of a safetensors file's tensors; None, and a fault, where it is not there or not whole."""
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


def is_pointer(file: Path) -> bool:
    """Whether a file is what git leaves in the place of a large one that git-lfs has not fetched."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(POINTER)) == POINTER
    except OSError:
        return False


def read_header(file: Path) -> tuple[set[str], int]:
    """(names of the tensors, bytes that the whole file must have) of a safetensors file, by its header. ValueError where it
    has none; OSError."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER + 1
        if length > MOST_HEADER:
            raise ValueError("is no safetensors file")
        text = stream.read(length)
    try:
        header = json.loads(text)
        tensors = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
        end = max((int(offsets[1]) for offsets in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("is cut off or no safetensors file") from None
    return set(tensors), 8 + length + end


def read_index(file: Path) -> dict[str, str]:
    """Name of each tensor -> file beside the index that holds it. ValueError, beginning with the index's name, where it does
    not say so; OSError."""
    content = _json(file)
    keys = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(keys, dict) or not all(
        isinstance(name, str) and Path(name).name == name and name.endswith(SAFETENSORS) for name in keys.values()
    ):
        raise ValueError(f"{file.name}: weight_map does not name safetensors files beside it")
    return keys


def _json(file: Path) -> Any:
    """What a file holds; None: no JSON. OSError."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more
