"""What is known of GPUs: their makers' data sheets, and how fast FLUX trains on those whose speed is predicted. Imports
nothing of megaflux, so that every bench can import it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# Dense bf16 peak, TFLOP/s, by what the GPU's name holds; from the makers' data sheets, without sparsity.
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
    """Dense bf16 peak of a GPU by the longest known name in its name ("NVIDIA A100-SXM4-80GB" -> 312); None:
    unknown."""
    found = [name for name in PEAK_TFLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)]
    return float(PEAK_TFLOPS[max(found, key=len)]) if found else None


@dataclass(frozen=True)
class Gpu:
    """What a prediction of training's speed needs to know of a GPU; `told` says where it is from."""

    name: str
    memory_gb: float
    """GB (1e9 bytes) as it is sold; a driver reports up to 7% more."""
    peak_tflops: float
    """Dense bf16."""
    flux: float
    """Part of the peak that FLUX's forward and backward reach, by hardware FLOPs (recomputation included)."""
    trunk: float
    """The same of Qwen2-VL's frozen trunk, forward."""
    vae: float
    """The same of the VAE's encoder."""
    reduced_gb_s: float
    """GB/s at which a GPU sends gradients or weights to the others of its machine."""
    memory_gb_s: float
    """GB/s, read and written together."""
    told: str
    """One line for people: what of it was measured, and what is assumed."""

    def with_memory(self, gb: float) -> Gpu:
        """The same with another memory, in GB, which its name tells too."""
        return replace(self, memory_gb=gb, name=re.sub(r"[\d.]+ GB$", f"{gb:g} GB", self.name))

    def with_share(self, flux: float) -> Gpu:
        """The same with another part of the peak for FLUX, and the frozen networks' changed in proportion."""
        factor = flux / self.flux
        return replace(self, flux=flux, trunk=self.trunk * factor, vae=self.vae * factor)


# Measured: docs/gpu-results.md. One H100: a step of FLUX at 1024 px takes 336 ms without recomputation, 367 in policy mlp and
# 489 in full: 52, 54 and 51% of the peak by `training.costs`' hardware FLOPs; trunk 25 ms and VAE 38 ms a picture at a batch
# of 8; a copy 2.9 TB/s. One H200: 322 ms and 4.05 TB/s. Nothing of an A100, and no reduction on any: an audit's estimates.
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
    """The GPU of GPUS that a name means: its key, or a device's name as torch gives it ("NVIDIA H100 80GB HBM3"), of
    which a size in it is taken over. None for all others, PCIe and NVL variants and parts of a GPU (MIG) among them: they are
    slower."""
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
    """What a person says of the GPUs (`--gpu` and the options beside it), which wins over what is known of them."""

    name: str | None = None
    memory_gb: float | None = None
    peak_tflops: float | None = None
    mfu: float | None = None
    """Part of the peak at which FLUX computes, what is computed again included."""

    def of(self, device_name: str | None = None) -> Gpu | None:
        """The GPU that is meant: `name`, else the device's; of one that is not known only with `memory_gb`: an A100's
        shares of its peak (312 TFLOP/s where that is not known either). None: nothing is known of it."""
        name = self.name or device_name
        gpu = find_gpu(name) if name else None
        if gpu is None:
            if self.memory_gb is None:
                return None
            peak = peak_tflops_for(name) if name else None
            gpu = replace(GPUS["a100"], name=name or "GPU", peak_tflops=peak or GPUS["a100"].peak_tflops)
            gpu = replace(
                gpu, told=f"nothing is known of this GPU; an A100's shares of {gpu.peak_tflops:g} TFLOP/s are assumed"
            )
        given = {}
        if self.memory_gb is not None:
            gpu = gpu.with_memory(self.memory_gb)
        if self.peak_tflops is not None:
            given["peak_tflops"] = self.peak_tflops
        if self.mfu is not None:
            gpu = gpu.with_share(self.mfu)
        if self.peak_tflops is not None or self.mfu is not None:
            given["told"] = (
                f"given: FLUX at {gpu.flux:.0%} of {given.get('peak_tflops', gpu.peak_tflops):g} TFLOP/s (recomputation included)"
            )
        return replace(gpu, **given)
