"""train.deterministic: what is switched on, on each rank, before anything of a GPU starts. That GPUs then give the same bits
is for tests/training/test_gpu.py."""

from __future__ import annotations

import pytest

from tests import forked
from tests.training.runs import launch, rank_environments

CODE = """
import os, sys
import torch
from megaflux.common.errors import exit_on_user_error
from megaflux.training import distributed

def main():
    world = distributed.start(deterministic=sys.argv[1] == "on")
    cudnn = torch.backends.cudnn
    print(world.rank, torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
          cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled(),
          torch.utils.deterministic.fill_uninitialized_memory, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), flush=True)
    distributed.stop()

exit_on_user_error(main)
"""


def start(switch: str, ranks: int = 1, **variables: str) -> list[tuple[int, str, str]]:
    """(exit code, last line of stdout, stderr) of each rank of a process group that is started so."""
    processes = []
    for place in rank_environments(ranks):
        env = {k: v for k, v in place.items() if k != "CUBLAS_WORKSPACE_CONFIG"} | variables
        processes.append(forked.Forked(["-c", CODE, switch], env))
    done = [process.communicate(timeout=120) for process in processes]
    # DeepSpeed writes to stdout as well, before
    last = [(out.strip().rpartition("\n")[2], err) for out, err in done]
    return [(process.returncode, *texts) for process, texts in zip(processes, last, strict=True)]


def test_every_rank_is_deterministic_and_strictly_so():
    for rank, (code, out, err) in enumerate(start("on", ranks=2)):
        assert code == 0, err
        assert out.split() == [str(rank), "True", "False", "True", "False", "False", "False", ":4096:8"]


def test_nothing_is_switched_on_where_nobody_asks():
    ((code, out, err),) = start("off")
    assert code == 0, err
    assert out.split()[1:4] == ["False", "False", "False"] and out.split()[-1] == "None"


@pytest.mark.parametrize("given, code", [(":16:8", 0), (":0:0", 2)])
def test_a_workspace_of_ones_own(given, code):
    ((left, out, err),) = start("on", CUBLAS_WORKSPACE_CONFIG=given)
    assert left == code
    if code:
        assert err.splitlines()[-1] == (
            "error: CUBLAS_WORKSPACE_CONFIG: ':0:0', but train.deterministic needs :4096:8 or :16:8; leave the variable out"
        )
    else:
        assert out.split()[-1] == ":16:8"


def test_training_asks_for_it_where_its_configuration_does(tmp_path, monkeypatch):
    """Seen by what is refused at the start, as on a CPU the bits are the same either way."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    done = launch("--run.dir", tmp_path / "run", "--train.deterministic", "true", with_="forked", timeout=90)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.splitlines()[-1].startswith("error: CUBLAS_WORKSPACE_CONFIG: ':0:0', but train.deterministic")
