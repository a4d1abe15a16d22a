"""Step continued: two processes resume from one checkpoint of the step loop; are they equal, bit for bit?

One update each, from the checkpoint after update 4, beside the process that was not interrupted. Compared are the fp32
masters of the trainable parameters in the optimizer's shard: bfloat16 weights hide most differences.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from megaflux.bench.first import loop
from megaflux.bench.first.facts import Recorder
from megaflux.bench.first.settings import Setting
from megaflux.training.checkpoint import manifest, reshard

RUNS = ("first", "second")
LINKED = 1 << 20  # bytes; larger files of the checkpoint are linked, not copied


def run(recorder: Recorder, setting: Setting) -> None:
    facts = [
        "two continuations are bit-equal",
        "two continuations: masters that differ",
        "two continuations: distance over the update",
        "uninterrupted and continued: distance over the update",
    ]
    if not recorder.missing(*facts):
        return
    work = setting.work / "loop"
    with recorder.measuring(*facts):
        if not loop.is_ours(recorder, setting.work):  # another machine's, or cleared away
            loop.train(recorder, setting)
        for name in RUNS:
            fork(work / "run", work / name)
            loop.begin(loop.write_config(work, name, setting.small, loop.LAST))
        before = masters(_checkpoint(work / "run", loop.SAVED))
        whole = masters(_checkpoint(work / "run", loop.LAST))
        first, second = (masters(_checkpoint(work / name, loop.LAST)) for name in RUNS)
        differ = sum((a != b).sum().item() for a, b in zip(first, second, strict=True))
        recorder.add("two continuations are bit-equal", differ == 0)
        recorder.add("two continuations: masters that differ", differ / sum(a.numel() for a in first))
        moved = distance(first, before)
        recorder.add("two continuations: distance over the update", distance(first, second) / moved)
        recorder.add("uninterrupted and continued: distance over the update", distance(first, whole) / moved)
        del before, whole, first, second  # they are mapped from the files
        shutil.rmtree(work)  # 27 GB at FLUX.1-dev's sizes, not needed any more


def fork(run: Path, other: Path) -> None:
    """A copy of a run folder as it was at its checkpoint SAVED."""
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(run, other, copy_function=_link)
    for update, path in manifest.listed(other).items():
        if update > loop.SAVED:
            shutil.rmtree(path)
    # Otherwise there would be nothing to do, and the runs would be equal for no reason.
    if max(manifest.listed(other), default=0) != loop.SAVED:
        raise RuntimeError(f"{run}: holds no checkpoint after update {loop.SAVED}")


def masters(checkpoint: Path) -> list[torch.Tensor]:
    """The fp32 masters in a checkpoint of one rank, a flat tensor per parameter group."""
    return reshard.optimizer_shards(checkpoint / "deepspeed", 1)[0]["single_partition_of_fp32_groups"]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Euclidean distance of two lists of tensors."""
    return sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True)) ** 0.5


def _checkpoint(run: Path, update: int) -> Path:
    return manifest.folder(run) / manifest.name_of(update)


def _link(source: str, target: str) -> None:
    if os.path.getsize(source) > LINKED:
        os.link(source, target)
    else:
        shutil.copy2(source, target)
