"""How many captions the images of a dataset have, and how long they are, over all its chunks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from megaflux.common.errors import UserError
from megaflux.data.captions import split
from megaflux.data.storage.caption_stats import CaptionStats, Lengths, measured
from megaflux.data.storage.dataset import SPLITS, read_dataset_info
from megaflux.data.storage.shards import read_shard
from megaflux.data.writing import chunks
from megaflux.data.writing.chunks import Report, Target
from megaflux.data.writing.tokens import Counted, TokenCounter, read_counted

READ_AGAIN = 32  # chunks whose captions are read from their shards; of more, as many that lie evenly apart


def caption_stats(target: Target, reports: Sequence[Report], counter: TokenCounter | None) -> CaptionStats | None:
    """The statistics of a dataset's captions, lengths in tokens where they can be had, else in characters; None where an
    earlier version wrote chunks, whose reports do not count them.

    counter: None for the lengths that are there: of an earlier merge, or of the command that wrote the chunks. Raises
    UserError where some chunks have images with several captions, and others are of a version that stored one."""
    numbers = [report.images_by_captions for report in reports]
    known = [counted for counted in numbers if counted is not None]
    images = _added(known)
    if len(known) < len(reports):
        if any(number > 1 for number in images):
            raise UserError(
                f"{target.out}: some of its chunks are of an earlier version, which stored only the first of several captions, "
                "and some are not; prepare the data into a new folder"
            )
        return None
    lengths = _in_tokens(target, reports, counter) if images.keys() - {0} else None
    if lengths is None:
        lengths = measured(_added([report.characters or {} for report in reports]), "characters")
    return CaptionStats(images, lengths)


def _added(counted: Sequence[Mapping[str, int]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for one in counted:
        for number, count in one.items():
            found[int(number)] += count
    return found


def _in_tokens(target: Target, reports: Sequence[Report], counter: TokenCounter | None) -> Lengths | None:
    there = {number: read_counted(target.out, chunks.name_of(number)) for number in range(len(reports))}
    if counter is None:
        return _of_earlier(target, list(there.values()))
    counts: Counter[int] = Counter()
    missing = []
    for number, kept in there.items():
        if kept is not None and kept.fingerprint == counter.fingerprint:
            counts.update(kept.lengths)
        else:
            missing.append(number)
    if len(missing) > READ_AGAIN:
        missing = [missing[i * len(missing) // READ_AGAIN] for i in range(READ_AGAIN)]
    for number in missing:
        for stored in _stored(target, reports[number]):
            counts.update(counter.lengths(split(stored)))
    return measured(counts, "tokens", counter.name, counter.limit)


def _of_earlier(target: Target, there: Sequence[Counted | None]) -> Lengths | None:
    """Lengths in tokens of a finished dataset, or of chunks that were all counted with one tokenizer."""
    if (target.out / "dataset.json").exists():
        stats = read_dataset_info(target.out).caption_stats
        if stats and stats.lengths and stats.lengths.unit == "tokens":
            return stats.lengths
    counted = [one for one in there if one is not None]
    if len(counted) < len(there) or len({one.fingerprint for one in counted}) != 1:
        return None
    total: Counter[int] = Counter()
    for one in counted:
        total.update(one.lengths)
    return measured(total, "tokens", counted[0].name, counted[0].limit)


def _stored(target: Target, report: Report) -> Iterator[str]:
    """The captions of a chunk's images, read from its shards. Raises UserError for a damaged one."""
    for split_name in SPLITS:
        for bucket in target.buckets:
            folder = target.out / split_name / bucket.folder
            for shard in report.shards[split_name].get(bucket.name, []):
                for sample in read_shard(folder, shard):
                    yield sample["caption"]
