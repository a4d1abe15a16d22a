"""Chunks -> dataset: the indexes over all of them, and whether too many images were unusable."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.data.buckets import make_buckets
from megaflux.data.storage.dataset import (
    HELD_OUT,
    SPLITS,
    DatasetInfo,
    by_reason,
    describe,
    read_dataset_info,
    write_dataset,
)
from megaflux.data.storage.index import write_index
from megaflux.data.storage.shards import COMPRESSION
from megaflux.data.writing import chunks
from megaflux.data.writing.caption_report import caption_stats
from megaflux.data.writing.chunks import Report
from megaflux.data.writing.held_out import ENOUGH, advice, top_up, validation_shape
from megaflux.data.writing.options import Options
from megaflux.data.writing.tokens import TokenCounter


class TooManyBad(Exception):
    """More images could not be used than allowed. The message is one line."""


def merge(
    out: str | Path, *, max_bad: float = 0.05, progress: bool = True, counter: TokenCounter | None = None
) -> DatasetInfo:
    """Write the indexes and dataset.json over all chunks of `out`, once every part is done.

    From 100 images on, at least 8 of one shape are held out, the next by hash, unless --held-out is 0; a finished dataset
    stays as it is. max_bad, progress, counter: as build.prepare. Raises UserError if chunks are missing or no image is usable, and
    TooManyBad.
    """
    out = Path(out)
    plan = read_plan(out)
    if plan is None:
        raise UserError(f"{out}/prepare.json: missing, so there is nothing to merge in {out}")
    missing = [n for n in range(plan["chunks"]) if not chunks.report_path(out, n).exists()]
    if missing:
        some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UserError(
            f"{out}: {len(missing)} of {plan['chunks']} chunks are not written yet ({some}); run their parts"
        )
    reports = [chunks.read_report(out, number) for number in range(plan["chunks"])]
    listing = _write_listing(out / "bad_images.jsonl", [entry for report in reports for entry in report.bad])
    bad, notes = judge(reports, max_bad, str(listing), progress)
    bad_captions = [entry for report in reports for entry in report.bad_captions]
    if bad_captions:
        listing = _write_listing(out / "bad_captions.jsonl", bad_captions)
        if progress:
            print(
                f"{len(bad_captions)} captions could not be used, listed in {listing}; their images are stored without them"
            )
    bad_references = [entry for report in reports for entry in report.bad_references]
    if bad_references:
        listing = _write_listing(out / "bad_references.jsonl", bad_references)
        if progress:
            print(
                f"{len(bad_references)} references could not be used, listed in {listing}; their images are stored without them"
            )
    settings = plan["settings"]
    listed: dict[str, Any] = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
    options = Options(**{**settings, **listed})
    buckets = make_buckets(options.aspect_ratios, options.longest_side)
    target = chunks.Target(
        out, buckets, options, plan.get("compression", COMPRESSION), plan["source"].get("references", False)
    )
    reports, chosen = _with_validation_bucket(target, reports, progress)
    counts = {
        split: {b.name: sum(report.counts[split].get(b.name, 0) for report in reports) for b in buckets}
        for split in SPLITS
    }
    if not sum(counts["train"].values()):
        held = sum(counts["held_out"].values())
        raise UserError(
            f"{out}: no usable training images among {plan['source']['items']} "
            f"({f'{held} held out, lower --held-out; ' * bool(held)}{by_reason(bad)})"
        )
    for split in SPLITS:
        for bucket in buckets:
            shards = [shard for report in reports for shard in report.shards[split].get(bucket.name, [])]
            if shards:
                write_index(out / split / bucket.folder, shards)
    stats = caption_stats(target, reports, counter)
    references: Counter[str] = sum((Counter(report.images_by_references) for report in reports), Counter())
    info = DatasetInfo(
        longest_side=options.longest_side,
        buckets=buckets,
        counts=counts,
        columns=target.columns,
        settings={
            **settings,
            "source": plan["source"],
            **chosen,
            **({"caption_stats": stats.to_json()} if stats else {}),
            **({"reference_stats": references} if target.references else {}),
        },
        bad=bad,
        notes=notes,
        attribution=plan["attribution"],
    )
    write_dataset(out, info)
    if progress:
        print(describe(info))
        if info.captioned == 0 and plan["source"]["kind"] != "openmoji":
            print(
                "no image has a caption: fine for training on images alone; docs/data.md lists where captions are found"
            )
        elif counter is not None and stats is None:
            print(
                "--tokenizer: not used, because an earlier version wrote chunks of this dataset and did not count captions"
            )
        elif stats and stats.lengths and stats.lengths.unit == "characters":
            print(
                "training cuts captions by tokens: the same command with --tokenizer counts them (a Qwen2-VL folder or hub name)"
            )
    return read_dataset_info(out)


def _with_validation_bucket(
    target: chunks.Target, reports: list[Report], progress: bool
) -> tuple[list[Report], dict[str, str]]:
    """(the chunks' reports, the setting that names the bucket whose held-out pictures validation uses), once that bucket has
    enough of them if the dataset is large enough. Nothing changes in a finished dataset."""
    if (target.out / "dataset.json").exists():  # runs may train on it
        settings = read_dataset_info(target.out).settings
        return reports, {name: settings[name] for name in ("validation_bucket",) if name in settings}
    shape = validation_shape(target.buckets, reports) if target.options.held_out else None
    if shape is None:
        return reports, {}
    changed: set[int] = set()
    if sum(report.items - len(report.bad) for report in reports) >= ENOUGH:
        changed = top_up(target, shape)
    elif shape.held < HELD_OUT and progress:
        print(f"warning: {advice(shape)}")
    reports = [chunks.read_report(target.out, n) if n in changed else report for n, report in enumerate(reports)]
    return reports, {"validation_bucket": shape.bucket.name}


def _write_listing(path: Path, entries: Sequence[dict[str, str]]) -> Path:
    with open(path, "w") as file:
        file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
    return path


def read_plan(out: Path) -> dict[str, Any] | None:
    """The content of prepare.json, or None where a dataset was not begun. Raises UserError if it cannot be read."""
    try:
        return json.loads((out / "prepare.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{out}/prepare.json: cannot be read ({error}); prepare into another folder") from None


def judge(
    reports: Sequence[Report], max_bad: float, listing: str, progress: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Counts over these chunks' reports: reason -> skipped images, and note -> images.

    max_bad: how many may be skipped, a fraction of the images if below 1, else a count. listing: the file that lists the
    skipped images, for messages. Raises TooManyBad if more were skipped.
    """
    bad: Counter[str] = sum((Counter(entry["reason"] for entry in report.bad) for report in reports), Counter())
    notes: Counter[str] = sum((Counter(report.notes) for report in reports), Counter())
    notes["caption_unusable"] += sum(len(report.bad_captions) for report in reports)
    noted = {name: count for name, count in notes.items() if count}
    captioned = [report.captioned for report in reports]
    if None not in captioned:  # as reports of earlier versions have it
        noted["captioned"] = sum(count or 0 for count in captioned)
    items = sum(report.items for report in reports)
    allowed = max_bad * items if max_bad < 1 else max_bad
    if bad.total() > allowed:
        raise TooManyBad(
            f"{bad.total()} of {items} images cannot be used ({by_reason(bad)}), more than --max-bad "
            f"{max_bad:g}; listed in {listing}"
        )
    if bad and progress:
        print(f"{bad.total()} of {items} images skipped, listed in {listing}")
    return dict(sorted(bad.items())), dict(sorted(noted.items()))
