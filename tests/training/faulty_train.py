"""launch/train.py with one fault put in, for tests: FAULT=kind:update[:rank] in the environment.

nan, spike: the noise of that update is not finite, or huge. nan_from: from that update on, until the run went back.
slow_save, slow_data, slow_validation: from that update on, that part takes 1.5 s more, and the file MARK says when it began.
DIGESTS=file in the environment: a line for each stage begun and ended, with the SHA-256 of every parameter's bytes.
die, hang, throw: the rank ends itself, stops moving, or raises, in the forward pass. full: from there on its disk is full. slow: every update takes 0.3 s.
"""

import hashlib
import json
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

kind, update, *rank = os.environ["FAULT"].split(":")
rank = int(rank[0]) if rank else None
mine = rank is None or int(os.environ.get("RANK", "0")) == rank

from megaflux.training import noise  # noqa: E402

real, calls, cured = noise.draw_time_and_noise, set(), []


def draw(config, seed, at, keys, seen, latents):
    t, n = real(config, seed, at, keys, seen, latents)
    if calls and at < max(calls):
        cured.append(at)
    calls.add(at)
    if kind == "slow":
        time.sleep(0.3)
    if not mine:
        return t, n
    once = kind in ("nan", "spike") and at == int(update)
    if once or (kind == "nan_from" and at >= int(update) and not cured):
        n = n * (float("nan") if kind != "spike" else 1e4)
    if at == int(update):
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "throw":
            raise RuntimeError("a bug, put in by a test")
        if kind == "full":  # to this rank the disk is full: a write beyond fails, with EFBIG in the place of ENOSPC
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        if kind == "hang":
            time.sleep(10_000)
    return t, n


noise.draw_time_and_noise = draw


def slow_down(module, name: str) -> None:
    """A part of the loop takes 1.5 s more, once updates have begun, and says on one rank that it is in it."""
    real = getattr(module, name)

    def slow(*args, **kwargs):
        if calls and max(calls) >= int(update):
            if os.environ.get("RANK", "0") == "0":
                Path(os.environ["MARK"]).touch()
            time.sleep(1.5)
        return real(*args, **kwargs)

    setattr(module, name, slow)


if kind == "slow_save":
    from megaflux.training import manifest

    slow_down(manifest, "inventory")
if kind == "slow_validation":
    from megaflux.training import validation

    slow_down(validation, "validation_loss")
if kind == "slow_data":
    from megaflux.data import loader

    slow_down(loader.BucketLoader, "_next")


def keep_digests(path: str) -> None:
    from megaflux.training import engine

    def write(self, when: str) -> None:
        of = {
            n: hashlib.sha256(p.detach().view(torch.uint8).numpy()).hexdigest()
            for n, p in self.module.named_parameters()
        }
        line = {"when": when, "stage": self.stage, "trains": sorted(self.first_stage), "sha256": of}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")

    begin, end = engine.StageEngine.__init__, engine.StageEngine.close

    def __init__(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        write(self, "begin")

    def close(self):
        end(self)
        write(self, "end")

    engine.StageEngine.__init__, engine.StageEngine.close = __init__, close


if "DIGESTS" in os.environ:
    keep_digests(os.environ["DIGESTS"])
sys.argv[0] = str(ROOT / "launch" / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
