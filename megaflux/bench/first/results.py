"""python -m megaflux.bench.first.results DIR: what `make gpu-first OUT=DIR` found, as a section of docs/gpu-results.md.

One section per device, between two comment lines; it replaces an earlier one of the same device, and all other text of
the file stays. Values are those of DIR/facts.jsonl, to four digits; predictions are today's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from megaflux.bench.first import predicted as predictions
from megaflux.bench.first.facts import FINISHED, Fact, Facts, number
from megaflux.bench.first.steps import TABLE
from megaflux.common.paths import path_option
from megaflux_kernels.bench.report import Parser

SMALL = "small"
DOCUMENT = Path(__file__).parents[3] / "docs" / "gpu-results.md"
VERSIONS = ("python", "cuda", "cuDNN")
ELSEWHERE = (FINISHED, *VERSIONS, "device", "torch", "triton", "transformers", "diffusers")  # written above the tables
TITLES = {
    "machine": "What the machine does at most; fp8 without what quantising costs",
    "attention": "Attention, on the strides that FLUX hands it; backward counted as twice the forward",
    "gates": "Ops against float64 in bf16, at training's token counts: largest error over what is allowed, which is twice the eager "
    "reference's and a quarter of a rounding",
    "gate-blocks": "2 + 2 blocks at full width in bf16 against float32, velocity and every gradient: largest relative errors",
    "blocks": "A step of all 57 blocks, batch 1, 1024 x 1024 px, stage 1; MFU without what is computed again",
    "compiled": "The same, diffusers' blocks under torch.compile",
    "memory": "Memory of a step beside weights, and the formula",
    "networks": "VAE and Qwen2-VL's trunk, at 1024 x 1024 px; the number is the batch",
    "ops": "Ops, caches cold; share of a copy's bytes or of a product's FLOPs in the same run",
    "loop": "The training loop: an update of 2 x 1 picture of 1024 x 1024 px, waited for after each step; a save of the first stage",
    "continued": "Going on from one checkpoint",
    "tests": "Tests on the GPU",
}
# Facts that differ in their last words alone are one line of a table: what stands between them, and the columns.
COLUMNS = {
    "machine": (", ", ("bf16", "fp8")),
    "attention": (", ", ("forward", "backward")),
    "memory": (": ", ("allocated", "reserved", "retries")),
    "gate-blocks": (": ", ("ours over diffusers'", "diffusers' own")),
    "ops": (": ", ("forward", "with backward", "share forward", "share backward")),
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m megaflux.bench.first.results", description=__doc__)
    parser.add_argument("dir", type=path_option, metavar="DIR", help="of make gpu-first OUT=DIR")
    parser.add_argument(
        "--document", type=path_option, metavar="FILE", default=str(DOCUMENT), help="default docs/gpu-results.md"
    )
    args = parser.parse_args(argv)
    facts = Facts(Path(args.dir) / "facts.jsonl")
    if not facts.path.is_file() or "device" not in _session(facts):
        parser.error(f"{facts.path}: no facts; give the OUT of a `make gpu-first`")
    if _session(facts).get("sizes") == SMALL and args.document == str(DOCUMENT):
        parser.error(f"{facts.path}: of small sizes, which no document is made of; name another with --document")
    document = Path(args.document)
    try:
        text = document.read_text() if document.exists() else "# Results on GPUs\n"
        document.write_text(placed(text, facts))
    except OSError as error:
        parser.error(f"--document {document}: {error.strerror}")
    return 0


def placed(text: str, facts: Facts) -> str:
    """A document with the section of these facts, which replaces an earlier one of the same device."""
    device = _session(facts)["device"]
    begin, end = (f"<!-- gpu-first: {device}{suffix} -->" for suffix in ("", ", end"))
    block = f"{begin}\n{section(facts)}{end}\n"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        return before + block + rest.partition(end)[2].removeprefix("\n")
    return text.rstrip("\n") + "\n\n" + block


def section(facts: Facts) -> str:
    """The section in Markdown."""
    session, latest = _session(facts), _as_predicted_now(facts)
    machine = {row.fact: row for row in latest.values() if row.step == "machine"}
    versions = ", ".join(f"{name} {machine[name].value}" for name in VERSIONS if name in machine)
    lines = [
        f"## {session['device']}: measured beside predicted",
        "",
        f"`make gpu-first`, sizes {session['sizes']}. {session['libraries']}; {versions}. {_when(facts)}",
        "Predictions are an audit's for one H100, from before any GPU had run; for memory, the formula's as an H200 has "
        "corrected it. [gpu.md](gpu.md) says how each number is measured.",
    ]
    for step, title in TITLES.items():
        mine = [row for row in latest.values() if _group(row.step) == step and row.fact not in ELSEWHERE]
        if mine:
            lines += ["", f"### {title}", *(_gates(mine) if step == "gates" else _tables(step, mine))]
    failed = [row for row in latest.values() if row.error is not None]
    if failed:
        lines += ["", "### What failed", "", *(f"- {row.step}, {row.fact}: {row.error}" for row in failed)]
    waiting = [
        f"{step}: {fact} ({number(value)})"
        for step, found in predictions.PREDICTED.items()
        for fact, value in found.items()
        if (step, fact) not in latest or latest[step, fact].error is not None
    ]
    if waiting and session["sizes"] != SMALL:
        lines += ["", "### Predictions that wait for a measurement", "", *(f"- {line}" for line in waiting)]
    return "\n".join(lines) + "\n"


def _as_predicted_now(facts: Facts) -> dict[tuple[str, str], Fact]:
    """What is known, with today's predictions: one that was corrected since is out of date in the facts."""
    found = {}
    for key, row in facts.latest().items():
        expected = predictions.of(*key)
        found[key] = row if expected is None else replace(row, predicted=expected)
    return found


