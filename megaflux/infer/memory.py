"""How much memory a job will take on the device: a coarse estimate, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megaflux.generation.job import Job, Runtime
from megaflux.infer.parts import Facts, Part, extra_parts, facts_of

GB = 1e9
WIDTHS_ALIVE = 15  # (B, S, width) tensors alive at once inside a single block: streams, q, k, v, attention, MLP, joined
VAE_CHANNELS = (128, 256)  # of the two outermost levels of FLUX's VAE


@dataclass(frozen=True)
class Estimate:
    """Estimated bytes on the device."""

    sizes: dict[str, float]
    """Weights of each part, by its name."""
    weights: float
    """Weights that are there at the same time."""
    working: float

    @property
    def peak(self) -> float:
        return self.weights + self.working


def estimate(parts: Sequence[Part], job: Job, runtime: Runtime, facts: Facts) -> Estimate:
    """The weights in their dtype, as far as offload keeps them on the device, and the larger of the working memory of FLUX
    and of the VAE's decoder."""
    from megaflux.models.latents import coding_peak

    width = bytes_each(runtime)
    sizes = {p.name: (p.parameters or 0) * (1.1 if p.name == "FLUX" and runtime.quantize else width) for p in parts}
    height, wide = job.height or facts.settings.longest_side, job.width or facts.settings.longest_side
    decoding = coding_peak(VAE_CHANNELS, 1, height, wide, width)[1]  # pictures are decoded one by one
    tokens = height * wide / 256 + facts.settings.vlm_max_tokens * max(1, len(job.references))
    working = max(job.batch_size * WIDTHS_ALIVE * tokens * facts.width * width, decoding)
    if runtime.offload == "model":
        weights = max(sizes.values())
    elif runtime.offload == "sequential":
        weights = 0.02 * max(sizes.values())
    else:
        weights = sum(sizes.values())
    return Estimate(sizes, weights, working)


def print_memory(parts: Sequence[Part], job: Job, runtime: Runtime, facts: Facts) -> None:
    """Print a table of the parts, and the estimated peak on the device."""
    memory = estimate(parts, job, runtime, facts)
    print(f"\nto load, in {'float32' if bytes_each(runtime) == 4 else 'bfloat16'}:")
    for part in parts:
        amount = "   would be fetched     "
        if part.parameters is not None:
            amount = f"{part.parameters / 1e6:10.1f} M {memory.sizes[part.name] / GB:8.2f} GB"
        print(f"  {part.name:<14}{amount}  {part.source}")
    print(
        f"  estimated peak on the device: {memory.peak / GB:.1f} GB: {memory.weights / GB:.1f} weights"
        f"{' at a time' if runtime.offload else ''}, {memory.working / GB:.1f} working memory"
    )
    if on_gpu(runtime):
        print(f"  free there: {free_bytes(runtime) / GB:.1f} GB; {advice(memory, runtime) or 'fits'}")


def warn_of_memory(job: Job, runtime: Runtime) -> None:
    """On a GPU, print a line if the estimate is above what is free."""
    if not on_gpu(runtime):
        return
    facts = facts_of(runtime)
    memory = estimate([*facts.parts, *extra_parts(job, runtime)[0]], job, runtime, facts)
    if remedy := advice(memory, runtime):
        print(f"memory: about {memory.peak / GB:.1f} GB wanted, {free_bytes(runtime) / GB:.1f} free: {remedy}")


def advice(memory: Estimate, runtime: Runtime) -> str:
    """What to try where the estimate does not fit; empty where it fits."""
    return "" if memory.peak < free_bytes(runtime) else "does not fit; try --offload model or --quantize fp8"


def free_bytes(runtime: Runtime) -> float:
    """Free memory of the runtime's GPU."""
    import torch

    return float(torch.cuda.mem_get_info(torch.device(runtime.device or "cuda"))[0])


def bytes_each(runtime: Runtime) -> int:
    """Bytes of one weight in the runtime's dtype."""
    return 4 if runtime.dtype == "float32" or (runtime.dtype == "auto" and not on_gpu(runtime)) else 2


def on_gpu(runtime: Runtime) -> bool:
    """Whether the pipeline runs on a GPU."""
    import torch

    return torch.cuda.is_available() and (runtime.device or "cuda").startswith("cuda")
