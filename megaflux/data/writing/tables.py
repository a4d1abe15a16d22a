"""Tables of captions and references beside a folder's images: metadata.jsonl, metadata.csv and metadata.parquet, as the
datasets library's ImageFolder defines them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megaflux.common.errors import one_line
from megaflux.data.writing import captions, pairing, recognise
from megaflux.data.writing.captions import Caption, CaptionReader
from megaflux.data.writing.items import folded

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_FIELDS = ("file_name", "filename", "file", "image", "image_path", "path")  # the first one found wins


@dataclass(frozen=True, slots=True)
class Named:
    """A reference as a table names it. path: relative to the folder, letters composed. strength: as it is written."""

    path: str
    strength: Any = None


@dataclass(slots=True)
class Told:
    """What a table says of an image. caption: None if nothing."""

    caption: Caption | None = None
    references: tuple[Named, ...] = ()


@dataclass
class _Found:
    """What one table says. named, captioned, bad: its rows with a file's name, with captions, without a name. fields: of the
    references. differing: rows with other references than an earlier one of the same image."""

    captions: dict[str, list[Caption]] = field(default_factory=dict)
    references: dict[str, tuple[Named, ...]] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    named: int = 0
    captioned: int = 0
    bad: int = 0
    differing: int = 0


class Tables:
    """The captions and references that a folder's tables give. files: the tables that were read. only_references: paths that
    they name as references and never as images, letters composed."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        reader: CaptionReader,
        *,
        references: bool = False,
        names: Sequence[str] = (),
    ) -> None:
        """root: the folder. files: the relative paths of those of its files that are not images. reader: of the
        captions. references: whether to read them. names: the relative paths of all its files."""
        self.files: set[str] = set()
        self.only_references: set[str] = set()
        self._root, self._references = root, references
        self._reader, self._edits = reader, replace(reader, edits=True)
        self._there = {folded(name) for name in names}
        self._told: dict[str, Told] = {}
        self._used = 0
        self._remarks: list[str] = []
        targets: set[str] = set()
        for name in files:
            if name.rpartition("/")[2].lower() in NAMES:
                targets |= self._read(name)
        named = {one.path for told in self._told.values() for one in told.references}
        self.only_references = named - targets

    def of(self, image: str) -> Told | None:
        """What they say of an image, by its relative path (letters composed), or None."""
        found = self._told.get(image)
        self._used += found is not None
        return found

    def remarks(self) -> list[str]:
        """After all images were asked for: what was wrong with the tables, and how many of their names are not there."""
        missing = len(self._told) - self._used
        more = [f"{', '.join(sorted(self.files))}: name {missing} images that are not here"] if missing > 0 else []
        return self._remarks + more

    def _read(self, name: str) -> set[str]:
        """Read a table. Returns the paths of its images."""
        found = _Found()
        try:
            for row in _rows(self._root / name, self._reader, self._references):
                self._add(found, posixpath.dirname(name), row)
        except (OSError, ValueError, csv.Error) as error:  # Arrow's errors are of the first two
            self._remarks.append(f"{name}: cannot be read ({one_line(error)})")
            found.named = found.captioned = found.bad = 0  # of which nothing is said then
        self._keep(name, found)
        return found.targets

    def _add(self, found: _Found, folder: str, row: Mapping[str, Any] | None) -> None:
        """Note what a row says."""
        fields = self._reference_fields(row) if row and self._references else []
        file = None if row is None else self._file_of(row, bool(fields))
        if row is None or file is None:
            found.bad += 1
            return
        found.named += 1
        image = _path(folder, file)
        found.targets.add(image)
        references = tuple(self._named(folder, one) for name in fields for one in pairing.listed(row[name]))
        if references:
            found.fields.update(fields)
            found.differing += found.references.setdefault(image, references) != references
        reader = self._edits if references else self._reader
        if values := reader.of_fields(row):
            found.captioned += 1
            found.captions.setdefault(image, []).append(reader.of_values(values))

    def _keep(self, name: str, found: _Found) -> None:
        """Take what a table says of the images of which no earlier one says anything."""
        named = [one.path for references in found.references.values() for one in references]
        if named and not any(path in self._there or recognise.has_image_suffix(path) for path in named):
            self._remarks.append(f"{name}: {', '.join(sorted(found.fields))} names no pictures, so it is left aside")
            found.references.clear()
        elif named:
            fields = ", ".join(sorted(found.fields))
            self._remarks.append(f"{name}: {len(found.references)} images have {len(named)} references in {fields}")
        if found.differing:
            self._remarks.append(
                f"{name}: {found.differing} rows name other references than an earlier row of the same image; the first are used"
            )
        for image, rows in found.captions.items():  # several rows of one image: a caption in each
            told = self._told.setdefault(image, Told())
            if told.caption is None:
                told.caption = rows[0] if self._reader.captions == captions.FIRST else captions.gathered(rows)
        for image, references in found.references.items():
            told = self._told.setdefault(image, Told())
            told.references = told.references or references
        if found.bad:
            self._remarks.append(f"{name}: {found.bad} rows without a file name ({', '.join(FILE_FIELDS)})")
        if found.named and not found.captioned:
            looked = self._reader.field or ", ".join(captions.FIELDS)
            self._remarks.append(f"{name}: no captions in it (looked for {looked}; --caption-column names another)")
        if found.captioned or found.references:
            self.files.add(name)

    def _file_of(self, row: Mapping[str, Any], referring: bool) -> str | None:
        """The name of a row's image: in one of FILE_FIELDS, or of pairing.TARGETS, which beside references come first."""
        file = next((row[name] for name in FILE_FIELDS if row.get(name)), None)
        if self._references and (referring or not file):
            target = pairing.target_name([name for name in _written(row) if isinstance(row[name], str)])
            file = file if target is None else row[target]
        return file if isinstance(file, str) else None

    def _reference_fields(self, row: Mapping[str, Any]) -> list[str]:
        """The names of a row's fields of references."""
        written = _written(row)
        if not written:
            return []
        return pairing.reference_names(written, targeted=pairing.target_name(written) is not None)

    def _named(self, folder: str, value: Any) -> Named:
        """A reference of a value in a table: a path, or an object with one and perhaps a strength."""
        strength = None
        if isinstance(value, Mapping):
            strength = value.get("strength")
            value = next((value[name] for name in FILE_FIELDS if value.get(name)), None)
        if not isinstance(value, str):
            return Named("", strength)
        path, root = _path(folder, value.strip()), folded(posixpath.normpath(str(self._root.absolute())))
        return Named(path.removeprefix(root + "/"), strength)


