"""RUN/events.jsonl and the report on it."""

import json
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflux.common.errors import UserError
from megaflux.training import report as reporting
from megaflux.training.accounting import SHARES, account
from megaflux.training.survival.events import Events, Fault, parse, read

ANY = settings(deadline=None, database=None, max_examples=150)  # cores are shared, so no test has a deadline

ANYTHING = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.integers(), st.floats(), st.just(10**400))
UPDATES = st.one_of(st.integers(0, 30), ANYTHING)
DURATIONS = st.one_of(st.floats(0, 50), ANYTHING)
KINDS = ("start", "ready", "progress", "save", "validation", "fault", "stop", "other")
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(KINDS), "time": st.one_of(st.integers(0, 100), st.floats(0, 9e10))},
        optional={
            "update": UPDATES,
            "seconds": DURATIONS,
            "data_wait": DURATIONS,
            "world_size": ANYTHING,
            "pid": ANYTHING,
            "host": ANYTHING,
            "why": ANYTHING,
            "detail": ANYTHING,
            "what": st.one_of(st.sampled_from(list(Fault)), ANYTHING),
        },
    ),
    max_size=30,
)


def say(*events: tuple) -> list[dict]:
    """Events from (time, kind) or (time, kind, facts)."""
    return [{"time": time, "kind": kind, **(rest[0] if rest else {})} for time, kind, *rest in events]


def write(folder: Path, events: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def start(update: int, **facts) -> dict:
    return {"update": update, "world_size": 8, "pid": 1, "host": "far away", **facts}


# One attempt killed at update 9 (checkpoint at 5), one that a signal ended.
STORY = say(
    (1000, "start", start(0)),
    (1010, "validation", {"update": 0, "seconds": 4}),
    (1020, "ready", {"update": 0}),
    (1070, "progress", {"update": 4, "seconds": 50, "data_wait": 2}),
    (1080, "save", {"update": 5, "seconds": 3}),
    (1113, "progress", {"update": 8, "seconds": 40, "data_wait": 8}),
    (1120, "fault", {"what": "spike", "update": 9, "detail": "norm 7.1\nis 6 sigma"}),
    (1200, "start", start(5, world_size=4)),
    (1203, "fault", {"what": "checkpoint_refused", "update": 5, "detail": "damaged"}),
    (1230, "ready", {"update": 5}),
    (1280, "progress", {"update": 8, "seconds": 45, "data_wait": 0}),
    (1290, "stop", {"update": 8, "why": "signal SIGTERM"}),
)


def test_every_second_is_where_it_was_spent():
    report = account(STORY)
    assert report.seconds == pytest.approx(
        {
            "productive": 48 + 0.25 * 32 + 45,  # of the second progress (updates 4 to 8), 5 counts and 6, 7, 8 do not
            "data_wait": 2 + 0.25 * 8,
            "start_up": 16 + 30,
            "saves": 3,
            "validation": 4,
            "lost": 0.75 * 40,
            "down": 80,
            "unaccounted": 7 + 5 + 10,
        }
    )
    assert report.wall == 290
    assert (report.kept, report.done) == (8, 11)
    assert [(a.first, a.last, a.world_size, a.seconds, a.ended) for a in report.attempts] == [
        (0, 8, 8, 120, "killed (no stop)"),
        (5, 8, 4, 90, "signal SIGTERM"),
    ]
    assert report.counts() == {"spike": 1, "checkpoint_refused": 1}


def test_a_run_that_went_back_within_an_attempt_did_its_updates_twice():
    report = account(
        say(
            (0, "start", start(0)),
            (5, "ready", {"update": 0}),
            (15, "progress", {"update": 10, "seconds": 10}),
            (16, "fault", {"what": "rollback", "update": 4}),
            (20, "ready", {"update": 4}),
            (26, "progress", {"update": 10, "seconds": 6}),
            (26, "ready", {"update": 10}),  # a new stage
            (28, "progress", {"update": 12, "seconds": 2}),
            (28, "stop", {"update": 12, "why": "done"}),
        )
    )
    assert (report.seconds["lost"], report.seconds["productive"]) == (6, 12)
    assert (report.seconds["start_up"], report.seconds["unaccounted"]) == (9, 1)
    assert (report.kept, report.done) == (12, 18)


@ANY
@given(EVENTS)
def test_shares_of_any_events_add_up_to_the_wall_time(events):
    with tempfile.TemporaryDirectory() as folder:
        readable = read(write(Path(folder), events))
    assert len(readable) == len(events)
    report = account(readable, now=0)
    gaps = [max(0.0, later["time"] - before["time"]) for before, later in zip(events, events[1:], strict=False)]
    assert report.wall == pytest.approx(sum(gaps))
    assert set(report.seconds) == set(SHARES) and min(report.seconds.values()) >= 0
    assert sum(report.share(name) for name in SHARES) == pytest.approx(1 if report.wall else 0)
    assert 0 <= report.kept <= report.done
    assert sum(a.seconds for a in report.attempts) + report.seconds["down"] == pytest.approx(report.wall)
    json.dumps(reporting._as_json("run", report, 8, 0))
    reporting._print("run", report, 8) if events else None


@ANY
@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 7), st.integers(1, 9), st.data())
def test_a_second_counts_where_its_update_was_not_done_again(lengths, every, save_every, data):
    """Updates of one second each; attempts of these lengths, each from a checkpoint of an earlier one."""
    events, clock, saved, standing, undone = [], 0, [0], set(), 0
    for length in lengths:
        begin = data.draw(st.sampled_from(saved))
        undone += len({u for u in standing if u > begin})
        standing, saved = {u for u in standing if u <= begin}, [u for u in saved if u <= begin]
        events += say((clock, "start", start(begin)), (clock, "ready", {"update": begin}))
        told = begin
        for update in range(begin + 1, begin + length + 1):
            clock += 1
            if (update - begin) % every == 0:
                events += say((clock, "progress", {"update": update, "seconds": every, "data_wait": 0}))
                standing |= set(range(told + 1, update + 1))
                told = update
            if update % save_every == 0:
                clock += 5
                events += say((clock, "save", {"update": update, "seconds": 5}))
                saved.append(update)
    report = account(events)
    assert report.seconds["productive"] == pytest.approx(len(standing)) == pytest.approx(report.kept)
    assert report.seconds["lost"] == pytest.approx(undone)


