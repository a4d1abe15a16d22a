"""Ranks that wait for one that works for longer than any collective may take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import environment, free_port

WORKER = str(Path(__file__).with_name("waiting_worker.py"))


@pytest.mark.parametrize(
    ("ends", "said", "codes"),
    [
        ("end", ["went on", "went on"], [0, 0]),
        ("refuse", ["refused: the source is gone; give another, agreed True"] * 2, [0, 0]),
        ("crash", ["", ""], [1, 1]),
    ],
)
def test_others_wait_for_a_rank_that_works_past_every_time_limit(ends, said, codes):
    port, ranks = str(free_port()), []
    for rank in (0, 1):
        env = environment() | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(subprocess.Popen([sys.executable, WORKER, ends], env=env, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True))  # fmt: skip
    found = [process.communicate(timeout=60) for process in ranks]
    assert [out.strip() for out, _ in found] == said, found
    assert [min(1, abs(process.returncode)) for process in ranks] == codes, found
    assert ("ZeroDivisionError" in found[0][1]) == (ends == "crash")
