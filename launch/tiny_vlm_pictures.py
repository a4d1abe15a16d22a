"""The pictures of launch/train_tiny_vlm.py, and which of them it must not see.

Two collections: the demo's emoji (OpenMoji by code points) and, if given, a grid of icon sets that share their names. A
picture that is held out in one of them is kept from training in the other's form too: OpenMoji is in both.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.common.paths import ICONIFY
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.images import BadImage
from megaflux.data.writing.cells import Cell, held_out_cells, held_out_contents
from megaflux.data.writing.icon_sets import files_of
from megaflux.data.writing.iconify import Iconify
from megaflux.data.writing.items import Item, Source
from megaflux.data.writing.openmoji import SKIN_TONES, OpenMoji
from megaflux.data.writing.options import ICONIFY_DEFAULTS, OPENMOJI_DEFAULTS, SHARED, Options
from megaflux.data.writing.split import is_held_out

OPENMOJI = "openmoji"  # the set that is in both collections
CELLS_SHARE, CONTENTS_SHARE = 0.1, 0.02  # of the grid, held out
SIDE = 128  # px


def base_code(code: str) -> str:
    """Code points without emoji presentation and skin tones: "1f44b-1f3fb" -> "1F44B"."""
    return "-".join(point for point in code.upper().split("-") if point not in ("FE0F", *SKIN_TONES))


@dataclass(frozen=True)
class Grid:
    """The names that all sets have. codes: of a name, the code points of OpenMoji's drawing, as chars.json writes them."""

    names: tuple[str, ...]
    styles: tuple[str, ...]
    codes: dict[str, tuple[str, ...]]

    @property
    def held_out(self) -> set[Cell]:
        """Kept from training by the grid's own draw."""
        return held_out_cells(self.names, self.styles, CELLS_SHARE, CONTENTS_SHARE)


def open_grid(folder: Path) -> tuple[Grid, Iconify]:
    """The sets of a folder, SET/icons.json, with OpenMoji's code points from openmoji/chars.json. UserError where one lacks."""
    options = Options(**ICONIFY_DEFAULTS, contents=SHARED, hold_out_cells=CELLS_SHARE, hold_out_contents=CONTENTS_SHARE)
    source = Iconify(files_of(f"{ICONIFY}:{folder}", [str(folder)]), make_buckets(("1:1",), SIDE), options)
    cells = [item.where for item in source.list_items()]
    file = folder / OPENMOJI / "chars.json"
    try:
        chars = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--grid: {file} cannot be read ({error}); give a folder with {OPENMOJI}'s package") from None
    codes: dict[str, list[str]] = {}
    for code, name in chars.items():
        codes.setdefault(name, []).append(code)
    names = tuple(sorted({name for _, name in cells}))
    styles = tuple(sorted({style for style, _ in cells}))
    return Grid(names, styles, {name: tuple(sorted(codes.get(name, ()))) for name in names}), source


@dataclass(frozen=True)
class Split:
    """What may be seen. demo: code points; cells: (name, style)."""

    demo: set[str]
    demo_held: set[str]
    cells: set[Cell]
    cells_held: set[Cell]
    """Held out by the grid's own draw; cells that are in neither set are the demo's held-out drawings."""


def split_pictures(demo_codes: Iterable[str], grid: Grid | None) -> Split:
    """Training and held-out pictures of both collections."""
    codes = set(demo_codes)
    demo_held = {code for code in codes if is_held_out(code, OPENMOJI_DEFAULTS["held_out"])}
    if grid is None:
        return Split(codes - demo_held, demo_held, set(), set())
    held = grid.held_out
    unseen_drawings = {base_code(code) for name, style in held if style == OPENMOJI for code in grid.codes[name]}
    unseen_codes = {base_code(code) for code in demo_held}
    demo = {code for code in codes - demo_held if base_code(code) not in unseen_drawings}
    cells = {
        (name, style)
        for name in grid.names
        for style in grid.styles
        if (name, style) not in held
        and not (style == OPENMOJI and any(base_code(code) in unseen_codes for code in grid.codes[name]))
    }
    return Split(demo, demo_held, cells, held)


