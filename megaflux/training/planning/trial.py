"""Try a plan out on this machine's GPU: one micro-batch, forward and backward, without a lasting effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megaflux.common.errors import is_out_of_memory
from megaflux.common.ranks import World
from megaflux.config.schema import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import Models
from megaflux.models.vlm import Condition
from megaflux.training import distributed, objective
from megaflux.training.ds_config import batch_sizes
from megaflux.training.engine import StageEngine, release_memory
from megaflux.training.objective import Denoising
from megaflux.training.planning import memory
from megaflux.training.planning.cache_size import cached_shapes
from megaflux.training.planning.candidates import Candidates
from megaflux.training.planning.micro_batch import Choice
from megaflux.training.planning.sizes import Sizes

LITTLE = 10**9  # bytes too few to tell whose they are
NEVER = 10**6  # steps down of a rank on which no plan fits


def device_name(device: torch.device) -> str:
    """The GPU's name by its driver; "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def held_by_others(device: torch.device) -> int:
    """Bytes of a GPU that neither this process nor, by estimate, its libraries hold; 0: too few to be sure, or a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device) - memory.RUNTIME_BYTES
    return others if others > LITTLE else 0


def tries_out(world: World, engine: StageEngine) -> bool:
    """Whether plans are tried out: on GPUs, except under ZeRO-3, whose forward pass uses collectives."""
    return world.device.type == "cuda" and engine.zero_stage < 3


def forward_and_backward(config: Config, models: Models, bucket: Bucket) -> None:
    """Run a micro-batch of blank pictures through encoders, forward and backward, without a lasting effect. What data.cache
    has is not encoded, as in the run; zeros replace it.

    It calls the module's own forward, without DeepSpeed's hooks, and gradients are returned, not accumulated: it uses no
    collective, changes no state and draws no random number."""
    batch, device = batch_sizes(config).micro, models.trunk.device
    latents, condition = _blank(config, models, bucket, batch, device)
    t = torch.linspace(0.1, 0.9, batch, device=device)
    given = Denoising(bucket, latents, condition, t, torch.zeros_like(latents), 1.0)
    losses = objective.denoising_loss(models.trainable.forward, models, given)
    trained = [parameter for parameter in models.trainable.parameters() if parameter.requires_grad]
    torch.autograd.grad(losses.mean(), trained, allow_unused=True)


def _blank(
    config: Config, models: Models, bucket: Bucket, batch: int, device: torch.device
) -> tuple[torch.Tensor, Condition]:
    """(latents, condition) of blank pictures, encoded or as the loader gives them from the cache."""
    vae: Any = models.vae
    shapes = cached_shapes(models, config.data.cache, bucket)
    pictures = torch.zeros(batch, 3, bucket.height, bucket.width, dtype=torch.uint8, device=device)
    if "latents" in shapes:
        latents = torch.zeros(batch, *shapes["latents"], dtype=vae.dtype, device=device)
    else:
        latents = latent_ops.encode(models.vae, pictures)
    if "hidden_states" in shapes and not config.trunk_share:
        hidden_states = torch.zeros(batch, *shapes["hidden_states"], dtype=models.trunk.dtype, device=device)
        return latents, models.trunk.from_cache(hidden_states, bucket.height, bucket.width)
    words = "word " * models.trunk.max_caption_tokens if config.data.condition.image_text else ""
    references = [[picture] * config.data.references.turns for picture in pictures]
    return latents, models.trunk.encode_references(references, [words] * batch, "image_text" if words else "image")


@contextmanager
def held(device: torch.device, sizes: Sequence[int]) -> Iterator[None]:
    """Allocate memory that later updates will need, while inside: a tensor of each size in bytes."""
    tensors: list[torch.Tensor] = []
    try:
        tensors += [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
        yield
    finally:
        tensors.clear()


def fits(sizes: Sizes, stage: Stage, models: Models, engine: StageEngine, choice: Choice) -> bool:
    """Whether a plan fits this rank's GPU at every bucket, beside what later updates allocate. Leaves the model configured
    with it."""
    models.trainable.configure(sizes.fused, list(choice.policies))
    config, device = sizes.cut_into(choice.micro_batch_size).config, models.trunk.device
    in_flight, *_ = memory.zero_bytes(sizes.ds_config, sizes.ranks, sizes.module, stage, sizes.width)
    enough = True
    try:
        with held(device, [*engine.coming(device), in_flight]):
            for bucket in sizes.buckets:
                forward_and_backward(config, models, bucket)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        enough = False
    release_memory()  # after the handler, whose traceback holds all that the try allocated
    return enough


def highest_that_fits(
    candidates: Candidates, choice: Choice, fits: Callable[[Choice], bool], world: World
) -> tuple[Choice, int] | None:
    """The highest plan, from this one down, that fits on every rank, and how many steps lower it is. None: none fits on some
    rank. Collective."""
    steps, plan = 0, choice
    while not fits(plan):
        if (lower := candidates.lower(plan)) is None:
            steps = NEVER
            break
        steps, plan = steps + 1, lower[0]
    steps = -distributed.min_over_ranks(-steps, world)
    if steps == NEVER:
        return None
    for _ in range(steps):  # the steps of the rank with the least memory, the same on all
        if (lower := candidates.lower(choice)) is None:
            raise RuntimeError("ranks have different plans to choose from")
        choice = lower[0]
    return choice, steps
