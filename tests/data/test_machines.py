"""Machines that share a dataset's folder divide its verification; those with a copy of their own do not."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_faults import dataset, flip, stored  # noqa: F401  a fixture

from megaflux.common.ranks import World
from megaflux.data.storage.verdict import VERDICT, verify_shards
from tests import forked
from tests.training.runs import rank_environments

MACHINE = """
import json, os, sys, threading
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
from megaflux.data.storage import verdict
from megaflux.common.ranks import detect_world
paths, out = json.loads(sys.argv[1]), Path(sys.argv[2])
world = detect_world()
assert world.nodes == len(paths), world
path, read, check = Path(paths[world.rank // world.local_size]), [], verdict._check
def spy(root, file, *rest):
    read.append(file.name)
    return check(root, file, *rest)
verdict._check = spy
problems = list(map(str, verdict.verify_shards(path, ["train"], None, world)))
(out / f"{world.rank}.json").write_text(json.dumps([sorted(read), problems]))
dist.barrier()
os._exit(0)  # a normal exit under gloo's threads aborts now and then (exit code -6)
"""


def verified_by(paths, out, ranks=1):
    """What each rank read and found, with a machine for each of `paths`: processes that share no temporary folder."""
    (out / "machine.py").write_text(MACHINE)
    envs = rank_environments(len(paths) * ranks, nodes=len(paths))
    for rank, env in enumerate(envs):
        env["TMPDIR"] = str(out / f"tmp{rank // ranks}")
        Path(env["TMPDIR"]).mkdir(exist_ok=True)
    command = [str(out / "machine.py"), json.dumps([str(path) for path in paths]), str(out)]
    done = forked.run_ranks(command, envs, timeout=90)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(len(paths) * ranks)]


@pytest.fixture
def root(dataset, tmp_path):  # noqa: F811
    return Path(shutil.copytree(dataset, tmp_path / "shared", ignore=shutil.ignore_patterns("*.mds")))


def names(root):
    return sorted(str(path.relative_to(root)) for bucket in (0, 1) for path in stored(root, bucket))


def test_machines_that_share_a_folder_read_each_file_once_and_lose_no_verdict(root, tmp_path):
    flip(stored(root)[1]), flip(stored(root)[2])  # one of each machine's
    (first, found), (nothing, same), (second, also), (none, too) = verified_by([root, root], tmp_path, ranks=2)
    assert sorted(first + second) == names(root)
    assert abs(len(first) - len(second)) <= 1
    assert nothing == none == []
    assert found == same == also == too
    assert len(found) == 2
    kept = [json.loads(file.read_text())["files"] for file in sorted(root.glob(".verified*.json"))]
    assert len(kept) == 2
    assert len({**kept[0], **kept[1]}) == len(names(root)) - 2
    flip(stored(root)[1]), flip(stored(root)[2])
    (first, found), (second, _) = verified_by([root, root], tmp_path)
    assert sorted(first + second) == sorted(str(path.relative_to(root)) for path in stored(root)[1:3])
    assert found == []
    assert (
        verify_shards(root, ["train"], None, World(0, 1)) == []
    )  # and a run on one machine believes what both have kept
    assert len(json.loads((root / VERDICT).read_text())["files"]) == len(names(root))
    assert not list(root.rglob(".seen-by-*"))


def test_machines_with_a_copy_each_read_all_of_it(root, tmp_path):
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    flip(stored(copy)[0])
    (first, found), (second, same) = verified_by([root, copy], tmp_path)
    assert first == second == names(root)
    assert found == same == [f"{stored(copy)[0]}: damaged, its xxh64 is not the one in the index"]


@pytest.mark.slow
def test_machines_that_cannot_write_there_read_all_of_it(root, tmp_path):
    folders = [path for path in root.rglob("*") if path.is_dir()]
    if subprocess.run(["chattr", "+i", *folders], capture_output=True).returncode:
        pytest.skip("no immutable folders on this file system")
    try:
        (first, _), (second, _) = verified_by([root, root], tmp_path)
    finally:
        subprocess.run(["chattr", "-i", *folders], check=True)
    assert first == second == names(root)
