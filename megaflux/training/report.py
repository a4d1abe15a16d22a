"""Where the wall time of a run went: goodput, attempts and faults, from RUN/events.jsonl.

`accounting` says what each row counts.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from megaflux.common.command import Parser
from megaflux.common.errors import UserError, exit_on_user_error, one_line
from megaflux.common.paths import path_option
from megaflux.config.parse import load_yaml
from megaflux.training.accounting import SHARES, Report, account, whole
from megaflux.training.survival import events as event_log
from megaflux.training.text import duration, write_json_report

FAULTS_SHOWN, ATTEMPTS_SHOWN = 5, 20  # newest ones printed


def main() -> None:
    """Print the report of a run's folder; UserError where it holds no events or the JSON file cannot be written."""
    parser = Parser(prog="python -m megaflux.training.report", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=path_option, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--json", type=path_option, metavar="FILE", help="write the same as JSON, and every attempt and fault"
    )
    args = parser.parse_args()
    events, skipped = _read(Path(args.run))
    report = account(events)
    batch, trouble = _batch_size(Path(args.run))
    _print(args.run, report, batch)
    if report.backwards:
        print(f"note: the clock was set back, by {duration(report.backwards)} in total; that does not count as time")
    if skipped:
        print(f"note: {skipped} lines of {event_log.NAME} are torn or foreign and were skipped")
    if trouble:
        print(f"note: no images/s: {trouble}")
    if args.json:
        write_json_report(args.json, _as_json(args.run, report, batch, skipped))


def _read(run: Path) -> tuple[list[dict[str, Any]], int]:
    remedy = "give the folder of a run (its run.dir) that has started at least once"
    if not run.is_dir():
        raise UserError(f"{run}: {'not a folder' if run.exists() else 'no such folder'}; {remedy}")
    try:
        events, skipped = event_log.parse((run / event_log.NAME).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run}: holds no {event_log.NAME}; {remedy}") from None
    except OSError as error:
        raise UserError(f"{run / event_log.NAME}: {error.strerror}; make it a readable file") from None
    if not events:
        raise UserError(f"{run / event_log.NAME}: holds no event; {remedy}")
    return events, skipped


def _batch_size(run: Path) -> tuple[int | None, str | None]:
    """train.global_batch_size of the run's config.yaml, or None and the reason."""
    try:
        section = load_yaml(str(run / "config.yaml")).get("train")
    except UserError as error:
        return None, str(error)
    size = whole(section.get("global_batch_size")) if isinstance(section, dict) else None
    return (size, None) if size and size > 0 else (None, f"{run}/config.yaml gives no train.global_batch_size")


def _speeds(report: Report, batch: int | None) -> dict[str, float] | None:
    """Images/s: of updates not undone over the wall time, and of all updates over the time in updates."""
    inside = sum(report.seconds[name] for name in ("productive", "data_wait", "lost"))
    if not batch or not inside:
        return None
    return {"wall": report.kept * batch / report.wall, "updating": report.done * batch / inside}


def _print(run: str, report: Report, batch: int | None) -> None:
    attempts = report.attempts
    print(
        f"{run}: {_when(attempts[0].begin)} to {_when(attempts[-1].end)}, {duration(report.wall)}; "
        f"{len(attempts)} attempt{'s' * (len(attempts) > 1)}, the last: {attempts[-1].ended}"
    )
    print(f"\n{'where the wall time went':<40}{'share':>8}{'time':>16}")
    for name, text in SHARES.items():
        print(f"  {text:<38}{report.share(name):>8.2%}{duration(report.seconds[name]):>16}")
    print(f"  {'total':<38}{float(report.wall > 0):>8.2%}{duration(report.wall):>16}")
    print(
        f"\ngoodput {report.share('productive'):.2%}; {report.kept:.0f} updates, {report.done - report.kept:.0f} more done again"
    )
    if speeds := _speeds(report, batch):
        print(
            f"{speeds['wall']:.3g} images/s over the wall time, {speeds['updating']:.3g} while updating "
            f"({batch} images an update)"
        )

    print(f"\n{'attempt':>7}  {'started':<21}{'lasted':>14}{'from':>10}{'to':>10}{'ranks':>7}  ended")
    if len(attempts) > ATTEMPTS_SHOWN:
        print(f"{'...':>7}  {len(attempts) - ATTEMPTS_SHOWN} earlier: --json FILE lists them")
    for i, a in list(enumerate(attempts, 1))[-ATTEMPTS_SHOWN:]:
        first, last, size = ("?" if value is None else value for value in (a.first, a.last, a.world_size))
        print(f"{i:>7}  {_when(a.begin):<21}{duration(a.seconds):>14}{first:>10}{last:>10}{size:>7}  {a.ended}")

    print("\nfaults: " + (", ".join(f"{what} {n}" for what, n in report.counts().items()) or "none"))
    for fault in report.faults[-FAULTS_SHOWN:]:
        words = str(fault.get("detail", ""))
        print(
            f"  {_when(fault['time'])}  update {fault.get('update', '?')}: {fault.get('what', '?')}"
            + (f": {one_line(words)}" if words else "")
        )


def _as_json(run: str, report: Report, batch: int | None, skipped: int) -> dict[str, Any]:
    return {
        "run": run,
        "wall_seconds": report.wall,
        "goodput": report.share("productive"),
        "seconds": report.seconds,
        "shares": {name: report.share(name) for name in SHARES},
        "updates": {"kept": report.kept, "done_again": report.done - report.kept},
        "images_per_second": _speeds(report, batch),
        "attempts": [asdict(attempt) for attempt in report.attempts],
        "faults": {"counts": report.counts(), "all": report.faults},
        "clock_put_back_seconds": report.backwards,
        "lines_passed_over": skipped,
    }


def _when(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # the clock was set to the year 60000
        return "?"


if __name__ == "__main__":
    exit_on_user_error(main)
