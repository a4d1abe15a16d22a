"""Checkpoints on disk: which there are, whether they are whole, and how one comes to be and goes. No torch in here.

    RUN/checkpoints/update-0000400/           a checkpoint, if its manifest.json says so of every file
    RUN/checkpoints/.update-0000400.partial/  being written; one whose manifest holds is a checkpoint that a crash kept
                                              from its name, and gets it at the next start
    RUN/checkpoints/.update-0000400.old/      about to be deleted: replaced by a newer one of the same update
    RUN/checkpoints/.update-0000400.deleting/ about to be deleted: too old

Order of a save, so that a crash at any point leaves the checkpoint before or the new one: files, fsync; manifest
(SHA-256 of each), fsync; rename; fsync of the folder; only then are older ones deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.files import sync_file, sync_folder

# 2: the manifest holds a hash of itself; 3: fields of the configuration came in (saved.ADDED); 4: more of them, and the
# weights are divided among the ranks' files (trained.py); 5: the stage's plan, and train.micro_batch_size may be `auto`
FORMAT = 5
MANIFEST = "manifest.json"
KEYS = {"format", "update", "stage", "stage_name", "world_size", "data", "identity", "base", "deepspeed", "files"}
HASHERS = 8  # files hashed at a time: one thread reads 1 to 2 GB/s, and a shared file system gives more to several


def folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def listed(run_dir: str | Path) -> dict[int, Path]:
    """The checkpoint folders of a run by update, oldest first; complete or not. Others' names are passed over, so one
    that somebody moved aside as update-0000400.bad is none."""
    found = folder(run_dir).glob("update-*") if folder(run_dir).is_dir() else []
    numbered = {path.name.removeprefix("update-"): path for path in found if path.is_dir()}
    return dict(sorted((int(number), path) for number, path in numbered.items() if number.isdigit()))


def name_of(update: int) -> str:
    return f"update-{update:07d}"


def partial_of(run_dir: str | Path, update: int) -> Path:
    """Where a checkpoint is written before it is one."""
    return folder(run_dir) / f".{name_of(update)}.partial"


class NewerFormat(UserError):
    """A whole checkpoint of a later megaflux: to pass it over would give up what it holds."""


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, its keys and its files' names checked. UserError for what is none."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != 1 and manifest.get("seal") != _seal(manifest):
            raise KeyError("damaged (not what its own hash says)")
        if manifest["format"] > FORMAT:  # every format to come has this seal
            raise NewerFormat(
                f"{path}: format {manifest['format']} is newer than this code's {FORMAT}; update megaflux"
            )
        if manifest["format"] < 1:
            raise KeyError(f"format {manifest['format']} is none")
        if missing := KEYS - set(manifest):
            raise KeyError(f"{sorted(missing)[0]} is missing")
        whole = all(isinstance(manifest[key], int) for key in ("format", "update", "stage", "world_size"))
        if not whole or not all(isinstance(manifest[key], dict) for key in ("data", "identity", "deepspeed")):
            raise KeyError("a value of another type")
        for name, entry in manifest["files"].items():
            if not isinstance(entry["bytes"], int) or len(bytes.fromhex(entry["sha256"])) != 32:
                raise KeyError(f"{name}: bytes or sha256 is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}/{MANIFEST}: {getattr(error, 'strerror', None) or error}; this is not a complete checkpoint"
        ) from None
    for name in manifest["files"]:
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path}/{MANIFEST}: {name} lies outside the checkpoint; do not use it")
    return manifest


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint whose files match it; only: just these files. UserError naming the first that
    doesn't."""
    manifest = read(path)
    files = {name: entry for name, entry in manifest["files"].items() if only is None or name in only}
    for name, entry in files.items():  # what costs nothing first
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file}: damaged ({file.stat().st_size} bytes, the manifest says {entry['bytes']})")
    if only is None:  # a pickle beside those that were hashed would be loaded unseen
        for file in sorted(path.rglob("*.pt")):
            if str(file.relative_to(path)) not in files:
                raise UserError(f"{file}: not in the manifest; do not use it")
    try:
        digests = _hashed(path / name for name in files)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    for (name, entry), digest in zip(files.items(), digests):
        if digest != entry["sha256"]:
            raise UserError(f"{path / name}: damaged (not what the manifest's SHA-256 says)")
    return manifest


def publish(partial: Path, final: Path, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Make `partial` the checkpoint `final`: sync its folders, write the manifest, rename. Durable on return.

    files: what `inventory` says of every file in it; whoever wrote one has synced it."""
    for inner in sorted({(partial / name).parent for name in files} | {partial}):
        sync(inner)
    write_durably(partial / MANIFEST, json.dumps(sealed(content | {"files": files}), indent=1))
    sync(partial)
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():  # by a run that went back to an older one; what stands there is damaged or its twin
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest's content with its own hash: a flipped digit of the data's position would else go unseen."""
    return content | {"seal": _seal(content)}


def _seal(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def files_in(path: Path) -> list[Path]:
    """Every file of a checkpoint's folder but its manifest, and but hidden ones: safetensors gives a file its name when it
    is whole, and other ranks write theirs meanwhile; NFS keeps a deleted file under such a name while it is open."""
    found = (file for file in path.rglob("*") if not file.name.startswith(".") and file.name != MANIFEST)
    return sorted(file for file in found if file.is_file())


def inventory(path: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """{"deepspeed/...": {"bytes", "sha256"}, ...} of files in a folder; None: of all but its manifest."""
    files = files_in(path) if files is None else list(files)
    return {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _hashed(files))
    }


def recover(run_dir: str | Path, say: Callable[[str], Any]) -> None:
    """Give checkpoints that were complete but for their name that name, and delete what saves and deletions left."""
    root = folder(run_dir)
    for partial in sorted(root.glob(".update-*.partial")) if root.is_dir() else []:
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if (partial / MANIFEST).is_file() and not final.exists():
            with suppress(UserError):
                verify(partial)
                partial.rename(final)
                sync(root)
                say(f"{final}: was complete but for its name, which it now has")
                continue
        shutil.rmtree(partial, ignore_errors=True)
        say(f"{partial}: a save that was cut short; deleted")
    for kind in ("old", "deleting"):
        for leftover in root.glob(f".update-*.{kind}") if root.is_dir() else []:
            shutil.rmtree(leftover, ignore_errors=True)


def clear(path: Path) -> None:
    """Delete what a save that was cut short left under this name."""
    if path.exists():
        shutil.rmtree(path)


def prune(run_dir: str | Path, keep: int, milestones: Collection[int], protect: Collection[int] = ()) -> list[Path]:
    """Delete old checkpoints and name them: the newest `keep`, milestones and `protect` stay."""
    deleted = []
    for update, path in list(listed(run_dir).items())[: -max(1, keep)]:
        if update not in milestones and update not in protect:
            going = path.with_name(f".{path.name}.deleting")  # half a folder must not look like a checkpoint
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)
            deleted.append(path)
    return deleted


def write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        sync_file(stream)


def sync(path: Path) -> None:
    """fsync of a file or folder, as megaflux.common.files has it: storage that refuses it is warned of once."""
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("rb") as stream:
            sync_file(stream)


def _hashed(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(HASHERS) as pool:
        return list(pool.map(_sha256, files))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
