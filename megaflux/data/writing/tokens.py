"""Lengths of captions in tokens, counted while chunks are written.

    OUT/tokens/chunk-00012.json     how many captions of the chunk have so many tokens, of which tokenizer

Counting is no part of the dataset: no shard, report or setting depends on it, and a chunk without a count can be counted later
(writing/caption_report.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megaflux.common.files import write_json


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of captions as training does."""

    name: str
    """The tokenizer's folder or hub name, as given."""
    fingerprint: str
    """Of its content."""
    count: Callable[[str], int]
    limit: int
    """Tokens of a caption that training keeps (model.caption_max_tokens)."""

    def lengths(self, captions: Iterable[str]) -> Counter[int]:
        """Length in tokens -> how many of the captions have it."""
        return Counter(self.count(caption) for caption in captions)


@dataclass(frozen=True)
class Counted:
    """The lengths of a chunk's captions, and the counter's name, fingerprint and limit."""

    name: str
    fingerprint: str
    limit: int
    lengths: Counter[int]


def open_counter(source: str, limit: int | None = None) -> TokenCounter:
    """The counter of a Qwen2-VL folder or hub name, or of a folder with its tokenizer's files alone. limit: None for
    training's default. Raises UserError, naming the source, where it has no tokenizer."""
    from megaflux.config.schema import Model
    from megaflux.models.vlm_folder import open_caption_tokens  # here, because it imports transformers

    tokens = open_caption_tokens(source)
    if limit is None:
        limit = Model.model_fields["caption_max_tokens"].default
    return TokenCounter(source, tokens.fingerprint, lambda caption: len(tokens.ids(caption)), limit)


def write_counted(out: Path, chunk: str, counter: TokenCounter, lengths: Counter[int]) -> None:
    """Keep the lengths of a chunk's captions, to be read by `read_counted`. chunk: its name."""
    path = _path(out, chunk)
    path.parent.mkdir(exist_ok=True)
    content = {"name": counter.name, "fingerprint": counter.fingerprint, "limit": counter.limit}
    write_json(path, content | {"lengths": {str(length): count for length, count in lengths.items()}})


def read_counted(out: Path, chunk: str) -> Counted | None:
    """What was kept of a chunk; None where it was not counted, or the file cannot be read."""
    try:
        content = json.loads(_path(out, chunk).read_text())
        lengths = Counter({int(length): int(count) for length, count in content["lengths"].items()})
        return Counted(str(content["name"]), str(content["fingerprint"]), int(content["limit"]), lengths)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _path(out: Path, chunk: str) -> Path:
    return out / "tokens" / f"{chunk}.json"
