"""Whole runs that meet a fault: killed, asked to leave, hung, diverging, on other ranks, on a full disk."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.models.pretrained import load_models
from megaflux.training.checkpoint import elastic, manifest
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.checkpoint.write import writer_of
from tests.training.faults import (
    Reference,
    Terminal,
    assert_same,
    averages_in,
    both_ranks,
    end,
    events,
    final_weights,
    kill_chain,
    left_behind,
    newest,
    same_end,
    start,
    wait_for,
    weights_in,
)
from tests.training.runs import copy_until, ds_config, launch, launch_faulty, make_dataset, small_config, write_config

SLOW = pytest.mark.slow
NO_REPEATS = 38  # pictures of which 28 train, a multiple of the 4 drawn at a time


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, data):
    """12 updates on two ranks over a stage boundary, never disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    values = small_config(data, folder / "run", train__updates=12, optim__ema_decay=0.7, flow__guidance=[1.0, 4.0])
    whole = Reference(folder / "run", ds_config(folder, "bf16"), write_config(values, folder / "config.yaml"), data)
    done = launch(*whole.started_by, ranks=2, with_="forked")
    assert done.returncode == 0, done.stderr[-3000:]
    return whole


def go_on(reference: Reference, run: Path, *more: object) -> None:
    """The same command again: it ends as the run that nothing disturbed."""
    done = launch(*reference.started_by, "--run.dir", run, *more, ranks=2, with_="forked")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    same_end(reference.run, run)


def check_kills(kills, points):
    assert len(kills) == points  # else the run was over before
    for kill in kills:
        assert kill.seconds < 10, kill
        assert kill.reached - kill.resumed <= 2, kill  # one checkpoint interval, at most
        if not kill.ranks and kill.phase == "updates":
            assert kill.stale, kill  # which the next start was not hindered by, and removed


@pytest.mark.parametrize("seeds", [[39, 29], pytest.param([39, 29, 28], marks=pytest.mark.slow)], ids=len)
def test_a_killed_run_ends_as_if_it_had_not_been(reference, tmp_path, seeds):
    # one rank in an update, every process in an update, one rank while it starts
    check_kills(kill_chain(reference, tmp_path / "run", seeds, within=0.8), len(seeds))


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(5))
def test_kill_sweep(reference, tmp_path, chain):
    check_kills(kill_chain(reference, tmp_path / "run", [10 * chain + i for i in range(11, 14)], within=0.8), 3)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal yet: an interpreter that only just begins has none."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


AT_A_TERMINAL = ("ctrl-c", "tee", "window")


def ask_to_leave(reference: Reference, run: Path, to: str, phase: str, *more: object) -> None:
    """SIGTERM to the launcher, SIGUSR1 to each rank, or what a person at a terminal does to all: Ctrl-C, the same with a pipe
    into tee, which it ends as well, or closing the window. In a phase; asserts what is promised of the answer."""
    mark, before = run.with_name("mark"), len(events(run, "stop"))
    mark.unlink(missing_ok=True)
    slow = f"slow_{phase}:2" if phase in ("save", "data", "validation") else "slow:0"
    command = [*reference.started_by, "--run.dir", run, *more]
    if to in AT_A_TERMINAL:
        process = Terminal(*command, fault=slow, mark=mark, after=f" 2>&1 | tee {mark}.log" if to == "tee" else "")
    else:
        process = start(*command, fault=slow, mark=mark)
    try:
        ranks, seen = both_ranks(process), len(events(run, "progress"))
        if phase == "start-up":
            wait_for(lambda: all(catches(rank.pid, signal.SIGUSR1) for rank in ranks))
            time.sleep(0.5)
        elif phase in ("update", "panel"):
            kind = "progress" if phase == "update" else "save"
            seen = len(events(run, kind))
            wait_for(lambda: len(events(run, kind)) > seen + 1 or process.poll() is not None)
            time.sleep(0.1)
        else:
            wait_for(lambda: mark.exists() or process.poll() is not None)
            time.sleep(0.3)
        asked = time.monotonic()
        if to == "launcher":
            process.terminate()
        elif to == "window":
            process.close()
        elif to in AT_A_TERMINAL:
            process.type(b"\x03")
        else:
            for rank in ranks:
                rank.send_signal(signal.SIGUSR1)
        said = process.said if to in AT_A_TERMINAL else process.communicate(timeout=60)[0]
        wait_for(lambda: not left_behind(run), 30)
        seconds = time.monotonic() - asked
        print(f"asked in {phase}, the {to}: all gone after {seconds:.1f} s")
        assert seconds < 25, said[-2000:]
    finally:
        end(process)
    if to == "ranks":
        assert process.returncode == 10, said[-2000:]  # the launcher itself leaves with 1 when it is told to
    if phase == "start-up":
        assert not list(run.glob("checkpoints/*")), said[-2000:]
        return
    (stop,) = events(run, "stop")[before:]
    name = {"launcher": "SIGTERM", "ranks": "SIGUSR1", "window": "SIGHUP"}.get(to, "SIGINT")
    # At a terminal the launcher has the signal as well, and sends SIGTERM or dies at the same moment.
    names = (name, "SIGTERM") if to in AT_A_TERMINAL else (name,)
    assert stop["why"].removeprefix("signal ") in names, said[-2000:]
    if to == "ctrl-c":  # all that was said: DeepSpeed's runner has a traceback at times, ours are none
        assert process.said.count("Traceback") == process.said.count("deepspeed/launcher/runner.py"), process.said
        assert process.said.count("Ctrl-C: saving once this update has ended; a second one leaves at once") == 1
    assert (run / "checkpoints" / f"update-{stop['update']:07d}" / "manifest.json").is_file()
    assert 0 < stop["update"] < 12


