"""TensorBoard curves and the progress bar of a run. Rank 0 writes; the numbers are of all ranks.

MFU = model FLOPs per second / peak. Model FLOPs: forward, backward through all of FLUX, weight gradients of trainable
parameters only, attention's backward twice its forward; recomputation is not counted (planning/costs.py).
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
from tqdm import tqdm

from megaflux.common.files import append_line
from megaflux.common.ranks import World, gathered
from megaflux.config.schema import Config
from megaflux.training.distributed import sum_over_ranks
from megaflux.training.pictures import picture_file, save_picture
from megaflux.training.planning import costs
from megaflux.training.planning.gpus import peak_tflops_for
from megaflux.training.survival.events import Events, Fault, Kind
from megaflux.training.survival.guard import Drop, DropReason
from megaflux.training.update_result import MicroBatch, UpdateResult

T_BUCKETS = 8
log = logging.getLogger("megaflux")


class Monitor:
    """Collects over `monitor.every` updates, then writes one point per curve."""

    def __init__(self, config: Config, world: World, module: Any, start_update: int, events: Events):
        self.config, self.world, self.module, self.events = config, world, module, events
        self.replaced, self.cut_captions, self.done = 0, 0, start_update
        self.replacements: list[tuple[int, str]] = []
        self.folder, self.warned = Path(config.run.dir), False
        folder = self.folder / "tensorboard"
        # Points after the checkpoint that the run resumes from will be written again: hide the old ones.
        self.writer = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # here, because the other ranks start without it

            self.writer = SummaryWriter(folder, purge_step=start_update + 1)
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
        self.cut = 0  # captions of this rank
        self.since = time.perf_counter()

    def _count(self, micro: MicroBatch, stage: int, update: int) -> None:
        """Add one micro-batch of this rank to the interval."""
        which = (micro.t * T_BUCKETS).long().clamp(max=T_BUCKETS - 1)
        finite = micro.losses.isfinite()  # a dropped update does not spoil the interval's other updates
        self.loss[:, 0].index_add_(0, which, torch.where(finite, micro.losses, 0).double())
        self.loss[:, 1].index_add_(0, which, finite.double())
        self.images += len(micro.keys)
        self.cut += micro.cut_captions
        self.flops += len(micro.keys) * costs.train_flops_per_image(self.config, self.module, stage, micro.bucket)
        for line in micro.replaced:
            log.warning("update %d: %s", update, line)
            self.replacements.append((update, line))

    def dropped(self, update: int, drop: Drop, keys: list[list[str]]) -> None:
        """Report an update that changed nothing. keys: the samples of each rank that were in it."""
        names = [key for of_rank in keys for key in of_rank]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if self.world.is_main:
            log.warning("update %d was dropped: %s; its samples: %s", update, drop.text, shown)
        what = Fault.SPIKE if drop.reason is DropReason.SPIKE else Fault.SKIPPED_UPDATE
        self.events.fault(what, update, drop.text, keys=names)

    @contextmanager
    def timed(self, kind: Kind, update: int) -> Iterator[None]:
        """Record how long a part outside the updates takes."""
        started = time.perf_counter()
        yield
        self.events.record(kind, update=update, seconds=time.perf_counter() - started)

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Time spent inside (validation, panels, checkpoints, a new stage) is left out of images/s."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def update(self, result: UpdateResult, stage: int, update: int, skipped_steps: int) -> None:
        """Call after each update. update: how many are done. Writes a point of every curve each `monitor.every` updates.
        Collective where it does."""
        for micro in result.micro_batches:
            self._count(micro, stage, update)
        self.data_wait += result.data_wait
        self.scalars({f"grad_norm/{name}": norm for name, norm in result.grad_norms.items()}, update)
        self.bar.update()
        self.done = update
        if update % self.config.monitor.every:
            return
        seconds = time.perf_counter() - self.since
        sums, replaced, cut, allocators = self._sum_over_ranks()
        self.cut_captions += cut
        if replaced:
            self._record_replacements()
        images = self.images * self.world.size
        mean = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        scalars = {
            "train/loss": mean,
            "train/learning_rate": result.learning_rate,
            "train/grad_norm": result.grad_norm,
            "train/large_gradient_share": result.large_gradient_share,
            "train/skipped_steps": skipped_steps,
            "data/replaced_samples": self.replaced,
            "data/cut_captions": self.cut_captions,
            "speed/images_per_second": images / seconds,
            "speed/data_wait_fraction": self.data_wait / seconds,
            "speed/mfu": self.flops / seconds / self.peak,
            "memory/peak_gb": peak_memory_gb(self.world),
        }
        if self.config.rates_by_part:
            scalars |= {f"train/learning_rate_{part}": rate for part, rate in result.learning_rates.items()}
        scalars |= allocator_scalars(allocators)
        scalars |= {f"train/loss_t{j}": (s / n).item() for j, (s, n) in enumerate(sums) if n > 0}
        self.scalars(scalars, update)
        self.show(loss=f"{mean:.3f}", lr=f"{result.learning_rate:.1e}", img_s=f"{images / seconds:.1f}")
        self._record_progress(seconds)
        self._reset()

    def _sum_over_ranks(self) -> tuple[Tensor, int, int, list[dict[str, int]]]:
        """Over all ranks: losses by t (sum, count), how many samples were replaced and captions cut, and every rank's
        `allocator_state`.

        All in one tensor, so that the GPU is waited for once; gathering objects waits several times per rank. Collective."""
        size, state = self.world.size, allocator_state(self.world)
        news = torch.zeros(2 + 2 * size, dtype=self.loss.dtype, device=self.loss.device)
        news[0].fill_(len(self.replacements))
        news[1].fill_(self.cut)
        news[2 + self.world.rank].fill_(state.get("reserved", 0))
        news[2 + size + self.world.rank].fill_(state.get("retries", 0))
        summed = sum_over_ranks(torch.cat([self.loss.flatten(), news]), self.world).cpu()
        losses, replaced, cut, reserved, retries = summed.split([self.loss.numel(), 1, 1, size, size])
        states = [
            {"reserved": int(r), "retries": int(n)} if state else {} for r, n in zip(reserved, retries, strict=True)
        ]
        return losses.view(self.loss.shape), int(replaced), int(cut), states

    def _record_replacements(self) -> None:
        """Record the replaced samples of every rank as events, and count them on all ranks. Collective."""
        new = [one for of_rank in gathered(self.replacements, self.world) for one in of_rank]
        for update, line in new:
            self.events.fault(Fault.REPLACED_SAMPLE, update, line)
        self.replaced, self.replacements = self.replaced + len(new), []

    def _record_progress(self, seconds: float) -> None:
        self.events.record(Kind.PROGRESS, update=self.done, seconds=seconds, data_wait=self.data_wait)

    def scalars(self, values: dict[str, float], update: int) -> None:
        with self._never_fatal():
            if self.writer:
                for name, value in values.items():
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
                append_line(self.folder / name, json.dumps(values).encode())

    @contextmanager
    def _never_fatal(self) -> Iterator[None]:
        """A full disk loses curves and pictures, with one warning, but never stops training."""
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
        """Call where all ranks end the run together. Collective."""
        if self.images:  # of updates since the last point
            self._record_replacements()
            self._record_progress(time.perf_counter() - self.since)
        self.bar.close()
        with self._never_fatal():
            if self.writer:
                self.writer.close()


def peak_memory_gb(world: World) -> float:
    """Peak memory so far, GB: allocated on the GPU, or on a CPU resident in this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def allocator_state(world: World) -> dict[str, int]:
    """This rank's GPU: peak of reserved bytes, and how often torch had to empty its cache to find room (the GPU's work waits
    each time); {} on a CPU."""
    if world.device.type != "cuda":
        return {}
    state = torch.cuda.memory_stats(world.device)
    return {"reserved": state.get("reserved_bytes.all.peak", 0), "retries": state.get("num_alloc_retries", 0)}


def allocator_scalars(states: list[dict[str, int]]) -> dict[str, float]:
    """Curves of all ranks' `allocator_state`: the highest peak in GB, and the sum of retries."""
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