def _when(facts: Facts) -> str:
    """Which steps were measured when, and of which commit."""
    now: dict[str, str] = {}
    of: dict[str, dict[str, None]] = {}
    latest = set(facts.latest().values())
    for row in facts.rows():
        if row.step == "session":
            now[row.fact] = str(row.value)
        elif row in latest:
            of.setdefault(f"{now.get('date', '')}, commit {now.get('commit', '')[:7]}", {})[_group(row.step)] = None
    return "; ".join(f"{when}: {', '.join(names)}" for when, names in of.items()) + "."


def _session(facts: Facts) -> dict[str, str]:
    return {row.fact: str(row.value) for row in facts.rows() if row.step == "session"}


def _group(step: str) -> str:
    return "gates" if TABLE.get(step, ("",))[0] == "gates" else step


def _gates(rows: list[Fact]) -> list[str]:
    """A line per op: the largest error of all token counts, and the number of cases."""
    lines = ["", "| op | largest | cases |", "|---|---|---|"]
    for op in dict.fromkeys(row.step.removeprefix("gate-") for row in rows):
        mine = [row for row in rows if row.step == f"gate-{op}"]
        failed = any(row.error for row in mine)
        largest = "failed" if failed else number(max(row.value for row in mine if isinstance(row.value, int | float)))
        lines.append(f"| `{op}` | {largest} | {len(mine)} |")
    return lines


def _tables(step: str, rows: list[Fact]) -> list[str]:
    """Facts with columns as one table, followed by the others, a line each."""
    between, columns = COLUMNS.get(step, ("", ()))
    cells: dict[str, dict[str, Fact]] = {}
    for row in rows:
        name, found, column = row.fact.rpartition(between) if between else ("", "", "")
        if found and column in columns:
            cells.setdefault(name, {})[column] = row
    beside = {row for of_name in cells.values() if len(of_name) > 1 for row in of_name.values()}
    others = [row for row in rows if row not in beside]
    lines = []
    if beside:
        lines += ["", f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name, of_name in cells.items():
            if len(of_name) > 1:
                lines.append(f"| {name} | {' | '.join(_cell(of_name.get(column)) for column in columns)} |")
    if others:
        lines += ["", "| | measured | predicted |", "|---|---|---|"]
        lines += [f"| {row.fact} | {_measured(row)} | {number(row.predicted, row.unit)} |" for row in others]
    return lines


def _cell(row: Fact | None) -> str:
    if row is None:
        return ""
    expected = "" if row.predicted is None else f" (predicted {number(row.predicted)})"
    return _measured(row) + expected


def _measured(row: Fact) -> str:
    return "failed" if row.error is not None else number(row.value, row.unit)


if __name__ == "__main__":
    sys.exit(main())
