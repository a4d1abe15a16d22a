"""What the tests of survival and the soak do to a run: start it, look into it, kill it, ask it to leave."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import select
import shlex
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from megaflux.data.reading.shared_memory import _folders_in
from megaflux.training.survival.events import NAME, read
from tests.training.runs import FAULTY, LAUNCH, ROOT, environment, free_port, launch


@dataclass(frozen=True)
class Reference:
    """A run that was never disturbed, and what started it."""

    run: Path
    ds: Path
    config: Path
    data: Path

    @property
    def started_by(self) -> list[object]:
        return ["--deepspeed", self.ds, "--config", self.config]


def start(*arguments: object, ranks: int = 2, fault: str | None = None, mark: Path | None = None) -> subprocess.Popen:
    """The deepspeed launcher in a session of its own; fault, mark: see faulty_train.py."""
    command = [
        "deepspeed",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        FAULTY if fault else LAUNCH,
        *map(str, arguments),
    ]
    env = environment() | ({"FAULT": fault, "MARK": str(mark)} if fault else {})
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
    )


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # which nohup, or a script's &, has the tests ignore
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """The deepspeed launcher under a shell in a terminal of its own, as a person starts it: `type` types, `close` closes the
    window. Stands for the process where the helpers below take one."""

    def __init__(self, *arguments: object, fault: str, mark: Path | None = None, after: str = "", with_: tuple = ()):
        """with_: another launcher's words; after: what is typed behind the command, as `| tee log`."""
        own, theirs = pty.openpty()
        starter = with_ or ("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()))
        typed = shlex.join(map(str, [*starter, FAULTY, *arguments])) + after
        # The shell outlives its command, as an interactive one does, and its prompt says with what code that left. The
        # command is not among its own words, in which `left_behind` looks.
        shell = ["bash", "-c", 'trap : INT; eval "$TYPED"; echo "left with $?"; cat >/dev/null']
        self.process = subprocess.Popen(
            shell,
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=environment() | {"FAULT": fault, "MARK": str(mark), "TYPED": typed},
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.pid, self._own, self._said = self.process.pid, own, []
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        waiting = select.poll()  # select takes no descriptor above 1023, and streaming leaves this process many
        waiting.register(self._own, select.POLLIN)
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while not self._closing.is_set():
                if waiting.poll(100):
                    self._said.append(os.read(self._own, 65536))

    @property
    def said(self) -> str:
        return b"".join(self._said).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self._own, keys)

    def close(self) -> None:
        """SIGHUP for whoever sits at it; what is written to it from then on fails with EIO."""
        self._closing.set()
        self._reader.join(5)  # a window that somebody reads stays open
        os.close(self._own)

    def poll(self) -> int | None:
        return self.process.poll()

    def communicate(self) -> tuple[str, None]:
        """All that was said, once the shell is gone."""
        self.process.wait(10)
        if not self._closing.is_set():
            self.close()
        return self.said, None


def ranks_of(launcher: subprocess.Popen | Terminal) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    try:
        below = psutil.Process(launcher.pid).children(recursive=True)
        found = [(p, p.environ().get("RANK")) for p in below if any("train.py" in part for part in p.cmdline())]
        direct = [(int(rank), p) for p, rank in found if rank is not None and p.parent().environ().get("RANK") is None]
        return [p for _, p in sorted(direct, key=lambda pair: pair[0])]
    except psutil.Error:
        return []


def wait_for(condition, seconds: float = 60.0):
    """The condition's first true value. Looks every 20 ms."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def both_ranks(process: subprocess.Popen | Terminal) -> list[psutil.Process]:
    return wait_for(lambda: found if len(found := ranks_of(process)) == 2 else None)


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in read(run) if event["kind"] == kind] if (run / NAME).exists() else []


def end(process: subprocess.Popen | Terminal) -> None:
    """Whatever came before: nothing of it stays."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def left_behind(run: Path) -> list[str]:
    """Processes that still name the run."""
    found = psutil.process_iter(["name", "cmdline"])
    return [p.info["name"] for p in found if str(run) in " ".join(p.info["cmdline"] or ())]


def shared_memory_of(data: Path) -> set[str]:
    """Streaming's prefixes in shared memory whose streams lie in this dataset; other tests run beside this one."""
    found = set()
    for block in Path("/dev/shm").glob("[0-9]*_locals"):
        with contextlib.suppress(OSError):
            if any(Path(stream).is_relative_to(data) for stream in _folders_in(block.read_bytes())):
                found.add(block.name.partition("_")[0])
    return found


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("update-*"))


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return weights_in(newest(run))


