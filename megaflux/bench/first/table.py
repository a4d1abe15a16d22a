"""Facts as a human-readable table: measured beside predicted."""

from __future__ import annotations

from megaflux.bench.first.facts import FINISHED, Facts, number

WIDEST = 72  # characters of a column; what is longer pushes its own line aside


def table(facts: Facts) -> str:
    """One line per fact, by step; errors too."""
    lines = [["step", "fact", "value", "predicted", "error"]]
    order = {step: at for at, step in enumerate(dict.fromkeys(row.step for row in facts.rows()))}
    for row in sorted(facts.latest().values(), key=lambda row: order[row.step]):
        if row.fact == FINISHED and row.error is None:
            continue
        lines.append(
            [row.step, row.fact, number(row.value, row.unit), number(row.predicted, row.unit), row.error or ""]
        )
    widths = [max(len(line[i]) for line in lines if len(line[i]) <= WIDEST) for i in range(4)]
    text = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    )
    return "\n".join(text)
