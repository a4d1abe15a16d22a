"""The held-out samples of a dataset that an evaluation looks at, and the grid of contents and styles where it is one.

A grid is a dataset of one or more icon sets: the key of a sample is STYLE/CONTENT, so that every cell of the table contents x styles
has a true picture. Cells are held out of training singly, and some contents with all their cells.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket
from megaflux.data.captions import split
from megaflux.data.reference_size import COLUMN
from megaflux.data.references import ReferencePicture, decoded
from megaflux.data.storage.dataset import DatasetInfo, read_dataset_info
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_image


@dataclass(frozen=True)
class Sample:
    """A held-out sample."""

    key: str
    caption: str
    """The first one, "" where it has none."""
    bucket: Bucket
    target: Tensor
    """uint8 (3, H, W), of the bucket's size."""
    references: tuple[ReferencePicture, ...]
    """One or more: the target itself where the data have none."""
    own: bool
    """Whether the target is its own reference."""


@dataclass(frozen=True)
class Cell:
    """A place of a grid."""

    style: str
    content: str

    @property
    def key(self) -> str:
        return f"{self.style}/{self.content}"


@dataclass
class Grid:
    """All pictures of a dataset that is a grid. Cells in the order of their keys."""

    styles: list[str]
    contents: list[str]
    held_out_contents: frozenset[str]
    """Contents without a training cell."""
    train: dict[Cell, bytes] = field(default_factory=dict)
    """Image files of the cells to train on."""
    held_out: dict[Cell, bytes] = field(default_factory=dict)

    def picture(self, cell: Cell) -> Tensor | None:
        """uint8 (3, H, W) of a cell; None where the grid lacks it."""
        data = self.train.get(cell, self.held_out.get(cell))
        return None if data is None else from_image(data)


def cell_of(key: str) -> Cell:
    """The cell of a sample's key STYLE/CONTENT."""
    style, _, content = key.rpartition("/")
    return Cell(style, content)


@dataclass
class HeldOut:
    """What is evaluated."""

    info: DatasetInfo
    fingerprint: str
    """SHA-256 of dataset.json and index.json, which holds the hashes of all shards."""
    samples: list[Sample]
    """In the order of a hash of their keys."""
    first: int
    """How many of them, from the first on, are evaluated in everything; the others are further cells of the grid."""
    grid: Grid | None = None
    """None: the data are no grid."""


def load(path: str, samples: int, cells: int | None, with_grid: bool = True) -> HeldOut:
    """The held-out samples of a prepared dataset.

    samples: the most that are evaluated in everything, of all shapes, those first by a hash of their keys. cells: the most held-out
    cells of a grid, and as many cells of held-out contents; None: all. with_grid False: a grid is taken as any other data.
    UserError where there are no held-out samples or a file is damaged.
    """
    info = read_dataset_info(path)
    grid = _grid(path, info) if with_grid else None
    rows = {row["key"]: (bucket, row) for bucket, row in first_rows(path, info, samples)}
    if grid is not None:
        cells = len(grid.held_out) if cells is None else cells
        wanted: set[str] = set()
        for whole in (False, True):
            of_kind = (c.key for c in grid.held_out if (c.content in grid.held_out_contents) is whole)
            wanted.update(heapq.nsmallest(cells, of_kind, key=hashed))
        rows |= {row["key"]: (bucket, row) for bucket, row in _rows(path, info, "held_out") if row["key"] in wanted}
    if not rows:
        raise UserError(f"{path}: no held-out pictures; prepare the data again with a larger --held-out")
    ordered = sorted(rows.values(), key=lambda pair: hashed(pair[1]["key"]))
    found = [sample(bucket, row) for bucket, row in ordered]
    return HeldOut(info, fingerprint(path), found, min(samples, len(found)), grid)


