"""The sources that megaflux.data.prepare reads: a folder of images, WebDataset tars, parquet files, openmoji."""

from __future__ import annotations

import os
import tarfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.images import BadImage
from megaflux.data.writing.items import (
    CAPTION_FIELDS,
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    Item,
    Loaded,
    Source,
    check_caption,
    parse_caption,
)
from megaflux.data.writing.openmoji import OpenMoji


def open_source(source: str, buckets: Sequence[Bucket], canvases: float = 2) -> Source:
    """The source of that name ("openmoji") or at that path, recognised by what is there.

    A folder, searched with its subfolders, may hold images, .tar files or .parquet files, of one kind only. A single .tar
    or .parquet file is a source too. buckets, canvases: of openmoji. Raises UserError if the path does not exist, or has
    nothing usable or more than one kind.
    """
    if source == OpenMoji.kind:
        return OpenMoji(buckets, canvases)
    root = Path(source)
    if not os.path.exists(root):  # Path's own raises where a name is too long
        raise UserError(f"source {source}: no such file or folder (and not the name openmoji)")
    files = _walk(root) if root.is_dir() else [root.name]
    if not root.is_dir():
        root = root.parent
    found: dict[type[TarFiles | ParquetFiles | ImageFolder], list[str]] = {
        TarFiles: [name for name in files if name.lower().endswith(".tar")],
        ParquetFiles: [name for name in files if name.lower().endswith(".parquet")],
        ImageFolder: [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)],
    }
    kinds = [kind for kind, names in found.items() if names]
    if not kinds:
        hint = "; unpack or recompress .tar.gz" if any(".tar." in name or ".tgz" in name for name in files) else ""
        raise UserError(f"source {source}: no images, .tar or .parquet files among its {len(files)} files{hint}")
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} {kind.kind}" for kind in kinds)
        raise UserError(f"source {source}: files of several kinds ({counts}); prepare each kind separately")
    return kinds[0](root, found[kinds[0]], files)


def _walk(root: Path) -> list[str]:
    """All files under a folder but hidden ones, as sorted relative paths with "/"."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        names += [prefix + name for name in files if not name.startswith(".")]
    return sorted(names)


def _printable(name: str) -> str:
    """A file name as a key: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class ImageFolder:
    """Image files, captions in a .txt or .json file of the same name. key: the relative path."""

    kind = "images"
    attribution = None

    def __init__(self, root: Path, names: Sequence[str], all_files: Sequence[str]) -> None:
        self.root = root
        self.names = names
        self._captions = {name for name in all_files if name.endswith(CAPTION_SUFFIXES)}

    def list_items(self) -> list[Item]:
        """One item per image file, in the order of the paths."""
        items = []
        for name in self.names:
            stem = name[: name.rindex(".")]
            captions = [stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in self._captions]
            problem, size = None, 0
            try:
                size = sum((self.root / path).stat().st_size for path in [name, *captions[:1]])
            except OSError:  # a dangling link, say
                problem = "unreadable"
            key = _printable(name)
            items.append(Item(key, key, (name, captions[0] if captions else None), size, problem))
        return items

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The files' bytes and captions."""
        for item in items:
            image_name, caption_name = item.where
            try:
                caption = ""
                if caption_name:
                    caption = parse_caption((self.root / caption_name).read_bytes(), Path(caption_name).suffix)
                yield Loaded((self.root / image_name).read_bytes(), caption)
            except BadImage as bad:
                yield bad
            except OSError as error:
                yield BadImage("unreadable", error.strerror or "")


