"""Checkpoints on disk: every state that a crash can leave, damage of every kind, what is deleted and what never is."""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from megaflux.common import files
from megaflux.common.errors import UserError
from megaflux.training.checkpoint import manifest

CONTENT = {
    "format": manifest.FORMAT,
    "update": 0,
    "stage": 0,
    "stage_name": "one",
    "world_size": 2,
    "data": {"epoch": 1},
    "base": "b",
    "identity": {},
    "deepspeed": {"zero_stage": 2},
    "guard": {},
}


def write_files(folder: Path, seed: int) -> None:
    """What a save writes before its manifest, small."""
    rng = random.Random(seed)
    for name in (
        "deepspeed/a_optim_states.pt",
        "deepspeed/b_optim_states.pt",
        "weights.safetensors",
        "rng-rank0000.pt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(300 + rng.randrange(200)))


def save(run: Path, update: int, keep: int = 2) -> None:
    """What checkpoint.save does on the main rank, without a model."""
    partial = manifest.partial_of(run, update)
    manifest.clear(partial)
    partial.mkdir(parents=True)
    write_files(partial, update)
    for file in manifest.files_in(partial):
        manifest.sync(file)
    manifest.publish(
        partial,
        manifest.folder(run) / manifest.name_of(update),
        CONTENT | {"update": update},
        manifest.inventory(partial),
    )
    manifest.prune(run, keep, milestones=(), protect=())


def newest(run: Path) -> int | None:
    """The update that a run would go on from."""
    manifest.recover(run, lambda line: None)
    for update, path in reversed(manifest.listed(run).items()):
        try:
            assert manifest.verify(path)["update"] == update
        except UserError:
            continue
        return update
    return None


class Crash(BaseException):
    """The machine stops here."""


class Machine:
    """Counts what changes the disk and stops before the n-th of it.

    torn: the write it stops at has half arrived. `lose` then takes away what no fsync had made durable: contents of files,
    renames, and the names of what was made in a folder."""

    def __init__(self, stop_at: int, torn: bool = False):
        self.stop_at, self.torn, self.count = stop_at, torn, 0
        self.tore = False
        self.unsynced: set[int] = set()
        """Inodes of files written to since their fsync."""
        self.renames: list[tuple[int, Path, Path]] = []
        """(inode of the folder, from, to) of those since its fsync."""
        self.names: dict[int, int] = {}
        """Inode of a file or folder made since the fsync of the folder that it is in -> that folder's."""

    def lose(self, run: Path) -> None:
        for _, old, new in reversed(self.renames):
            if new.exists() and not old.exists():
                new.rename(old)
        for file in run.rglob("*"):
            if file.is_file() and file.stat().st_ino in self.unsynced:
                file.write_bytes(b"")
        for made in sorted(run.rglob("*"), reverse=True):  # what is in a folder before it
            if made.stat().st_ino in self.names:
                shutil.rmtree(made) if made.is_dir() else made.unlink()

    def made(self, path: Path) -> None:
        self.names[path.stat().st_ino] = path.parent.stat().st_ino

    def step(self) -> bool:
        """Whether this operation still happens; raises where it is the last, unless it is to be torn."""
        self.count += 1
        if self.count < self.stop_at:
            return True
        if self.count > self.stop_at or not self.torn:
            raise Crash
        return False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        machine, real_open = self, builtins.open

        def wrap(module, name: str) -> None:
            real = getattr(module, name)

            def changed(*args, **kwargs):
                if not machine.step():
                    raise Crash  # a rename, a deletion of one name or an fsync is done or is not
                if name == "rename":
                    old, new = map(Path, args[:2])
                    machine.renames.append((new.parent.stat().st_ino, old, new))
                if name == "fsync":
                    synced = os.fstat(args[0]).st_ino
                    machine.unsynced.discard(synced)
                    machine.renames = [rename for rename in machine.renames if rename[0] != synced]
                    machine.names = {made: where for made, where in machine.names.items() if where != synced}
                result = real(*args, **kwargs)
                if name == "mkdir":
                    machine.made(Path(args[0]))
                return result

            patch.setattr(module, name, changed)

        for name in ("rename", "fsync", "unlink", "rmdir", "mkdir"):
            wrap(os, name)

        class Torn:
            def __init__(self, stream):
                self.stream = stream

            def __getattr__(self, name):
                return getattr(self.stream, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.stream.close()

            def write(self, data):
                machine.unsynced.add(os.fstat(self.stream.fileno()).st_ino)
                if machine.step():
                    return self.stream.write(data)
                machine.tore = True
                self.stream.write(data[: len(data) // 2])
                self.stream.flush()
                raise Crash

        def opened(file, mode="r", *args, **kwargs):
            new = "w" in mode and not os.path.exists(file)
            stream = real_open(file, mode, *args, **kwargs)
            if new:
                machine.made(Path(file))
            return Torn(stream) if "w" in mode else stream

        patch.setattr("io.open", opened)


def enumerate_states(tmp_path: Path, prepare, act) -> int:
    """Crash `act` before each of its changes, there without what was not synced, and inside each of its writes; checks
    each state. Returns how many states there were."""
    states, stop, finished = 0, 1, False
    while not finished:
        for kind in ("kept", "lost", "torn"):
            run = tmp_path / f"{stop}-{kind}"
            before = prepare(run)
            machine, finished = Machine(stop, kind == "torn"), True
            with pytest.MonkeyPatch.context() as patch:
                machine.install(patch)
                try:
                    act(run)
                except Crash:
                    finished = False
            if kind == "lost":
                machine.lose(run)
            states += kind != "torn" or machine.tore
            after = newest(run)
            assert after is not None and after >= before, (stop, kind, sorted(p.name for p in run.rglob("update-*")))
            left = {path.name for path in manifest.folder(run).iterdir()}
            assert left == {manifest.name_of(update) for update in manifest.listed(run)}  # leftovers are gone
            act(run)  # and the next save works
            shutil.rmtree(run)
        stop += 1
    return states


def test_every_state_that_a_crash_can_leave_has_a_whole_checkpoint(tmp_path):
    def prepare(run: Path) -> int:
        save(run, 1)
        save(run, 2)
        return 2

    states = enumerate_states(tmp_path, prepare, lambda run: save(run, 3))
    assert states > 50
    print(f"{states} states of a save")


def test_every_state_of_a_save_that_keeps_only_itself(tmp_path):
    def prepare(run: Path) -> int:
        save(run, 1)
        save(run, 2)
        return 2

    assert enumerate_states(tmp_path, prepare, lambda run: save(run, 3, keep=1)) > 50


def test_every_state_of_a_save_over_a_damaged_twin(tmp_path):
    def prepare(run: Path) -> int:
        save(run, 2)
        save(run, 3)
        (manifest.folder(run) / "update-0000003" / "weights.safetensors").write_bytes(b"damaged")
        return 2

    assert enumerate_states(tmp_path, prepare, lambda run: save(run, 3)) > 50


def test_a_thousand_corruptions_are_all_refused_and_the_one_before_is_used(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    path, rng = manifest.folder(tmp_path) / "update-0000002", random.Random(0)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    contents = {file: file.read_bytes() for file in files}
    for number in range(1000):
        file, data = files[number % len(files)], bytearray(contents[files[number % len(files)]])
        kind = rng.choice(["flip", "truncate", "zero", "grow", "missing"])
        if kind == "flip":
            position = rng.randrange(len(data))
            data[position] ^= 1 << rng.randrange(8)
        elif kind == "truncate":
            del data[rng.randrange(len(data)) :]
        elif kind == "zero":
            start = rng.randrange(len(data))
            data[start : start + 16] = bytes(len(data[start : start + 16]))
        elif kind == "grow":
            data += bytes([rng.randrange(256)])
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes(data)
        if kind == "missing" or bytes(data) != contents[file]:
            same = kind != "missing" and file.name == "manifest.json" and _says_the_same(data, contents[file])
            assert newest(tmp_path) == (2 if same else 1), (kind, file.name)
        file.write_bytes(contents[file])
    assert newest(tmp_path) == 2


def _says_the_same(data: bytes, original: bytes) -> bool:
    """Whether only white space has changed."""
    try:
        return json.loads(data) == json.loads(original)
    except ValueError:
        return False


def test_what_is_deleted_and_what_never_is(tmp_path):
    for update in (1, 2, 3, 4, 5, 6):
        partial = manifest.partial_of(tmp_path, update)
        partial.mkdir(parents=True)
        write_files(partial, update)
        manifest.publish(
            partial,
            manifest.folder(tmp_path) / manifest.name_of(update),
            CONTENT | {"update": update},
            manifest.inventory(partial),
        )
    (manifest.folder(tmp_path) / "update-0000004.bad").mkdir()
    gone = manifest.prune(tmp_path, 2, milestones={3}, protect={1})
    assert gone == [manifest.folder(tmp_path) / f"update-000000{update}" for update in (2, 4)]
    assert list(manifest.listed(tmp_path)) == [1, 3, 5, 6]
    assert len([*manifest.folder(tmp_path).iterdir()]) == 5  # and the disk is free again
    assert (manifest.folder(tmp_path) / "update-0000004.bad").is_dir()  # somebody's own
    manifest.prune(tmp_path, 0, milestones=(), protect=())
    assert list(manifest.listed(tmp_path)) == [6]  # never the only one


def test_the_tool_lists_verifies_and_prunes(tmp_path):
    def tool(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "megaflux.training.checkpoint", *map(str, arguments)], capture_output=True, text=True
        )

    nothing = tool("ls", tmp_path)
    assert nothing.returncode == 2 and "holds no checkpoint" in nothing.stderr
    assert tool("verify", tmp_path / "gone").returncode == 2
    save(tmp_path, 1)
    save(tmp_path, 2)
    listed = tool("ls", tmp_path)
    assert listed.returncode == 0 and listed.stdout.count("update-000000") == 2 and "kB" in listed.stdout
    sound = tool("verify", tmp_path)
    assert sound.returncode == 0 and "resumes from update-0000002" in sound.stdout
    (manifest.folder(tmp_path) / "update-0000002" / "weights.safetensors").write_bytes(b"")
    bad = tool("verify", tmp_path)
    assert bad.returncode == 2 and "resumes from update-0000001" in bad.stdout and "weights.safetensors" in bad.stdout
    assert "Traceback" not in bad.stderr + listed.stderr + nothing.stderr


def refuse_fsync(patch: pytest.MonkeyPatch, number: int, of: str) -> None:
    """fsync fails with this errno: of folders, of files, or of both, as some storage refuses it."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        if kind in of:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    patch.setattr(os, "fsync", fsync)
    patch.setattr(files, "_warned", set())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("of", ["folder", "file and folder"])
def test_storage_without_fsync_keeps_checkpoints_after_one_warning(tmp_path, monkeypatch, caplog, number, of):
    refuse_fsync(monkeypatch, number, of)
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert newest(tmp_path) == 2
    (said,) = [record.message for record in caplog.records]
    assert "does not take fsync" in said and str(tmp_path) in said
    # complete but for its name, as a crash leaves it
    (manifest.folder(tmp_path) / manifest.name_of(2)).rename(manifest.partial_of(tmp_path, 2))
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_real_error_of_fsync_is_one(tmp_path, monkeypatch, number):
    save(tmp_path, 1)
    refuse_fsync(monkeypatch, number, "folder")
    with pytest.raises(OSError) as error:
        save(tmp_path, 2)
    assert error.value.errno == number and newest(tmp_path) == 1


def test_one_rank_of_a_machine_warns_of_its_storage(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    refuse_fsync(monkeypatch, errno.EINVAL, "folder")
    save(tmp_path, 1)
    assert newest(tmp_path) == 1 and caplog.records == []
