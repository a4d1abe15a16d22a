"""The sources that megaflux.data.prepare reads: a folder of images, WebDataset tars, parquet files, openmoji, icon sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import ICONIFY
from megaflux.data.buckets import Bucket
from megaflux.data.writing import icon_sets, pairing, parquet, recognise
from megaflux.data.writing.folder import ImageFolder, image_names
from megaflux.data.writing.iconify import Iconify
from megaflux.data.writing.items import LeftAside, Source
from megaflux.data.writing.openmoji import OpenMoji
from megaflux.data.writing.options import ICONIFY_DEFAULTS, NONE, Options, defaults_of
from megaflux.data.writing.parquet import ParquetFiles
from megaflux.data.writing.recognise import Tree
from megaflux.data.writing.tars import TarFiles

KINDS = {"images": ImageFolder.kind, "tar": TarFiles.kind, "parquet": ParquetFiles.kind}  # --kind -> the source's
PACKED = (".gz", ".tgz", ".zip", ".zst", ".xz", ".bz2", ".7z", ".rar")  # a compressed tar has no positions to seek to
OF_ICONS = (
    "pairs",
    "sets",
    "contents",
    "most_contents",
    "hold_out_cells",
    "hold_out_contents",
)  # options that say nothing to other sources
CLEAR = 0.9  # the share of the bytes, or else of the images, that makes a kind the one that is meant


def open_source(source: str, buckets: Sequence[Bucket], options: Options) -> tuple[Source, list[str]]:
    """(the source of that name ("openmoji", "iconify", "iconify:PATH") or at that path, lines about files that it leaves aside).

    A folder, searched with its subfolders, may hold images, .tar files or .parquet files. A single file is a source too.
    If there are several kinds, `options.kind` decides, else the kind with nearly all of the bytes or images is taken;
    parquet files without images do not count. Icon sets are taken where there is nothing else, or with `options.kind`.
    buckets: of sources that draw their pictures. Raises UserError if the path does not exist, has
    nothing usable, or does not show which kind is meant.
    """
    paths = icon_sets.paths_of(source)
    if paths is None and options.kind == ICONIFY and source != OpenMoji.kind:
        paths = [str(source)]
    if paths is not None:
        return Iconify(icon_sets.files_of(source, paths), buckets, options), []
    if source == OpenMoji.kind:
        _refuse_icon_options(source, options)
        return OpenMoji(buckets, options.canvases), []
    root = Path(source)
    if not os.path.exists(root):  # Path's own raises where a name is too long
        raise UserError(f"source {source}: no such file or folder (and not one of the names openmoji and iconify)")
    icons = _plain_icons(root)
    root, tree = _looked_over(root, options)
    found = _files_by_kind(root, tree, options)
    if icons and options.kind is None and not any(found.values()):
        return Iconify(icons, buckets, options), []
    _refuse_icon_options(source, options)
    kind = _choose(source, root, found, options, tree)
    if kind == "images":
        return ImageFolder(root, found[kind], tree, options), []
    names = found[kind]
    aside = LeftAside()
    for name in sorted({*tree.files, *tree.hidden}.difference(names)):
        aside.add(name)
    return (TarFiles if kind == "tar" else ParquetFiles)(root, names, options), aside.lines()


def _refuse_icon_options(source: str, options: Options) -> None:
    """Raises UserError for options that say nothing to a source that is not of icon sets."""
    usual = Options()
    if foreign := [name for name in OF_ICONS if getattr(options, name) != getattr(usual, name)]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise UserError(
            f"{names}: of icon sets only, and {source} is read as something else; give {ICONIFY}:DIR as SOURCE"
        )


def usual_options(source: str, kind: str | None = None) -> dict[str, Any]:
    """What differs from Options' own defaults for a source, by its name, by what is at its path, or as `kind` says."""
    if named := defaults_of(source):
        return named
    return ICONIFY_DEFAULTS if kind == ICONIFY or (kind is None and _are_icons(source)) else {}


