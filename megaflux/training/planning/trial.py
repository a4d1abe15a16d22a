"""A plan tried out on the GPU at hand: one micro-batch, forward and backward, of which nothing stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megaflux.common.ranks import World
from megaflux.config.parse import Config
from megaflux.data.buckets import Bucket
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition
from megaflux.training import validation
from megaflux.training.engine import StageEngine
from megaflux.training.planning import memory
from megaflux.training.planning.cache_size import cached_shapes

LITTLE = 10**9  # bytes that may be anybody's


def device_name(device: torch.device) -> str:
    """The GPU's name as its driver has it; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that neither this process nor, as far as is known, its libraries hold; 0: next to none, or a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device) - memory.RUNTIME_BYTES
    return others if others > LITTLE else 0


def tries_out(world: World, engine: StageEngine) -> bool:
    """Whether plans are tried out: on GPUs, and not under ZeRO-3, whose forward pass is made of collectives."""
    return world.device.type == "cuda" and engine.zero_stage < 3


def forward_and_backward(config: Config, models: Models, bucket: Bucket) -> None:
    """What a micro-batch of this size needs, on blank pictures: encoders, forward, backward; nothing stays of it. What
    data.cache holds is not encoded, as in the run: zeros stand for it.

    The module's own forward, past the hooks that DeepSpeed has on it, and gradients returned, not accumulated: no
    collective, no state, no random number."""
    batch, device = config.train.micro_batch_size, models.trunk.device
    latents, condition = _blank(config, models, bucket, batch, device)
    t = torch.linspace(0.1, 0.9, batch, device=device)
    losses = validation.denoising_loss(
        models.trainable.forward, config, models, bucket, latents, torch.zeros_like(latents), condition, t
    )
    trained = [parameter for parameter in models.trainable.parameters() if parameter.requires_grad]
    torch.autograd.grad(losses.mean(), trained, allow_unused=True)


def _blank(
    config: Config, models: Models, bucket: Bucket, batch: int, device: torch.device
) -> tuple[torch.Tensor, Condition]:
    """(latents, condition) of blank pictures, computed or as the loader brings them."""
    shapes = cached_shapes(models, config.data.cache, bucket)
    pictures = torch.zeros(batch, 3, bucket.height, bucket.width, dtype=torch.uint8, device=device)
    if "latents" in shapes:
        latents = torch.zeros(batch, *shapes["latents"], dtype=models.vae.dtype, device=device)
    else:
        latents = latent_ops.encode(models.vae, pictures)
    if "hidden_states" in shapes:
        hidden_states = torch.zeros(batch, *shapes["hidden_states"], dtype=models.trunk.dtype, device=device)
        return latents, models.trunk.from_cache(hidden_states, bucket.height, bucket.width)
    words = "word " * models.trunk.max_caption_tokens if config.data.condition.image_text else ""
    return latents, models.trunk.encode(pictures, [words] * batch, "image_text" if words else "image")


@contextmanager
def held(device: torch.device, sizes: Sequence[int]) -> Iterator[None]:
    """Memory that the updates will take and nothing holds yet, held: so many bytes each."""
    tensors = []
    try:
        tensors += [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        yield
    finally:
        tensors.clear()