def test_a_clock_put_back_is_no_time_and_is_told(tmp_path, capsys):
    events = say(
        (5000, "start", start(0)),
        (5010, "ready"),
        (2000, "progress", {"update": 1, "seconds": 9}),
        (2030, "progress", {"update": 2, "seconds": 30}),
    )
    report = account(events)
    assert (report.wall, report.backwards) == (40, 3010)
    assert report.seconds["productive"] == 30
    assert "the clock was set back, by 50.2 minutes" in table(write(tmp_path / "run", events), capsys)


@pytest.mark.parametrize(
    "facts, age, ended",
    [
        ({"host": socket.gethostname(), "pid": os.getpid()}, 0, "still going"),
        ({"host": socket.gethostname(), "pid": os.getpid()}, 10**6, "killed (no stop)"),  # its number, but younger
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, 0, "killed (no stop)"),
        ({"host": "far away"}, 60, "still going"),
        ({"host": "far away"}, 3600, "killed (no stop)"),
        ({"pid": None}, 60, "still going"),
    ],
)
def test_how_the_last_attempt_stands(facts, age, ended):
    now = time.time()
    events = say((now - age - 1000, "start", start(0)), (now - age, "start", start(0, **facts)))
    assert [a.ended for a in account(events).attempts] == ["killed (no stop)", ended]
    events += say((now - age, "stop", {"update": 3, "why": "error"}))
    assert account(events).attempts[-1].ended == "error"


@ANY
@given(st.lists(st.dictionaries(st.sampled_from(["update", "detail"]), ANYTHING), max_size=5), st.data())
def test_a_kill_costs_at_most_the_last_line_and_none_after_it(facts, data):
    with tempfile.TemporaryDirectory() as folder:
        events, path = Events(folder, enabled=True), Path(folder) / "events.jsonl"
        for i, some in enumerate(facts):
            events.record("fault", number=i, **some)
        content = path.read_bytes() if facts else b""
        cut = min(data.draw(st.integers(0, 400)), len(content))
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        kept = [event["number"] for event in read(folder)]
        assert kept in (list(range(whole)), list(range(whole + 1)))  # the second: only its line's end was cut
        Events(folder, enabled=True).record("start", number=99)
        assert [event["number"] for event in read(folder)] == [*kept, 99]


@ANY
@given(st.binary(max_size=200))
def test_no_bytes_stop_the_reading(content):
    line = b'{"time": 7.5, "kind": "ready"}'
    events, skipped = parse(content + b"\n" + line + b"\n")
    assert events[-1] == {"time": 7.5, "kind": "ready"}
    assert skipped <= content.count(b"\n") + 1
    account(events)


def test_foreign_lines_are_skipped_and_counted():
    foreign = (
        b"[1]",
        b'{"kind": "ready"}',
        b'{"time": NaN, "kind": "ready"}',
        b'{"time": true, "kind": "ready"}',
        b"\0\0",
        b'{"time": 1, "kind": 3}',
        b'{"time": 1e300, "kind": "ready"}',
        b"[" * 9999,
        b"\xff",
        b'{"time": 1, "ki',
    )
    assert parse(b"\n".join(foreign)) == ([], len(foreign))