@dataclass
class Pictures:
    """Pictures of one size with their captions. images: (N, H, W, 3) uint8."""

    images: np.ndarray
    captions: list[str]
    keys: list[str]


def hand_of(key: str) -> str:
    """The icon set that a picture is of, by its key."""
    kind, what = key.split(" ", 1)
    return OPENMOJI if kind == "demo" else what.partition("/")[0]


@dataclass
class Collection:
    """train: by size. held_out: squares, by what they are: `demo`; `cells` of names that are seen in other styles;
    `contents`, cells of names that are seen in none."""

    train: dict[str, Pictures]
    held_out: dict[str, Pictures]


def load_pictures(folder: Path | None) -> tuple[Collection, Grid | None]:
    """All pictures, drawn. folder: of the grid's sets."""
    demo = OpenMoji(make_buckets(ASPECT_RATIOS, SIDE), OPENMOJI_DEFAULTS["canvases"])
    grid, icons = (None, None) if folder is None else open_grid(folder)
    split = split_pictures({item.split_key for item in demo.list_items()}, grid)
    whole = held_out_contents(grid.names, CONTENTS_SHARE) if grid else set()
    rows: dict[tuple[str, str], list[tuple[np.ndarray, str, str]]] = {}

    def add(source: Source, wanted: Sequence[tuple[Item, str, str, str]]) -> None:
        for (item, kind, bucket, key), loaded in zip(wanted, source.read([row[0] for row in wanted]), strict=True):
            if isinstance(loaded, BadImage):
                raise UserError(f"{item.key}: {loaded}")
            assert isinstance(loaded.image, Image.Image)  # both sources draw
            rows.setdefault((kind, bucket), []).append((np.asarray(loaded.image), loaded.caption.texts[0], key))

    wanted = []
    for item in demo.list_items():
        code, bucket = item.where
        if code in split.demo or (code in split.demo_held and bucket == "1:1"):
            wanted.append((item, "train" if code in split.demo else "demo", bucket, f"demo {code}"))
    add(demo, wanted)
    if icons is not None:
        wanted = []
        for item in icons.list_items():
            style, name = item.where
            if (name, style) in split.cells | split.cells_held:
                kind = "train" if (name, style) in split.cells else "contents" if name in whole else "cells"
                wanted.append((item, kind, "1:1", f"grid {item.key}"))
        add(icons, wanted)

    def stacked(kind: str, bucket: str = "1:1") -> Pictures:
        images, captions, keys = zip(*rows[kind, bucket])
        return Pictures(np.stack(images), list(captions), list(keys))

    held = {kind: stacked(kind) for kind in ("demo", "cells", "contents") if (kind, "1:1") in rows}
    return Collection({bucket: stacked(kind, bucket) for kind, bucket in rows if kind == "train"}, held), grid


# --- the list that is shipped ----------------------------------------------------------------------------------------


def write_seen(file: Path, keys: Sequence[str], grid: Grid | None) -> None:
    """What was trained on as gzipped lines: `demo CODE`, `grid STYLE/NAME`; `name NAME CODE...` for all names of the grid."""
    names = [] if grid is None else [" ".join(("name", name, *grid.codes[name])) for name in grid.names]
    lines = sorted(set(keys)) + names
    file.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def read_seen(file: Path) -> tuple[set[str], set[Cell], Grid]:
    """(code points, cells (name, style), grid) of what `write_seen` wrote."""
    demo: set[str] = set()
    cells: set[Cell] = set()
    codes: dict[str, tuple[str, ...]] = {}
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        kind, what, *more = line.split(" ")
        if kind == "demo":
            demo.add(what)
        elif kind == "grid":
            style, _, name = what.partition("/")
            cells.add((name, style))
        else:
            codes[what] = tuple(more)
    return demo, cells, Grid(tuple(codes), tuple(sorted({style for _, style in cells})), codes)
