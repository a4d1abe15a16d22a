"""Sheets: pictures side by side that a person can read at a glance, uint8 (3, H, W).

On a grid the rows are contents and the columns styles; at the top of a column is the one reference of its style that all pictures of the
column were made from, and in each place the true cell stands beside the made one. A frame marks what training never saw: orange a
held-out cell, red a cell of a held-out content. Elsewhere a row is a sample: its references, its true picture, what was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaflux.evaluate.conditions import Conditions, Given
from megaflux.evaluate.samples import Cell, Grid, HeldOut, Sample, cell_of, hashed
from megaflux.evaluate.work import Asked

SHEET = "sheet"
ROWS, WHOLE_ROWS = 8, 4  # contents in a grid's sheet, and how many of them are held out whole, where there are any
GREY, ORANGE, RED = (200, 200, 200), (255, 140, 0), (220, 20, 20)
BORDER = 3


@dataclass(frozen=True)
class GridSheet:
    """What the sheet of a grid shows."""

    contents: list[str]
    references: dict[str, Sample]
    """Of each style the sample whose references its column is made from."""
    pictures: dict[Cell, Asked]


def grid_sheet(held_out: HeldOut, grid: Grid, conditions: Conditions, seed: int) -> GridSheet:
    """What to show: contents that are held out whole, and those with the most held-out cells, the first by hash.

    A cell's words are its content's caption in the held-out samples."""
    by_cell = {cell_of(sample.key): sample for sample in held_out.samples}
    captions = {cell.content: sample.caption for cell, sample in by_cell.items()}
    references = {style: next((s for c, s in by_cell.items() if c.style == style), None) for style in grid.styles}
    shown = {style: sample for style, sample in references.items() if sample is not None}
    known = sorted(captions, key=lambda content: (-sum(cell.content == content for cell in by_cell), hashed(content)))
    whole = [content for content in known if content in grid.held_out_contents][:WHOLE_ROWS]
    contents = [content for content in known if content not in grid.held_out_contents][: ROWS - len(whole)] + whole
    pictures = {}
    for content in contents:
        for style, sample in shown.items():
            cell = Cell(style, content)
            own = conditions.matched(sample)
            like = Sample(cell.key, captions[content], sample.bucket, sample.target, sample.references, sample.own)
            given = Given(own.references, captions[content] if conditions.kind != "image" else "")
            pictures[cell] = Asked(SHEET, like, seed, given)
    return GridSheet(contents, shown, pictures)


def draw_grid(sheet: GridSheet, grid: Grid, made: dict[Cell, Tensor]) -> Tensor:
    """The sheet: pairs (true, made) in columns of styles, under the columns' references."""
    first = next(iter(made.values()))
    size = (first.shape[1], first.shape[2])
    blank = torch.full((3, *size), 255, dtype=torch.uint8)
    rows = [
        [
            part
            for s in sheet.references.values()
            for part in (framed(_fit(s.references[0].pixel_values, size), GREY), framed(blank, (255, 255, 255)))
        ]
    ]
    for content in sheet.contents:
        row = []
        for style in sheet.references:
            cell = Cell(style, content)
            true = grid.picture(cell)
            colour = RED if content in grid.held_out_contents else ORANGE if cell in grid.held_out else GREY
            row += [framed(blank if true is None else _fit(true, size), GREY), framed(made[cell], colour)]
        rows.append(row)
    return stacked(rows)


def draw_rows(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows of pictures of any shapes, each fitted into the first one's size on white."""
    size = (rows[0][0].shape[1], rows[0][0].shape[2])
    return stacked([[framed(_fit(picture, size), GREY) for picture in row] for row in rows])


def framed(picture: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """The picture with a border of a colour."""
    _, height, width = picture.shape
    canvas = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, height + 2 * BORDER, width + 2 * BORDER)
    canvas[:, BORDER:-BORDER, BORDER:-BORDER] = picture
    return canvas


def stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Pictures of one size in rows; short rows are filled with white."""
    most = max(len(row) for row in rows)
    white = torch.full_like(rows[0][0], 255)
    return torch.cat([torch.cat([*row, *[white] * (most - len(row))], dim=2) for row in rows], dim=1)


def _fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture scaled into (height, width) on white, its shape kept."""
    if picture.shape[1:] == size:
        return picture
    scale = min(size[0] / picture.shape[1], size[1] / picture.shape[2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[1:])
    small = F.interpolate(picture[None].float(), (height, width), mode="area")[0].round().clamp(0, 255)
    canvas = torch.full((3, *size), 255, dtype=torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas[:, top : top + height, left : left + width] = small.to(torch.uint8)
    return canvas
