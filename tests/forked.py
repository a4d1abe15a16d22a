"""Python processes whose imports are done before they start: forked from one that has imported what training imports.

A launch spends most of its time importing torch, DeepSpeed, transformers and diffusers. Tests whose subject is what a
run computes start it here; those whose subject is starting, launchers, signals or what outlives a process use the
launchers themselves (tests/training/runs.py, faults.py).

All of them have the hash seed of the process that they are forked from, which has no threads and has run only imports. A
forked one has the arguments, working folder and environment that it is given, runs its script or module as __main__, and
ends as any interpreter does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
# Libraries; a forked process imports megaflux itself, so that scripts can replace parts of it before (faulty_train.py).
PRELOADED = (
    "megaflux.common.compat",  # comes before libraries
    "accelerate",
    "deepspeed",
    "streaming",
    "pydantic",
    "torch.utils.tensorboard",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.controlnets.controlnet_flux",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.flux.pipeline_flux_controlnet",
    "diffusers.pipelines.flux.pipeline_flux_controlnet_image_to_image",
    "diffusers.pipelines.flux.pipeline_flux_controlnet_inpainting",
    "diffusers.pipelines.flux.pipeline_flux_img2img",
    "diffusers.pipelines.flux.pipeline_flux_inpaint",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.qwen2.tokenization_qwen2_fast",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl_fast",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",
    "transformers.models.t5.modeling_t5",
)
ENVIRONMENT = dict(os.environ)  # before any test changes it
_server: subprocess.Popen | None = None
_address: Path | None = None


class Forked:
    """A process of its own; has the part of subprocess.Popen that tests use."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT):
        """command: what follows `python` on a command line (SCRIPT, -m MODULE or -c CODE, and arguments). env: None: this
        process's."""
        self.returncode: int | None = None
        self._output: tuple[list[bytes], list[bytes]] = ([], [])
        pipes = [os.pipe() for _ in self._output]
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(_started()))
        asked = {"command": list(command), "env": dict(os.environ if env is None else env), "cwd": str(cwd)}
        request = json.dumps(asked).encode()
        socket.send_fds(self._connection, [len(request).to_bytes(4, "big")], [write for _, write in pipes])
        self._connection.sendall(request)
        self._readers = []
        for (read, write), said in zip(pipes, self._output):
            os.close(write)
            self._readers.append(threading.Thread(target=_read, args=(read, said), daemon=True))
            self._readers[-1].start()
        self.pid = int.from_bytes(_exactly(self._connection, 4), "big")

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: still running."""
        return self._ended(0)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """stdout and stderr of the process, once it has ended. Raises TimeoutExpired, after killing it."""
        if self._ended(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("forked", timeout, *map(b"".join, self._output))
        for reader in self._readers:
            reader.join(30)
            if reader.is_alive():  # some descendant still has stdout or stderr
                raise subprocess.TimeoutExpired("forked", timeout, *map(b"".join, self._output))
        out, err = (b"".join(said).decode(errors="replace") for said in self._output)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float) -> int | None:
        if self.returncode is None:
            waiting = select.poll()  # select takes no descriptor above 1023, and streaming leaves this process many
            waiting.register(self._connection, select.POLLIN)
            if waiting.poll(timeout * 1000):
                self.returncode = int.from_bytes(_exactly(self._connection, 4), "big", signed=True)
                self._connection.close()
        return self.returncode


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """subprocess.run for a Forked, with its output as text."""
    return run_ranks(command, [dict(os.environ if env is None else env)], timeout, cwd)


class EndedRanks(subprocess.CompletedProcess[str]):
    """Several processes: the exit code of the first one that failed, and their outputs one after the other."""

    ranks: list[tuple[str, str]]
    """stdout and stderr of each."""


def run_ranks(
    command: Sequence[str], envs: Sequence[Mapping[str, str]], timeout: float = 300, cwd: Path = ROOT
) -> EndedRanks:
    """Run a command (see Forked) once for each environment, all at the same time. As launchers do it, five seconds after a
    failure the others are killed."""
    processes = [Forked(command, env, cwd) for env in envs]
    until, failed, code = time.monotonic() + timeout, None, 0
    try:
        while any(process.poll() is None for process in processes):
            bad = [process.returncode for process in processes if process.poll()]
            if bad and failed is None:
                failed, code = time.monotonic(), bad[0]
            if time.monotonic() > until or (failed and time.monotonic() > failed + 5):
                break
            time.sleep(0.01)
    finally:
        late = time.monotonic() > until
        for process in processes:
            process.kill()
    said = [process.communicate() for process in processes]
    if late:
        raise subprocess.TimeoutExpired(command, timeout, *("".join(texts) for texts in zip(*said)))
    code = code or next((process.returncode for process in processes if process.returncode), 0)
    done = EndedRanks(list(command), code, *("".join(texts) for texts in zip(*said)))
    done.ranks = said
    return done


def _read(file: int, said: list[bytes]) -> None:
    with open(file, "rb", buffering=0) as stream:
        while data := stream.read(65536):
            said.append(data)


def _started() -> Path:
    """The address of this process's server, started by the first call."""
    global _server, _address
    if _server is None or _server.poll() is not None:
        _address = Path(tempfile.mkdtemp(prefix="forked-")) / "socket"
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(_address)],
            env=env,
            cwd=ROOT,
            stdin=subprocess.PIPE,  # closed when this process ends, however it ends
            stdout=subprocess.DEVNULL,
        )
        atexit.register(shutil.rmtree, _address.parent, ignore_errors=True)
        atexit.register(_server.kill)
        until = time.monotonic() + 120
        while not _address.exists():
            if _server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the process to fork from did not start")
            time.sleep(0.05)
    assert _address is not None
    return _address


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the process to fork from is gone")
        data += part
    return data


def serve(address: str) -> list[str] | None:
    """Import, then fork on request until stdin is closed. Returns the command in a forked process, None in the server."""
    for name in PRELOADED:
        __import__(name)
    hidden = socket.socket(socket.AF_UNIX)
    hidden.bind(address + ".new")
    hidden.listen()
    os.rename(address + ".new", address)  # whoever sees it can connect
    running: dict[int, socket.socket] = {}
    while True:
        ready = select.select([hidden, sys.stdin], [], [], 0.01 if running else None)[0]
        if sys.stdin in ready:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return None
        if hidden in ready:
            connection, _ = hidden.accept()
            size, files, _, _ = socket.recv_fds(connection, 4, 2)
            request = json.loads(_exactly(connection, int.from_bytes(size, "big")))
            pid = os.fork()
            if pid == 0:
                for other in (hidden, connection, *running.values()):
                    other.close()
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(files[0], 1)
                os.dup2(files[1], 2)
                for file in files:
                    os.close(file)
                os.environ.clear()
                os.environ.update(request["env"])
                os.chdir(request["cwd"])
                tempfile.tempdir = None  # it remembers TMPDIR
                random.seed()  # as different as those of processes that start by themselves
                sys.modules["numpy"].random.seed()
                return request["command"]
            for file in files:
                os.close(file)
            connection.sendall(pid.to_bytes(4, "big"))
            running[pid] = connection
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with contextlib.suppress(OSError):
                running[pid].sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
            running.pop(pid).close()


def execute(command: list[str]) -> None:
    """What `python COMMAND...` does, in this interpreter."""
    kind, *rest = command
    if kind == "-m":
        sys.argv, sys.path[0] = rest, os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = command, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if (command := serve(sys.argv[1])) is not None:
        execute(command)
