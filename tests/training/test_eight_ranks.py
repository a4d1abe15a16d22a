"""The tiny preset on eight ranks, through all stages, and on with 8, 4 and 2. Minutes on two cores: marked slow."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from megaflux.config.presets import tiny
from megaflux.training.checkpoint import manifest
from megaflux.training.checkpoint.write import writer_of
from tests.training.faults import end, final_weights, left_behind, newest, ranks_of, start, wait_for
from tests.training.runs import ds_config, make_dataset, write_config

UPDATES = 8  # every stage has some
PICTURES = 92  # of which 64 train: two batches of 32, without repeats, which other ranks give other noise


class Watched:
    """One launch: how long it took, and the most memory that each rank had for itself, by rank."""

    def __init__(self, *arguments: object, ranks: int):
        self.memory: dict[int, int] = {}
        began = time.monotonic()
        self.process = start(*arguments, ranks=ranks)
        watching = threading.Thread(target=self._watch)
        watching.start()
        try:
            self.said, _ = self.process.communicate(timeout=1200)
        finally:
            end(self.process)
            watching.join()
        self.seconds = time.monotonic() - began

    def _watch(self) -> None:
        while self.process.poll() is None:
            for rank, process in enumerate(ranks_of(self.process)):
                try:  # pages shared with other processes, as libraries are, count by their share
                    self.memory[rank] = max(self.memory.get(rank, 0), process.memory_full_info().pss)
                except psutil.Error:
                    pass
            time.sleep(1)

    def __str__(self) -> str:
        gigabytes = [self.memory[rank] / 1e9 for rank in sorted(self.memory)]
        return f"{self.seconds:.0f} s, {min(gigabytes):.2f} to {max(gigabytes):.2f} GB a rank"


@pytest.mark.slow
def test_eight_ranks_train_all_stages_and_eight_four_and_two_go_on(tmp_path):
    data = make_dataset(tmp_path, images=PICTURES, square=True)
    values = {
        "preset": "tiny",
        "data": {"path": str(data), "source": None, "longest_side": 64, "aspect_ratios": ["1:1", "2:1"]},
        "train": {"updates": UPDATES, "checkpoint_every": 1, "keep_checkpoints": 9},
        "validation": {"every": 0, "panel_every": 0, "samples": 3, "panel_samples": 2, "steps": 2},
        "monitor": {"every": 1, "peak_tflops": 0.1},
    }
    config, ds = write_config(values, tmp_path / "config.yaml"), ds_config(tmp_path, "fp32")

    def run(folder: Path, ranks: int, *more: object) -> str:
        done = Watched("--deepspeed", ds, "--config", config, "--run.dir", folder, *more, ranks=ranks)
        assert done.process.returncode == 0, done.said[-3000:]
        wait_for(lambda: not left_behind(folder), 30)
        print(f"{folder.name}, {ranks} ranks {' '.join(map(str, more))}: {done}")
        return done.said

    whole, other = tmp_path / "whole", tmp_path / "other"
    run(whole, 8)
    stages = [stage["name"] for stage in tiny()["stages"]]
    shown = [json.loads(file.read_text())["stage_name"] for file in sorted(whole.glob("checkpoints/*/manifest.json"))]
    assert list(dict.fromkeys(shown)) == stages and len(shown) == UPDATES
    for path in manifest.listed(whole).values():
        written = [0] * 8
        for file in manifest.files_in(path):
            written[writer_of(file.name)] += file.stat().st_size
        assert max(written) <= 1.5 * sorted(written)[4]  # no rank writes much more than the others

    run(other, 8, "--train.stop_after", 2)
    run(other, 8, "--train.stop_after", 4)
    assert "resharded for 4" in run(other, 4, "--train.stop_after", 6)
    assert "resharded for 2" in run(other, 2)
    want, got = final_weights(whole), final_weights(other)
    difference = max((want[name] - got[name]).abs().max().item() for name in want)
    print(f"8 -> 8 -> 4 -> 2 ranks: weights differ by at most {difference:.1e}")
    assert want.keys() == got.keys() and difference < 1e-4
    ends = [json.loads((newest(folder) / "manifest.json").read_text()) for folder in (whole, other)]
    assert ends[0]["data"] == ends[1]["data"] | {"micro_batch_size": 4, "world_size": 8}
    assert (ends[0]["update"], ends[0]["world_size"], ends[1]["world_size"]) == (UPDATES, 8, 2)