def _are_icons(source: str) -> bool:
    """Whether there are icon sets at this path, and nothing else that is read."""
    if not os.path.exists(source) or not _plain_icons(Path(source)):
        return False
    return not any(_files_by_kind(*_looked_over(Path(source), Options()), Options()).values())


def _plain_icons(path: Path) -> list[Path]:
    """The files of icon sets at a path that was given without the name iconify."""
    return [file for file in icon_sets.files_at(path) if file.name == icon_sets.FILE]


def _looked_over(path: Path, options: Options) -> tuple[Path, Tree]:
    """(the folder, all that is in it); of a single file its folder and the file with its captions and references."""
    if path.is_dir():
        return path, recognise.walk(path)
    return path.parent, Tree(_with_its_own(path, options))


def _with_its_own(file: Path, options: Options) -> list[str]:
    """The name of a single file, and if it is an image those of the files that may hold its caption or are its references."""
    if file.suffix.lower() in (".tar", ".parquet"):
        return [file.name]
    beside = [path for path in file.parent.iterdir() if path.name.startswith(f"{file.stem}.") and path != file]
    named = [file.name, *(path.name for path in beside if not recognise.has_image_suffix(path.name))]
    if options.references != NONE:
        found = ((path, pairing.reference_of(path.stem)) for path in beside if recognise.has_image_suffix(path.name))
        named += [path.name for path, reference in found if reference and reference[0] == file.stem]
    return sorted(named)


def _tables(tree: Tree) -> list[str]:
    return [name for name in tree.files if name.lower().endswith(".parquet")]


def _files_by_kind(root: Path, tree: Tree, options: Options) -> dict[str, list[str]]:
    """The files of each kind of KINDS; parquet files only if they have a column of images."""
    tables = _tables(tree)
    with_images = [name for name in tables if parquet.has_images(root / name, options)]
    if with_images or options.kind != "parquet":  # else the refusal names the columns of the first one
        tables = with_images
    return {
        "images": image_names(root, tree.files),
        "tar": [name for name in tree.files if name.lower().endswith(".tar")],
        "parquet": tables,
    }


def _choose(source: str, root: Path, found: dict[str, list[str]], options: Options, tree: Tree) -> str:
    """The kind that is meant, one of KINDS. Raises UserError if there is none, or if it is not clear."""
    if options.kind is not None:
        if not found[options.kind]:
            raise UserError(f"source {source}: no {KINDS[options.kind]} among its {len(tree.files)} files; drop --kind")
        return options.kind
    kinds = [kind for kind, names in found.items() if names]
    if not kinds:
        there = LeftAside()
        for name in tree.files:
            there.add(name)
        packed = any(name.lower().endswith(PACKED) for name in tree.files)
        raise UserError(
            f"source {source}: no images, .tar files or .parquet files with images among its {len(tree.files)} files"
            + f"{'; unpack the archives' * packed}{''.join(f'; {line}' for line in there.lines())}"
            + "; --kind parquet lists the columns, --image-column names that of the images" * bool(_tables(tree))
        )
    if len(kinds) == 1:
        return kinds[0]
    sizes = {kind: sum(_size(root / name) for name in found[kind]) for kind in kinds}
    numbers: dict[str, int] = {}
    if "tar" not in kinds:  # how many images an archive holds shows only when it has been read
        numbers = {"images": len(found["images"])}
        numbers["parquet"] = sum(parquet.number_of_rows(root / name) for name in found["parquet"])
    for measure in (sizes, numbers):
        for kind, amount in measure.items():
            if amount >= CLEAR * sum(measure.values()):
                return kind
    counts = ", ".join(f"{len(found[kind])} {KINDS[kind]} of {sizes[kind] / 1e6:.1f} MB" for kind in kinds)
    raise UserError(f"source {source}: files of several kinds ({counts}); choose one with --kind {' or '.join(kinds)}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
