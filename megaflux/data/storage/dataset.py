"""The description of a dataset, dataset.json, and the folder that it completes.

    ROOT/dataset.json                          what the dataset is; written last, so it marks completeness
    ROOT/index.json                            all shards of all splits and buckets
    ROOT/<split>/<bucket>/index.json           the shards of one stream: train/16x9, held_out/1x1, ...
    ROOT/<split>/<bucket>/.../*.mds       shards of JPEG and WebP files, which zstd would not make smaller, and caches
    ROOT/<split>/<bucket>/.../*.mds.zstd  of PNG files, and of earlier caches; streaming unpacks them beside it, as *.mds

Columns of prepared images: key (str), caption (str; several are joined, see megaflux.data.captions), image (bytes of a
png, jpeg or webp file at the bucket's size), and where the source has references, those (see megaflux.data.references). A derived dataset has the same layout and other columns: latents and
hidden_states as arrays. NumPy has no bfloat16, so those bits are stored as uint16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.files import write_json
from megaflux.data.buckets import Bucket, check_ratio
from megaflux.data.reference_size import COLUMN
from megaflux.data.storage.caption_stats import CaptionStats
from megaflux.data.storage.index import Problem, inspect_index, raise_problems, shown, with_prefix, write_index

FORMAT_VERSION = 3
"""The newest that is read: 3 has references, 2 has several captions. A dataset of images with one caption at most is written as 1,
which earlier versions read too."""
SPLITS = ("train", "held_out")
HELD_OUT = 8  # pictures of one shape that validation should have at least; of fewer, its figures change by chance
IMAGE_COLUMNS = {"key": "str", "caption": "str", "image": "bytes"}


@dataclass(frozen=True)
class DatasetInfo:
    """The content of dataset.json.

    longest_side: px, of every canvas. counts: split -> bucket name -> samples. columns: name -> MDS encoding. settings:
    those that the dataset was prepared with. bad: reason -> images that were skipped. notes: what was done to images
    ("rotated", ...) -> how many. attribution: the credit that the pictures ask for.
    """

    longest_side: int
    buckets: tuple[Bucket, ...]
    counts: dict[str, dict[str, int]]
    columns: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    attribution: str | None = None

    @property
    def captioned(self) -> int | None:
        """Samples with a caption; None in datasets of earlier versions, which did not count them."""
        return self.notes.get("captioned")

    @property
    def caption_stats(self) -> CaptionStats | None:
        """How many captions the images have, and their lengths; None in datasets of earlier versions."""
        content = self.settings.get("caption_stats")
        return None if content is None else CaptionStats.from_json(content)

    @property
    def has_references(self) -> bool:
        """Whether samples may have reference pictures of their own; without them the target is its own reference."""
        return COLUMN in self.columns

    @property
    def most_references(self) -> int:
        """The most references that a sample has."""
        return max((int(number) for number, images in self._images_by_references.items() if images), default=0)

    @property
    def _images_by_references(self) -> dict[str, int]:
        return self.settings.get("reference_stats", {})

    @property
    def format_version(self) -> int:
        """The oldest format that can hold the dataset, so that earlier versions read what they can."""
        if self.has_references:
            return 3
        return 2 if self.caption_stats and self.caption_stats.several else 1

    def samples(self, split: str) -> int:
        """Samples of one split over all buckets."""
        return sum(self.counts.get(split, {}).values())

    def filled(self, split: str) -> Iterator[tuple[Bucket, int]]:
        """(bucket, samples) of every bucket that has samples in the split."""
        for bucket in self.buckets:
            if count := self.counts.get(split, {}).get(bucket.name, 0):
                yield bucket, count


def read_dataset_info(path: str | Path) -> DatasetInfo:
    """Read `path`/dataset.json. Raises UserError if it is missing, invalid or of a newer format."""
    file = Path(path) / "dataset.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{file}: missing, so there is no complete dataset here; make one with "
            f"python -m megaflux.data.prepare SOURCE {path}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    try:
        version = content.pop("format_version")
        if version > FORMAT_VERSION:
            newer = f"format version {shown(version)}, this code reads up to {FORMAT_VERSION}"
            raise UserError(f"{file}: {newer}; update it")
        if not _is_whole(version, 1):
            raise TypeError(f"format version {shown(version)}")
        buckets = tuple(Bucket(**bucket) for bucket in content.pop("buckets"))
        info = DatasetInfo(buckets=buckets, **content)
        _check_info(info)
        return info
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{file}: not a dataset description ({what}); prepare the dataset again") from None


def _check_info(info: DatasetInfo) -> None:
    """Raises TypeError for values of the wrong type, and for names that lead out of the dataset's folder."""
    names = [bucket.name for bucket in info.buckets]
    for bucket in info.buckets:
        try:
            check_ratio(bucket.name)  # it becomes a folder's name
        except UserError as error:
            raise TypeError(str(error)) from None
        if not _is_whole(bucket.width, 1) or not _is_whole(bucket.height, 1):
            raise TypeError(f"bucket {bucket.name} of {shown(bucket.width)} x {shown(bucket.height)} px")
    if len(set(names)) < len(names):
        raise TypeError("a bucket appears twice")
    if not _is_whole(info.longest_side, 1):
        raise TypeError(f"longest_side {shown(info.longest_side)}")
    for name in ("counts", "columns", "settings", "bad", "notes"):
        if not isinstance(getattr(info, name), dict):
            raise TypeError(f"{name} is not an object")
    for split, counts in info.counts.items():
        if not isinstance(counts, dict) or not all(_is_whole(count, 0) for count in counts.values()):
            raise TypeError(f"counts of {shown(split)} are not counts")
        if unknown := counts.keys() - set(names):
            raise TypeError(f"counts of {shown(split)} name {shown(min(unknown))}, which is not a bucket")
    if not all(_is_whole(count, 0) for counts in (info.bad, info.notes) for count in counts.values()):
        raise TypeError("bad or notes has values that are not counts")
    _ = info.caption_stats  # raises TypeError itself
    stats = info.settings.get("reference_stats", {})
    if not isinstance(stats, dict) or not all(number.isdecimal() and _is_whole(n, 0) for number, n in stats.items()):
        raise TypeError("reference_stats are not counts")
    source = info.settings.get("source", {})
    if not isinstance(source, dict):
        raise TypeError("source is not an object")
    if "styles" in source:
        lists = [source.get(name) for name in ("styles", "held_out_contents")]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            raise TypeError("styles or held_out_contents are not lists of names")
        if not all(_is_whole(source.get(name), 0) for name in ("names", "held_out_cells")):
            raise TypeError("names or held_out_cells are not counts")
    if not isinstance(info.attribution, str | None):
        raise TypeError("attribution is not text")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def validation_bucket(info: DatasetInfo, split: str) -> Bucket | None:
    """The bucket chosen for validation when the dataset was prepared; where none was, or it has no samples in the split,
    of those that have the one nearest to a square; None without any."""
    buckets = [bucket for bucket, _ in info.filled(split)]
    buckets = [bucket for bucket in buckets if bucket.name == info.settings.get("validation_bucket")] or buckets
    return min(buckets, key=lambda bucket: abs(bucket.width / bucket.height - 1), default=None)


