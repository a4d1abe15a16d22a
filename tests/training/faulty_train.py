"""launch/train.py with one fault put in, for tests: FAULT=kind:update[:rank] in the environment.

nan, spike: the noise of that update is not finite, or huge. nan_from: from that update on, until the run went back.
slow_save, slow_data, slow_validation: from that update on, that part takes 1.5 s more, and the file MARK says when it began.
oom_forward, oom_backward, oom_step: the GPU's memory runs out in that part. small_gpu: where plans are tried out, and fit
that rank only with every block computed again.
less_memory: that rank may plan with so many bytes, the number in the update's place, and nobody's VAE needs any.
other_view: that rank reads other values for the run than the others, as stale network storage may show them.
DIGESTS=file in the environment: a line for each stage begun and ended, with the SHA-256 of every parameter's bytes.
die_validation, die_panel: the first rank ends itself when that part begins after that update; with :1 behind it, when the part
is done but for writing what it found.
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

from megaflux.training import objective  # noqa: E402

real, calls, cured, now = objective.draw_time_and_noise, set(), [], [-1]


def draw(config, seed, at, samples, latents):
    t, n = real(config, seed, at, samples, latents)
    if calls and at < max(calls):
        cured.append(at)
    calls.add(at)
    now[0] = at
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


objective.draw_time_and_noise = draw


def other_view() -> None:
    from megaflux.config import command_line

    parse = command_line.parse_config

    def stale(*args, **kwargs):
        options, found = parse(*args, **kwargs)
        return options, found.model_copy(update={"optim": found.optim.model_copy(update={"lr": 0.5})})

    command_line.parse_config = stale


if kind == "other_view" and mine:
    other_view()


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
    from megaflux.training.checkpoint import manifest

    slow_down(manifest, "inventory")
if kind == "slow_validation":
    from megaflux.training import validation

    slow_down(validation, "validation_loss")
if kind == "slow_data":
    from megaflux.data import loader

    slow_down(loader.BucketLoader, "_next")


def die_where_it_shows() -> None:
    """Between the last save and what a person was to see after it."""
    from megaflux.training import monitor, upkeep

    part, late = kind.removeprefix("die_"), rank is not None
    begins = {"validation": "validate", "panel": "show_panel"}[part]
    owner, name = (
        (upkeep, begins) if not late else (monitor.Monitor, "write_line" if part == "validation" else "picture")
    )
    real = getattr(owner, name)

    def die(*args, **kwargs):
        if max(calls, default=-1) == int(update) - 1 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, die)


if kind in ("die_validation", "die_panel"):
    die_where_it_shows()


def run_out(*_) -> None:
    """As torch says it, in the update asked for."""
    if mine and now[0] == int(update):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")


if kind in ("oom_forward", "oom_backward"):
    from megaflux.models.qwen2vl_flux import Qwen2VLFlux

    forward = Qwen2VLFlux.forward

    def run_out_in(self, *args, **kwargs):
        if kind == "oom_forward":
            run_out()
        velocity = forward(self, *args, **kwargs)
        if velocity.requires_grad:
            velocity.register_hook(run_out)
        return velocity

    Qwen2VLFlux.forward = run_out_in
if kind == "oom_step":
    torch.optim.AdamW.step = lambda self, *args, step=torch.optim.AdamW.step, **kwargs: (
        run_out() or step(self, *args, **kwargs)
    )
if kind == "small_gpu":
    from megaflux.training.planning import trial

    def too_large(config, models, bucket, real=trial.forward_and_backward):
        real(config, models, bucket)
        if mine and set(models.trainable.transformer.fused.policies) != {"full"}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trial.tries_out = lambda world, engine: True
    trial.forward_and_backward = too_large


if kind == "less_memory":
    from megaflux.training.planning import memory

    memory.coding_peak = lambda *_: (0, 0)  # at small sizes more than all else, and the same for each micro-batch
    if mine:
        memory.DeviceMemory.plannable = lambda self, own: int(update)


def watch_models() -> None:
    """Two copies of the models never stand side by side: what was loaded before is gone when they are loaded anew."""
    import weakref

    from megaflux.models import pretrained

    loaded, load = [], pretrained.load_models

    def load_models(*args, **kwargs):
        alive = [type(model()).__name__ for model in loaded if model() is not None]
        print(f"models loaded, alive of those before: {alive}", flush=True)
        models = load(*args, **kwargs)
        loaded.extend(
            map(weakref.ref, (models.trainable, models.trainable.connector.weight, models.trunk.vlm, models.vae))
        )
        return models

    pretrained.load_models = load_models


if kind == "nan_from":
    watch_models()


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
