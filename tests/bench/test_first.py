"""make gpu-first: facts that survive what happens to their processes, and the whole of it at a small size."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import pytest

from megaflux.bench.first import __main__ as first
from megaflux.bench.first import runner, steps
from megaflux.bench.first.facts import FINISHED, Fact, Facts, GpuLost, Recorder
from megaflux.bench.first.runner import Outcome, Step
from tests.bench.runs import ROOT, WITHOUT

FIELDS = ["step", "fact", "value", "unit", "predicted", "seconds", "error"]
SCRIPT = str(Path(__file__).with_name("first_step.py"))
BLOCKED = (
    WITHOUT
    + """
step = sys.orig_argv[sys.orig_argv.index("--step") + 1] if "--step" in sys.orig_argv else None
if step is not None and step not in ("loop", "continued"):  # a process of the first part
    hide()
"""
)


def fake(kind: str, out: Path, limit: float = 60, **options) -> Step:
    return Step(kind, [sys.executable, SCRIPT, kind, str(out)], limit, **options)


def values(facts: Facts, step: str) -> dict:
    return {row.fact: row.error or row.value for row in facts.latest().values() if row.step == step}


# --- the file of facts ----------------------------------------------------------------------------------------------


def test_a_fact_is_a_line_of_seven_fields(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    facts.add(Fact("machine", "copy", 3000.0, "GB/s", 2900.0, 1.5))
    line = json.loads(facts.path.read_text())
    assert list(line) == FIELDS and line["value"] == 3000.0 and line["predicted"] == 2900.0 and line["error"] is None


def test_a_line_torn_by_a_death_costs_itself_alone(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    facts.add(Fact("a", "one", 1))
    with open(facts.path, "a") as file:
        file.write('{"step": "a", "fact": "tw')
    facts.add(Fact("a", "three", 3))
    assert values(facts, "a") == {"one": 1, "three": 3}


def test_a_number_that_is_none_is_an_error(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    facts.add(Fact("a", "one", math.nan))
    assert values(facts, "a") == {"one": "came out as nan"}
    assert "NaN" not in facts.path.read_text()  # which is no JSON


def test_what_is_known_is_not_written_again_and_what_failed_may_be(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    for fact in (Fact("a", "one", 1), Fact("a", "one", 1), Fact("a", "two", error="no"), Fact("a", "two", 2)):
        facts.add(fact)
    assert [(row.fact, row.value, row.error) for row in facts.rows()] == [
        ("one", 1, None),
        ("two", None, "no"),
        ("two", 2, None),
    ]
    assert Recorder(facts, "a", True, since=3).missing("one", "two", "three") == ["three"]


def _add_many(path: str, step: str) -> None:
    for number in range(50):
        Facts(path).add(Fact(step, f"fact {number}", "x" * 200))


def test_processes_write_side_by_side(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_add_many, [str(tmp_path / "f")] * 4, "abcd"))
    rows = Facts(tmp_path / "f").rows()
    assert len(rows) == 200 and len({row.key for row in rows}) == 200


def test_an_error_costs_its_own_fact_and_one_of_the_gpu_its_process(tmp_path):
    recorder = Recorder(Facts(tmp_path / "f"), "a", True)
    with recorder.measuring("one", "two"):
        raise ValueError("a line\nand another")
    with pytest.raises(GpuLost), recorder.measuring("three"):
        raise RuntimeError("CUDA error: unspecified launch failure")
    assert values(recorder.facts, "a") == {
        "one": "ValueError: a line and another",
        "two": "ValueError: a line and another",
        "three": "RuntimeError: CUDA error: unspecified launch failure",
    }
    assert not recorder.current.exists()


def test_a_fact_that_is_promised_and_does_not_come_is_an_error(tmp_path):
    recorder = Recorder(Facts(tmp_path / "f"), "a", True)
    with recorder.measuring("one", "two"):
        recorder.add("one", 1)
    assert values(recorder.facts, "a") == {"one": 1, "two": "the step ended without measuring it"}


def test_an_error_when_all_is_known_goes_on_up(tmp_path):
    recorder = Recorder(Facts(tmp_path / "f"), "a", True)
    with pytest.raises(ValueError), recorder.measuring("one"):
        recorder.add("one", 1)
        raise ValueError("after it")


def test_predictions_are_for_the_full_sizes_alone(tmp_path):
    facts = Facts(tmp_path / "f")
    Recorder(facts, "blocks", small=True).add("ours-none", 3.0, "ms")
    assert facts.rows()[-1].predicted is None
    Recorder(Facts(tmp_path / "g"), "blocks", small=False).add("ours-none", 300.0, "ms")
    assert Facts(tmp_path / "g").rows()[-1].predicted == 318.0


# --- processes ------------------------------------------------------------------------------------------------------


def test_whatever_happens_to_a_step_the_others_go_on(tmp_path):
    facts, log = Facts(tmp_path / "facts.jsonl"), tmp_path / "log.txt"
    kinds = ["fails", "dies", "breaks", "useless"]
    todo = [
        fake("hangs", tmp_path, limit=8),
        *(fake(kind, tmp_path, group="all") for kind in kinds),
        fake("right", tmp_path),
        fake("elsewhere", tmp_path, needs=("no_such_module",)),
    ]
    outcome = Outcome()
    runner.run(todo, facts, log, 120, outcome)
    rest = {"one": 1.5, "three": 1.5}
    assert values(facts, "fails") == rest | {
        "two": "ValueError: this one is not to be had",
        FINISHED: pytest.approx(0, abs=60),
    }
    killed = values(facts, "dies")
    assert killed.pop(FINISHED) > 0 and killed == rest | {"two": "its process was ended by signal SIGKILL"}
    broken = values(facts, "breaks")
    assert broken.pop(FINISHED) > 0 and broken == rest | {
        "two": "RuntimeError: CUDA error: an illegal memory access was encountered"
    }
    hung = values(facts, "hangs")
    assert hung["one"] == 1.5 and "three" not in hung and "its limit" in hung["two"] and "its limit" in hung[FINISHED]
    assert "ended with code 1" in values(facts, "useless")[FINISHED]
    assert values(facts, "right")[FINISHED] > 0
    assert outcome.left_out == {"elsewhere": "no no_such_module here"} and not values(facts, "elsewhere")
    assert "nothing here works" in log.read_text()

    # Given again: what is right is left alone, and what was missing is found.
    (tmp_path / "mended").touch()
    before = len(facts.rows())
    runner.run(todo, facts, log, 120, Outcome())
    assert all(runner.is_finished(facts, step.name) for step in todo[:-1])
    new = facts.rows()[before:]
    assert {(row.step, row.fact) for row in new if row.fact != FINISHED} == {
        ("hangs", "two"),
        ("hangs", "three"),
        ("fails", "two"),
        ("dies", "two"),
        ("breaks", "two"),
    }
    assert not any(row.error for row in new)


def test_no_step_begins_after_the_time_is_up(tmp_path):
    facts = Facts(tmp_path / "facts.jsonl")
    outcome = Outcome()
    runner.run([fake("hangs", tmp_path), fake("right", tmp_path)], facts, tmp_path / "log", 6, outcome)
    assert "its limit" in values(facts, "hangs")[FINISHED]
    assert outcome.left_out == {"right": "no time left"} and not values(facts, "right")


# --- the whole, small -----------------------------------------------------------------------------------------------


def start(out: Path, work: Path, chosen: str, **options) -> subprocess.Popen:
    (out.parent / "site").mkdir(exist_ok=True)
    (out.parent / "site" / "sitecustomize.py").write_text(BLOCKED)
    environment = os.environ | {"PYTHONPATH": str(out.parent / "site")}
    return subprocess.Popen(
        [
            "make",
            "gpu-first",
            "SMALL=1",
            f"OUT={out}",
            f"WORK={work}",
            f"STEPS={chosen}",
            f"GPU_PYTHON={sys.executable}",
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def of_this_run(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(folder) in " ".join(process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.parametrize("chosen", ["gate-modulate,loop", pytest.param("", marks=pytest.mark.slow)])
def test_the_whole_at_a_small_size_killed_and_given_again(tmp_path, chosen):
    """chosen: steps; "": all of them."""
    out, work = tmp_path / "out", tmp_path / "work"
    facts = Facts(out / "facts.jsonl")
    process = start(out, work, chosen, start_new_session=True)
    while not any("megaflux.bench.first.training" in " ".join(other.cmdline()) for other in of_this_run(tmp_path)):
        time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
    refused = subprocess.run(
        [sys.executable, "-m", "megaflux.bench.first", "--small", "--out", str(out), "--work", str(work)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "another invocation is at work there" in refused.stderr
    os.killpg(
        process.pid, signal.SIGKILL
    )  # make, and the runner; steps, and what they start, are in their own sessions
    process.wait()
    deadline = time.monotonic() + 30
    while of_this_run(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not of_this_run(tmp_path)  # no training is left on the GPU

    said = start(out, work, chosen)
    text, _ = said.communicate()
    rows = facts.rows()
    assert said.returncode == 0, text
    assert not [row for row in rows if row.error], text
    assert {row.step for row in rows} == {"session", *(chosen.split(",") if chosen else steps.names(small=True))}
    assert len([row for row in rows if row.step != "session" and row.fact != FINISHED]) >= (20 if chosen else 30)
    assert len({row.key for row in rows}) == len(rows)  # nothing twice, although a step was cut off
    assert "left out" not in text
    assert sorted(file.name for file in out.iterdir()) == [".lock", "facts.jsonl", "log.txt", "table.txt"]
    kept = ["loop"] if chosen else []  # for the step `continued`, which clears it away
    assert sorted(file.name for file in work.iterdir()) == [".lock", *kept]
    known = values(facts, "loop")
    assert known["trains"] == 5 and known["faults"] == 0
    assert all(
        known[f"update: {step}"] > 0 for step in ("2 latents", "3 condition", "5 forward", "6 backward", "7 optimizer")
    )
    assert known["save: write"] > 0 and known["save: hash"] > 0 and known["save: files"] > 0
    gates = [row for row in rows if row.step.startswith("gate-") and row.fact != FINISHED and row.step != "gate-blocks"]
    assert (len(gates) == 3 or not chosen) and all(0 <= row.value <= 1 for row in gates)
    if not chosen:
        own = [row.value for row in rows if row.fact.endswith("diffusers' own")]
        assert own and max(own) < 0.1  # or the float32 reference is one of something else
        assert values(facts, "continued")["two continuations are bit-equal"] is True  # a CPU adds in one order
        assert len(gates) >= 4 * 6 and "ours-none, 64 + 25 tokens: ours over diffusers'" in text

    again = start(out, work, chosen)
    text, _ = again.communicate()
    assert again.returncode == 0 and facts.rows() == rows, text


def test_facts_of_something_else_do_not_join(tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--steps", "machine", "--seconds", "1"]
    monkeypatch.setattr(first, "run", lambda *_: None)
    monkeypatch.setattr(first, "gpu_name", lambda: "GPU A")
    assert first.main([*command, "--commit", "one"]) == 1  # nothing was measured
    capsys.readouterr()
    for change, words in (
        (("gpu_name", lambda: "GPU B"), "holds facts of device GPU A, and this is GPU B"),
        (("libraries", lambda: "torch 1"), "holds facts of libraries torch"),
        (None, "holds facts of sizes FLUX.1-dev, and this is small"),
    ):
        with monkeypatch.context() as other, pytest.raises(SystemExit) as stopped:
            if change:
                other.setattr(first, *change)
            first.main(command if change else [*command, "--small"])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    # What is finished is not put down to a later commit.
    facts = Facts(tmp_path / "out" / "facts.jsonl")
    facts.add(Fact("machine", FINISHED, 1.0, "s"))
    assert first.main([*command, "--commit", "two"]) == 0
    assert [row.value for row in facts.rows() if row.fact == "commit"] == ["one"]
    # A step that is said to be out of date begins anew.
    assert first.main([*command, "--commit", "two", "--again", "machine"]) == 1
    assert [row.value for row in facts.rows() if row.fact == "commit"] == ["one", "two"]
    assert Recorder(facts, "machine", False, len(facts.rows())).missing(FINISHED) == [FINISHED]


def test_full_sizes_ask_for_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first, "gpu_name", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        first.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert stopped.value.code == 2 and "no NVIDIA GPU here" in capsys.readouterr().err


def test_a_step_asked_for_by_name_must_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "TABLE", {"loop": ("loop", 10, None, ("no_such_module",))})
    assert first.main(["--small", "--out", str(tmp_path / "o"), "--work", str(tmp_path / "w"), "--steps", "loop"]) == 1
    assert "left out: loop: no no_such_module here" in capsys.readouterr().out


def test_a_terminated_run_shows_what_it_knows(tmp_path):
    command = [
        sys.executable,
        "-m",
        "megaflux.bench.first",
        "--small",
        "--out",
        str(tmp_path / "out"),
        "--work",
        str(tmp_path / "work"),
        "--steps",
        "machine,attention",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not any(row.step == "machine" for row in Facts(tmp_path / "out" / "facts.jsonl").rows()):
        time.sleep(0.05)
    process.terminate()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "predicted" in text and (tmp_path / "out" / "table.txt").read_text() in text
    assert not of_this_run(tmp_path)


def test_a_full_disk_ends_no_step_to_come(tmp_path, monkeypatch, capsys):
    facts = Facts(tmp_path / "facts.jsonl")
    todo = [Step(name, [sys.executable, "-c", ""], 60) for name in ("one", "two")]

    def full(self, fact):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(Facts, "add", full)
        runner.run(todo, facts, tmp_path / "log", 60, Outcome())
    said = capsys.readouterr().err
    assert "not written: one: finished" in said and "not written: two: finished" in said


def test_bad_options_are_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "facts.jsonl").mkdir(parents=True)
    for argv, words in (
        (["--out", str(tmp_path / "file" / "x")], "--out"),
        (["--small", "--out", str(tmp_path / "odd"), "--work", str(tmp_path / "w")], "facts.jsonl is a folder"),
        (["--out", str(tmp_path), "--steps", "block"], "unknown step 'block'; use some of machine,attention,"),
        (["--out", str(tmp_path), "--seconds", "0"], "--seconds"),
    ):
        with pytest.raises(SystemExit) as stopped:
            first.main(argv)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said