def test_asked_to_leave_it_saves_and_goes_on(reference, tmp_path):
    ask_to_leave(reference, tmp_path / "run", "ranks", "update")
    ask_to_leave(reference, tmp_path / "run", "tee", "update", "--data.num_workers", "1")
    go_on(reference, tmp_path / "run")


IN_A_PHASE = {
    "start-up": [],
    "update": ["--data.num_workers", "1"],
    "save": [],
    "data": [],
    "validation": ["--validation.every", "3"],
    "panel": ["--validation.panel_every", "1", "--validation.steps", "400", "--validation.panel_samples", "3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", IN_A_PHASE)
@pytest.mark.parametrize("to", ["ranks", "launcher", *AT_A_TERMINAL])
def test_asked_to_leave_in_every_phase(reference, tmp_path, phase, to):
    run, more = tmp_path / "run", IN_A_PHASE[phase]
    ask_to_leave(reference, run, to, phase, *more)
    go_on(reference, run, *more)


def fault(reference: Reference, run: Path, kind: str, at: int) -> None:
    """One rank dies, hangs or raises in an update: all are gone in bounded time."""
    process = start(*reference.started_by, "--run.dir", run, "--train.hang_timeout", "5", fault=f"{kind}:{at}:1")
    try:
        wait_for(lambda: any(e["update"] == at for e in events(run, "progress")) or process.poll() is not None)
        reached = time.monotonic()
        said, _ = process.communicate(timeout=60)
        wait_for(lambda: not left_behind(run), 30)
        seconds = time.monotonic() - reached - (5 if kind == "hang" else 0)
        print(f"{kind}: all gone after {seconds:.1f} s" + " beyond train.hang_timeout" * (kind == "hang"))
        assert seconds < 10
    finally:
        end(process)
    assert process.returncode not in (0, 2, 10)
    if kind == "hang":
        assert process.returncode == 11 and "nothing moved for" in said and "faulty_train.py" in said  # the very line
    if kind == "throw":
        assert "a bug, put in by a test" in said


@pytest.mark.parametrize("kind", [pytest.param("die", marks=SLOW), "hang", pytest.param("throw", marks=SLOW)])
def test_no_rank_outlives_another(reference, tmp_path, kind):
    fault(reference, tmp_path / "run", kind, 5)
    if kind != "hang":  # which leaves what a kill leaves
        go_on(reference, tmp_path / "run")


@pytest.mark.parametrize("part", [pytest.param("forward", marks=SLOW), "backward", pytest.param("step", marks=SLOW)])
def test_a_rank_out_of_memory_leaves_word_and_the_next_start_plans_with_less(reference, tmp_path, part):
    run, auto = tmp_path / "run", ("--model.activation_checkpointing", "auto")
    done = launch_faulty(*reference.started_by, "--run.dir", run, *auto, fault=f"oom_{part}:4:1")
    said = done.stdout + done.stderr
    assert done.returncode == 11, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.startswith("rank 1: out of memory")]
    assert "after update 4" in line and "Tried to allocate 2.00 GiB" in line and "memory.json" in line
    assert "of 3 blocks: 3 full" in line and "Traceback" not in done.ranks[1][1].partition(line)[0]
    (fault,) = events(run, "fault")  # told by rank 1
    assert fault["what"] == "out_of_memory" and fault["update"] == 4 and "Tried to allocate" in fault["detail"]
    limits = json.loads((run / "memory.json").read_text())["bytes"]
    assert limits.keys() == {"base"} and not list(run.glob(".memory*"))

    done = launch_faulty(*reference.started_by, "--run.dir", run, *auto, fault="small_gpu:0:1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert said.count(f"planned within {limits['base'] / 1e9:.1f} GB") == 1
    plans = [(event["plan"], event["limit"]) for event in events(run, "ready")]
    full = "of 3 blocks: 3 full"
    assert plans == [("of 3 blocks: 3 none", None), (full, limits["base"]), (full, None)]
    assert said.count("stage one: the plan did not fit the memory of every GPU; lowered 1 times") == 1  # rank 1's alone
    same_end(reference.run, run)


def test_a_bad_update_changes_nothing_and_names_its_samples(data, tmp_path):
    # The fifth update, a stage's last: between dropped ones only a stage's end is saved.
    values = small_config(data, tmp_path / "run", train__updates=10, train__checkpoint_every=1, optim__weight_decay=0.5)
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "bf16")
    done = launch_faulty("--deepspeed", ds, "--config", config, fault="nan:4:1")  # on one rank of two
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    before, after = (tmp_path / "run" / "checkpoints" / f"update-000000{n}" for n in (4, 5))
    weights = sorted(file.name for file in before.glob("weights-*.safetensors"))
    assert weights == [f"weights-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    for name in weights:
        assert (before / name).read_bytes() == (after / name).read_bytes()
    for file in sorted((before / "deepspeed").glob("*optim_states.pt")):
        states = [
            torch.load(folder / "deepspeed" / file.name, weights_only=False)["optimizer_state_dict"]
            for folder in (before, after)
        ]
        assert_same(states[0]["base_optimizer_state"]["state"], states[1]["base_optimizer_state"]["state"])
        assert_same(states[0]["single_partition_of_fp32_groups"], states[1]["single_partition_of_fp32_groups"])
    (fault,) = events(tmp_path / "run", "fault")
    assert fault["what"] == "skipped_update" and fault["update"] == 5 and len(fault["keys"]) == 4
    assert all(key in said for key in fault["keys"])
    # Each parameter is written once, and no rank writes much more than another.
    assert torch.load(after / "deepspeed" / "mp_rank_00_model_states.pt", weights_only=False)["module"] == {}
    written = [
        sum(file.stat().st_size for file in manifest.files_in(after) if writer_of(file.name) == rank) for rank in (0, 1)
    ]
    assert written[1] / 1.5 < written[0] < 1.5 * written[1]
    for name in weights:  # and it went on training
        assert (newest(tmp_path / "run") / name).read_bytes() != (after / name).read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars("train/skipped_steps")] == [0] * 4 + [1] * 6


