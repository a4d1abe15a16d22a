"""A small grid of icons, a judge of it, and checkpoints whose pictures are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

SHAPES = {
    "dot": '<circle cx="8" cy="8" r="{r}" {p}/>',
    "box": '<rect x="3" y="3" width="10" height="{w}" {p}/>',
    "tent": '<path d="M8 2L14 14H2z" {p}/>',
    "kite": '<path d="M8 1L13 8L8 15L3 8z" {p}/>',
    "bar": '<rect x="1" y="6" width="14" height="4" {p}/>',
    "pole": '<rect x="6" y="1" width="4" height="14" {p}/>',
    "plus": '<path d="M6 2h4v4h4v4h-4v4h-4v-4H2V6h4z" {p}/>',
    "corner": '<path d="M2 2h4v8h8v4H2z" {p}/>',
    "flag": '<path d="M3 1h10l-3 4l3 4H5v6H3z" {p}/>',
    "moon": '<path d="M11 2A7 7 0 1 0 11 14A5 6 0 0 1 11 2z" {p}/>',
    "stairs": '<path d="M2 14V10h4V6h4V2h4v12z" {p}/>',
    "cup": '<path d="M3 3h2v9h6V3h2v11H3z" {p}/>',
}
STYLES = {
    "flat": 'fill="#d33"',
    "line": 'fill="none" stroke="#000" stroke-width="1"',
    "soft": 'fill="#9cf" stroke="#258" stroke-width=".6"',
}


STEPS = 40  # of the judge


def known(given, bucket) -> Tensor:
    """A grey picture of the bucket's size."""
    return torch.full((3, bucket.height, bucket.width), 127, dtype=torch.uint8)


class KnownMaker:
    """Makes what a function says of (condition, seed, bucket)."""

    def __init__(self, picture: Callable[..., Tensor], interrupt_at: int | None = None):
        self.picture, self.left = picture, interrupt_at

    def length(self, given) -> int:
        return 1 + len(given.words)

    def make(self, given: Sequence, seeds: Sequence[int], bucket) -> Tensor:
        if self.left is not None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        return torch.stack([self.picture(one, seed, bucket) for one, seed in zip(given, seeds, strict=True)])

    def round_trip(self, pictures: Tensor, change=None) -> Tensor:
        return pictures


@pytest.fixture(scope="session")
def grid_sets(tmp_path_factory) -> Path:
    """12 shapes in 3 styles as icon sets."""
    sets = tmp_path_factory.mktemp("sets")
    for style, paint in STYLES.items():
        (sets / style).mkdir()
        icons = {name: {"body": body.format(p=paint, r=6, w=10)} for name, body in SHAPES.items()}
        content = {"prefix": style, "icons": icons, "width": 16, "height": 16}
        (sets / style / "icons.json").write_text(json.dumps(content))
    return sets


def prepared_grid(sets: Path, out: Path, **changed) -> Path:
    """The prepared grid: a share of the cells and of the contents held out, pairs of one style."""
    pytest.importorskip("resvg_py")
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import ICONIFY_DEFAULTS, Options

    options = ICONIFY_DEFAULTS | {"longest_side": 64, "held_out": 0.0, "pairs": "same-style", "contents": "shared"}
    options |= {"hold_out_cells": 0.3, "hold_out_contents": 0.15, "pair_references": 2}
    prepare(f"iconify:{sets}", out, Options(**(options | changed)), workers=1, progress=False)
    return out


@pytest.fixture(scope="session")
def grid_data(grid_sets, tmp_path_factory) -> Path:
    """All of the grid."""
    return prepared_grid(grid_sets, tmp_path_factory.mktemp("grids") / "grid")


@pytest.fixture(scope="session")
def judge_file(grid_data, tmp_path_factory) -> Path:
    """A judge of the grid."""
    from megaflux.evaluate import judge_training
    from megaflux.evaluate.results import true_cells
    from megaflux.evaluate.samples import load

    held_out = load(str(grid_data), 64, None)
    lesson = judge_training.of_grid(held_out.grid)
    judge = judge_training.train(lesson, {"data": held_out.fingerprint, "steps": STEPS}, STEPS)
    judge.facts |= true_cells(judge, held_out.grid)
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    judge.save(file)
    return file