def load_judge_grid(path: str, grid: Grid) -> Grid:
    """A prepared grid to train the judge of `grid` on. UserError where it is none, lacks styles or contents of it, or trains on what is
    held out in it."""
    found = _grid(path, read_dataset_info(path))
    if found is None:
        raise UserError(f"--judge-data {path}: no grid; give a dataset of two or more icon sets")
    if set(found.styles) != set(grid.styles):
        raise UserError(
            f"--judge-data {path}: of {', '.join(found.styles)}, not {', '.join(grid.styles)}; prepare it of the same icon sets"
        )
    if lacking := next((name for name in grid.contents if name not in set(found.contents)), None):
        raise UserError(f"--judge-data {path}: lacks content {lacking}; prepare it with all contents of the data")
    if seen := next((cell for cell in grid.held_out if cell in found.train), None):
        raise UserError(
            f"--judge-data {path}: trains on {seen.key}, which the data hold out; prepare both with the same --hold-out-cells and "
            "--hold-out-contents"
        )
    return found


def first_rows(path: str, info: DatasetInfo, count: int) -> list[tuple[Bucket, dict[str, Any]]]:
    """The `count` stored held-out samples, of all shapes, whose keys have the smallest hashes, with their buckets."""
    return heapq.nsmallest(count, _rows(path, info, "held_out"), key=lambda pair: hashed(pair[1]["key"]))


def hashed(key: str) -> str:
    """What samples are ordered by, as in validation during training."""
    return hashlib.sha256(key.encode()).hexdigest()


def sample(bucket: Bucket, row: dict[str, Any]) -> Sample:
    """A stored sample, decoded. UserError for pictures that cannot be."""
    key = row["key"]
    try:
        target = from_image(row["image"])
        references = tuple(decoded(row[COLUMN])) if row.get(COLUMN) else ()
    except Exception as error:  # Pillow raises errors of any kind
        raise UserError(f"sample {key!r}: a picture cannot be decoded ({str(error)[:200]}); prepare it again") from None
    own = not references
    references = references or (ReferencePicture(target, 1.0, key),)
    return Sample(key, (split(row["caption"]) or ("",))[0], bucket, target, references, own)


def fingerprint(path: str) -> str:
    """SHA-256 of what describes a dataset and all of its shards. UserError where a file cannot be read."""
    digest = hashlib.sha256()
    for name in ("dataset.json", "index.json"):
        try:
            digest.update((Path(path) / name).read_bytes())
        except OSError as error:
            raise UserError(f"{path}/{name}: cannot be read ({error.strerror}); prepare the data again") from None
    return digest.hexdigest()


def train_rows(path: str, info: DatasetInfo, most: int) -> list[dict[str, Any]]:
    """About `most` stored training samples: the first of each bucket, by its share of all. Reads no more than it returns."""
    total = info.samples("train")
    if not total:
        raise UserError(f"{path}: holds no training pictures, which a judge learns from; prepare the data with some")
    shares = ((bucket, -(-most * count // total)) for bucket, count in info.filled("train"))
    return [row for bucket, limit in shares for row in read_split(path, "train", bucket, limit)]


def _rows(path: str, info: DatasetInfo, kind: str) -> Iterator[tuple[Bucket, dict[str, Any]]]:
    for bucket, _ in info.filled(kind):
        for row in read_split(path, kind, bucket):
            yield bucket, row


def _grid(path: str, info: DatasetInfo) -> Grid | None:
    source = info.settings.get("source")
    if not isinstance(source, dict) or source.get("kind") != "iconify" or len(source.get("styles") or ()) < 2:
        return None
    found = {
        kind: {cell_of(row["key"]): row["image"] for _, row in _rows(path, info, kind)}
        for kind in ("train", "held_out")
    }
    if not found["train"] or not found["held_out"]:
        return None  # nothing to judge by, or nothing to judge
    train, held_out = ({c: cells[c] for c in sorted(cells, key=lambda c: c.key)} for cells in found.values())
    contents = sorted({cell.content for cell in (*train, *held_out)})
    unseen = frozenset(contents) - {cell.content for cell in train}
    styles = [style for style in source["styles"] if any(cell.style == style for cell in (*train, *held_out))]
    return Grid(styles, contents, unseen, train, held_out)
