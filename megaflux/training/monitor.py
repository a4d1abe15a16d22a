"""What a person sees of a run: TensorBoard and one progress bar. Rank 0 writes, all ranks are counted in.

MFU = model FLOPs per second / peak. Model FLOPs: forward, backward through all of FLUX, weight gradients of what
trains only, attention's backward twice its forward; recomputation is not counted (costs.py).
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megaflux.common.ranks import World, gathered
from megaflux.config.parse import Config
from megaflux.data.batches import Batch
from megaflux.training.distributed import sum_over_ranks
from megaflux.training.planning import costs
from megaflux.training.planning.gpus import peak_tflops_for
from megaflux.training.survival.events import Events
from megaflux.training.validation import picture_file, save_picture

T_BUCKETS = 8
log = logging.getLogger("megaflux")


class Monitor:
    """Collects over `monitor.every` updates, then writes one point per curve."""

    def __init__(self, config: Config, world: World, module, start_update: int, events: Events):
        self.config, self.world, self.module, self.events = config, world, module, events
        self.replaced, self.replacements, self.done = 0, [], start_update
        self.folder, self.warned = Path(config.run.dir), False
        folder = self.folder / "tensorboard"
        # Points after the checkpoint that a run resumes from are made again: hide the old ones.
        self.writer = SummaryWriter(folder, purge_step=start_update + 1) if world.is_main else None
        if self.writer and start_update == 0:
            self.writer.add_text("config", f"```yaml\n{config.to_yaml()}```")
        self.bar = tqdm(
            total=config.train.updates,
            initial=start_update,
            unit="upd",
            disable=not world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
        )
        self.peak = _peak_flops(config, world)
        self.shown: dict[str, str] = {}
        self._reset()

    def _reset(self) -> None:
        self.loss = torch.zeros(T_BUCKETS, 2, dtype=torch.float64, device=self.world.device)  # sum, count by t
        self.images = self.flops = 0.0
        self.data_wait = 0.0
        self.since = time.perf_counter()

    def micro_batch(self, loss: Tensor, t: Tensor, batch: Batch, stage: int, update: int) -> None:
        """Count one micro-batch of this rank: losses (B,), times (B,)."""
        which = (t * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)
        finite = loss.detach().isfinite()  # of an update that the guard drops: the interval's other updates still count
        self.loss[:, 0].index_add_(0, which, torch.where(finite, loss.detach(), 0).double())
        self.loss[:, 1].index_add_(0, which, finite.double())
        self.images += len(loss)
        self.flops += len(loss) * costs.train_flops_per_image(self.config, self.module, stage, batch.bucket)
        for line in batch.replaced:
            log.warning("update %d: %s", update + 1, line)
            self.replacements.append((update + 1, line))

    def dropped(self, update: int, why: str, keys: list[list[str]]) -> None:
        """An update that changed nothing, and the samples of each rank that were in it."""
        names = [key for of_rank in keys for key in of_rank]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if self.world.is_main:
            log.warning("update %d was dropped: %s; its samples: %s", update, why, shown)
        what = "spike" if "spike" in why else "skipped_update"
        self.events.record("fault", what=what, update=update, detail=why, keys=names)

    @contextmanager
    def timed(self, kind: str, update: int) -> Iterator[None]:
        """Record how long a part outside the updates takes."""
        started = time.perf_counter()
        yield
        self.events.record(kind, update=update, seconds=time.perf_counter() - started)

    def excluded(self, seconds: float) -> None:
        """Leave time spent on validation, panels or checkpoints out of images/s."""
        self.since += seconds

    def update(self, update: int, learning_rate: float, grad_norm: float, skipped_steps: int) -> None:
        """After each update; `update` counts those done. Writes a point every `monitor.every`."""
        self.bar.update()
        self.done = update
        if update % self.config.monitor.every:
            return
        seconds = time.perf_counter() - self.since
        sums, replaced, allocators = self._sum_over_ranks()
        if replaced:
            self._tell_replacements()
        images = self.images * self.world.size
        mean = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        scalars = {
            "train/loss": mean,
            "train/learning_rate": learning_rate,
            "train/grad_norm": grad_norm,
            "train/skipped_steps": skipped_steps,
            "data/replaced_samples": self.replaced,
            "speed/images_per_second": images / seconds,
            "speed/data_wait_fraction": self.data_wait / seconds,
            "speed/mfu": self.flops / seconds / self.peak,
            "memory/peak_gb": peak_memory_gb(self.world),
        }
        scalars |= allocator_scalars(allocators)
        scalars |= {f"train/loss_t{j}": (s / n).item() for j, (s, n) in enumerate(sums) if n > 0}
        self.scalars(scalars, update)
        self.show(loss=f"{mean:.3f}", lr=f"{learning_rate:.1e}", img_s=f"{images / seconds:.1f}")
        self._record_progress(seconds)
        self._reset()

    def _sum_over_ranks(self) -> tuple[Tensor, int, list[dict[str, int]]]:
        """Over all ranks: losses by t (sum, count), how many samples were replaced, and every rank's `allocator_state`.

        One tensor that is waited for: gathering objects waits a few times for each rank. Collective."""
        size, state = self.world.size, allocator_state(self.world)
        news = torch.zeros(1 + 2 * size, dtype=self.loss.dtype, device=self.loss.device)
        news[0].fill_(len(self.replacements))
        news[1 + self.world.rank].fill_(state.get("reserved", 0))
        news[1 + size + self.world.rank].fill_(state.get("retries", 0))
        summed = sum_over_ranks(torch.cat([self.loss.flatten(), news]), self.world).cpu()
        losses, replaced, reserved, retries = summed.split([self.loss.numel(), 1, size, size])
        states = [
            {"reserved": int(r), "retries": int(n)} if state else {} for r, n in zip(reserved, retries, strict=True)
        ]
        return losses.view(self.loss.shape), int(replaced), states

    def _tell_replacements(self) -> None:
        """Every rank's, in the events and counted on all. Collective."""
        new = [one for of_rank in gathered(self.replacements, self.world) for one in of_rank]
        for update, line in new:
            self.events.record("fault", what="replaced_sample", update=update, detail=line)
        self.replaced, self.replacements = self.replaced + len(new), []

    def _record_progress(self, seconds: float) -> None:
        self.events.record("progress", update=self.done, seconds=seconds, data_wait=self.data_wait)

    def scalars(self, values: dict[str, float], update: int) -> None:
        with self._never_fatal():
            for name, value in values.items() if self.writer else ():
                self.writer.add_scalar(name, value, update)

    def picture(self, name: str, sheet: Tensor, update: int) -> None:
        """uint8 (3, H, W), to TensorBoard and RUN/samples."""
        with self._never_fatal():
            if self.writer:
                self.writer.add_image(name, sheet, update)
                save_picture(sheet, picture_file(self.folder, update))

    def write_line(self, name: str, values: dict[str, Any]) -> None:
        """A line of JSON at the end of a file of the run."""
        with self._never_fatal():
            if self.world.is_main:
                with (self.folder / name).open("a") as file:
                    file.write(json.dumps(values) + "\n")

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        """A full disk costs curves and pictures, with one warning, and not the run."""
        try:
            yield
        except OSError as error:
            if not self.warned:
                log.warning("%s: %s; curves and pictures are lost until it can be written", self.folder, error)
            self.warned = True

    def show(self, **numbers: str) -> None:
        """Put numbers into the progress bar."""
        self.shown |= numbers
        self.bar.set_postfix(self.shown, refresh=False)

    def close(self) -> None:
        """Of a run that ends as agreed on. Collective."""
        if self.images:  # of updates since the last point
            self._tell_replacements()
            self._record_progress(time.perf_counter() - self.since)
        self.bar.close()
        with self._never_fatal():
            if self.writer:
                self.writer.close()


