"""launch/supervise.sh and launch/slurm.sbatch with small scripts in the place of training, srun and scontrol."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPERVISE = str(ROOT / "launch" / "supervise.sh")
QUICK = {"FIRST_WAIT": "0", "MAX_FAST_FAILURES": "3", "SAVE_SECONDS": "5"}
# A rank saves when told to; `sleep` in the background, so that bash hears the signal at once.
RANK = """trap 'sleep 0.5; touch "$SAVED/rank$RANK"; exit 10' TERM USR1; touch "$SAVED/up$RANK"
sleep 60 & while :; do wait $!; done"""


def start(*command: object, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "RUN_DIR")}
    # nohup, under which tests may run, has SIGHUP ignored, and a shell cannot trap what was ignored before it.
    return subprocess.Popen(
        ["env", "--default-signal=HUP", SUPERVISE, *map(str, command)],
        env=kept | QUICK | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*command: object, **environment: str) -> tuple[int, list[str]]:
    """Exit code and the lines that the supervisor logged."""
    process = start(*command, **environment)
    _, said = process.communicate(timeout=20)
    return process.returncode, said.splitlines()


def script(folder: Path, text: str) -> Path:
    path = folder / "command.sh"
    path.write_text(text)
    return path


def in_turn(folder: Path, *parts: str) -> list[object]:
    """A command whose nth attempt does the nth part; it counts them in the file `attempts`."""
    cases = "\n".join(f"{i}) {part} ;;" for i, part in enumerate(parts, 1))
    text = f'echo >>"{folder}/attempts"\ncase $(wc -l <"{folder}/attempts") in\n{cases}\n*) exit 99 ;;\nesac\n'
    return ["bash", script(folder, text)]


def attempts(folder: Path) -> int:
    return (folder / "attempts").read_text().count("\n")


def until(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(mark: str) -> list[int]:
    """Processes with this text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


def test_again_until_it_is_done(tmp_path):
    code, said = run(*in_turn(tmp_path, "exit 10", "exit 11", "kill -9 $$", "exit 0"), MAX_FAST_FAILURES="9")
    assert code == 0 and attempts(tmp_path) == 4
    said = [re.sub(r"after \d+ s", "after N s", line) for line in said]
    assert said == [
        "supervise: attempt 1: exit code 10 after N s; starting again in 0 s",
        "supervise: attempt 2: exit code 11 after N s; starting again in 0 s",
        "supervise: attempt 3: exit code 137 after N s; starting again in 0 s",
        "supervise: attempt 4: done after N s",
    ]


def test_bad_input_is_not_tried_again(tmp_path):
    code, said = run(*in_turn(tmp_path, "exit 1", "exit 2", "exit 0"))
    assert code == 2 and attempts(tmp_path) == 2
    assert "bad input" in said[-1]


def test_the_command_gets_its_words_as_they_are(tmp_path):
    command = script(tmp_path, f'printf "%s|" "$@" >"{tmp_path}/words"')
    assert run("bash", command, "a b", "*", "", "--run.dir=/none", "$HOME")[0] == 0
    assert (tmp_path / "words").read_text() == "a b|*||--run.dir=/none|$HOME|"


def test_waits_double_up_to_the_most_and_begin_anew_after_a_long_attempt(tmp_path):
    parts = ["exit 1"] * 4 + ["sleep 2.2; exit 1", "exit 1", "exit 2"]
    code, said = run(
        *in_turn(tmp_path, *parts),
        FIRST_WAIT="1",
        MAX_WAIT="2",
        LONG_SECONDS="1",
        MAX_FAST_FAILURES="0",
        PATH=f"{no_sleep(tmp_path)}:{os.environ['PATH']}",
    )
    assert code == 2
    assert [int(line.split()[-2]) for line in said[:-1]] == [1, 2, 2, 2, 1, 2]


def no_sleep(folder: Path) -> Path:
    """A folder with a `sleep` that takes whole seconds for nothing."""
    (folder / "bin").mkdir()
    (folder / "bin" / "sleep").write_text('#!/bin/sh\ncase $1 in *.*) exec /bin/sleep "$1" ;; esac\n')
    (folder / "bin" / "sleep").chmod(0o755)
    return folder / "bin"


def checkpoint(run_dir: Path, update: int) -> str:
    folder = f'"{run_dir}"/checkpoints/update-{update:07d}'
    return f"mkdir -p {folder}; touch {folder}/manifest.json; exit 1"


