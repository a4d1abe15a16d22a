"""Who asks a rank to leave, and when it gives up; the lock of a run's folder; room for checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.training import run_folder
from megaflux.training.checkpoint import space
from megaflux.training.checkpoint.retention import most_at_once
from megaflux.training.survival.watch import ASKING, HANDLED, Watch
from tests.training.runs import ROOT, small_config

ALONE = World(0, 1, torch.device("cpu"))
BLOCKED = """
import ctypes, sys
from megaflux.training.survival.watch import Watch
watch = Watch(hang_timeout={hang}, leave_within=1)
{ready}
print("up", flush=True)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)  # as in a collective: no handler of Python's runs
"""


def blocked(
    ready: str = "",
    hang: float = 1000,
    rank: bool = True,
    before: Sequence[str] = (),
    more: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")} | ({"RANK": "0"} if rank else {})
    # These tests may themselves run under nohup, or behind `&`.
    command = [
        "env",
        "--default-signal=HUP,INT,QUIT",
        *before,
        sys.executable,
        "-c",
        BLOCKED.format(ready=ready, hang=hang),
    ]
    process = subprocess.Popen(
        command,
        env=env | more,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("number", ASKING)
def test_before_the_first_update_it_leaves_at_once_even_from_within_a_collective(number):
    process = blocked()
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 10 and "nothing to save" in said


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_ctrl_c_leaves_at_once(first):
    process = blocked("watch.ready(); part = watch.slow_section(); part.__enter__()")  # a save, say
    process.send_signal(getattr(signal, first))
    if first != "SIGINT":  # the launcher's own word is no Ctrl-C
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert (
        process.stderr.readline()
        == "Ctrl-C: saving once this update has ended; a second one leaves at once and saves nothing\n"
    )
    process.send_signal(signal.SIGINT)  # from the same hand: `timeout -s INT` sends it to the group as well
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130 and said == "rank 0: a second Ctrl-C: leaving at once, nothing is saved\n"


def test_ctrl_backslash_shows_stacks_and_leaves():
    process = blocked("watch.ready()")
    process.send_signal(signal.SIGQUIT)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 131
    assert said.startswith("rank 0: SIGQUIT: leaving at once, nothing is saved\n") and "most recent call first" in said


@pytest.mark.parametrize(("more", "heard"), [({}, False), ({"TORCHELASTIC_RUN_ID": "none"}, True)])
def test_nohup_stays_nohup(more, heard):
    """torchrun hears what nohup has it ignore, and kills ranks that ignore it."""
    process = blocked(before=["nohup"], more=more)
    process.send_signal(signal.SIGHUP)
    if heard:
        assert process.wait(timeout=10) == 10
    else:
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 10
    process.communicate()


PRINTS = """
from megaflux.training.survival.watch import Watch
import logging, sys, time
watch = Watch(1000)
watch.ready()
logging.basicConfig(format="%(message)s")
print("up", flush=True)
while watch.signal is None:
    time.sleep(0.05)
time.sleep(0.5)  # until the reader is gone
for _ in range(3):
    print("saving", flush=True), logging.warning("saving"), print("x" * 100_000, file=sys.stderr)
sys.exit(10)
"""


@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_output_that_nobody_reads_any_more_ends_nothing(flags):
    for gone in ("pipe", "terminal", "disk"):
        own, theirs = os.pipe() if gone != "terminal" else os.openpty()
        errors = os.open("/dev/full", os.O_WRONLY) if gone == "disk" else theirs
        process = subprocess.Popen(
            ["env", "--default-signal=HUP", sys.executable, *flags, "-c", PRINTS],
            cwd=ROOT,
            stdout=theirs,
            stderr=errors,
        )
        os.close(theirs)
        assert os.read(own, 2) == b"up"
        process.send_signal(signal.SIGHUP)
        os.close(own)
        assert process.wait(timeout=15) == 10, gone


STUCK_IN_PRINT = """
from megaflux.training.survival.watch import Watch
import sys
watch = Watch({hang}, 1000)
watch.ready()
print("up", flush=True)
while True:
    print("x" * 1000, file=sys.stderr)