@pytest.mark.parametrize(
    "kills", [[2], pytest.param([1, 3, 4, 5], marks=SLOW)]
)  # 2: the first update of the second stage
def test_not_a_byte_of_what_is_frozen_changes_in_three_stages_with_kills_between(data, tmp_path, kills):
    stages = [
        {"name": "a", "share": 1, "blocks": [0]},
        {"name": "b", "share": 1, "blocks": [1]},
        {"name": "c", "share": 1, "blocks": [0], "components": "block"},
    ]
    values = small_config(
        data, tmp_path / "run", stages=stages, train__checkpoint_every=1, optim__weight_decay=0.5, optim__lr=1e-2
    )
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "bf16")  # two updates a stage
    for at in (*kills, None):
        digests = tmp_path / "digests.jsonl"
        fault = f"die:{at}" if at else "none:-1"
        done = launch_faulty("--deepspeed", ds, "--config", config, fault=fault, ranks=1, DIGESTS=digests)
        assert done.returncode == (-signal.SIGKILL if at else 0), done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "digests.jsonl").read_text().splitlines()]
    assert [(line["when"], line["stage"]) for line in lines][-2:] == [("begin", 2), ("end", 2)]
    trained_by = [{name for line in lines if line["stage"] == stage for name in line["trains"]} for stage in range(3)]
    first, frozen = lines[0]["sha256"], 0
    for line in lines:
        may_differ = set().union(*trained_by[: line["stage"] + 1])
        same = set(first) - may_differ
        frozen += len(same)
        assert not [name for name in same if line["sha256"][name] != first[name]]
    whole = [(begin, end_) for begin, end_ in zip(lines, lines[1:]) if end_["when"] == "end"]
    for begin, end_ in whole:
        changed = {name for name in first if begin["sha256"][name] != end_["sha256"][name]}
        assert changed <= set(begin["trains"])
    assert len(changed) > len(begin["trains"]) / 4  # in the last stage; some are too small to change in bf16
    assert frozen > 100 and trained_by[0] != trained_by[1] != trained_by[2]