def _path(folder: str, file: str) -> str:
    """A path as a table in `folder` writes it -> relative to the source's folder, letters composed; it may lead out of it."""
    return folded(posixpath.normpath(posixpath.join(folder, file.replace("\\", "/"))))


def _written(row: Mapping[str, Any]) -> list[str]:
    """The fields of a row that are named as those of pairs are and hold something."""
    return [name for name in pairing.names_of_pairs(tuple(row)) if pairing.listed(row[name])]


def _rows(path: Path, reader: CaptionReader, references: bool) -> Iterator[Mapping[str, Any] | None]:
    """A table's rows; None for one that cannot be read. Raises OSError and ValueError for a table that cannot."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            wanted = [*(name for name in names if name in FILE_FIELDS), *reader.fields_of(names)]
            if references:
                wanted += [name for name in names if pairing.is_of_a_pair(name)]
                wanted += replace(reader, edits=True).fields_of(names)
            columns = list(dict.fromkeys(wanted))
            for batch in table.iter_batches(1024, columns=columns):
                yield from batch.to_pylist()
        return
    text = captions.decoded(path.read_bytes(), "surrogateescape")  # a row that is not UTF-8 costs its own caption only
    if suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    for line in text.split("\n"):  # not splitlines: JSON may hold U+2028 as it is
        if line.strip():
            yield _object(line)


def _object(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
