"""A folder of image files, with captions beside them or in tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megaflux.data.images import BadImage
from megaflux.data.writing import captions, recognise, tables
from megaflux.data.writing.captions import Caption
from megaflux.data.writing.items import Item, LeftAside, Loaded, folded, printable
from megaflux.data.writing.options import Options
from megaflux.data.writing.recognise import Tree


class ImageFolder:
    """Image files. key: the relative path.

    The caption of a.png is in a.txt, a.caption, a.json, a.png.txt, a.png.caption or a.png.json, the first that is not
    blank, else in a metadata.jsonl, metadata.csv or metadata.parquet of a folder above it. Letters with accents may be
    composed in one name and decomposed in the other, as macOS writes them.
    """

    kind = "images"
    attribution = None
    has_references = False
    settings: dict[str, Any] = {}

    def __init__(self, root: Path, names: Sequence[str], tree: Tree, options: Options) -> None:
        """root: the folder. names: its images, as `image_names` finds them. tree: all that is in it."""
        self.root = root
        self.names = names
        self.tree = tree
        self.reader = options.caption_reader
        self.aside = LeftAside()

    def list_items(self) -> list[Item]:
        """One item per image file, in the order of the paths, then the folders that cannot be read."""
        self.aside = LeftAside()
        others = set(self.tree.files).difference(self.names)
        beside = _CaptionFiles(name for name in others if name.lower().endswith(captions.SUFFIXES))
        in_tables = tables.Captions(self.root, sorted(others), self.reader)
        items = [self._item(name, beside.of(name), in_tables) for name in self.names]
        used = {caption for item in items for caption in item.where[1]} | in_tables.files
        self.aside.others += in_tables.remarks()
        for name in sorted(others - used):
            if name.lower().endswith(recognise.CAPTION_LIKE):
                self.aside.caption_like.append(printable(name))
            else:
                self.aside.add(name)
        for name in self.tree.hidden:
            self.aside.add(name)
        items += [Item(key := printable(name), key, (), 0, "unreadable") for name in self.tree.unreadable]
        return items

    def _item(self, name: str, beside: tuple[str, ...], in_tables: tables.Captions) -> Item:
        key, problem, size = printable(name), None, 0
        told = in_tables.of(folded(name))
        try:
            size = sum((self.root / path).stat().st_size for path in (name, *beside[:1]))
        except OSError:  # a dangling link, say
            problem = "unreadable"
        if told is not None and not beside:
            size += len(told.stored.encode())
        return Item(key, key, (name, beside, told), size, problem)

    def remarks(self) -> list[str]:
        """What `list_items` left aside."""
        return self.aside.lines()

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The files' bytes and captions."""
        for item in items:
            name, beside, told = item.where
            try:
                image = (self.root / name).read_bytes()
            except OSError as error:
                yield BadImage("unreadable", error.strerror or "")
                continue
            in_files = (self._read_caption(caption) for caption in beside)
            yield Loaded(image, captions.first(itertools.chain(in_files, [told or Caption()])))

    def _read_caption(self, name: str) -> Caption:
        path = self.root / name
        try:
            return self.reader.of_file(path.read_bytes(), path.suffix.lower())
        except OSError as error:
            return Caption(problem=error.strerror or "cannot be read")

    def together(self, item: Item) -> object:
        """Each file is read alone."""
        return item.key


def image_names(root: Path, files: Sequence[str]) -> list[str]:
    """Those of the files that are images: by their suffix, or by content where they have none or an unknown one."""
    named = [name for name in files if recognise.has_image_suffix(name)]
    others = [name for name in files if recognise.may_be_image(name) and recognise.is_image_file(root / name)]
    if not others:
        return named
    # The blobs of a download cache have no suffix, and are what its named files link to.
    linked = {(root / name).resolve() for name in named if (root / name).is_symlink()}
    return sorted([*named, *(name for name in others if (root / name).resolve() not in linked)])


class _CaptionFiles:
    """Finds the caption file of an image among the files of a tree."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[tuple[str, str], str] = {}  # (name without suffix, suffix in small letters) -> name
        for name in sorted(names):
            stem, _, suffix = name.rpartition(".")
            self._names.setdefault((folded(stem), f".{suffix.lower()}"), name)

    def of(self, image: str) -> tuple[str, ...]:
        """The names of an image's caption files, the first one to be read first."""
        if not self._names:
            return ()
        folder, slash, file = image.rpartition("/")
        stem = file.rpartition(".")[0] or file
        bases = dict.fromkeys((folded(f"{folder}{slash}{stem}"), folded(image)))
        found = [self._names.get((base, suffix)) for base in bases for suffix in captions.SUFFIXES]
        return tuple(name for name in found if name is not None)