@pytest.mark.slow
def test_every_rank_takes_what_the_first_one_read(reference, tmp_path):
    done = launch_faulty(*reference.started_by, "--run.dir", tmp_path / "run", fault="other_view:0:1")
    assert done.returncode == 0, done.stderr[-2000:]
    same_end(reference.run, tmp_path / "run")


def test_divergence_goes_back_to_a_sound_checkpoint_and_leaves_the_data_out(data, tmp_path):
    values = small_config(data, tmp_path / "run", train__bad_updates=2, train__updates=5, train__checkpoint_every=1)
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "fp32")
    done = launch_faulty("--deepspeed", ds, "--config", config, fault="nan_from:2:1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    back = [fault for fault in events(tmp_path / "run", "fault") if fault["what"] == "rollback"]
    assert len(back) == 1 and back[0]["update"] == 2 and "back to update 2" in said
    position = json.loads((newest(tmp_path / "run") / "manifest.json").read_text())
    # 5 updates of one batch, and the two dropped ones, whose data was left out
    assert (position["update"], position["data"]["epoch"], position["data"]["batches"]) == (5, 0, 7)
    assert position["guard"]["dropped"] == 2
    copies = re.findall(r"alive of those before: (\[.*?\])", said)  # ranks may share a line
    assert copies == ["[]"] * 4  # two ranks, twice


def test_other_ranks_go_on_with_the_same_batches(tmp_path):
    # One bucket without repeats: a sample drawn twice in an update may get other noise on other ranks.
    square = make_dataset(tmp_path / "square", images=NO_REPEATS, square=True, references=3)
    stages = [
        {
            "name": "one",
            "share": 3,
            "blocks": "all",
            "components": "model",
        },  # without it FLUX from nothing has no gradient
        {"name": "two", "share": 2, "blocks": [2], "vlm_layers": 0},
        {"name": "three", "share": 3, "blocks": [0, 2]},  # block 1 has stopped, block 0 and the Qwen layer come back
    ]
    values = small_config(
        square,
        tmp_path / "whole",
        stages=stages,
        data__condition={"image": 0.5, "image_text": 0.5},
        data__references={"min": 0, "max": 2},
        data__reference_crop=0.6,
        data__reference_flip=0.5,
        train__updates=8,
        train__checkpoint_every=1,
        optim__ema_decay=0.6,
        optim__lr=1e-3,
    )
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "fp32")
    assert launch("--deepspeed", ds, "--config", config, ranks=2, with_="forked").returncode == 0
    run = copy_until(tmp_path / "whole", tmp_path / "run", 2)
    again = ("--deepspeed", ds, "--config", config, "--run.dir", run)
    one = launch(*again, "--train.stop_after", "5", ranks=1, with_="forked")
    assert one.returncode == 0 and "resharded for 1" in one.stderr + one.stdout, one.stderr[-2000:]
    two = launch(*again, ranks=2, with_="forked")
    assert two.returncode == 0 and "resharded for 2" in two.stderr + two.stdout, two.stderr[-2000:]
    want, got = final_weights(tmp_path / "whole"), final_weights(run)
    difference = max((want[name] - got[name]).abs().max() for name in want)
    print(f"2 -> 1 -> 2 ranks: weights differ by at most {difference:.1e}")
    assert difference < 1e-5
    ends = [
        json.loads((folder / "checkpoints/update-0000008/manifest.json").read_text())["data"]
        for folder in (tmp_path / "whole", run)
    ]
    assert ends[0] == ends[1]
    assert "0 repeats" in two.stderr + two.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    norms = EventAccumulator(str(tmp_path / "whole" / "tensorboard")).Reload().Scalars("train/grad_norm")
    assert len(norms) == 8 and all(norm.value > 0 for norm in norms)  # else any data would do
    models = load_models(build_config(merge(tiny(), values)))
    for folder in (tmp_path / "whole", run):
        assert_averages_follow_the_weights(folder, dict(models.trainable.named_parameters()), 0.6)