"""


@pytest.mark.parametrize(("signals", "code"), [(["SIGINT", "SIGINT"], 130), (["SIGQUIT"], 131), ([], 11)])
def test_a_rank_that_is_stuck_in_a_print_is_left_as_well(signals, code):
    """`... | less`, or a reader that is stopped: the pipe is full, and the write holds the lock of stderr's buffer."""
    process = subprocess.Popen(
        ["env", "--default-signal=INT,QUIT", sys.executable, "-c", STUCK_IN_PRINT.format(hang=1000 if signals else 3)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"up\n"
        for name in signals:
            time.sleep(1.0)
            process.send_signal(getattr(signal, name))
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
        process.communicate()


def test_an_update_has_three_times_the_longest_to_end(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("megaflux.training.survival.watch.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Watch, "_loop", lambda self: None)  # no thread
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    watch, told = Watch(1000), Watch(1000, 7)
    try:

        def later(seconds: float) -> None:
            now[0] += seconds
            watch.moved(), told.moved()

        later(500)  # start-up is no update
        watch.ready(), told.ready()
        assert watch.leave_within == 25
        later(8)
        assert watch.leave_within == 25
        later(41)
        assert watch.leave_within == 123
        with watch.slow_section():
            later(90)  # a batch of a validation
            now[0] += 300  # and what follows it
        later(2)
        assert watch.leave_within == 123
        watch.pause()
        later(200)  # a new stage
        watch.ready()
        later(3)
        assert (watch.leave_within, told.leave_within) == (123, 7)
    finally:
        watch.close(), told.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_an_update_that_does_not_end_is_given_up_with_its_stacks():
    process = blocked("watch.ready()")
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 11
    assert "SIGUSR1, and no update ended within 1 s (train.leave_within)" in said and "most recent call first" in said


def test_a_save_takes_its_time():
    process = blocked("watch.ready(); part = watch.slow_section(); part.__enter__()")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_start_up_is_not_held_to_the_hang_timeout_and_updates_are():
    starting, training = blocked(hang=1), blocked("watch.ready()", hang=1)
    _, said = training.communicate(timeout=10)
    assert training.returncode == 11 and "(train.hang_timeout)" in said
    assert starting.poll() is None
    starting.kill()
    starting.communicate()


def test_a_hang_that_cannot_even_be_written_down_is_left():
    process = blocked("import time; watch.on_hang = lambda why: time.sleep(1000); watch.ready()", hang=1)
    assert process.wait(timeout=15) == 11
    process.communicate()


def test_a_persons_python_outlives_its_shell_and_what_else_ran_there(tmp_path):
    code = "from megaflux.training.survival.watch import Watch; import sys, time; w = Watch(1000); w.ready(); time.sleep(3); "
    code += f"open({str(tmp_path / 'asked')!r}, 'w').write(str(w.signal))"
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    shell = f'sleep 1 & "{sys.executable}" -c "{code}" & sleep 1.5'
    subprocess.run(["bash", "-c", shell], env=env, cwd=ROOT, check=True)
    until = time.monotonic() + 15
    while not (tmp_path / "asked").exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.1)
    assert (tmp_path / "asked").read_text() == "None"


def config_for(run):
    return build_config(merge(tiny(), small_config(run / "data", run / "run")))


def test_a_run_folder_is_held_by_one_run(tmp_path, monkeypatch):
    config = config_for(tmp_path)
    code = (
        "import sys, time; from types import SimpleNamespace as N; from megaflux.training import run_folder; "
        "from megaflux.training.distributed import World; "
        "run_folder.lock_run_folder(N(run=N(dir=sys.argv[1])), World(0, 1, None)); print('held', flush=True); time.sleep(1000)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, config.run.dir], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE", 0.5)
    with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .*; stop that run"):
        run_folder.lock_run_folder(config, ALONE)
    other.kill()  # -9: the lock goes with it
    other.communicate()
    run_folder.lock_run_folder(config, ALONE)


@pytest.mark.parametrize(
    ("free", "inodes", "said"),
    [
        (10**9, 10**6, None),
        (10**6, 10**6, "0.0 GB free, and 4 checkpoints of this stage need"),
        (10**9, 3, "3 inodes left, and 4 checkpoints need"),
        (10**9, 0, None),  # a file system that counts none
    ],
)
def test_what_cannot_fit_is_refused(tmp_path, monkeypatch, free, inodes, said):
    config = config_for(tmp_path)
    config = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 2})})
    engine = SimpleNamespace(module=torch.nn.Linear(1000, 100), num_trainable=100_100)
    disk = SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_files=inodes and 10**7, f_favail=inodes)
    monkeypatch.setattr(space.os, "statvfs", lambda path: disk)
    assert space.checkpoint_bytes(100_100, 100_100, 4) == pytest.approx(100_100 * (12 + 4), rel=0.05)
    if said is None:
        space.check(config, engine, 100_100, ALONE, 4)
    else:
        with pytest.raises(space.NoRoom, match=said):
            space.check(config, engine, 100_100, ALONE, 4)
        with pytest.raises(space.NoRoom, match=said.replace("4 checkpoints", "2 checkpoints")):
            space.check(config, engine, 100_100, ALONE, 2)


def test_no_room_is_asked_for_checkpoints_that_never_come(tmp_path):
    """make gpu-train saves twice, half way and at its end: it needs no room for those that a longer run keeps."""
    values = small_config(
        tmp_path, tmp_path / "run", train__updates=20, train__checkpoint_every=8, train__keep_checkpoints=2
    )
    values["stages"] = values["stages"][:1]
    values = merge(tiny(), values)
    config = build_config(values)
    # Due are 8, 16 and 20, and a signal may ask for one more; kept are two, the one being written, and the last for good.
    assert [most_at_once(config, update) for update in (0, 8, 15, 16, 20)] == [4, 3, 3, 2, 1]
    values["train"]["keep_checkpoints"] = 9
    assert most_at_once(build_config(values), 0) == 4
    values["train"]["stop_after"] = 5
    assert most_at_once(build_config(values), 0) == 5
    values["train"] |= {"updates": 2000, "keep_checkpoints": 2, "stop_after": 0}
    assert most_at_once(build_config(values), 0) == 4  # a long run: as it has always been
