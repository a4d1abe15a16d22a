"""Ranks that wait for one that works for longer than any collective may take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.training import prepare_data
from tests import forked
from tests.training.runs import rank_environments

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
    ranks = [forked.Forked([WORKER, ends], env) for env in rank_environments(2)]
    found = [process.communicate(timeout=60) for process in ranks]
    assert [out.strip() for out, _ in found] == said, found
    assert [min(1, abs(process.returncode)) for process in ranks] == codes, found
    assert ("ZeroDivisionError" in found[0][1]) == (ends == "crash")


def test_data_are_prepared_and_fetched_while_the_others_wait_and_not_before_a_barrier(tmp_path, monkeypatch):
    """By rank 0 what is prepared, by each machine's first what is fetched; all others wait with signs of life."""
    from megaflux.data.storage import remote
    from megaflux.data.writing import build

    done, waited = [], []

    class Stop(Exception):
        """Behind the wait."""

    def wait(work, world):
        waited.append(world.rank)
        work and work()
        raise Stop

    monkeypatch.setattr(prepare_data, "work_while_others_wait", wait)
    monkeypatch.setattr(build, "prepare", lambda *_: done.append("prepared"))
    monkeypatch.setattr(remote, "fetch_split", lambda *_: done.append("fetched"))
    for data, works, what in (({"source": "pictures"}, 0, "prepared"), ({"remote": "s3://x"}, 1, "fetched")):
        config = build_config(merge(tiny(), {"data": {"path": str(tmp_path / "none")} | {"source": None} | data}))
        for rank in (0, 1):
            monkeypatch.setenv("LOCAL_RANK", str(0 if rank == works else 1))
            with pytest.raises(Stop):
                prepare_data.prepare_data(config, World(rank, 2, torch.device("cpu")))
        assert done == [what]
        done.clear()
    assert waited == [0, 1, 0, 1]
