"""Parquet tables of images, captions and references."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError, one_line
from megaflux.data.images import BadImage
from megaflux.data.writing import captions, pairing
from megaflux.data.writing.captions import Caption, CaptionReader
from megaflux.data.writing.items import Item, LeftAside, Loaded, Reference, printable
from megaflux.data.writing.options import NONE, Options
from megaflux.data.writing.recognise import starts_like_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes")  # the first one found wins
_BUFFER = 1 << 20  # bytes read at a time; Arrow's default is a row group's whole column


@dataclass(frozen=True)
class _Columns:
    """Names of a table's columns: of the images, of the captions and of the references (none, one, or numbered ones) and of the
    keys, or None. unused: columns of pictures named as in pairs that are neither."""

    image: str
    captions: tuple[str, ...]
    references: tuple[str, ...]
    key: str | None
    unused: tuple[str, ...] = ()

    @property
    def read(self) -> list[str]:
        """Those of which every row is read."""
        return [self.image, *self.captions, *self.references]

    @property
    def told(self) -> str:
        """What is read from where."""
        told = f"images from the column {self.image}, captions from {', '.join(self.captions) or 'none'}"
        if self.references:
            told += f", references from {', '.join(self.references)}"
        return told + f" (not read: {', '.join(self.unused)})" * bool(self.unused)


class ParquetFiles:
    """Parquet tables with a column of images (bytes, or a struct with `bytes`), and perhaps captions, references and `key`.

    The images' column is Options.image_column, else one of pairing.TARGETS beside references, else the first of IMAGE_COLUMNS
    that holds bytes, else one of TARGETS, else the only one that does; the captions' are Options.caption_column, else the first
    of captions.FIELDS, with its numbered ones. References are in the first of pairing.REFERENCES, with its numbered ones, else
    of pairing.SOURCES where the images' column is one of TARGETS or named by the user: bytes, a struct with `bytes` or `image`
    and perhaps `strength`, or a list of these. key: file path, ":", and the column `key` or the row number.
    """

    kind = "parquet files"
    attribution = None
    settings: dict[str, Any] = {}
    BATCH = 32  # rows in memory at a time
    WITH_REFERENCES = 8  # the same where each has several pictures

    def __init__(self, root: Path, names: Sequence[str], options: Options) -> None:
        self.root = root
        self.names = names
        self.options = options
        self.aside = LeftAside()
        self.has_references = False
        self._reader: _Rows | None = None

    def list_items(self) -> list[Item]:
        """One item per row. Raises UserError for a table that cannot be opened or has no images."""
        items: list[Item] = []
        self.aside, self.has_references = LeftAside(), False
        found: dict[str, int] = {}
        for name in self.names:
            with open_table(self.root / name) as table:
                columns = self._columns(name, table)
                told = columns.told
                self.has_references |= bool(columns.references)
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
        image, references, unused = _picture_columns(table, self.options)
        if image is None:
            wanted = self.options.image_column
            what = f"no column {wanted} of bytes" if wanted else "no column of images"
            raise UserError(
                f"{self.root / name}: {what}, only {', '.join(map(str, names))[:200]}; name it with --image-column"
            )
        reader = replace(self.options.caption_reader, edits=bool(references))
        told = tuple(reader.fields_of([name for name in names if name not in (image, *references)]))
        if not told and self.options.caption_column:
            raise UserError(
                f"{self.root / name}: no column {self.options.caption_column}, only {', '.join(map(str, names))[:200]}"
            )
        return _Columns(image, told, references, "key" if "key" in names else None, unused)

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
        columns = self._columns(name, table)
        size = self.WITH_REFERENCES if columns.references else self.BATCH
        return _Rows(name, group, table, columns, self.options.captions, size)


class _Rows:
    """The rows of one row group, read in order."""

    def __init__(self, name: str, group: int, table: Any, columns: _Columns, how: str, batch_size: int) -> None:
        self._place = (name, group)
        self._table = table
        self._columns = columns
        self._reader = CaptionReader(captions=how, edits=bool(columns.references))  # of what is in the cells
        self._batches = table.iter_batches(batch_size, row_groups=[group], columns=columns.read)
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
        loaded = _loaded(image.as_py(), captions.gathered(self._caption(column, row) for column in columns.captions))
        if isinstance(loaded, BadImage) or not columns.references:
            return loaded
        cells = (self._batch.column(column)[row] for column in columns.references)
        return replace(loaded, references=tuple(itertools.chain.from_iterable(map(_references_of, cells))))

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


def has_images(path: Path, options: Options) -> bool:
    """Whether a parquet file has a column of images; True too for a file that cannot be opened."""
    with contextlib.suppress(UserError), open_table(path) as table:
        return _picture_columns(table, options)[0] is not None
    return True


def number_of_rows(path: Path) -> int:
    """The rows of a parquet file; 0 for one that cannot be opened."""
    with contextlib.suppress(UserError), open_table(path) as table:
        return table.metadata.num_rows
    return 0


def _picture_columns(table: Any, options: Options) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """The names of a table's columns of images, or None, of references, and of pictures named as in pairs that are not read.
    The last two are empty where no references are read."""
    columns = list(table.schema_arrow)
    of_bytes = [column.name for column in columns if _holds_bytes(column.type)]
    wanted = options.image_column
    if options.references == NONE:
        return (wanted if wanted in of_bytes else None) if wanted else _image_column(table, of_bytes), (), ()
    target = wanted or pairing.target_name(of_bytes)
    rest = [column.name for column in columns if column.name != target and _holds_references(column.type)]
    references = pairing.reference_names(rest, targeted=target is not None)
    if wanted:
        image = wanted if wanted in of_bytes else None
    elif references and target:
        image = target
    else:
        may_be = [name for name in of_bytes if not pairing.is_reference_name(name)]
        if pairing.target_name([column.name for column in columns]) and not target:  # elsewhere, say as a file's name
            may_be = [name for name in may_be if not pairing.reference_names([name], targeted=True)]
        image = _image_column(table, may_be) or target
    unused = (name for name in [*rest, target] if name and name not in (image, *references))
    return image, tuple(references), tuple(name for name in unused if pairing.is_of_a_pair(name))


def _image_column(table: Any, of_bytes: Sequence[str]) -> str | None:
    """Which of these columns of bytes holds a table's images, or None."""
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