@pytest.mark.parametrize("given", ["words", "equals", "environment", "home"])
def test_gives_up_where_no_checkpoint_moves(tmp_path, given):
    root = tmp_path / "my run"
    moves, still = [checkpoint(root, n) for n in (8, 9, 10)], ["exit 5"] * 2
    half = f'mkdir -p "{root}"/checkpoints/update-0000099 "{root}"/checkpoints/update-0000011.bad; exit 4'
    extra = {
        "words": ["--run.dir", "/elsewhere", "--run.dir", root],
        "equals": [f"--run.dir={root}"],
        "environment": [],
        "home": ["--run.dir=~/my run"],  # in which no shell expands it
    }
    environment = {"RUN_DIR": str(root)} if given == "environment" else {"RUN_DIR": "/nowhere"}
    command = in_turn(tmp_path, *moves, *still, checkpoint(root, 12), *still, half)
    code, said = run(*command, *extra[given], HOME=str(tmp_path), **environment)
    assert code == 4 and attempts(tmp_path) == 9
    assert "3 in a row got nowhere, giving up" in said[-1]


@pytest.mark.parametrize("text", ["~nobodyhere/x", "~$(touch pwned)/x", "~;touch pwned", "~-/x", "~1", "./~/x"])
def test_what_is_no_home_stays_as_it_is(tmp_path, text):
    functions = 'eval "$(sed -n "/^run_folder() {/,/^}/p" "$1")"; run_folder "--run.dir=$2"'
    said = subprocess.run(
        ["bash", "-uc", functions, "-", SUPERVISE, text], cwd=tmp_path, capture_output=True, text=True
    )
    assert (said.stdout, said.stderr, os.listdir(tmp_path)) == (f"{text}\n", "", [])


def test_progress_without_a_checkpoint_is_getting_somewhere(tmp_path):
    line = '{"time": 1, "kind": "progress", "update": 1}'
    moves = f"echo '{line}' >> {tmp_path}/events.jsonl; exit 6"
    command = [*in_turn(tmp_path, *[moves] * 5, *["exit 6"] * 3), "--run.dir", tmp_path]
    assert run(*command)[0] == 6
    assert attempts(tmp_path) == 8


def test_without_a_run_folder_only_the_time_counts(tmp_path):
    assert run(*in_turn(tmp_path, "exit 6", "sleep 1.2; exit 6", *["exit 6"] * 3), FAST_SECONDS="1")[0] == 6
    assert attempts(tmp_path) == 5


@pytest.mark.parametrize("given", ["--run.dir={}", "--run.dir=~/{.name}", "--run.dir=~"])
def test_a_file_in_the_run_stops_it(tmp_path, given):
    """A ~ behind a = is the command's to expand, and so the supervisor's."""
    command = [*in_turn(tmp_path, "exit 1", f"touch {tmp_path}/SUPERVISE_STOP; exit 9"), given.format(tmp_path)]
    code, said = run(*command, MAX_FAST_FAILURES="9", HOME=str(tmp_path if given.endswith("~") else tmp_path.parent))
    assert code == 9 and attempts(tmp_path) == 2
    assert said[-1].endswith("SUPERVISE_STOP is there: not starting again")


@pytest.mark.parametrize("sent, code", [("TERM", 143), ("INT", 130), ("USR1", 10), ("HUP", 129)])
def test_a_signal_reaches_the_ranks_of_a_launcher_that_tells_nobody(tmp_path, sent, code):
    worker = script(tmp_path, 'trap "[ -e $SAVED/rank$RANK ] || touch $SAVED/early; exit" TERM; sleep 60 & wait')
    worker = worker.rename(tmp_path / "worker.sh")  # of a rank: not to be told while that lives
    (tmp_path / "rank.sh").write_text(f'bash "{worker}" &\n{RANK}')
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'for r in 0 1; do RANK=$r setsid bash "{tmp_path}/rank.sh" & done; wait\n')
    process = start("bash", launcher, SAVED=str(tmp_path))
    until(lambda: all((tmp_path / f"up{r}").exists() for r in (0, 1)))
    process.send_signal(getattr(signal, f"SIG{sent}"))
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"SIG{sent}: passed on" in said and "starting again" not in said
    assert all((tmp_path / f"rank{r}").exists() for r in (0, 1)) and not (tmp_path / "early").exists()
    assert not alive(f"SAVED={tmp_path}")


