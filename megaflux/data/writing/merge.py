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
    IMAGE_COLUMNS,
    SPLITS,
    DatasetInfo,
    by_reason,
    describe,
    read_dataset_info,
    write_dataset,
)
from megaflux.data.storage.index import write_index
from megaflux.data.writing import chunks


class TooManyBad(Exception):
    """More images could not be used than allowed. The message is one line."""


def merge(out: str | Path, *, max_bad: float = 0.05, progress: bool = True) -> DatasetInfo:
    """Write the indexes and dataset.json over all chunks of `out`, once every part is done.

    max_bad, progress: as build.prepare. Raises UserError if chunks are missing or no image is usable, and TooManyBad.
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
    listing = out / "bad_images.jsonl"
    with open(listing, "w") as file:
        for report in reports:
            file.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in report["bad"])
    bad, notes = judge(reports, max_bad, str(listing), progress)
    settings = plan["settings"]
    buckets = make_buckets(settings["aspect_ratios"], settings["longest_side"])
    counts = {
        split: {b.name: sum(report["counts"][split].get(b.name, 0) for report in reports) for b in buckets}
        for split in SPLITS
    }
    if not sum(counts["train"].values()):
        raise UserError(f"{out}: no usable training images among {plan['source']['items']} ({by_reason(bad)})")
    for split in SPLITS:
        for bucket in buckets:
            shards = [shard for report in reports for shard in report["shards"][split].get(bucket.name, [])]
            if shards:
                write_index(out / split / bucket.folder, shards)
    info = DatasetInfo(
        longest_side=settings["longest_side"],
        buckets=buckets,
        counts=counts,
        columns=IMAGE_COLUMNS,
        settings={**settings, "source": plan["source"]},
        bad=bad,
        notes=notes,
        attribution=plan["attribution"],
    )
    write_dataset(out, info)
    if progress:
        print(describe(info))
    return read_dataset_info(out)


def read_plan(out: Path) -> dict[str, Any] | None:
    """The content of prepare.json, or None where a dataset was not begun. Raises UserError if it cannot be read."""
    try:
        return json.loads((out / "prepare.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{out}/prepare.json: cannot be read ({error}); prepare into another folder") from None


def judge(
    reports: Sequence[dict[str, Any]], max_bad: float, listing: str, progress: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Counts over these chunks' reports: reason -> skipped images, and note -> images.

    max_bad: how many may be skipped, a fraction of the images if below 1, else a count. listing: the file that lists the
    skipped images, for messages. Raises TooManyBad if more were skipped.
    """
    bad: Counter[str] = sum((Counter(entry["reason"] for entry in report["bad"]) for report in reports), Counter())
    notes: Counter[str] = sum((Counter(report["notes"]) for report in reports), Counter())
    items = sum(report["items"] for report in reports)
    allowed = max_bad * items if max_bad < 1 else max_bad
    if bad.total() > allowed:
        raise TooManyBad(
            f"{bad.total()} of {items} images cannot be used ({by_reason(bad)}), more than --max-bad "
            f"{max_bad:g}; listed in {listing}"
        )
    if bad and progress:
        print(f"{bad.total()} of {items} images skipped, listed in {listing}")
    return dict(sorted(bad.items())), dict(sorted(notes.items()))
