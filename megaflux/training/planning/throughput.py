"""Images per second of a run, predicted before anything has run: an estimate for comparing micro-batches.

    time of a micro-batch = VAE + trunk + FLUX + gradients sent
        each network: the larger of FLOPs / (its fraction of the peak) and launches x 30 us, as eager Python launches one
        kernel after the other; FLUX includes Qwen's last layers that are apart from the trunk, forward, backward and
        recomputation
        gradients: bytes that a rank sends for each trained parameter, in communication_data_type, over the rate
    time of an update = global batch / (ranks x micro-batch) of these + trained weights gathered + the optimizer's bytes

Fractions, rates and their sources: `megaflux.training.planning.gpus`. Reductions are assumed not to overlap the backward pass
(overlap_comm is off). Not included: waits for data, an offloaded optimizer, validation and saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaflux.training.ds_config import sent_bytes, weight_bytes, with_defaults, zero_stage
from megaflux.training.planning.gpus import Gpu

LAUNCH_SECONDS = 30e-6  # a trunk of 2,000 launches took 59 to 69 ms on an H100, for one picture or two
BLOCK_LAUNCHES = {True: 31, False: 80}  # of a FLUX block, forward and backward: with kernels, with diffusers' own path
LAYER_LAUNCHES = 35  # of a layer of Qwen2-VL or of its ViT, forward
VAE_LAUNCHES = 150
NETWORK_GB_S = 25.0  # GB/s a GPU between machines: a link of 200 Gbit/s for each
PER_MACHINE = 8  # GPUs of one machine, if the number is unknown
LAUNCHES_NOTE = f"a kernel takes eager Python {LAUNCH_SECONDS * 1e6:g} us to launch, on every GPU"
OPTIMIZER_BYTES = 30  # read and written by AdamW per parameter of a rank's part


@dataclass(frozen=True)
class Work:
    """Hardware FLOPs of one image in one step."""

    flux: int
    """FLUX, connector and Qwen's last layers, with recomputation."""
    trunk: int
    vae: int

    @property
    def total(self) -> int:
        return self.flux + self.trunk + self.vae


@dataclass(frozen=True)
class Launches:
    """Kernels that the host launches for a micro-batch, independent of its size."""

    flux: int
    trunk: int
    vae: int = VAE_LAUNCHES


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank moves for the parameters that train."""

    per_micro_batch: float
    """Sent: gradients; under ZeRO-3 also the weights of all networks in the engine, gathered twice."""
    per_update: float
    """Sent: trained weights."""
    optimizer: float
    """Read and written in GPU memory by the step."""


def traffic(ds_config: dict[str, Any], ranks: int, trained: int, in_engine: int) -> Traffic:
    """Traffic of ZeRO-2 or ZeRO-3 in rings of R ranks: an all-reduce sends 2 (R - 1) / R of a tensor's bytes, a reduce or
    gather half of that (docs/training.md). trained: parameters that train; in_engine: all parameters of the engine."""
    width, sent = weight_bytes(ds_config), sent_bytes(ds_config)
    ring = (ranks - 1) / ranks
    optimizer = OPTIMIZER_BYTES * trained / ranks
    if zero_stage(ds_config) == 3:
        return Traffic(ring * (sent * trained + 2 * width * in_engine), 0.0, optimizer)
    on_all = with_defaults(ds_config)["zero_optimization"]["use_multi_rank_bucket_allreduce"]
    return Traffic((2 if on_all else 1) * ring * sent * trained, ring * width * trained, optimizer)


@dataclass(frozen=True)
class Cluster:
    """The machines that a prediction is for."""

    gpu: Gpu
    ranks: int
    per_machine: int = PER_MACHINE

    @property
    def sent_gb_s(self) -> float:
        """GB/s that a rank sends; with several machines the network is the bottleneck."""
        return min(self.gpu.reduced_gb_s, NETWORK_GB_S) if self.ranks > self.per_machine else self.gpu.reduced_gb_s

    def update_seconds(
        self, work: Work, launches: Launches, moved: Traffic, micro_batch: int, global_batch: int
    ) -> float:
        """Predicted time of one update whose images all have one size."""
        gpu, sent = self.gpu, 1e9 * self.sent_gb_s
        parts = (
            (work.flux, launches.flux, gpu.flux),
            (work.trunk, launches.trunk, gpu.trunk),
            (work.vae, launches.vae, gpu.vae),
        )
        seconds = sum(
            max(micro_batch * flops / (share * gpu.peak_tflops * 1e12), LAUNCH_SECONDS * count)
            for flops, count, share in parts
            if flops
        )
        accumulated = global_batch / (micro_batch * self.ranks)
        once = moved.per_update / sent + moved.optimizer / (1e9 * gpu.memory_gb_s)
        return accumulated * (seconds + moved.per_micro_batch / sent) + once

    def assumptions(self) -> list[str]:
        """What a prediction assumes about this GPU, one line each; LAUNCHES_NOTE holds for all GPUs."""
        where = "between machines" if self.ranks > self.per_machine else "within a machine"
        lines = [f"{self.gpu.name}: {self.gpu.provenance}"]
        if self.ranks > 1:
            lines.append(
                f"{self.gpu.name}: gradients are sent at {self.sent_gb_s:g} GB/s a GPU {where} (assumed), not "
                "while the backward pass runs"
            )
        return lines