def _holds_references(kind: Any) -> bool:
    """Whether cells of this Arrow type hold pictures: bytes, structs with `bytes` or `image`, lists of these."""
    from pyarrow import types

    if types.is_struct(kind):
        inner = kind.get_field_index("image")
        return _holds_bytes(kind) or (inner >= 0 and _holds_bytes(kind.field(inner).type))
    return _holds_references(kind.value_type) if _is_list(kind) else _holds_bytes(kind)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    names = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(types, name, lambda _: False)(kind) for name in names)


def _references_of(cell: Any, strength: object = None) -> Iterator[Reference]:
    """The references in a cell of a type as _holds_references has it; empty cells and entries are none."""
    if not cell.is_valid:
        return
    if _is_list(cell.type):
        for entry in cell.values:
            yield from _references_of(entry)
    elif hasattr(cell, "keys"):
        fields = dict(zip(cell.type.names, cell.values(), strict=True))
        if "strength" in fields:
            strength = fields["strength"].as_py()
        if "bytes" in fields:
            name = _text(fields["path"]) if "path" in fields else ""
            if fields["bytes"].is_valid or name:
                yield _reference(fields["bytes"].as_py(), name, strength)
        else:
            yield from _references_of(fields["image"], strength)
    else:
        yield _reference(cell.as_py(), "", strength)


def _reference(data: bytes | None, name: str, strength: object) -> Reference:
    factor = pairing.strength_of(strength)
    if isinstance(factor, BadImage):
        return Reference(factor, name)
    return Reference(BadImage("missing_image", "a path without bytes") if data is None else data, name, factor)


def _text(cell: Any) -> str:
    try:
        return str(cell.as_py() or "")
    except ValueError:  # a path that is not UTF-8
        return ""


def _bytes_of(value: object) -> object:
    return value.get("bytes") if isinstance(value, dict) else value


def _loaded(value: object, caption: Caption) -> Loaded | BadImage:
    image = _bytes_of(value)
    if image is None:
        return BadImage("missing_image")
    if not isinstance(image, bytes):
        return BadImage("not_an_image", f"a {type(image).__name__}, not bytes")
    return Loaded(image, caption)
