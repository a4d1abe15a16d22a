"""Checkpoints on disk: finding, verifying, publishing and deleting them. Imports no torch.

    RUN/checkpoints/update-0000400/           a checkpoint, if its manifest.json says so of every file
    RUN/checkpoints/.update-0000400.partial/  being written; if its manifest verifies, a crash came just before the rename,
                                              which the next start does
    RUN/checkpoints/.update-0000400.old/      about to be deleted: replaced by a newer one of the same update
    RUN/checkpoints/.update-0000400.deleting/ about to be deleted: too old

The order of a save, so that a crash at any point leaves either the previous checkpoint or the new one: write the files,
fsync; write the manifest (SHA-256 of each), fsync; rename; fsync of the folder; only then delete older ones.
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

# 2: the manifest holds a hash of itself; 3: new fields of the configuration (saved.ADDED); 4: more new fields, and the
# weights are divided among the ranks' files (weights.py); 5: the stage's plan, and train.micro_batch_size may be `auto`;
# 6: stages and rates by part, where a run begins and ends; paths of sources are no longer part of the identity;
# 7: averages of the weights (average.py), and more new fields
FORMAT = 8
MANIFEST = "manifest.json"
KEYS = {"format", "update", "stage", "stage_name", "world_size", "data", "identity", "base", "deepspeed", "files"}
HASHERS = 8  # files hashed in parallel: one thread reads 1 to 2 GB/s, and a shared file system delivers more


def folder(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints, which need not exist."""
    return Path(run_dir) / "checkpoints"


def listed(run_dir: str | Path) -> dict[int, Path]:
    """Update -> checkpoint folder of a run, oldest first; not verified. Folders with other names, as a checkpoint that
    somebody renamed to update-0000400.bad, are left out."""
    found = folder(run_dir).glob("update-*")  # none where there is no such folder
    numbered = {path.name.removeprefix("update-"): path for path in found if path.is_dir()}
    return dict(sorted((int(number), path) for number, path in numbered.items() if number.isdigit()))


def name_of(update: int) -> str:
    """The name of a checkpoint's folder."""
    return f"update-{update:07d}"


def partial_of(run_dir: str | Path, update: int) -> Path:
    """The folder in which a checkpoint is written before it gets its name."""
    return folder(run_dir) / f".{name_of(update)}.partial"


class NewerFormat(UserError):
    """A whole checkpoint of a later megaflux: skipping it would discard its updates."""


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, with its keys and file names checked. Raises UserError if it is not a valid one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != 1 and manifest.get("seal") != _seal(manifest):
            raise KeyError("damaged (it does not match its own hash)")
        if manifest["format"] > FORMAT:  # every later format has this seal
            raise NewerFormat(
                f"{path}: format {manifest['format']} is newer than this code's {FORMAT}; update megaflux"
            )
        if manifest["format"] < 1:
            raise KeyError(f"format {manifest['format']} does not exist")
        if missing := KEYS - set(manifest):
            raise KeyError(f"{sorted(missing)[0]} is missing")
        whole = all(isinstance(manifest[key], int) for key in ("format", "update", "stage", "world_size"))
        if not whole or not all(isinstance(manifest[key], dict) for key in ("data", "identity", "deepspeed")):
            raise KeyError("a value has the wrong type")
        for name, entry in manifest["files"].items():
            if not isinstance(entry["bytes"], int) or len(bytes.fromhex(entry["sha256"])) != 32:
                raise KeyError(f"{name}: bytes or sha256 is invalid")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}/{MANIFEST}: {getattr(error, 'strerror', None) or error}; this is not a complete checkpoint"
        ) from None
    for name in manifest["files"]:
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise UserError(f"{path}/{MANIFEST}: {name} lies outside the checkpoint; do not use it")
    return manifest


