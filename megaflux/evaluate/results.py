"""From the files of one checkpoint to its figures, by section of the report.

A section is a tree of names whose leaves are figures (statistics.Measured); in the section `loss` also curves over t.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaflux.evaluate import figures, work
from megaflux.evaluate.judge import Judge, likeliest, prototypes
from megaflux.evaluate.loss import TIMES_OF
from megaflux.evaluate.outside import Embedder, cosines
from megaflux.evaluate.samples import Cell, Grid, HeldOut, Sample, cell_of
from megaflux.evaluate.statistics import gap, measured

Section = dict[str, Any]
Made = Callable[[str, int], dict[str, Tensor]]
"""(kind, seed) -> pictures by key."""


@dataclass
class Results:
    """What was computed of a checkpoint."""

    held_out: HeldOut
    root: Path
    pictures: list[work.Asked]
    loss_batches: int
    seeds: tuple[int, ...]
    references: int
    """References that each sample was given, at most."""

    @property
    def first(self) -> list[Sample]:
        """The samples that are looked at in everything."""
        return self.held_out.samples[: self.held_out.first]

    def made(self, kind: str, seed: int | None = None) -> dict[str, Tensor]:
        """Pictures of a kind by the samples' keys. seed None: the first."""
        seed = self.seeds[0] if seed is None else seed
        wanted = (one for one in self.pictures if one.kind == kind and one.seed == seed)
        return {one.sample.key: work.read(one, self.root) for one in wanted}

    def clusters(self, samples: Sequence[Sample]) -> list[str]:
        """What is drawn together in the bootstrap: cells of one content; else each sample alone."""
        if self.held_out.grid is None:
            return [sample.key for sample in samples]
        return [cell_of(sample.key).content for sample in samples]


def loss_section(results: Results) -> Section:
    """Losses by t at both sets of times, and by how much each other condition raises them."""
    by_name = work.read_losses(results.root, results.loss_batches)
    section: Section = {}
    for number, (times, ts) in enumerate(TIMES_OF.items()):
        places = slice(8 * number, 8 * number + 8)
        section[times] = {"t": ts} | {
            name: _means([row[places] for row in rows.values()]) for name, rows in by_name.items()
        }
    own = {key: float(np.mean(row[:8])) for key, row in by_name["matched"].items()}  # type: ignore[arg-type]
    samples = {sample.key: sample for sample in results.first}
    section["loss"] = {}
    for name, rows in by_name.items():
        means = {key: float(np.mean(row[:8])) for key, row in rows.items() if row[0] is not None}  # type: ignore[arg-type]
        keys = tuple(sorted(means))
        clusters = results.clusters([samples[key] for key in keys])
        section["loss"][name] = measured([means[key] for key in keys], clusters, keys)
        if name != "matched":
            mine = [own[key] for key in keys]
            section.setdefault("gap", {})[name] = gap(mine, [means[key] for key in keys], clusters, keys)
    section["loss_mlperf"] = {
        "matched": measured(
            [float(np.mean(by_name["matched"][key][8:])) for key in own],  # type: ignore[arg-type]
            results.clusters([samples[key] for key in own]),
            tuple(own),
        )
    }
    return section


