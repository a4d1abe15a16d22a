"""Images -> training shards: python -m megaflux.data.prepare SOURCE OUT

SOURCE is a folder of images (captions in .txt, .caption or .json files of the same name, or in metadata.jsonl,
.csv or .parquet), of WebDataset .tar files or of .parquet files (columns image, caption or text, key), the word
openmoji, or icon sets: iconify:DIR, a folder of SET/icons.json (iconify alone: those that npm has installed here). docs/data.md lists all that is read. OUT becomes the dataset described in
megaflux.data.storage.dataset. The list of images is cut into chunks of fixed size; each appears in one step, so the
result does not depend on the number of processes, and a killed run continues when the same command is given again.

Several machines: give each the same command and --part 1/4, --part 2/4, ...; with separate disks copy
their OUT folders into one. Then the same command with --merge.

exit codes: 0 done; 2 bad input, nothing done; 3 more images could not be used than --max-bad allows (the
finished chunks are kept: the same command with a higher --max-bad accepts them).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from megaflux.common.command import Parser
from megaflux.common.errors import exit_on_user_error
from megaflux.common.paths import path_option
from megaflux.data.images import ENCODINGS
from megaflux.data.writing import captions
from megaflux.data.writing.build import finish, prepare
from megaflux.data.writing.merge import TooManyBad
from megaflux.data.writing.options import ALL, CONTENTS, NONE, PAIRS, REFERENCES, SOURCE_KINDS, Options
from megaflux.data.writing.sources import usual_options
from megaflux.data.writing.tokens import open_counter


def _parse_part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, as in 2/4")
    return int(index), int(count)


def _parse_max_bad(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction below 1 nor a count")
    return value


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the Options that it gives as `options`."""
    usual = Options()
    parser = Parser(
        prog="python -m megaflux.data.prepare",
        description=__doc__,
        allow_abbrev=True,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=path_option, metavar="SOURCE", help="folder, .tar, .parquet, openmoji, or iconify:DIR")
    add("out", type=path_option, metavar="OUT", help="folder of the dataset, new or begun by the same command")
    add("--longest-side", type=int, metavar="PX", help="of every canvas, default 1024 (openmoji, iconify: 128)")
    add("--aspect-ratios", help=f"canvases, default {','.join(usual.aspect_ratios)} (iconify: 1:1)")
    add("--held-out", type=float, metavar="FRACTION", help="kept from training, default 0.01 (openmoji, iconify: 0.05)")
    add(
        "--format",
        dest="encoding",
        choices=ENCODINGS,
        help="of the stored images, default jpeg (openmoji, iconify: png)",
    )
    add("--quality", type=int, default=usual.quality, help="of jpeg and webp, default %(default)s")
    add("--allow-upscale", action="store_true", help="enlarge small images (counted) instead of skipping them")
    add("--shard-size", type=int, default=usual.shard_size, metavar="BYTES", help="default %(default)s")
    add("--chunk", type=int, default=usual.chunk, metavar="IMAGES", help="unit of work, default %(default)s")
    add("--canvases", type=float, metavar="N", help="openmoji: per emoji on average, 1 to 5; default 1.25")
    add(
        "--references",
        choices=REFERENCES,
        default=usual.references,
        help=f"reference pictures of the images: {ALL} that are there, or {NONE}; default %(default)s",
    )
    add(
        "--min-references",
        type=int,
        metavar="N",
        help="usable references that an image needs; others are left out (default: an image with one that cannot be used is skipped)",
    )
    add("--sets", metavar="SET,...", help="iconify: the icon sets to read; default: all that are there")
    add("--contents", choices=CONTENTS, default=usual.contents, help="iconify: all names, or those that all sets share")
    add("--most-contents", type=int, metavar="N", help="iconify: at most N names, drawn by hash (all)")
    add("--pairs", choices=PAIRS, help="iconify: give each picture references: other names of its own set")
    add("--pair-references", type=int, default=usual.pair_references, metavar="N", help="how many, default %(default)s")
    add("--hold-out-cells", type=float, default=0.0, metavar="SHARE", help="iconify: of the pairs (name, set), by hash")
    add(
        "--hold-out-contents",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="iconify: of the names, in all sets, by hash",
    )
    add("--kind", choices=SOURCE_KINDS, help="which files to read, if SOURCE has several kinds")
    add("--image-column", metavar="NAME", help="of parquet files; default: recognised")
    add("--caption-column", metavar="NAME", help="of parquet files, metadata tables and .json; default: recognised")
    add(
        "--captions",
        choices=(captions.ALL, captions.LINES),
        default=usual.captions,
        help=f"{captions.LINES}: each line of a .txt or .caption file is a caption; default {captions.ALL}: the file is one",
    )
    add(
        "--tokenizer",
        type=path_option,
        metavar="DIR",
        help="count the captions' tokens with that of a Qwen2-VL folder or hub name (only reported)",
    )
    add(
        "--caption-max-tokens",
        type=int,
        metavar="N",
        help="with --tokenizer: report how many captions are longer; default as model.caption_max_tokens",
    )
    add("--max-pixels", type=int, default=usual.max_pixels, help="skip larger images, default %(default)s")
    add(
        "--max-bad",
        type=_parse_max_bad,
        default=0.05,
        metavar="FRACTION_OR_COUNT",
        help="unusable images allowed: a fraction if below 1, else a count; default %(default)s",
    )
    add("--workers", type=int, metavar="N", help="processes, default one per core")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--part", type=_parse_part, metavar="I/N", help="only the I-th of N parts, without merging")
    how.add_argument("--merge", action="store_true", help="only merge the parts that are there")
    given = parser.parse_args(arguments)
    if given.caption_max_tokens is not None and (given.caption_max_tokens < 1 or not given.tokenizer):
        parser.error("--caption-max-tokens: give at least 1, and --tokenizer, which counts them")
    defaults = usual_options(given.source, given.kind)
    if given.hold_out_cells or given.hold_out_contents:
        if given.held_out:
            parser.error("--held-out: not with --hold-out-cells or --hold-out-contents, which say what is held out")
        defaults = defaults | {"held_out": 0.0}
    for name in ("aspect_ratios", "sets"):
        if (text := getattr(given, name)) is not None:
            setattr(given, name, tuple(part.strip() for part in text.split(",") if part.strip()))
    chosen: dict[str, Any] = {
        name: getattr(given, name) if getattr(given, name) is not None else defaults.get(name, value)
        for name, value in vars(usual).items()
    }
    given.options = Options(**chosen)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code, raises UserError for code 2."""
    given = parse_arguments(arguments)
    counter = open_counter(given.tokenizer, given.caption_max_tokens) if given.tokenizer else None
    try:
        if given.merge:
            finish(given.out, given.max_bad, counter=counter)
        else:
            prepare(
                given.source,
                given.out,
                given.options,
                workers=given.workers,
                max_bad=given.max_bad,
                part=given.part,
                counter=counter,
            )
    except TooManyBad as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
