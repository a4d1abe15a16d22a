"""Step loop: the training loop at FLUX.1-dev's sizes with random models: two stages and a save, timed.

Five updates of two micro-batches of one square picture, three in the first stage; checkpoints after 3, 4 and 5. One
double block trains in the first stage and one single block in the second (0.41 and 0.32 B parameters with the Qwen
layer), so that a save fits any disk: it is the seconds per gigabyte that hold for the published stages too.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.processes import start
from megaflux.bench.first.settings import SMALL_SIDE, Setting
from megaflux.bench.first.training import ALL, STEPS
from megaflux.config.presets import dev, tiny
from megaflux_kernels.bench.timing import median

UPDATES, STAGE_END, SAVED, LAST = 6, 3, 4, 5
"""Updates of the configuration, of the first stage, at the checkpoint that `continued` resumes from, and of this run."""
RATIOS = ("1:1",)
WARM = slice(1, STAGE_END)  # updates of the first stage that compile nothing
STAMP = "of.json"  # which facts the run belongs to
MEMORY = (
    "memory before the first engine",
    "memory with the first engine",
    "memory before the first engine is closed",
    "memory after the first engine is closed",
    "memory with the second engine",
)


def run(recorder: Recorder, setting: Setting) -> None:
    facts = [
        "trains",
        *(f"update: {step}" for step in (*STEPS, ALL)),
        *(f"save: {part}" for part in ("files", "write", "sync", "hash")),
        *(MEMORY if setting.device.type == "cuda" else ()),
    ]
    if recorder.missing(*facts):
        with recorder.measuring(*facts):
            note(recorder, setting, train(recorder, setting))


def train(recorder: Recorder, setting: Setting) -> dict[str, Any]:
    """Run the loop in a process of its own, from scratch; returns what `training.Seen` recorded."""
    work, small = setting.work / "loop", setting.small
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    make_data(work / "data", SMALL_SIDE if small else 1024)
    begin(write_config(work, "run", small, LAST), "--seen", str(work / "seen.json"))
    (work / STAMP).write_text(json.dumps(stamp(recorder)))
    return json.loads((work / "seen.json").read_text())


def stamp(recorder: Recorder) -> dict[str, str]:
    """Which facts a run belongs to."""
    return {"facts": str(recorder.facts.path.resolve()), "small": str(recorder.small)}


def is_ours(recorder: Recorder, work: Path) -> bool:
    """Whether the run in work/loop is complete, and belongs to these facts."""
    try:
        return json.loads((work / "loop" / STAMP).read_text()) == stamp(recorder)
    except (OSError, ValueError):
        return False


def begin(config: Path, *options: str) -> None:
    """Run a training process to its end. RuntimeError where it fails."""
    code = start([sys.executable, "-m", "megaflux.bench.first.training", str(config), *options]).wait()
    if code:
        raise RuntimeError(f"training ended with code {code}; see the log")


def write_config(work: Path, run: str, small: bool, stop_after: int) -> Path:
    """The configuration of the run in work/run, as a YAML file."""
    import yaml

    path = work / f"{run}-{stop_after}.yaml"
    path.write_text(yaml.safe_dump(values(work, run, small, stop_after)))
    return path


def values(work: Path, run: str, small: bool, stop_after: int) -> dict[str, Any]:
    """All values of the configuration: the preset's, changed so that it is short."""
    found = tiny() if small else dev()
    found["model"] |= {"flux": None, "vlm": None, "activation_checkpointing": "auto"}
    found["run"] = {"dir": str(work / run)}
    found["data"] |= {
        "path": str(work / "data"),
        "source": None,
        "aspect_ratios": list(RATIOS),
        "cache": [],
        "num_workers": 0 if small else 2,
    }
    found["stages"] = [
        {"name": name, "share": 1.0, "blocks": [block], "components": "attention"}
        for name, block in (("double", 1), ("single", 3 if small else 56))
    ]
    found["train"] = {
        "updates": UPDATES,
        "stop_after": stop_after,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "checkpoint_every": SAVED,
        "keep_checkpoints": 3,
    }
    found["validation"] = {"every": 0, "panel_every": 0, "samples": 2, "panel_samples": 1, "steps": 2}
    found["monitor"] = {"every": 1, "grad_norms_every": 0}
    return found


def make_data(folder: Path, side: int) -> None:
    """A prepared dataset of generated pictures, some of them held out."""
    from megaflux.bench.loader import make_pictures
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    make_pictures(folder.parent / "pictures", 20, side, RATIOS)
    prepare(
        str(folder.parent / "pictures"),
        folder,
        Options(longest_side=side, aspect_ratios=RATIOS, held_out=0.2),
        progress=False,
    )


def note(recorder: Recorder, setting: Setting, seen: dict[str, Any]) -> None:
    """Record the facts of what `training.Seen` recorded."""
    run = setting.work / "loop" / "run"
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]
    recorder.add("trains", len(seen["updates"]), "updates")
    recorder.add("faults", sum(line["kind"] == "fault" for line in lines), predicted=0)
    recorder.add("held-out loss before", losses[0])
    recorder.add("held-out loss after the first stage", losses[-1])
    for number, line in enumerate((line for line in lines if line["kind"] == "ready"), start=1):
        recorder.add(f"plan of stage {number}", line["plan"])
    for step in (*STEPS, ALL):
        recorder.add(f"update: {step}", median([update.get(step, 0.0) for update in seen["updates"][WARM]]), "s")
    save = seen["saves"][0]
    recorder.add("save: files", save["gb"], "GB")
    recorder.add("save: sync", save["sync"], "s")
    recorder.add("save: hash", save["hash"], "s")
    recorder.add("save: write", save["save"] - save["sync"] - save["hash"], "s")
    if seen["memory"]:
        known = memory(seen["memory"])
        for fact, gb in known.items():
            recorder.add(fact, gb, "GB", known[MEMORY[0]] if fact == MEMORY[3] else None)


def memory(noted: list[tuple[str, float]]) -> dict[str, float]:
    """GB allocated around the change from the first stage's engine to the second's, by the names of MEMORY."""
    when = [name for name, _ in noted]
    built, closed = when.index("after an engine is built"), when.index("before it is closed")
    second = when.index("after an engine is built", closed)
    places = built - 1, built, closed, closed + 1, second
    return {fact: noted[place][1] for fact, place in zip(MEMORY, places, strict=True)}
