"""What a run began from (`model.init`): finding it, and the copy in the run's folder. Imports no torch.

    RUN/init/init-00001-of-00005.safetensors ...  tensors in which the beginning differs from the base weights of model.flux,
                                                  model.vlm and model.vae, by names that do not depend on where Qwen2-VL is cut
                                                  (models/parameters.py: beginnings)
    RUN/init/manifest.json                        format, source, fingerprints; size and SHA-256 of each file

Written when the run begins (init_weights.py), under another name and renamed when it is whole. From then on the run needs it,
and the source no more: every checkpoint's manifest holds its fingerprint (`init`). Until the first checkpoint each start makes
it anew, as the source may be another one now; where the source is gone, the copy stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED
from megaflux.config.schema import Config
from megaflux.generation import layout
from megaflux.models.shipped import START_WEIGHTS
from megaflux.training.checkpoint import manifest, saved
from megaflux.training.checkpoint.saved import Begun

FORMAT = 1
RELEASE = ("flux", "qwen2-vl")
"""Folders of the authors' layout (convert.py)."""
_KEYS = {"format", "source", "base", "fingerprint", "files"}


def folder(run_dir: str | Path) -> Path:
    """The folder of what a run began from, which need not exist."""
    return Path(run_dir) / "init"


def partial_of(run_dir: str | Path) -> Path:
    """The folder in which it is written before it gets its name."""
    return Path(run_dir) / ".init.partial"


# --- a run's own copy -----------------------------------------------------------------------------------------------


def fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Identifies the content: SHA-256 of the list of files and their SHA-256, one a line."""
    listed = "\n".join(f"{name} {files[name]['sha256']}" for name in sorted(files))
    return hashlib.sha256(listed.encode()).hexdigest()


def read(run_dir: str | Path, expected: str | None = None) -> dict[str, Any]:
    """The manifest of RUN/init, whose files are there in their sizes. expected: its fingerprint, as a checkpoint names it.
    UserError, naming the file and the mend, where it is missing, damaged or another run's."""
    root = folder(run_dir)
    mend = "restore the folder from a copy, or start a new run with another --run.dir"
    if not root.is_dir():
        raise UserError(f"{root}: missing, and it holds what the run began from (model.init); {mend}")
    file = root / manifest.MANIFEST
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise KeyError(f"format {content['format']}, this code reads {FORMAT}")
        if manifest.sealed({k: v for k, v in content.items() if k != "seal"}) != content or _KEYS - set(content):
            raise KeyError("damaged (it does not match its own hash)")
        if content["fingerprint"] != fingerprint(content["files"]):
            raise KeyError("damaged (its fingerprint is not that of its files)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = getattr(error, "strerror", None) or (error.args[0] if isinstance(error, KeyError) else error)
        raise UserError(f"{file}: {why}; {mend}") from None
    if expected is not None and content["fingerprint"] != expected:
        raise UserError(f"{root}: is not what this run began from (model.init) but another run's; {mend}")
    for name, entry in content["files"].items():
        part = root / name
        if Path(name).name != name or not part.is_file():
            raise UserError(f"{part}: missing, and the run began from it (model.init); {mend}")
        if part.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{part}: damaged ({part.stat().st_size} bytes, its manifest says {entry['bytes']}); {mend}"
            )
    return content


def verify(run_dir: str | Path, expected: str) -> dict[str, Any]:
    """`read`, with every file's SHA-256 compared."""
    content = read(run_dir, expected)
    root = folder(run_dir)
    for name, entry in manifest.inventory(root, [root / name for name in content["files"]]).items():
        if entry["sha256"] != content["files"][name]["sha256"]:
            raise UserError(
                f"{root / name}: damaged (it does not match its SHA-256), and the run began from it (model.init); restore it "
                "from a copy, or start a new run with another --run.dir"
            )
    return content


def clear(run_dir: str | Path, everything: bool = False) -> None:
    """Delete what an interrupted start left; everything: the whole copy too, of a run that has no checkpoint yet. A folder of
    that name which is no such copy is the user's, and stays."""
    partial, copy = partial_of(run_dir), folder(run_dir)
    for path in (partial, copy) if everything else (partial,):
        if path.is_dir() and not path.is_symlink() and (path == partial or _is_copy(path)):
            if path == copy:
                copy.rename(partial)  # a kill half way must not leave a rest that looks like the user's own
            shutil.rmtree(partial)


