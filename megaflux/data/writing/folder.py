"""A folder of image files, with captions beside them or in tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaflux.data.images import BadImage
from megaflux.data.writing import captions, pairing, recognise, tables
from megaflux.data.writing.captions import Caption
from megaflux.data.writing.items import Item, LeftAside, Loaded, Reference, folded, printable
from megaflux.data.writing.options import NONE, Options
from megaflux.data.writing.recognise import Tree


@dataclass(frozen=True, slots=True)
class _Reference:
    """A reference of an image. name: its relative path, as in the folder. problem: (reason, detail) if it cannot be used."""

    name: str
    strength: float = 1.0
    problem: tuple[str, str] | None = None


class ImageFolder:
    """Image files. key: the relative path. a.ref0.png, a.ref1.jpg beside a.png are its references, else those that a table names.

    The caption of a.png is in a.txt, a.caption, a.json, a.png.txt, a.png.caption or a.png.json, the first that is not
    blank, else in a metadata.jsonl, metadata.csv or metadata.parquet of a folder above it. Letters with accents may be
    composed in one name and decomposed in the other, as macOS writes them.
    """

    kind = "images"
    attribution = None
    settings: dict[str, Any] = {}

    def __init__(self, root: Path, names: Sequence[str], tree: Tree, options: Options) -> None:
        """root: the folder. names: its images, as `image_names` finds them. tree: all that is in it."""
        self.root = root
        self.names = names
        self.tree = tree
        self.reader = options.caption_reader
        self.with_references = options.references != NONE
        self.has_references = False
        self.aside = LeftAside()

    def list_items(self) -> list[Item]:
        """One item per image file that is no reference, in the order of the paths, then the folders that cannot be read."""
        self.aside = LeftAside()
        others = set(self.tree.files).difference(self.names)
        beside = _CaptionFiles(name for name in others if name.lower().endswith(captions.SUFFIXES))
        in_tables = tables.Tables(
            self.root, sorted(others), self.reader, references=self.with_references, names=self.tree.files
        )
        references = _References(self.root, self.names if self.with_references else (), self.tree.files)
        only_named = {name for name in self.names if folded(name) in in_tables.only_references}
        names = [name for name in self.names if name not in only_named and name not in references.names]
        items = [self._item(name, beside.of(name), in_tables.of(folded(name)), references) for name in names]
        self.has_references = any(item.where[3] for item in items)
        if references.names:
            self.aside.others.append(
                f"{len(references.names)} images are references of those beside them (.ref0, .ref1, ...)"
            )
        if only_named:
            self.aside.others.append(
                f"{len(only_named)} images are named as references only, so they are not samples themselves"
            )
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

    def _item(self, name: str, beside: tuple[str, ...], told: tables.Told | None, references: _References) -> Item:
        key, problem, size = printable(name), None, 0
        found = references.beside(name) or tuple(references.named(one) for one in (told.references if told else ()))
        try:
            size = sum((self.root / path).stat().st_size for path in (name, *beside[:1]))
        except OSError:  # a dangling link, say
            problem = "unreadable"
        caption = told.caption if told else None
        if caption is not None and not beside:
            size += len(caption.stored.encode())
        size += sum(references.size(one) for one in found)
        return Item(key, key, (name, beside, caption, found), size, problem)

    def remarks(self) -> list[str]:
        """What `list_items` left aside."""
        return self.aside.lines()

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The files' bytes and captions, and their references'."""
        for item in items:
            name, beside, told, references = item.where
            try:
                image = (self.root / name).read_bytes()
            except OSError as error:
                yield BadImage("unreadable", error.strerror or "")
                continue
            in_files = (self._read_caption(caption, bool(references)) for caption in beside)
            caption = captions.first(itertools.chain(in_files, [told or Caption()]))
            yield Loaded(image, caption, tuple(map(self._read_reference, references)))

    def _read_caption(self, name: str, edit: bool) -> Caption:
        path = self.root / name
        try:
            return replace(self.reader, edits=edit).of_file(path.read_bytes(), path.suffix.lower())
        except OSError as error:
            return Caption(problem=error.strerror or "cannot be read")

    def _read_reference(self, reference: _Reference) -> Reference:
        name = printable(reference.name)
        if reference.problem:
            return Reference(BadImage(*reference.problem), name)
        try:
            return Reference((self.root / reference.name).read_bytes(), name, reference.strength)
        except OSError as error:
            return Reference(BadImage("unreadable", error.strerror or ""), name)

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


class _References:
    """Finds the references of images. names: the images that are references of one beside them."""

    def __init__(self, root: Path, images: Sequence[str], files: Sequence[str]) -> None:
        """root: the folder. images: those of its files that are images. files: all."""
        self._root = root
        self._files = {folded(name): name for name in reversed(files)}
        self.names: set[str] = set()
        self._beside: dict[str, list[tuple[int, str]]] = {}
        may_be = {name: found for name in images if (found := pairing.reference_of(_stem(name)))}
        targets = {folded(_stem(name)) for name in images if name not in may_be} if may_be else set()
        for name, (target, number) in may_be.items():
            if folded(target) in targets:
                self.names.add(name)
                self._beside.setdefault(folded(target), []).append((number, name))

    def beside(self, image: str) -> tuple[_Reference, ...]:
        """Those beside an image, in the order of their numbers."""
        found = self._beside.get(folded(_stem(image)), ()) if self._beside else ()
        return tuple(_Reference(name) for _, name in sorted(found))

    def named(self, reference: tables.Named) -> _Reference:
        """One that a table names."""
        name = self._files.get(reference.path)
        strength = pairing.strength_of(reference.strength)
        if isinstance(strength, BadImage):
            return _Reference(name or reference.path, problem=(strength.reason, strength.detail))
        if name is not None:
            return _Reference(name, strength)
        if not reference.path:
            problem = "neither a path nor an object with one"
        elif reference.path.startswith(("../", "/")) or reference.path == "..":
            problem = "leads out of the folder"
        else:
            problem = "not among the files of the folder"
        return _Reference(reference.path, strength, ("missing_image", problem))

    def size(self, reference: _Reference) -> int:
        """What a reference adds to the fingerprint of its image: bytes, and those of what is written of it."""
        told = len(f"{reference.name} {reference.strength}".encode(errors="surrogateescape"))
        if reference.problem:
            return told
        try:
            return told + (self._root / reference.name).stat().st_size
        except OSError:
            return told


def _stem(name: str) -> str:
    """A path without its suffix."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


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