def verify(path: Path, only: Collection[str] | None = None) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest, which is returned. only: these files alone; None: all. Raises
    UserError naming the first file that does not match."""
    manifest = read(path)
    files = {name: entry for name, entry in manifest["files"].items() if only is None or name in only}
    for name, entry in files.items():  # the cheap checks first
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file}: damaged ({file.stat().st_size} bytes, the manifest says {entry['bytes']})")
    if only is None:  # a pickle that is not in the manifest would be loaded unchecked
        for file in sorted(path.rglob("*.pt")):
            if str(file.relative_to(path)) not in files:
                raise UserError(f"{file}: not in the manifest; do not use it")
    try:
        digests = _hashed(path / name for name in files)
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}") from None
    for (name, entry), digest in zip(files.items(), digests):
        if digest != entry["sha256"]:
            raise UserError(f"{path / name}: damaged (it does not match its SHA-256 in the manifest)")
    return manifest


def publish(partial: Path, final: Path, content: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Turn `partial` into the checkpoint `final`: sync its folders, write the manifest, rename. Durable on return.

    content: the manifest without `files`. files: `inventory` of all of its files, each synced by its writer."""
    for inner in sorted({(partial / name).parent for name in files} | {partial}):
        sync(inner)
    write_durably(partial / MANIFEST, json.dumps(sealed(content | {"files": files}), indent=1))
    sync(partial)
    replaced = final.with_name(f".{final.name}.old")
    if final.exists():  # the run went back to an older checkpoint; this one is damaged or equal
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest's content with its own hash, without which a flipped digit of the data's position would go unnoticed."""
    return content | {"seal": _seal(content)}


def _seal(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def files_in(path: Path) -> list[Path]:
    """The files of a checkpoint's folder, except its manifest and hidden files: those are files that safetensors is still
    writing, for other ranks, and deleted files that NFS keeps while they are open."""
    found = (file for file in path.rglob("*") if not file.name.startswith(".") and file.name != MANIFEST)
    return sorted(file for file in found if file.is_file())


def inventory(path: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """{"deepspeed/...": {"bytes", "sha256"}, ...} of files in a checkpoint's folder; None: of `files_in` it."""
    files = files_in(path) if files is None else list(files)
    return {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in zip(files, _hashed(files))
    }


def recover(run_dir: str | Path, say: Callable[[str], Any]) -> None:
    """Finish interrupted saves: rename checkpoints that are complete under their partial name, and delete all other
    leftovers of saves and deletions. say: logs one line."""
    root = folder(run_dir)
    for partial in sorted(root.glob(".update-*.partial")):
        final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
        if (partial / MANIFEST).is_file() and not final.exists():
            with suppress(UserError):
                verify(partial)
                partial.rename(final)
                sync(root)
                say(f"{final}: was complete but not renamed yet; renamed")
                continue
        shutil.rmtree(partial, ignore_errors=True)
        say(f"{partial}: a save that was cut short; deleted")
    for kind in ("old", "deleting"):
        for leftover in root.glob(f".update-*.{kind}"):
            shutil.rmtree(leftover, ignore_errors=True)


def clear(path: Path) -> None:
    """Delete what an interrupted save left under this name."""
    if path.exists():
        shutil.rmtree(path)


def prune(run_dir: str | Path, keep: int, milestones: Collection[int], protect: Collection[int] = ()) -> list[Path]:
    """Delete all checkpoints but the newest `keep`, `milestones` and `protect` (updates); returns the deleted folders."""
    deleted = []
    for update, path in list(listed(run_dir).items())[: -max(1, keep)]:
        if update not in milestones and update not in protect:
            going = path.with_name(f".{path.name}.deleting")  # half a folder must not look like a checkpoint
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)
            deleted.append(path)
    return deleted


def write_durably(file: Path, text: str) -> None:
    """Write a text file and fsync it."""
    with file.open("w") as stream:
        stream.write(text)
        sync_file(stream)


def sync(path: Path) -> None:
    """fsync a file or folder; storage that refuses it causes one warning (megaflux.common.files)."""
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