def _is_copy(root: Path) -> bool:
    """Whether a folder holds what a run began from, whole or damaged."""
    try:
        content = json.loads((root / manifest.MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and set(content) >= _KEYS


def kept(run_dir: str | Path, source: str) -> dict[str, Any] | None:
    """The manifest of RUN/init where an earlier start made it from `source`, which is gone by now; None: it did not, or the
    source is there, or the copy is not whole."""
    if source == SHIPPED or os.path.lexists(source):
        return None
    try:
        content = read(run_dir)
    except UserError:
        return None
    return content if content["source"]["path"] == str(Path(source).absolute()) else None


def in_the_way(run_dir: str | Path) -> str | None:
    """One line where RUN/init, which a new run is to write, is something else; None: it is not."""
    root = folder(run_dir)
    if not os.path.lexists(root) or (not root.is_symlink() and _is_copy(root)):
        return None
    return (
        f"{root}: is there, and the run would write what it begins from (model.init) under that name; move it away, or give "
        "another --run.dir"
    )


def settled(config: Config, begun: Begun) -> Config:
    """A resumed run's configuration with the `model.init` that it began from: another one that is given now has no effect.
    UserError where it began without one and is given one."""
    values, given = begun.values, config.model.init
    if values is None or values["model"]["init"] == given:
        return config
    if given is not None and values["model"]["init"] is None:
        raise began_without(config)
    model = config.model.model_copy(update={"init": values["model"]["init"]})
    return config.model_copy(update={"model": model})


def began_without(config: Config) -> UserError:
    """For a `model.init` that is given to a run which began without one."""
    return UserError(
        f"model.init: {config.model.init}, but {config.run.dir} holds a run that began without one; leave it out, or give "
        "another --run.dir"
    )


def describe(config: Config, given: str | None) -> str | None:
    """One line where a resumed run is given another `model.init` than it began from. config: `settled`."""
    began_from = config.model.init
    if given == began_from or (given and began_from and Path(given).absolute() == Path(began_from)):
        return None
    return (
        f"model.init: {given} has no effect: {config.run.dir} began from {config.model.init}, which is copied into "
        f"{folder(config.run.dir)}"
    )


# --- a source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a new run begins from: an export, a run's newest whole checkpoint, or the shipped weights."""

    kind: Literal["export", "run", "shipped"]
    path: Path
    """As given; of the shipped weights their file."""
    content: dict[str, Any]
    """The checkpoint's manifest; {} for an export."""
    checkpoint: Path | None = None
    """Of a run."""
    skipped: tuple[str, ...] = ()
    """Why newer ones of the run are not used, one line each."""

    @property
    def identity(self) -> dict[str, Any]:
        """As plain data that RUN/init/manifest.json stores: where the beginning comes from, and which weights it is."""
        if self.kind == "shipped":
            digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
            return {"kind": self.kind, "path": SHIPPED, "update": None, "sha256": digest}
        found: dict[str, Any] = {"kind": self.kind, "path": str(self.path.absolute())}
        if self.checkpoint is None:
            digest = hashlib.sha256((self.path / layout.MANIFEST).read_bytes()).hexdigest()
            return found | {"update": None, "sha256": digest}
        digest = hashlib.sha256((self.checkpoint / manifest.MANIFEST).read_bytes()).hexdigest()
        return found | {"update": self.content["update"], "sha256": digest}


def find(path: str | Path, whole: bool = True) -> Source:
    """The source at a path. whole: compare a run's files with their SHA-256, not with their sizes alone.

    UserError, one line that begins with the path, where it is missing, neither an export nor a run, or not complete."""
    if str(path) == SHIPPED:
        return Source("shipped", START_WEIGHTS, {})
    root = Path(path)
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{root}: {what}; give an export, a converted release or a run")
    if layout.is_export(root):
        layout.read_manifest(root)
        return Source("export", root, {})
    if (root / manifest.MANIFEST).is_file() and not (root / saved.NAME).is_file():
        raise UserError(f"{root}: one checkpoint of a run; give the run's folder")
    if all((root / name).is_dir() for name in RELEASE):
        raise UserError(
            f"{root}: the released weights in their authors' layout; run python -m megaflux.convert {root} OUT, and give OUT"
        )
    if not (root / saved.NAME).is_file() and not manifest.folder(root).is_dir():
        raise UserError(
            f"{root}: neither a run (no {saved.NAME}) nor an export (no {layout.MANIFEST}); give an export, a converted "
            "release or a run"
        )
    skipped: list[str] = []
    for checkpoint in reversed(manifest.listed(root).values()):
        try:
            content = _checked(root, checkpoint, whole)
        except manifest.NewerFormat:
            raise
        except UserError as error:
            skipped.append(str(error))
        else:
            return Source("run", root, content, checkpoint, tuple(skipped))
    why = f" ({skipped[0]})" if skipped else ""
    raise UserError(f"{manifest.folder(root)}: holds no complete checkpoint{why}; train until the first one is written")


def _checked(run_dir: Path, checkpoint: Path, whole: bool) -> dict[str, Any]:
    """The manifest of a checkpoint whose weights are whole, and what its run began from. UserError otherwise."""
    content = manifest.read(checkpoint)
    names = [name for name in content["files"] if name.endswith(".safetensors")]
    for name in names:
        if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size != content["files"][name]["bytes"]:
            raise UserError(f"{checkpoint / name}: missing or damaged")
    if whole:
        manifest.verify(checkpoint, only=names)
    if content.get("init") is not None:
        (verify if whole else read)(run_dir, content["init"])
    return content


# --- before anything is loaded --------------------------------------------------------------------------------------


def problem(config: Config) -> str | None:
    """What is wrong with the beginning of a run, one line; None: nothing. Sizes are compared, no weight is read."""
    content = saved.newest(config.run.dir)
    try:
        if content is not None:
            if content.get("init") is not None:
                read(config.run.dir, content["init"])
        elif config.model.init is not None:
            if found := in_the_way(config.run.dir):
                return found
            if kept(config.run.dir, config.model.init) is None:
                find(config.model.init, whole=False)
    except UserError as error:
        return str(error) if content is not None else f"model.init: {error}"
    return None
