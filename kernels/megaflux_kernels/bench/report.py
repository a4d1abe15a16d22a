"""Rows of a bench: printed as a table and stored as one JSON object, to which a later process can add.

{"device", "versions", "attention_backend", "commit",
 "rows": [{"bench", "arm", "shape", "metric", "value", "unit", "samples"}]}
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

FACTS = ("device", "versions", "attention_backend", "commit")


@dataclass(frozen=True)
class Row:
    """One number. arm: what was measured; shape: sizes that it depends on; samples: how many it is the median of."""

    bench: str
    arm: str
    shape: str
    metric: str
    value: float
    unit: str
    samples: int = 1


class Report:
    """The rows of this process, and those that an earlier one left in the same file."""

    def __init__(self, path: str | Path | None, facts: dict[str, Any], resume: bool = False):
        """path: JSON file, or None. facts: FACTS, of this process. resume: keep the file's rows if they were
        measured with the same facts. ValueError of one line for a file that is not a report or cannot be written."""
        self.path = Path(path) if path else None
        self.facts = {name: facts[name] for name in FACTS}
        self.rows: list[Row] = []
        if self.path is None:
            return
        if not self.path.parent.is_dir() or not os.access(self.path.parent, os.W_OK):
            raise ValueError(f"--json {path}: folder {self.path.parent} cannot be written; make it or give another")
        if self.path.exists():
            found = read(self.path)
            if resume and found:
                changed = [name for name in FACTS if found[name] != self.facts[name]]
                if changed:
                    print(f"{path}: measured with another {' and '.join(changed)}; begun anew")
                else:
                    self.rows = found["rows"]

    def has(self, bench: str, arm: str, shape: str, metric: str | None = None) -> bool:
        """Whether there is such a row, of any metric or of the one given."""
        return any((r.bench, r.arm, r.shape) == (bench, arm, shape) and metric in (None, r.metric) for r in self.rows)

    def add(self, *rows: Row) -> None:
        """Add rows, replacing older ones of the same name, and write the file."""
        names = {(r.bench, r.arm, r.shape, r.metric) for r in rows}
        self.rows = [r for r in self.rows if (r.bench, r.arm, r.shape, r.metric) not in names] + list(rows)
        self.save()

    def save(self) -> None:
        """Write the file atomically: a killed process leaves the old one or the new one."""
        if self.path is None:
            return
        content = self.facts | {"rows": [asdict(row) for row in self.rows]}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)


def read(path: Path) -> dict[str, Any] | None:
    """A report file with its rows as Row, None for an empty one. ValueError for a file that is not a report."""
    try:
        text = path.read_text()
        if not text.strip():
            return None
        found = json.loads(text)
        rows = [Row(**row) for row in found["rows"]]
        missing = [name for name in FACTS if name not in found]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--json {path}: no report of a bench ({error!r}); delete it or give another file") from None
    if missing:
        raise ValueError(f"--json {path}: no report of a bench ({missing[0]} is missing); give another file")
    return found | {"rows": rows}


def table(rows: Iterable[Row]) -> str:
    """One line per (bench, arm, shape), one column per metric in the order met."""
    rows = list(rows)
    metrics = list(dict.fromkeys(row.metric for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        lines.setdefault((row.bench, row.shape, row.arm), {})[row.metric] = _number(row)
    cells = [["bench", "shape", "arm", *metrics]]
    cells += [[*names, *(found.get(metric, "") for metric in metrics)] for names, found in lines.items()]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    aligned = (
        [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def _number(row: Row) -> str:
    if not math.isfinite(row.value):
        return str(row.value)
    if row.unit == "bytes":
        return f"{row.value / 1e9:.3f} GB" if row.value >= 1e8 else f"{row.value / 1e6:.3f} MB"
    if row.value and abs(row.value) < 1:
        return f"{row.value:.3g}"
    return f"{row.value:.2f}" if abs(row.value) < 1000 else f"{row.value:.0f}"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad input in one line, with exit code 2."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.removeprefix("argument ").split())
        print(f"error: {line}; --help lists the options", file=sys.stderr)
        sys.exit(2)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """--json and --resume."""
    parser.add_argument("--json", type=path, metavar="FILE", help="write one JSON object there")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="skip what FILE holds already, if measured on the same device, versions and commit",
    )


def path(text: str) -> str:
    """argparse type: a path; a leading `~`, which shells do not expand in `--json=~/x`, is expanded."""
    home = os.path.expanduser(text)
    if text.startswith("~") and not os.path.isabs(home):
        raise argparse.ArgumentTypeError(f"{text!r}: no such home; write the whole path, or ./{text}")
    return home


def positive(text: str) -> int:
    """argparse type: a whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def one_of(text: str, known: Iterable[str], what: str) -> list[str]:
    """Comma-separated names, each known. ArgumentTypeError naming the first that is not."""
    known = list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None or not names:
        raise argparse.ArgumentTypeError(f"unknown {what} {unknown or text!r}; use some of {','.join(known)}")
    return list(dict.fromkeys(names))


def open_report(parser: Parser, args: argparse.Namespace, facts: dict[str, Any]) -> Report:
    """The report of --json and --resume; a bad file ends the process with one line."""
    try:
        return Report(args.json, facts, args.resume)
    except ValueError as error:
        parser.error(str(error))