def weights_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = checkpoint.glob("weights*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def final_averages(run: Path) -> dict[str, torch.Tensor]:
    """The averages of the weights (optim.ema_decay); {} without."""
    return averages_in(newest(run))


def averages_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = checkpoint.glob("average*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def final_state(run: Path) -> list[dict]:
    """Everything DeepSpeed saved of the optimizer, rank by rank."""
    files = sorted((newest(run) / "deepspeed").glob("*optim_states.pt"))
    return [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]


def assert_same(a, b, where: str = "state") -> None:
    """Bitwise equality of nested containers of tensors and numbers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, int | float | str | bool | None):
        assert a == b, where


def same_end(run: Path, other: Path) -> None:
    """Weights, their averages, Adam's state, random state and data position are bit-equal."""
    assert_same(final_weights(run), final_weights(other))
    assert_same(final_averages(run), final_averages(other))
    assert_same(final_state(run), final_state(other))
    manifests = [json.loads((newest(folder) / "manifest.json").read_text()) for folder in (run, other)]
    for key in ("update", "stage", "data", "guard", "base", "deepspeed", "average"):
        assert manifests[0].get(key) == manifests[1].get(key), key
    for name in sorted(file.name for file in newest(run).glob("rng-*.pt")):
        assert_same(*(torch.load(newest(folder) / name, weights_only=True) for folder in (run, other)))


@dataclass
class Kill:
    """One point of the sweep: which ranks were killed when, and what it cost."""

    seed: int
    ranks: list[int]
    """[]: every process, launcher and all."""
    phase: str
    """start-up, or updates (the saves and validations among them)."""
    seconds: float
    """From the kill until the last process of the run was gone."""
    reached: int
    """Updates done when it was killed."""
    at: float
    """When, in seconds since 1970."""
    in_save: bool
    """Whether it left half a checkpoint behind."""
    stale: bool
    """Whether it left shared memory behind."""
    resumed: int | None = None
    """Update that the next start went on from."""


def kill_once(reference: Reference, run: Path, seed: int, within: float = 1.0) -> Kill | None:
    """Start or go on, and kill -9 one rank, or all there is (as a machine that loses its power), at a random moment. None:
    the run was done before.

    within: seconds of training or of start-up in which the moment lies."""
    rng = random.Random(seed)
    process = start(*reference.started_by, "--run.dir", run)
    try:
        ranks, begun = both_ranks(process), len(events(run, "ready"))
        early = rng.random() < 0.2
        if not early:
            wait_for(lambda: len(events(run, "ready")) > begun or process.poll() is not None)
        time.sleep(rng.uniform(0, 8.0 if early else within))
        chosen = [rng.randrange(2)] if rng.random() < 0.8 else []
        done = process.poll() is not None
        family = (
            [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if not done else []
        )
        for victim in ([ranks[rank] for rank in chosen] or family) if not done else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        killed, at = time.monotonic(), time.time()
        said, _ = process.communicate(timeout=60)
        wait_for(lambda: not left_behind(run), 30)
        if done:
            assert process.returncode == 0, said[-3000:]
            return None
    finally:
        end(process)
    reached = max((event["update"] for event in events(run, "progress")[-1:]), default=0)
    phase = "updates" if len(events(run, "ready")) > begun else "start-up"
    return Kill(
        seed,
        chosen,
        phase,
        round(time.monotonic() - killed, 2),
        reached,
        at,
        any((run / "checkpoints").glob(".update-*.partial")),
        bool(shared_memory_of(reference.data)),
    )


def kill_chain(reference: Reference, run: Path, seeds: Sequence[int], within: float = 1.0) -> list[Kill]:
    """Kill a run once for each seed, let it end, and hold it bit by bit against the run that was never killed.

    No step is done by hand: every start is the same command."""
    kills = []
    for seed in seeds:
        kill = kill_once(reference, run, seed, within)
        if kill is None:
            break
        kills.append(kill)
    done = launch(*reference.started_by, "--run.dir", run, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    same_end(reference.run, run)
    assert not shared_memory_of(reference.data)
    for kill in kills:  # a start that was killed early wrote no event: the next one counts
        after = [event["update"] for event in events(run, "start") if event["time"] > kill.at]
        kill.resumed = after[0] if after else None
    return kills
