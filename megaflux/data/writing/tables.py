"""Tables of captions beside a folder's images: metadata.jsonl, metadata.csv and metadata.parquet, as the datasets
library's ImageFolder defines them."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaflux.common.errors import one_line
from megaflux.data.writing import captions
from megaflux.data.writing.captions import Caption, CaptionReader
from megaflux.data.writing.items import folded

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_FIELDS = ("file_name", "filename", "file", "image", "image_path", "path")  # the first one found wins


class Captions:
    """The captions that a folder's tables give. files: the tables that were read."""

    def __init__(self, root: Path, files: Sequence[str], reader: CaptionReader) -> None:
        """root: the folder. files: the relative paths of those of its files that are not images. reader: of the
        captions."""
        self.files: set[str] = set()
        self._captions: dict[str, Caption] = {}
        self._used = 0
        self._remarks: list[str] = []
        for name in files:
            if name.rpartition("/")[2].lower() in NAMES:
                self._read(root, name, reader)

    def of(self, image: str) -> Caption | None:
        """The caption of an image, by its relative path (letters composed), or None."""
        found = self._captions.get(image)
        self._used += found is not None
        return found

    def remarks(self) -> list[str]:
        """After all images were asked for: what was wrong with the tables, and how many of their names are not there."""
        missing = len(self._captions) - self._used
        more = [f"{', '.join(sorted(self.files))}: name {missing} images that are not here"] if missing > 0 else []
        return self._remarks + more

    def _read(self, root: Path, name: str, reader: CaptionReader) -> None:
        folder = posixpath.dirname(name)
        bad = 0
        named = captioned = 0
        found: dict[str, list[Caption]] = {}
        try:
            for row in _rows(root / name, reader):
                file = None if row is None else next((row[f] for f in FILE_FIELDS if row.get(f)), None)
                if row is None or not isinstance(file, str):
                    bad += 1
                    continue
                named += 1
                values = reader.of_fields(row)
                if not values:
                    continue
                captioned += 1
                path = posixpath.normpath(posixpath.join(folder, file.replace("\\", "/")))
                found.setdefault(folded(path), []).append(reader.of_values(values))
        except (OSError, ValueError, csv.Error) as error:  # Arrow's errors are of the first two
            self._remarks.append(f"{name}: cannot be read ({one_line(error)})")
            return
        finally:
            for image, rows in found.items():  # several rows of one image: a caption in each
                told = rows[0] if reader.captions == captions.FIRST else captions.gathered(rows)
                self._captions.setdefault(image, told)
        if bad:
            self._remarks.append(f"{name}: {bad} rows without a file name ({', '.join(FILE_FIELDS)})")
        if named and not captioned:
            looked = reader.field or ", ".join(captions.FIELDS)
            self._remarks.append(f"{name}: no captions in it (looked for {looked}; --caption-column names another)")
        if captioned:
            self.files.add(name)


def _rows(path: Path, reader: CaptionReader) -> Iterator[Mapping[str, Any] | None]:
    """A table's rows; None for one that cannot be read. Raises OSError and ValueError for a table that cannot."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            columns = list(dict.fromkeys([*(name for name in names if name in FILE_FIELDS), *reader.fields_of(names)]))
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