def test_a_command_without_ranks_is_told_itself_and_killed_when_it_does_not_leave(tmp_path):
    command = script(tmp_path, f'trap "touch {tmp_path}/told" TERM; touch {tmp_path}/up; sleep 60 & wait $!; wait $!')
    process = start("bash", command, SAVED=str(tmp_path), SAVE_SECONDS="1")
    until((tmp_path / "up").exists)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(timeout=10) == 143
    assert (tmp_path / "told").exists() and time.monotonic() - started < 5
    assert not alive(f"SAVED={tmp_path}")


def test_a_second_ctrl_c_does_not_wait_for_the_save(tmp_path):
    rank = script(tmp_path, 'trap "touch $SAVED/told" TERM; touch $SAVED/up; while :; do sleep 1; done')
    process = start("bash", rank, SAVED=str(tmp_path), RANK="0", SAVE_SECONDS="60")
    until((tmp_path / "up").exists)
    process.send_signal(signal.SIGINT)
    until((tmp_path / "told").exists)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 130 and "not waiting for the save" in said
    assert not alive(f"SAVED={tmp_path}")


def test_words_that_nobody_reads_any_more_cost_no_save(tmp_path):
    """Ctrl-C ends the tee behind it as well."""
    process = start("bash", script(tmp_path, RANK), SAVED=str(tmp_path), RANK="0")
    until((tmp_path / "up0").exists)
    process.stdout.close(), process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 130 and (tmp_path / "rank0").exists()
    assert not alive(f"SAVED={tmp_path}")


def test_a_save_has_as_long_as_the_queue_gives():
    supervise, slurm = Path(SUPERVISE).read_text(), (ROOT / "launch" / "slurm.sbatch").read_text()
    assert "SAVE_SECONDS=${SAVE_SECONDS:-600}" in supervise and "#SBATCH --signal=B:USR1@600\n" in slurm


def test_a_signal_while_waiting_starts_nothing_again(tmp_path):
    process = start(*in_turn(tmp_path, "exit 1"), FIRST_WAIT="60")
    assert "starting again in 60 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143 and attempts(tmp_path) == 1


def test_ranks_that_a_launcher_left_behind_are_stopped_before_the_next_start(tmp_path):
    rank = script(tmp_path, RANK)
    launcher = tmp_path / "launcher.sh"
    orphaned = f'RANK=0 setsid bash "{rank}" & while [ ! -e {tmp_path}/up0 ]; do sleep 0.1; done; kill -9 $$'
    launcher.write_text(f"if [ -e {tmp_path}/rank0 ]; then exit 0; fi\n{orphaned}\n")
    code, said = run("bash", launcher, SAVED=str(tmp_path))
    assert code == 0 and not alive(f"SAVED={tmp_path}")
    assert "some of its processes have not; stopping them" in said[0]
    assert "exit code 137" in said[1] and "attempt 2: done" in said[2]


def test_exit_code_0_with_ranks_alive_is_not_done(tmp_path):
    """What DeepSpeed's launcher does when a signal kills its child."""
    rank = script(tmp_path, RANK)
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(f'if [ -e {tmp_path}/rank0 ]; then exit 0; fi\nRANK=0 bash "{rank}" & sleep 0.3; exit 0\n')
    code, said = run("bash", launcher, SAVED=str(tmp_path))
    assert code == 0 and not alive(f"SAVED={tmp_path}")
    assert "did not come to its end" in said[0] and "attempt 2: done" in said[-1]


def test_exit_code_0_without_a_stop_in_the_events_is_not_done(tmp_path):
    line = f"""printf '{{"time": 1.5, "kind": "%s"}}\\n' %s >>"{tmp_path}/events.jsonl"; exit 0"""
    command = in_turn(tmp_path, line % ("%s", "progress"), line % ("%s", "stop"))
    code, said = run(*command, "--run.dir", tmp_path)
    assert code == 0 and attempts(tmp_path) == 2
    assert "did not come to its end" in said[0]


@pytest.mark.parametrize(
    "argv, environment, words", [([], {}, "no command"), (["true"], {"MAX_WAIT": "5m"}, "MAX_WAIT: must")]
)
def test_bad_input_is_one_line(argv, environment, words):
    code, said = run(*argv, **environment)
    assert code == 2 and len(said) == 1
    assert said[0].startswith("error: ") and words in said[0]