def test_a_line_says_when_and_what(tmp_path):
    before = time.time()
    Events(tmp_path, enabled=True).record("save", update=4, seconds=math.inf, where=tmp_path, detail="über\n\ud800")
    Events(tmp_path, enabled=True).record("start", time=17.5)
    Events(tmp_path, enabled=False).record("ready")
    first, second = read(tmp_path)
    assert list(first) == ["time", "kind", "update", "seconds", "where", "detail"]
    assert before <= first["time"] <= time.time()
    assert (first["update"], first["where"], first["detail"]) == (4, str(tmp_path), "über\n\ud800")
    assert second == {"time": 17.5, "kind": "start"}


def test_a_full_disk_is_one_warning(tmp_path, caplog):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    missing = Events(tmp_path / "none", enabled=True)
    with caplog.at_level(logging.WARNING, "megaflux"):
        for events in (Events(tmp_path, enabled=True), missing):
            for _ in range(3):
                events.record("ready", update=1)
    assert len(caplog.records) == 2
    assert "No space left" in caplog.text and "No such file" in caplog.text


def table(run: Path, capsys, *options: str) -> str:
    sys.argv, kept = ["report", str(run), *options], sys.argv
    try:
        reporting.main()
    finally:
        sys.argv = kept
    return capsys.readouterr().out


def test_the_table(tmp_path, capsys):
    run = write(tmp_path / "run", STORY)
    (run / "config.yaml").write_text("train: {global_batch_size: 16}\n")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 13')
    text = table(run, capsys, "--json", str(tmp_path / "report.json"))
    lines = text.splitlines()
    assert "4.83 minutes; 2 attempts, the last: signal SIGTERM" in lines[0]
    assert any(line.split() == ["down", "between", "attempts", "27.59%", "1.33", "minutes"] for line in lines)
    assert any(line.split() == ["total", "100.00%", "4.83", "minutes"] for line in lines)
    assert "goodput 34.83%; 8 updates, 3 more done again" in lines
    assert "0.441 images/s over the wall time, 1.3 while updating (16 images an update)" in lines
    assert "faults: spike 1, checkpoint_refused 1" in lines
    assert any(line.endswith("update 9: spike: norm 7.1 is 6 sigma") for line in lines)
    assert "note: 1 lines of events.jsonl are torn or foreign and were skipped" in lines

    values = json.loads((tmp_path / "report.json").read_text())
    assert sum(values["shares"].values()) == pytest.approx(1)
    assert sum(values["seconds"].values()) == pytest.approx(values["wall_seconds"]) == 290
    assert [a["ended"] for a in values["attempts"]] == ["killed (no stop)", "signal SIGTERM"]
    assert values["images_per_second"]["wall"] == pytest.approx(8 * 16 / 290)
    assert values["faults"]["counts"] == {"spike": 1, "checkpoint_refused": 1}


def test_a_month_of_attempts_stays_readable(tmp_path, capsys):
    events = [event | {"time": event["time"] + 400 * i} for i in range(60) for event in STORY]
    lines = table(write(tmp_path / "run", events), capsys).splitlines()
    assert len(lines) < 55
    assert any("100 earlier: --json FILE lists them" in line for line in lines)
    assert any(line.startswith("note: no images/s: ") and "config.yaml" in line for line in lines)


@pytest.mark.parametrize(
    "config", ["train: 3", "train: {global_batch_size: many}", "a: [", "train: {global_batch_size: 0}"]
)
def test_a_run_without_a_batch_size_has_no_images_per_second(tmp_path, capsys, config):
    run = write(tmp_path / "run", STORY)
    (run / "config.yaml").write_text(config)
    text = table(run, capsys)
    assert "note: no images/s: " in text and "images/s over" not in text


def test_bad_input_names_the_folder_and_the_mend(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder" / "events.jsonl").mkdir(parents=True)
    write(tmp_path / "blank", [])
    for name, words in {
        "none": "no such folder",
        "file": "not a folder",
        "empty": "holds no events.jsonl",
        "blank": "holds no event;",
        "folder": "Is a directory",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            table(tmp_path / name, capsys)
        assert str(tmp_path / name) in str(caught.value) and "; " in str(caught.value)
    run = write(tmp_path / "run", STORY)
    with pytest.raises(UserError, match="--json"):
        table(run, capsys, "--json", str(tmp_path / "no" / "x.json"))


def test_the_command_is_quick_and_ends_as_the_others(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megaflux.training.report", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    imports, other = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else other).append(line)
    assert other == [
        f"error: {tmp_path}: holds no events.jsonl; give the folder of a run (its run.dir) that has started "
        "at least once"
    ]
    assert not any(line.split()[-1] in ("torch", "deepspeed", "numpy") for line in imports)
