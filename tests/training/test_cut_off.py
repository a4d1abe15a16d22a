"""Runs killed between a save and the validation and panel that follow it: the next start shows what is missing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.training.faults import events
from tests.training.runs import ds_config, launch_faulty, make_dataset, small_config, write_config

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def validated(run: Path) -> list[int]:
    return [json.loads(line)["update"] for line in (run / "validation.jsonl").read_text().splitlines()]


def panels(run: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("update-")) for file in (run / "samples").glob("update-*.png"))


CUT_OFF = {  # updates -> starts: fault, more, updates that are validated after it, and those with a panel
    2: [
        ("die_validation:2", [], [0, 1], []),  # the very last
        ("none:-1", [], [0, 1, 2], [2]),
    ],
    6: [
        ("die_validation:1", [], [0], []),  # in the middle of a stage
        ("die_panel:2", [], [0, 1, 2], []),  # at a stage's end
        ("die_panel:4:1", [], [0, 1, 2, 3, 4], [2]),  # at the next one's, the panel drawn and not yet written
        ("die_validation:5:1", ["--train.stop_after", "5"], [0, 1, 2, 3, 4], [2, 4]),  # ended early
        ("none:-1", ["--train.stop_after", "5"], [0, 1, 2, 3, 4, 5], [2, 4]),
        ("die_panel:6", [], [0, 1, 2, 3, 4, 5, 6], [2, 4]),
        ("none:-1", [], [0, 1, 2, 3, 4, 5, 6], [2, 4, 6]),
    ],
}


@pytest.mark.parametrize("updates", [2, pytest.param(6, marks=SLOW)])
def test_what_a_kill_cut_off_after_a_save_is_shown_by_the_next_start(data, tmp_path, updates):
    """Stages of two updates, killed between a save and what follows it; one rank."""
    stages = [{"name": name, "share": 1, "blocks": [0]} for name in "abc"[: updates // 2]]
    values = small_config(
        data, tmp_path / "run", stages=stages, train__updates=updates, train__checkpoint_every=1, validation__every=1
    )
    config, ds, run = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "fp32"), tmp_path / "run"

    def go(fault: str, *more: object) -> str:
        done = launch_faulty("--deepspeed", ds, "--config", config, *more, fault=fault, ranks=1)
        assert done.returncode == (-signal.SIGKILL if fault.startswith("die") else 0), done.stderr[-2000:]
        return done.stdout + done.stderr

    for fault, more, losses, pictures in CUT_OFF[updates]:
        go(fault, *more)
        assert (validated(run), panels(run)) == (losses, pictures), fault
    shown, saved = len(events(run, "validation")), len(events(run, "save"))
    assert f"done: {updates} of {updates} updates" in go("none:-1")  # a run that is done, and has shown all
    assert (len(events(run, "validation")), len(events(run, "save"))) == (shown, saved)
    assert [event["why"] for event in events(run, "stop")][-2:] == ["done", "done"]