def assert_averages_follow_the_weights(run: Path, base: dict[str, torch.Tensor], decay: float) -> None:
    """In float64, from the weights of every checkpoint, which are the masters of a run in float32: over changes of stage and of
    ranks. base: the weights that the run began with."""
    average = {name: p.detach().double() for name, p in base.items()}
    before: dict[str, torch.Tensor] = {}
    stopped: set[str] = set()
    for update, path in manifest.listed(run).items():
        content, now = manifest.read(path), weights_in(path)
        trained = {name for name in now if name not in before or not torch.equal(now[name], before[name])}
        d = min(decay, (1 + update) / (10 + update))
        for name in trained:
            average[name] += (1 - d) * (now[name].double() - average[name])
        found = averages_in(path)
        assert found.keys() == now.keys() and content["average"] == {"updates": update}
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-6, atol=1e-7, msg=f"{update} {name}")
        stopped |= now.keys() - trained
        before = now
    assert any(".1." in name or "single" in name for name in stopped) and any("vlm" in name for name in stopped)
    assert max((average[name] - tensor.double()).abs().max() for name, tensor in before.items()) > 1e-5


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 2), (4, 2), (8, 1)])
def test_ranks_share_what_the_run_draws(small_config, tmp_path, ranks, micro):
    resumed = Checkpoint(
        tmp_path, {"update": 1, "stage": 0, "data": {"micro_batch_size": 2, "world_size": 4}}
    )  # 8 together
    for sizes in (
        {"micro_batch_size": 2},
        {"micro_batch_size": None, "drawn_per_rank": 2},
    ):  # no rank holds more than 2
        config = small_config.model_copy(update={"train": small_config.train.model_copy(update=sizes)})
        fitted = elastic.fit(config, resumed, ranks).train
        assert (fitted.micro_batch_size, fitted.drawn_per_rank * ranks) == (micro, 8)
    with pytest.raises(
        UserError, match="8 pictures at a time, which 3 ranks cannot share evenly; use 1, 2, 4, 8 ranks"
    ):
        elastic.fit(config, resumed, 3)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_keeps_what_there_is_and_says_so(reference, tmp_path, rank):
    run = tmp_path / "run"  # saves fail on one rank; the other must not wait for it
    done = launch_faulty(*reference.started_by, "--run.dir", run, fault=f"full:3:{rank}")
    said = done.stdout + done.stderr
    assert done.returncode == 2, said[-3000:]
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "update-0000006: cannot be written" in line and "Traceback" not in said  # the stage's end
    assert "continuing without this checkpoint" in said and "update-0000004: cannot be written" in said
    assert [event["what"] for event in events(run, "fault")] == ["disk", "disk"]
    assert [p.name for p in (run / "checkpoints").glob("update-*")] == ["update-0000002"]
    assert not list((run / "checkpoints").glob(".update-*"))  # what was written of it makes room
    if rank == 0:
        go_on(reference, run)
