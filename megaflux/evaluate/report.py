"""The files of a finished evaluation: report.json, report.html, sheets, TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflux.common.files import write_json
from megaflux.evaluate import work
from megaflux.evaluate.evaluation import Task
from megaflux.evaluate.html import leaves, page
from megaflux.evaluate.results import Results
from megaflux.evaluate.sheets import draw_grid, draw_rows
from megaflux.evaluate.statistics import Measured, difference, summary
from megaflux.generation.layout import versions
from megaflux.training.pictures import save_picture

FORMAT = 1
ROWS_SHOWN = 12


@dataclass
class Findings:
    """The figures of one checkpoint, as trees of Measured."""

    checkpoint: dict[str, Any]
    """Path, source, what it was conditioned by, steps, guidance."""
    sections: dict[str, Any]


def content(findings: Findings, facts: dict[str, Any], against: Findings | None, seed: int) -> dict[str, Any]:
    """report.json. facts: data, settings, judge."""
    report: dict[str, Any] = {"format": FORMAT, "versions": versions(), **facts, "checkpoint": findings.checkpoint}
    report |= {name: summarised(section, seed) for name, section in findings.sections.items()}
    if against is not None:
        other = {name: summarised(section, seed) for name, section in against.sections.items()}
        report["against"] = {"checkpoint": against.checkpoint, **other}
        report["differences"] = {
            name: compared(section, against.sections[name], seed)
            for name, section in findings.sections.items()
            if name in against.sections
        }
    return report


def summarised(section: Any, seed: int) -> Any:
    """The tree with each figure as {"value", "interval", "n"}."""
    if isinstance(section, Measured):
        return summary(section, seed)
    if isinstance(section, Mapping):
        return {name: summarised(value, seed) for name, value in section.items()}
    return section


def compared(section: Any, other: Any, seed: int) -> Any:
    """The tree of the differences other - section, of figures that both have."""
    if isinstance(section, Measured):
        return difference(section, other, seed) if isinstance(other, Measured) else None
    if not isinstance(section, Mapping) or not isinstance(other, Mapping):
        return None
    found = {name: compared(value, other[name], seed) for name, value in section.items() if name in other}
    return {name: value for name, value in found.items() if value is not None}


def sheets(results: Results, task: Task) -> dict[str, Tensor]:
    """Caption -> sheet."""
    found = {}
    grid = results.held_out.grid
    if grid is not None and task.sheet is not None and task.sheet.pictures:
        made = {cell: work.read(asked, results.root) for cell, asked in task.sheet.pictures.items()}
        caption = (
            "Grid: rows are contents, columns styles; on top the reference from which a column is made, then pairs of the true and the "
            "made cell. Orange: a held-out cell; red: a content of which training saw no cell; grey: a cell of training. Contents: "
            + ", ".join(task.sheet.contents)
        )
        found[caption] = draw_grid(task.sheet, grid, made)
    rows, by_seed = [], [results.made(work.MADE, seed) for seed in results.seeds[:4]]
    words, empty = results.made(work.WORDS), results.made(work.EMPTY_MADE)
    for sample in results.first[:ROWS_SHOWN]:
        if sample.key not in by_seed[0]:
            continue
        row = [] if sample.own else [one.pixel_values for one in sample.references[: results.references]]
        row = [*row, sample.target, *(made[sample.key] for made in by_seed if sample.key in made)]
        row += [pictures[sample.key] for pictures in (words, empty) if sample.key in pictures]
        rows.append(row)
    if rows:
        caption = "Samples: references (where they are not the target), target, made with seeds " + ", ".join(
            map(str, results.seeds[:4])
        )
        caption += ("; from words alone" if words else "") + ("; from the empty condition" if empty else "")
        found[caption] = draw_rows(rows)
    elif words:
        shown = [s for s in results.first if s.key in words][:ROWS_SHOWN]
        found["Words: target, made from its words alone"] = draw_rows([[s.target, words[s.key]] for s in shown])
    return found


def write(out: Path, report: dict[str, Any], pictures: dict[str, Tensor]) -> None:
    """report.json last: where it is, all else is."""
    for number, picture in enumerate(pictures.values()):
        save_picture(picture, out / "sheets" / f"{number}.png")
    unfinished = out / ".report.html.unfinished"
    unfinished.write_text(page(report, pictures))
    unfinished.replace(out / "report.html")
    board(out / "tensorboard", report, pictures)
    write_json(out / "report.json", report)


def board(folder: Path, report: dict[str, Any], pictures: dict[str, Tensor]) -> None:
    """The figures as scalars and the sheets as images, at the checkpoint's update."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    for old in folder.glob("events.*"):
        old.unlink()
    step = int(report["checkpoint"]["source"].get("update") or 0)
    with SummaryWriter(str(folder)) as writer:
        for name, section in report.items():
            if name in ("settings", "data", "versions"):
                continue
            for leaf, figure in leaves(section, name):
                writer.add_scalar(f"evaluate/{leaf.replace('.', '/')}", figure["value"], step)
            for times in ("ours", "mlperf"):
                curves = section.get(times, {}) if isinstance(section, Mapping) else {}
                for curve, values in curves.items():
                    for t, value in zip(curves["t"], values, strict=True):
                        if curve != "t":
                            writer.add_scalar(f"evaluate/{name}/{times}/{curve}", value, round(1000 * t))
        for caption, picture in pictures.items():
            writer.add_image(f"evaluate/{caption.split(':')[0]}", picture.to(torch.uint8), step)


def lines(report: Mapping[str, Any]) -> list[str]:
    """The figures for a terminal."""
    found = []
    for name in ("loss", "pictures", "held_out_cells", "held_out_contents", "words", "outside", "differences"):
        for leaf, figure in leaves(report.get(name, {}), name):
            interval = figure.get("interval")
            ends = "" if interval is None else f"  {interval[0]:.4g} .. {interval[1]:.4g}"
            found.append(f"  {leaf:<52} {figure['value']:>9.4g}{ends}")
    return found