def peak_memory_gb(world: World) -> float:
    """Most memory so far, GB: allocated on the GPU, or resident in this process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def allocator_state(world: World) -> dict[str, int]:
    """Of this rank's GPU: most bytes reserved so far, and how often torch had to give its cache back to find room (each
    time all work on the GPU waits); empty on a CPU."""
    if world.device.type != "cuda":
        return {}
    state = torch.cuda.memory_stats(world.device)
    return {"reserved": state.get("reserved_bytes.all.peak", 0), "retries": state.get("num_alloc_retries", 0)}


def allocator_scalars(states: list[dict[str, int]]) -> dict[str, float]:
    """Curves of all ranks' `allocator_state`: the highest peak in GB, and the retries of all together."""
    if not all(states):
        return {}
    return {
        "memory/reserved_peak_gb": max(state["reserved"] for state in states) / 1e9,
        "memory/allocator_retries": sum(state["retries"] for state in states),
    }


def _peak_flops(config: Config, world: World) -> float:
    """FLOP/s of one device: configured, known by the GPU's name, or the best of a few 2048^3 bf16 products here."""
    if config.monitor.peak_tflops:
        return config.monitor.peak_tflops * 1e12
    known = peak_tflops_for(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
    if known:
        return known * 1e12
    n = 2048
    a = torch.ones(n, n, dtype=torch.bfloat16, device=world.device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)
