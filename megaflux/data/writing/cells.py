"""Which cells of a grid of contents and styles are kept from training: a draw by hash, of the names alone.

A cell is (name, style): the thing that is drawn, and the hand that draws it. Two kinds are held out: whole contents, in every
style, to ask for things never seen; and single cells, whose content and whose style are both seen elsewhere, to ask for a
combination never seen. Reads no picture, so that whatever else is trained can leave out the same cells.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from megaflux.data.writing.split import draw, is_held_out

Cell = tuple[str, str]
"""(name, style)."""


def held_out_contents(names: Iterable[str], share: float) -> set[str]:
    """The names that are held out in all styles, each by a draw of its own. share: 0 to below 1."""
    return {name for name in names if is_held_out(f"content {name}", share)}


def held_out_cells(names: Iterable[str], styles: Iterable[str], share: float, contents_share: float) -> set[Cell]:
    """The held-out cells of the grid in which every style has every name: `held_out_of` all its cells."""
    styles = list(styles)
    return held_out_of([(name, style) for name in names for style in styles], share, contents_share)


def held_out_of(cells: Collection[Cell], share: float, contents_share: float) -> set[Cell]:
    """The held-out cells of these: all of a held-out content, and of the other names' cells a share, each by a draw of its own.

    A name that is not held out as a whole keeps a cell to train on, and so does a style that has such a name: where the
    draw would take the last, the cell with the largest draw stays. The result depends on neither order nor repetition.
    """
    whole = held_out_contents({name for name, _ in cells}, contents_share)
    single = {cell for cell in cells if cell[0] not in whole}
    held = {cell for cell in single if is_held_out(_drawn_by(cell), share)}
    for axis in (0, 1):  # a cell that stays for its name cannot take the last of a style
        lines: dict[str, list[Cell]] = defaultdict(list)
        for cell in single:
            lines[cell[axis]].append(cell)
        for line in lines.values():
            if held.issuperset(line):
                held.remove(max(line, key=lambda cell: (draw(_drawn_by(cell)), cell)))
    return held | {cell for cell in cells if cell[0] in whole}


def _drawn_by(cell: Cell) -> str:
    name, style = cell
    return f"cell {style}/{name}"
