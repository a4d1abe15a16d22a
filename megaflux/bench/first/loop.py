"""Step loop: the training loop at FLUX.1-dev's sizes, random models made on the device: two stages, a save, both watched.

Five updates of two micro-batches of one picture, three in the first stage; checkpoints after 3, 4 and 5. One double block
trains in the first stage and one single block in the second (0.41 and 0.32 B parameters with the Qwen layer), so that a
save fits any disk: seconds a gigabyte are what carries over to the published stages.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import SMALL_SIDE, Setting
from megaflux.bench.first.training import STEPS
from megaflux.presets import dev, tiny
from megaflux_kernels.bench.timing import median

UPDATES, STAGE_END, SAVED, LAST = 6, 3, 4, 5
"""Of the configuration, of the first stage, at the checkpoint that `continued` goes on from, and of this process."""
RATIOS = ("1:1", "2:1")
COLD = (0, STAGE_END)  # updates that compile, and fill the allocator


def run(recorder: Recorder, setting: Setting) -> None:
    facts = [
        "trains",
        *(f"update: {step}" for step in STEPS),
        *(f"save: {part}" for part in ("files", "write", "sync", "hash")),
    ]
    if recorder.missing(*facts):
        with recorder.measuring(*facts):
            note(recorder, setting, train(setting.work / "loop", setting.small))


def train(work: Path, small: bool) -> dict[str, Any]:
    """Run the loop in a process of its own, from nothing; what `training.Seen` saw."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_data(work / "data", SMALL_SIDE if small else 1024)
    config = write_config(work, "run", small, LAST)
    start(config, "--seen", str(work / "seen.json"))
    return json.loads((work / "seen.json").read_text())


def start(config: Path, *options: str) -> None:
    """A training process. RuntimeError where it fails."""
    done = subprocess.run([sys.executable, "-m", "megaflux.bench.first.training", str(config), *options], check=False)
    if done.returncode:
        raise RuntimeError(f"training ended with code {done.returncode}; see the log")


def write_config(work: Path, run: str, small: bool, stop_after: int) -> Path:
    """The configuration of the run in work/run, as a YAML file."""
    import yaml

    path = work / f"{run}-{stop_after}.yaml"
    path.write_text(yaml.safe_dump(values(work, run, small, stop_after)))
    return path


def values(work: Path, run: str, small: bool, stop_after: int) -> dict[str, Any]:
    """All values of a configuration: the preset's, and what makes it short."""
    found = tiny() if small else dev()
    found["model"] |= {"flux": None, "vlm": None, "activation_checkpointing": "auto"}
    found["run"] = {"dir": str(work / run)}
    found["data"] |= {"path": str(work / "data"), "source": None, "aspect_ratios": list(RATIOS), "cache": [],
                      "num_workers": 0 if small else 2}  # fmt: skip
    found["stages"] = [{"name": name, "share": 1.0, "blocks": [block], "components": "attention"}
                       for name, block in (("double", 1), ("single", 3 if small else 56))]  # fmt: skip
    found["train"] = {"updates": UPDATES, "stop_after": stop_after, "global_batch_size": 2, "micro_batch_size": 1,
                      "checkpoint_every": SAVED, "keep_checkpoints": 3}  # fmt: skip
    found["validation"] = {"every": 0, "panel_every": 0, "samples": 2, "panel_samples": 1, "steps": 2}
    found["monitor"] = {"every": 1, "grad_norms_every": 0}
    return found


def make_data(folder: Path, side: int) -> None:
    """A prepared dataset of generated pictures, some of them held out."""
    from megaflux.bench.loader import make_pictures
    from megaflux.data.prepare import Options, prepare

    make_pictures(folder.parent / "pictures", 20, side, RATIOS)
    prepare(str(folder.parent / "pictures"), folder, Options(longest_side=side, aspect_ratios=RATIOS, held_out=0.2),
            progress=False)  # fmt: skip


def note(recorder: Recorder, setting: Setting, seen: dict[str, Any]) -> None:
    """The facts of what was seen."""
    run = setting.work / "loop" / "run"
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    dropped = sum(line["kind"] == "fault" for line in lines)
    losses = [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]
    recorder.add("trains", len(seen["updates"]), "updates")
    recorder.add("faults", dropped, predicted=0)
    recorder.add("held-out loss before", losses[0])
    recorder.add("held-out loss after the first stage", losses[-1])
    for number, line in enumerate((line for line in lines if line["kind"] == "ready"), start=1):
        recorder.add(f"plan of stage {number}", line["plan"])
    warm = [update for index, update in enumerate(seen["updates"]) if index not in COLD]
    for step in STEPS:
        recorder.add(f"update: {step}", median([update.get(step, 0.0) for update in warm]), "s")
    save = seen["saves"][0]
    recorder.add("save: files", save["gb"], "GB")
    recorder.add("save: sync", save["sync"], "s")
    recorder.add("save: hash", save["hash"], "s")
    recorder.add("save: write", save["save"] - save["sync"] - save["hash"], "s")
    if seen["memory"]:
        built = [gb for when, gb in seen["memory"] if when == "after an engine is built"]
        before = [gb for when, gb in seen["memory"] if when == "before an engine is built"]
        closed = [(a, b) for (when, a), (_, b) in zip(seen["memory"], seen["memory"][1:], strict=False)
                  if when == "before it is closed"]  # fmt: skip
        recorder.add("memory before the first engine", before[0], "GB")
        recorder.add("memory with the first engine", built[0], "GB")
        recorder.add("memory before the first engine is closed", closed[0][0], "GB")
        recorder.add("memory after the first engine is closed", closed[0][1], "GB", before[0])
        recorder.add("memory with the second engine", built[1], "GB")
