"""How a dataset is prepared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaflux.common.errors import UserError
from megaflux.common.paths import ICONIFY
from megaflux.config.data import MOST_REFERENCES
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.images import ENCODINGS, MAX_PIXELS
from megaflux.data.storage.shards import SHARD_SIZE
from megaflux.data.writing import captions
from megaflux.data.writing.captions import CaptionReader

OPENMOJI_DEFAULTS: dict[str, Any] = {"longest_side": 128, "held_out": 0.05, "encoding": "png", "canvases": 1.25}
ICONIFY_DEFAULTS: dict[str, Any] = {"longest_side": 128, "held_out": 0.05, "encoding": "png", "aspect_ratios": ("1:1",)}
SOURCE_KINDS = ("images", "tar", "parquet", ICONIFY)
ALL, NONE = "all", "none"
REFERENCES = (ALL, NONE)
PAIRS = ("same-style",)
SHARED = "shared"
CONTENTS = (ALL, SHARED)  # shared: only names that all sets have


@dataclass(frozen=True)
class Options:
    """The settings on which a dataset's bytes depend. Reruns and other parts must give the same."""

    longest_side: int = 1024  # px, of every canvas
    aspect_ratios: tuple[str, ...] = ASPECT_RATIOS
    held_out: float = 0.01  # fraction of the keys, by hash, kept from training
    encoding: str = "jpeg"  # of the stored images: png, jpeg or webp
    quality: int = 95  # of jpeg and webp
    allow_upscale: bool = False  # False: images that would have to be enlarged are skipped
    shard_size: int = SHARD_SIZE  # bytes before compression
    chunk: int = 1024  # images per chunk
    canvases: float = 2  # openmoji: canvases on which each emoji is drawn, on average
    max_pixels: int = MAX_PIXELS  # larger images are skipped before decoding
    kind: str | None = None  # of the files to read, where a folder has several: images, tar or parquet
    image_column: str | None = None  # of parquet files; None: recognised
    caption_column: str | None = None  # of parquet files, tables beside images, and .json files; None: recognised
    captions: str = captions.ALL  # how they are read, one of captions.WAYS
    references: str = ALL  # which reference pictures are read, one of REFERENCES
    min_references: int | None = None  # usable ones that an image needs; None: all that it has
    pairs: str | None = None  # iconify: references of each cell, one of PAIRS
    pair_references: int = 4  # iconify: how many of them
    sets: tuple[str, ...] = ()  # iconify: the icon sets to read; none: all that are there
    contents: str = ALL  # iconify: names to read, one of CONTENTS
    most_contents: int | None = None  # iconify: names to read, the first by a draw; None: all
    hold_out_cells: float = 0.0  # iconify: share of the cells (name, set) that are kept from training
    hold_out_contents: float = 0.0  # iconify: share of the names that are kept from training in all sets

    @property
    def caption_reader(self) -> CaptionReader:
        """What reads captions as these settings say."""
        return CaptionReader(self.caption_column, self.captions)

    def check(self) -> None:
        """Raises UserError for an invalid value."""
        make_buckets(self.aspect_ratios, self.longest_side)
        checks = {
            "--held-out must be at least 0 and below 1": 0 <= self.held_out < 1,
            f"--format must be one of {', '.join(ENCODINGS)}": self.encoding in ENCODINGS,
            "--quality must be 1 to 100": 1 <= self.quality <= 100,
            "--shard-size must be between 64 KiB and 2 GiB": 1 << 16 <= self.shard_size <= 1 << 31,
            "--chunk must be at least 1": self.chunk >= 1,
            "--max-pixels must be at least 1": self.max_pixels >= 1,
            f"--kind must be one of {', '.join(SOURCE_KINDS)}": self.kind in (None, *SOURCE_KINDS),
            f"--captions must be {captions.ALL} or {captions.LINES}": self.captions in captions.WAYS,
            f"--references must be {' or '.join(REFERENCES)}": self.references in REFERENCES,
            "--min-references must be at least 0": self.min_references is None or self.min_references >= 0,
            f"--pairs must be one of {', '.join(PAIRS)}": self.pairs in (None, *PAIRS),
            f"--pair-references must be 1 to {MOST_REFERENCES}": 1 <= self.pair_references <= MOST_REFERENCES,
            f"--contents must be {' or '.join(CONTENTS)}": self.contents in CONTENTS,
            "--most-contents must be at least 2": self.most_contents is None or self.most_contents >= 2,
            "--hold-out-cells must be at least 0 and below 1": 0 <= self.hold_out_cells < 1,
            "--hold-out-contents must be at least 0 and below 1": 0 <= self.hold_out_contents < 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(message)


def defaults_of(source: str) -> dict[str, Any]:
    """What differs from Options' own defaults for a source, by its name."""
    if source == "openmoji":
        return OPENMOJI_DEFAULTS
    return ICONIFY_DEFAULTS if source == ICONIFY or source.startswith(f"{ICONIFY}:") else {}