def write_dataset(root: str | Path, info: DatasetInfo) -> None:
    """Complete a dataset whose buckets are written: the index.json over all of them, then dataset.json.

    Raises UserError, before anything is written, if the buckets' indexes do not agree with `info`.
    """
    root = Path(root)
    merged: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for split in SPLITS:
        for bucket, count in info.filled(split):
            folder = f"{split}/{bucket.folder}"
            shards, found = inspect_index(root / folder, expected_samples=count)
            problems += found
            merged += [with_prefix(shard, folder) for shard in shards] if not found else []
    raise_problems(problems)
    write_index(root, merged)
    content = {
        "format_version": info.format_version,
        "longest_side": info.longest_side,
        "buckets": [{"name": b.name, "width": b.width, "height": b.height} for b in info.buckets],
        "counts": info.counts,
        "columns": info.columns,
        "settings": info.settings,
        "bad": info.bad,
        "notes": info.notes,
        "attribution": info.attribution,
    }
    write_json(root / "dataset.json", content)


def describe(info: DatasetInfo) -> str:
    """The dataset as a small table: samples by bucket and split, and what was noted or skipped."""
    lines = [f"{'bucket':<10}{'size':>12}" + "".join(f"{split:>12}" for split in SPLITS)]
    for bucket in info.buckets:
        numbers = "".join(f"{info.counts.get(split, {}).get(bucket.name, 0):>12}" for split in SPLITS)
        lines.append(f"{bucket.name:<10}{f'{bucket.width}x{bucket.height}':>12}{numbers}")
    lines.append(f"{'all':<22}" + "".join(f"{info.samples(split):>12}" for split in SPLITS))
    source = info.settings.get("source", {})
    if source.get("styles"):
        styles, held, whole = source["styles"], source["held_out_cells"], len(source["held_out_contents"])
        lines.append(f"grid: {source['names']} names in {len(styles)} sets ({', '.join(styles)})")
        lines.append(f"held out: {held} cells (name, set), {whole} names in all sets")
    if info.captioned is not None:
        lines.append(f"captions: {info.captioned} of {sum(info.samples(split) for split in SPLITS)} images have one")
    if info.caption_stats:
        lines += info.caption_stats.describe()
    if info.has_references:
        counted = {int(number): images for number, images in info._images_by_references.items()}
        several = ", ".join(f"{images} images with {number}" for number, images in sorted(counted.items()))
        lines.append(f"references: {sum(number * images for number, images in counted.items())} ({several})")
    if noted := {name: count for name, count in info.notes.items() if name != "captioned"}:
        lines.append("noted: " + by_reason(noted))
    if info.bad:
        lines.append("skipped: " + by_reason(info.bad))
    return "\n".join(lines)


def by_reason(counts: dict[str, int]) -> str:
    """ "12 damaged, 3 too_small": counts by reason on one line."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none skipped"
