"""Parquet tables of images and captions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError, one_line
from megaflux.data.images import BadImage
from megaflux.data.writing import captions
from megaflux.data.writing.captions import Caption, CaptionReader
from megaflux.data.writing.items import Item, LeftAside, Loaded, printable
from megaflux.data.writing.options import Options
from megaflux.data.writing.recognise import starts_like_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes")  # the first one found wins
_BUFFER = 1 << 20  # bytes read at a time; Arrow's default is a row group's whole column


@dataclass(frozen=True)
class _Columns:
    """Names of a table's columns: of the images, of the captions (none, one, or numbered ones) and of the keys, or None."""

    image: str
    captions: tuple[str, ...]
    key: str | None


class ParquetFiles:
    """Parquet tables with a column of images (bytes, or a struct with `bytes`), and perhaps captions and `key`.

    The images' column is Options.image_column, else the first of IMAGE_COLUMNS that holds bytes, else the only one that
    does; the captions' are Options.caption_column, else the first of captions.FIELDS, with its numbered ones.
    key: file path, ":", and the column `key` or the row number.
    """

    kind = "parquet files"
    attribution = None
    has_references = False
    settings: dict[str, Any] = {}
    BATCH = 32  # rows in memory at a time

    def __init__(self, root: Path, names: Sequence[str], options: Options) -> None:
        self.root = root
        self.names = names
        self.options = options
        self.aside = LeftAside()
        self._reader: _Rows | None = None

    def list_items(self) -> list[Item]:
        """One item per row. Raises UserError for a table that cannot be opened or has no images."""
        items: list[Item] = []
        self.aside = LeftAside()
        found: dict[str, int] = {}
        for name in self.names:
            with open_table(self.root / name) as table:
                columns = self._columns(name, table)
                told = f"images from the column {columns.image}, captions from {', '.join(columns.captions) or 'none'}"
                found[told] = found.get(told, 0) + 1
                if not columns.captions:
                    found[told + f" (columns: {', '.join(map(str, table.schema_arrow.names))[:120]})"] = found.pop(told)
                items += self._list_table(name, table, columns)
        self.aside.others += [f"{count} of {len(self.names)} tables: {told}" for told, count in found.items()]
        return items

    def remarks(self) -> list[str]:
        """Which columns are read."""
        return self.aside.lines()

    def together(self, item: Item) -> object:
        """A row group can only be read from its beginning."""
        return item.where[:2]

    def _columns(self, name: str, table: Any) -> _Columns:
        names = table.schema_arrow.names
        image = _image_column(table, self.options.image_column)
        if image is None:
            wanted = self.options.image_column
            what = f"no column {wanted} of bytes" if wanted else "no column of images"
            raise UserError(
                f"{self.root / name}: {what}, only {', '.join(map(str, names))[:200]}; name it with --image-column"
            )
        told = tuple(self.options.caption_reader.fields_of(names))
        if not told and self.options.caption_column:
            raise UserError(
                f"{self.root / name}: no column {self.options.caption_column}, only {', '.join(map(str, names))[:200]}"
            )
        return _Columns(image, told, "key" if "key" in names else None)

    def _list_table(self, name: str, table: Any, columns: _Columns) -> Iterator[Item]:
        row = 0
        for group in range(table.num_row_groups):
            metadata = table.metadata.row_group(group)
            keys = None
            if columns.key:
                keys = self._keys(name, table, group, columns.key)
            for index in range(metadata.num_rows):
                if keys is None:
                    key = f"{printable(name)}:{row}"
                else:  # numbers of rows could be other rows' keys
                    key = f"{printable(name)}:{f'row {row}' if keys[index] is None else keys[index]}"
                yield Item(key, key, (name, group, index), metadata.total_byte_size)
                row += 1

    def _keys(self, name: str, table: Any, group: int, column: str) -> list[Any]:
        try:
            keys = table.read_row_group(group, columns=[column])[column]
            try:
                return keys.to_pylist()
            except UnicodeDecodeError:
                found = keys.cast("binary").to_pylist()
                return [key if key is None else key.decode("utf-8", "backslashreplace") for key in found]
        except (OSError, ValueError) as error:  # Arrow's errors are of these two
            raise UserError(
                f"{self.root / name}: the column {column} cannot be read ({one_line(error, 120)})"
            ) from None

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The rows' bytes and captions. A row group is streamed, a few rows at a time; a call for later rows of the same
        group continues where the one before stopped."""
        for item in items:
            name, group, index = item.where
            if self._reader is None or not self._reader.is_before(name, group, index):
                if self._reader is not None:
                    self._reader.close()
                self._reader = self._start(name, group)
            yield self._reader.row(index)

    def _start(self, name: str, group: int) -> _Rows:
        table = open_table(self.root / name)
        return _Rows(name, group, table, self._columns(name, table), self.options.captions, self.BATCH)


class _Rows:
    """The rows of one row group, read in order."""

    def __init__(self, name: str, group: int, table: Any, columns: _Columns, how: str, batch_size: int) -> None:
        self._place = (name, group)
        self._table = table
        self._columns = columns
        self._reader = CaptionReader(captions=how)  # of what is in the cells
        read = [columns.image, *columns.captions]
        self._batches = table.iter_batches(batch_size, row_groups=[group], columns=read)
        self._batch: Any = None
        self._start = 0  # number of the batch's first row in its group
        self._damage: BadImage | None = None

    def is_before(self, name: str, group: int, index: int) -> bool:
        """Whether row `index` of that group can still be read: it does not lie before the rows in memory."""
        return (name, group) == self._place and index >= self._start

    def row(self, index: int) -> Loaded | BadImage:
        """The contents of a row of the group; the same error for all rows after a damage."""
        while self._damage is None and (self._batch is None or index >= self._start + self._batch.num_rows):
            try:
                done = self._batch.num_rows if self._batch is not None else 0
                self._batch = next(self._batches)
                self._start += done
            except (StopIteration, OSError, ValueError) as error:  # Arrow's errors are of the last two
                self._damage = BadImage("damaged", one_line(error))
        if self._damage is not None:
            return self._damage
        row, columns = index - self._start, self._columns
        image = self._batch.column(columns.image)[row]
        if hasattr(image, "keys") and image.is_valid:  # a struct, whose path may not be UTF-8
            image = image["bytes"]
        return _loaded(image.as_py(), captions.gathered(self._caption(column, row) for column in columns.captions))

    def _caption(self, column: str, row: int) -> Caption:
        try:
            return self._reader.of_value(self._batch.column(column)[row].as_py())
        except ValueError as error:  # text that is not UTF-8
            return Caption(problem=one_line(error))

    def close(self) -> None:
        """Close the file."""
        self._table.close()


def open_table(path: Path) -> Any:
    """A pyarrow.parquet.ParquetFile. UserError if it is none."""
    from pyarrow import parquet  # 0.2 s and 60 MB that the other sources do not need

    try:
        return parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (ValueError, OSError) as error:  # Arrow's errors are of these two
        raise UserError(f"{path}: not a parquet file ({one_line(error, 120)})") from None


def has_images(path: Path, column: str | None = None) -> bool:
    """Whether a parquet file has a column of images; True too for a file that cannot be opened."""
    with contextlib.suppress(UserError), open_table(path) as table:
        return _image_column(table, column) is not None
    return True


def number_of_rows(path: Path) -> int:
    """The rows of a parquet file; 0 for one that cannot be opened."""
    with contextlib.suppress(UserError), open_table(path) as table:
        return table.metadata.num_rows
    return 0


def _image_column(table: Any, wanted: str | None = None) -> str | None:
    """The name of a table's column of images, or None. wanted: the user's, if it holds bytes."""
    of_bytes = [column.name for column in table.schema_arrow if _holds_bytes(column.type)]
    if wanted is not None:
        return wanted if wanted in of_bytes else None
    lowered = {name.lower(): name for name in reversed(of_bytes)}
    found = next((lowered[name] for name in IMAGE_COLUMNS if name in lowered), None)
    if found is not None or len(of_bytes) != 1:
        return found
    (only,) = of_bytes
    try:
        rows: list[dict[str, Any]] = next((batch.to_pylist() for batch in table.iter_batches(8, columns=[only])), [])
    except (OSError, ValueError):  # damaged, which is said of each row
        return only
    values = [_bytes_of(row[only]) for row in rows]
    return only if any(isinstance(value, bytes) and starts_like_image(value[:32]) for value in values) else None


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):  # of the datasets library: bytes and path
        return kind.get_field_index("bytes") >= 0
    views = getattr(types, "is_binary_view", lambda _: False)  # as Polars writes them
    return views(kind) or types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _bytes_of(value: object) -> object:
    return value.get("bytes") if isinstance(value, dict) else value


def _loaded(value: object, caption: Caption) -> Loaded | BadImage:
    image = _bytes_of(value)
    if image is None:
        return BadImage("missing_image")
    if not isinstance(image, bytes):
        return BadImage("not_an_image", f"a {type(image).__name__}, not bytes")
    return Loaded(image, caption)