def slurm(folder: Path, srun: str, **environment: str) -> subprocess.Popen:
    """The batch script with these doings of srun; what scontrol was asked is in the file `asked`."""
    tools = {"srun": srun, "scontrol": f'[ "$1" = show ] && echo node7 || echo "$@" >>{folder}/asked'}
    for name, text in tools.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").touch()
    env = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[7-9]",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_NTASKS": "32",
    }
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "slurm.sbatch")],
        cwd=folder,
        env=env | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("saved", [0, 10])
def test_slurm_signal_reaches_the_step_and_the_job_goes_back_into_the_queue(tmp_path, saved):
    job = slurm(tmp_path, f'trap "sleep 0.3; echo $MASTER_ADDR; exit {saved}" USR1; touch up; sleep 9 >&- & wait; wait')
    until((tmp_path / "up").exists)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=10)
    assert job.returncode == 0
    assert f"exit code {saved} after" in said and "node7" in said
    assert (tmp_path / "asked").exists() == (saved == 10)
    if saved:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"


# srun as a stand-in: the job step that the script asked for, its tasks one after the other. Each gets what Slurm gives a
# task, and leaves its command, its environment and its CPUs behind.
SRUN = """options=(); while [[ $1 == --* ]]; do options+=("$1"); shift; done
for option in "${options[@]}"; do case $option in
  --nodes=*) nodes=${option#*=} ;; --ntasks=*) tasks=${option#*=} ;; --ntasks-per-node=*) per=${option#*=} ;;
  --cpus-per-task=*) cpus=${option#*=} ;; --kill-on-bad-exit=1) ;; *) echo "unknown $option"; exit 1 ;;
esac; done
[ "$tasks" = $((nodes * per)) ] || exit 1
for ((i = 0; i < tasks; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$((i % per)) CPUS=${cpus:-1} WORDS="$*" env -0 >task$i
done"""


@pytest.mark.parametrize(("nodes", "drawn"), [(1, 8), (4, 4), (8, 2)])
def test_slurm_script_as_shipped_is_right_for_any_of_these_nodes(tmp_path, monkeypatch, nodes, drawn):
    ranks = 8 * nodes
    job = slurm(
        tmp_path,
        SRUN,
        SLURM_JOB_NUM_NODES=str(nodes),
        SLURM_NTASKS=str(ranks),
        SLURM_NTASKS_PER_NODE="8",
        SLURM_CPUS_PER_TASK="8",
    )
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    tasks = [
        dict(pair.split("=", 1) for pair in (tmp_path / f"task{i}").read_text().split("\0") if "=" in pair)
        for i in range(ranks)
    ]
    assert len(list(tmp_path.glob("task*"))) == ranks
    assert {task["CPUS"] for task in tasks} == {"8"} and {task["MASTER_ADDR"] for task in tasks} == {"node7"}
    assert {task["MASTER_PORT"] for task in tasks} == {"20077"}

    from launch import train
    from megaflux.config.command_line import parse_config
    from megaflux.training.ds_config import load_ds_config
    from megaflux.training.planning.checks import find_problems

    python, program, *words = tasks[-1]["WORDS"].split()
    assert (python, program) == ("python", "launch/train.py")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, tasks[-1][name])
    assert train.started_ranks() == ranks
    monkeypatch.chdir(ROOT)  # for ds_configs/
    (tmp_path / "my_run.yaml").write_text("data: {source: openmoji}\n")  # what a person changes: data and models
    words[words.index("my_run.yaml")] = str(tmp_path / "my_run.yaml")
    args, config = parse_config(train.build_parser(), words)
    assert find_problems(config, load_ds_config(args.deepspeed), ranks) == []
    sizes = config.for_world(ranks).train
    assert (config.preset, sizes.global_batch_size, sizes.drawn_per_rank) == ("dev", 128, drawn)


def test_slurm_job_that_fails_fast_stays_out_of_the_queue_in_the_end(tmp_path):
    for code in (137, 1, 11, 10):  # 10 too, without a signal: a rank failed, and srun told the others to leave
        job = slurm(tmp_path, f"exit {code}")
        job.communicate(timeout=10)
        assert job.returncode == 0
    job = slurm(tmp_path, "exit 11")
    said, _ = job.communicate(timeout=10)
    assert job.returncode == 11 and "giving up" in said
    assert (tmp_path / "asked").read_text().count("requeue 77\n") == 4


def test_slurm_job_with_bad_input_ends(tmp_path):
    job = slurm(tmp_path, "exit 2")
    job.communicate(timeout=10)
    assert job.returncode == 2 and not (tmp_path / "asked").exists()