def _means(rows: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean at each time over samples that have a loss."""
    return [float(value) for value in np.array([row for row in rows if row[0] is not None], dtype=np.float64).mean(0)]


def pictures_section(results: Results, judge: Judge | None) -> Section:
    """Retrieval, copying and diversity of the first samples, in pixels and in the judge's features."""
    samples = results.first
    keys, clusters = tuple(sample.key for sample in samples), results.clusters(samples)
    made = [[pictures[key] for key in keys] for pictures in (results.made(work.MADE, seed) for seed in results.seeds)]
    targets = [sample.target for sample in samples]
    references = [sample.references[0].pixel_values for sample in samples]
    paired = any(not sample.own for sample in samples)
    section: Section = {}
    spaces: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {"pixels": figures.pixels}
    if judge is not None:
        spaces["judge"] = lambda pictures: judge.features(pictures)[0]
    for space, features in spaces.items():
        by_seed = torch.stack([features(pictures) for pictures in made], dim=1)
        target, reference = features(targets), features(references)

        def figure(values: Any, over: Any = None) -> Any:
            return measured(values, clusters, keys, over)

        found = {"retrieval_target": figure(figures.nearest_is_own(by_seed[:, 0], target))}
        if paired:
            found["retrieval_reference"] = figure(figures.nearest_is_own(by_seed[:, 0], reference))
        if len(samples) > 1:
            found["copying"] = figure(figures.copying(by_seed[:, 0], reference))
        found["distance_to_reference"] = figure(figures.distances(by_seed[:, 0], reference).diagonal().numpy())
        if len(results.seeds) > 1:
            between = figures.between_seeds(by_seed)
            found["distance_between_seeds"] = figure(between)
            found["nearer_to_reference_than_to_seed"] = figure(figures.nearer_to_reference(by_seed, reference))
            apart = figures.between_conditions(by_seed)
            if apart.sum() > 0:
                found["diversity"] = figure(between, apart)
        section[space] = found
    return section


def cells_section(results: Results, judge: Judge, grid: Grid, whole_contents: bool) -> Section | None:
    """What the judge sees on a grid's held-out cells of known contents, or on those of contents that are held out whole; None without
    such cells.

    content_top1 is a choice among the contents that were never seen in the wanted style: which of the unseen cells is this?
    content_top1_of_all and leakage are choices among all contents, of which many are near twins (second and third place medal).

    A content without a training cell has no prototype: for these, those of all held-out contents are made of their true cells in the
    other styles than the one that is judged.
    """
    samples = [
        sample
        for sample in results.held_out.samples
        if (cell_of(sample.key).content in grid.held_out_contents) is whole_contents
    ]
    if not samples:
        return None
    cells = [cell_of(sample.key) for sample in samples]
    keys, clusters = tuple(sample.key for sample in samples), results.clusters(samples)
    shown = [[cell_of(one.name).content for one in s.references[: results.references]] for s in samples]
    wanted = [cell.style for cell in cells]
    unseen = _unseen(grid, whole_contents)
    among = [unseen[cell.style] for cell in cells]
    content_of = (
        _zero_shot(judge, grid) if whole_contents else lambda features, _, names: judge.contents_of(features, names)
    )

    def figures_of(pictures: dict[str, Tensor], styles: list[str]) -> tuple[Section, np.ndarray, np.ndarray]:
        """(section, right style, right content) of one picture a cell; styles: those wanted."""
        features, scores = judge.features([pictures[key] for key in keys])
        chosen, of_all = (content_of(features, wanted, names) for names in (among, None))
        seen = [judge.styles[i] for i in scores.argmax(dim=1).tolist()]
        style = figures.is_in(seen, [[one] for one in styles])
        content = figures.is_in(chosen, [[cell.content] for cell in cells])
        section = {
            "style_top1": measured(style, clusters, keys),
            "content_top1": measured(content, clusters, keys),
            "content_top1_of_all": measured(figures.is_in(of_all, [[cell.content] for cell in cells]), clusters, keys),
            "leakage": measured(figures.is_in(of_all, shown), clusters, keys),
        }
        return section, style, content

    true, judge_style, judge_content = figures_of({s.key: s.target for s in samples}, wanted)
    section, style, content = figures_of(results.made(work.MADE), wanted)
    section["judge_style"], section["judge_content"] = true["style_top1"], true["content_top1"]
    section["judge_content_of_all"], section["judge_leakage"] = true["content_top1_of_all"], true["leakage"]
    section["chance"] = float(np.mean([1 / len(names) for names in among]))
    if judge_style.sum():
        section["style_of_ceiling"] = measured(style, clusters, keys, judge_style)
    if judge_content.sum():
        section["content_of_ceiling"] = measured(content, clusters, keys, judge_content)
    section["baselines"] = {}
    for kind in (work.EMPTY_MADE, work.OTHER_STYLE, work.ROUND_TRIP):
        pictures = results.made(kind)
        if all(key in pictures for key in keys):
            section["baselines"][kind] = figures_of(pictures, wanted)[0]
    return section


def _unseen(grid: Grid, whole_contents: bool) -> dict[str, set[str]]:
    """Style -> the contents whose cells in it are held out: of contents that are seen in other styles, or of those that are not."""
    names: dict[str, set[str]] = {}
    for cell in grid.held_out:
        if (cell.content in grid.held_out_contents) is whole_contents:
            names.setdefault(cell.style, set()).add(cell.content)
    return names


def _zero_shot(
    judge: Judge, grid: Grid
) -> Callable[[Tensor, Sequence[str], Sequence[Collection[str]] | None], list[str]]:
    """Tells contents that training never saw: (features (N, F), styles of the pictures, names to choose among or None: all) -> N names. A
    picture is compared with the true held-out cells of the styles other than its own."""
    cells = [cell for cell in grid.held_out if cell.content in grid.held_out_contents]
    features, _ = judge.features([picture for cell in cells if (picture := grid.picture(cell)) is not None])
    unseen = sorted(grid.held_out_contents)
    group = torch.tensor([unseen.index(cell.content) for cell in cells])

    def content_of(made: Tensor, styles: Sequence[str], among: Sequence[Collection[str]] | None) -> list[str]:
        found, names = [], [*judge.contents, *unseen]
        for i, (one, style) in enumerate(zip(made, styles, strict=True)):
            others = torch.tensor([cell.style != style for cell in cells])
            known = torch.cat([judge.prototypes, prototypes(features[others], group[others], len(unseen))])
            allowed = None if among is None else torch.tensor([[name in among[i] for name in names]])
            found.append(names[likeliest(one[None], known, known.new_zeros(len(known)), allowed)[0]])
        return found

    return content_of


def words_section(results: Results, judge: Judge) -> Section | None:
    """How often a picture made from words alone is nearest, of the held-out pictures, to the one whose caption it is; None where none
    was made."""
    made = results.made(work.WORDS)
    samples = [sample for sample in results.first if sample.key in made]
    if not samples:
        return None
    keys, clusters = tuple(sample.key for sample in samples), results.clusters(samples)
    features = judge.features([made[key] for key in keys])[0]
    targets = judge.features([sample.target for sample in samples])[0]
    return {"retrieval_target": measured(figures.nearest_is_own(features, targets), clusters, keys)}


def outside_section(results: Results, clip: Embedder | None, dino: Embedder | None) -> Section | None:
    """CLIP-I, CLIP-T and DINO-I of the first samples, and of their true pictures in the place of the made ones."""
    if clip is None and dino is None:
        return None
    samples = results.first
    keys, clusters, made = tuple(s.key for s in samples), results.clusters(samples), results.made(work.MADE)
    shown = {"made": [made[key] for key in keys], "true": [sample.target for sample in samples]}
    references = [sample.references[0].pixel_values for sample in samples]
    section: Section = {name: {} for name in shown}
    for name, embedder in (("clip_i", clip), ("dino_i", dino)):
        if embedder is not None:
            given = embedder.pictures(references)
            for which, pictures in shown.items():
                values = cosines(embedder.pictures(pictures), given).numpy()
                section[which][name] = measured(values, clusters, keys)
    captioned = [i for i, sample in enumerate(samples) if sample.caption]
    if clip is not None and captioned:
        words = clip.words([samples[i].caption for i in captioned])
        for which, pictures in shown.items():
            values = cosines(clip.pictures([pictures[i] for i in captioned]), words).numpy()
            chosen = tuple(keys[i] for i in captioned)
            section[which]["clip_t"] = measured(values, [clusters[i] for i in captioned], chosen)
    return section


def true_cells(judge: Judge, grid: Grid) -> dict[str, float]:
    """How well a judge does on the real held-out cells of contents that it knows: the ceiling of what can be measured."""
    cells: list[Cell] = [cell for cell in grid.held_out if cell.content not in grid.held_out_contents]
    pictures = [picture for cell in cells if (picture := grid.picture(cell)) is not None]
    if not pictures:
        return {}
    said, unseen = judge.judge(pictures), _unseen(grid, False)
    chosen = judge.contents_of(said.features, [unseen[cell.style] for cell in cells])
    return {
        "style": float(np.mean([a == c.style for a, c in zip(said.styles, cells, strict=True)])),
        "content": float(np.mean([a == c.content for a, c in zip(chosen, cells, strict=True)])),
        "content_of_all": float(np.mean([a == c.content for a, c in zip(said.contents, cells, strict=True)])),
        "cells": len(cells),
    }
