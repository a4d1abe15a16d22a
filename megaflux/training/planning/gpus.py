"""GPUs: peaks from their makers' data sheets, and how fast FLUX trains on those whose speed is predicted. Imports nothing of
megaflux, so that every bench can import it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# Part of a GPU's name -> dense bf16 peak in TFLOP/s, without sparsity; from the makers' data sheets.
PEAK_TFLOPS = {
    "A10": 125,
    "A10G": 70,
    "A30": 165,
    "A40": 150,
    "A100": 312,
    "A800": 312,
    "H20": 148,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "GB200": 2500,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX A6000": 155,
    "MI250X": 383,
    "MI300X": 1307,
}


def peak_tflops_for(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOP/s, by the longest known name in its name ("NVIDIA A100-SXM4-80GB" -> 312); None if
    unknown."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)]
    return float(PEAK_TFLOPS[max(found, key=len)]) if found else None


@dataclass(frozen=True)
class Gpu:
    """What a prediction of training speed needs to know about a GPU."""

    name: str
    memory_gb: float
    """GB (1e9 bytes), as advertised; a driver reports up to 7% more."""
    peak_tflops: float
    """TFLOP/s, dense bf16."""
    flux: float
    """Fraction of the peak that FLUX's forward and backward reach, by hardware FLOPs (with recomputation)."""
    trunk: float
    """The same for Qwen2-VL's frozen trunk, forward."""
    vae: float
    """The same for the VAE's encoder."""
    reduced_gb_s: float
    """GB/s at which a GPU sends gradients or weights to the others of its machine."""
    memory_gb_s: float
    """GB/s of its own memory, reads and writes together."""
    provenance: str
    """One line: which of these numbers were measured, and which are assumed."""

    def with_memory(self, gb: float) -> Gpu:
        """The same GPU with another memory, in GB, in its name as well."""
        return replace(self, memory_gb=gb, name=re.sub(r"[\d.]+ GB$", f"{gb:g} GB", self.name))

    def with_share(self, flux: float) -> Gpu:
        """The same GPU with another fraction of the peak for FLUX; the frozen networks' change in proportion."""
        factor = flux / self.flux
        return replace(self, flux=flux, trunk=self.trunk * factor, vae=self.vae * factor)


# Measured, see docs/gpu-results.md. One H100: a step of FLUX at 1024 px takes 336 ms without recomputation, 367 in policy mlp
# and 489 in full, which are 52, 54 and 51% of the peak by `planning.costs`' hardware FLOPs; the trunk takes 25 ms and the VAE
# 38 ms a picture at a batch of 8; a copy reaches 2.9 TB/s. One H200: 322 ms and 4.05 TB/s. The numbers of the A100, and the
# rates of reductions on all of them, are an audit's estimates.
GPUS = {
    "a100": Gpu(
        "A100 80 GB",
        80,
        312,
        0.60,
        0.50,
        0.25,
        138,
        1700,
        "no A100 was measured: FLUX at 60% of 312 TFLOP/s (recomputation included), trunk 50%, VAE 25%",
    ),
    "h100": Gpu(
        "H100 80 GB",
        80,
        989,
        0.52,
        0.38,
        0.13,
        245,
        2900,
        "measured on one H100: FLUX at 52% of 989 TFLOP/s (recomputation included), trunk 38%, VAE 13%",
    ),
    "h200": Gpu(
        "H200 141 GB",
        141,
        989,
        0.55,
        0.38,
        0.16,
        245,
        4050,
        "measured on one H200: FLUX at 55% of 989 TFLOP/s (recomputation included); assumed: trunk 38%, VAE 16%",
    ),
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of GPUS with this name: its key, or a device's name from torch ("NVIDIA H100 80GB HBM3"), whose memory size is
    then used. None for all others, including PCIe and NVL variants and parts of a GPU (MIG), which are slower."""
    if name.strip().lower() in GPUS:
        return GPUS[name.strip().lower()]
    found = next((gpu for key, gpu in GPUS.items() if re.search(rf"\b{key}\b", name, re.IGNORECASE)), None)
    slower = re.search(r"\b(PCIe|NVL|MIG)\b", name, re.IGNORECASE)
    if found is None or slower or peak_tflops_for(name) != found.peak_tflops:
        return None
    size = re.search(r"(\d+) ?GB\b", name)
    return found.with_memory(float(size[1])) if size else found


@dataclass(frozen=True)
class Assumed:
    """What the user states about the GPUs (`--gpu` and related options), which overrides what is known of them."""

    name: str | None = None
    memory_gb: float | None = None
    """GB (1e9 bytes) of each GPU."""
    peak_tflops: float | None = None
    """TFLOP/s, dense bf16."""
    mfu: float | None = None
    """Fraction of the peak that FLUX reaches, with recomputation."""

    def of(self, device_name: str | None = None) -> Gpu | None:
        """The GPU of `name`, else of the device. For an unknown GPU with `memory_gb`: one with an A100's fractions of its peak
        (312 TFLOP/s if that is unknown too). None: nothing is known of it."""
        name = self.name or device_name
        gpu = find_gpu(name) if name else None
        if gpu is None:
            if self.memory_gb is None:
                return None
            peak = peak_tflops_for(name) if name else None
            gpu = replace(GPUS["a100"], name=name or "GPU", peak_tflops=peak or GPUS["a100"].peak_tflops)
            gpu = replace(
                gpu,
                provenance=f"nothing is known of this GPU; an A100's shares of {gpu.peak_tflops:g} TFLOP/s are assumed",
            )
        if self.memory_gb is not None:
            gpu = gpu.with_memory(self.memory_gb)
        if self.peak_tflops is not None:
            gpu = replace(gpu, peak_tflops=self.peak_tflops)
        if self.mfu is not None:
            gpu = gpu.with_share(self.mfu)
        if self.peak_tflops is not None or self.mfu is not None:
            provenance = f"given: FLUX at {gpu.flux:.0%} of {gpu.peak_tflops:g} TFLOP/s (recomputation included)"
            gpu = replace(gpu, provenance=provenance)
        return gpu