class TarFiles:
    """WebDataset archives: members with the same base name are one sample. key: archive path, ":", base name.

    The listing records the position of each member's bytes, so that reading is a seek.
    """

    kind = "tar files"
    attribution = None

    def __init__(self, root: Path, names: Sequence[str], all_files: Sequence[str]) -> None:
        self.root = root
        self.names = names

    def list_items(self) -> list[Item]:
        """One item per base name that has an image or a caption; duplicates and missing images have a `problem`."""
        return [item for name in self.names for item in self._list_archive(name)]

    def _list_archive(self, name: str) -> Iterator[Item]:
        path = self.root / name
        length = path.stat().st_size
        samples: dict[str, dict[str, tuple[int, int]]] = {}  # base name -> suffix -> (offset, bytes)
        repeated: list[str] = []
        damaged = length == 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    folder, _, file = member.name.rpartition("/")
                    stem, dot, suffix = file.partition(".")  # WebDataset's rule: the first dot ends the name
                    suffix = (dot + suffix).lower()
                    if not member.isfile() or not suffix.endswith(IMAGE_SUFFIXES + CAPTION_SUFFIXES):
                        continue
                    damaged |= member.offset_data + member.size > length
                    parts = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    if suffix in parts:
                        repeated.append(member.name)
                    else:
                        parts[suffix] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError, ValueError):
            damaged = True
        prefix = _printable(name)
        for base, parts in samples.items():
            image = next((parts[suffix] for suffix in parts if suffix.endswith(IMAGE_SUFFIXES)), None)
            caption_suffix = next((s for wanted in CAPTION_SUFFIXES for s in parts if s.endswith(wanted)), None)
            caption = (*parts[caption_suffix], caption_suffix[-5:]) if caption_suffix else None
            problem = None if image else "missing_image"
            if image and sum(image) > length:
                problem = "damaged"
            key = f"{prefix}:{_printable(base)}"
            yield Item(key, key, (name, image, caption), sum(size for _, size in parts.values()), problem)
        for member_name in repeated:
            yield Item(f"{prefix}:{_printable(member_name)} (again)", prefix, (), 0, "duplicate_key")
        if damaged:  # members after the damage cannot be counted: one entry represents them
            yield Item(f"{prefix}:(rest of the archive)", prefix, (), length, "damaged")

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The members' bytes and captions."""
        opened: str | None = None
        file: BinaryIO | None = None
        try:
            for item in items:
                name, image, caption = item.where
                if file is None or name != opened:
                    if file:
                        file.close()
                    opened, file = name, open(self.root / name, "rb")  # noqa: SIM115  kept over items
                try:
                    text = ""
                    if caption:
                        offset, size, suffix = caption
                        suffix = ".json" if suffix == ".json" else ".txt"
                        text = parse_caption(_bytes_at(file, offset, size), suffix)
                    yield Loaded(_bytes_at(file, *image), text)
                except BadImage as bad:
                    yield bad
        finally:
            if file:
                file.close()


def _bytes_at(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


class ParquetFiles:
    """Parquet tables with a column `image` (bytes, or a struct with `bytes`), optionally `caption` or
    `text`, optionally `key`. key: that column, or file path, ":", row number."""

    kind = "parquet files"
    attribution = None
    BATCH = 32  # rows in memory at a time

    def __init__(self, root: Path, names: Sequence[str], all_files: Sequence[str]) -> None:
        self.root = root
        self.names = names

    def _open(self, name: str) -> Any:
        from pyarrow import parquet  # 0.2 s and 60 MB that the other sources do not need

        try:
            return parquet.ParquetFile(self.root / name)
        except (ValueError, OSError) as error:  # Arrow's errors are of these two
            raise UserError(f"{self.root / name}: not a parquet file ({str(error)[:120]})") from None

    def list_items(self) -> list[Item]:
        """One item per row. Raises UserError for a table that cannot be opened or has no images."""
        items = []
        for name in self.names:
            with self._open(name) as table:
                columns = table.schema_arrow.names
                if "image" not in columns:
                    raise UserError(f"{self.root / name}: no column `image`, only {', '.join(columns)}")
                row = 0
                for group in range(table.num_row_groups):
                    metadata = table.metadata.row_group(group)
                    size = metadata.total_byte_size
                    keys = None
                    if "key" in columns:
                        keys = table.read_row_group(group, columns=["key"])["key"].to_pylist()
                    for index in range(metadata.num_rows):
                        key = f"{_printable(name)}:{row}" if not keys or keys[index] is None else str(keys[index])
                        items.append(Item(key, key, (name, group, index), size))
                        row += 1
        return items

    def read(self, items: Sequence[Item]) -> Iterator[Loaded | BadImage]:
        """The rows' bytes and captions, streaming through each row group that holds one of the items."""
        position = 0
        while position < len(items):
            name, group, _ = items[position].where
            wanted = []
            while position < len(items) and items[position].where[:2] == (name, group):
                wanted.append(items[position].where[2])
                position += 1
            yield from self._read_rows(name, group, wanted)

    def _read_rows(self, name: str, group: int, wanted: Sequence[int]) -> Iterator[Loaded | BadImage]:
        with self._open(name) as table:
            text = next((field for field in CAPTION_FIELDS if field in table.schema_arrow.names), None)
            columns = ["image", text] if text else ["image"]
            remaining, start = deque(wanted), 0
            batches = table.iter_batches(self.BATCH, row_groups=[group], columns=columns)
            while remaining:
                try:
                    batch = next(batches)
                except (StopIteration, OSError, ValueError) as error:  # Arrow's errors are of these two
                    yield from [BadImage("damaged", str(error)[:200])] * len(remaining)
                    return
                while remaining and remaining[0] < start + batch.num_rows:
                    row = batch.slice(remaining.popleft() - start, 1).to_pylist()[0]
                    yield _row_to_loaded(row["image"], row[text] if text else "")
                start += batch.num_rows


def _row_to_loaded(image: object, caption: object) -> Loaded | BadImage:
    if isinstance(image, dict):
        image = image.get("bytes")
    if image is None:
        return BadImage("missing_image")
    if not isinstance(image, bytes):
        return BadImage("not_an_image", f"a {type(image).__name__}, not bytes")
    try:
        return Loaded(image, check_caption("" if caption is None else caption))
    except BadImage as bad:
        return bad
