"""Peak memory of training, counted: an update, DeepSpeed's ZeRO, the VAE.

The update is Qwen2-VL's last layers, connector and FLUX, forward and backward, by the real objective on fake tensors, so
that FLUX.1-dev is counted on a laptop. A gradient is dropped as soon as it is complete, as DeepSpeed moves it into its
bucket. The ops are counted as their Triton kernels (which allocate only partial sums inside), attention as a flash kernel.
ZeRO is counted on the real tensors of a small engine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import AutoencoderKL

from megaflux.bench.activations import assume_even_norms, in_dtype, rms_norm_of_gpus
from megaflux.bench.live_memory import LiveMemory
from megaflux.common.ranks import World
from megaflux.config.schema import Config, Stage
from megaflux.data.buckets import Bucket
from megaflux.models import latents
from megaflux.models.flux import Policy, pack_projections
from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.models.vlm import Condition
from megaflux.training import optim, stages
from megaflux.training.ds_config import accumulation_steps
from megaflux.training.objective import Denoising, denoising_loss
from megaflux.training.planning.costs import token_counts
from megaflux_kernels.dispatch import as_on_a_gpu


def update_peak(
    config: Config,
    module: Qwen2VLFlux,
    stage: Stage,
    bucket: Bucket,
    batch: int,
    policies: Sequence[Policy],
    fused: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes alive at the peak of one forward and backward pass of `batch` pictures, without weights.

    module: as `meta_models` returns it, not changed; policies: one per FLUX block; fused: with kernels.
    """
    module = copy.deepcopy(module)
    with ExitStack() as stack:
        for context in (FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION), as_on_a_gpu(), rms_norm_of_gpus()):
            stack.enter_context(context)
        for cached in (latents.image_ids, latents.text_ids):  # no fake ids into real runs, nor the other way round
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        _fill(module, stage, dtype)
        module.train()
        module.configure(fused, policies if fused else policies[0])
        assume_even_norms(module.transformer)
        flux = module.transformer.config
        channels = flux["in_channels"] // 4
        pooled = torch.empty(1, flux["pooled_projection_dim"], dtype=dtype)
        models: Any = SimpleNamespace(trainable=module, pooled_projections=pooled)
        if fused:
            pack_projections(module.transformer)  # now, so that no weight moves while what lives is counted
        with LiveMemory() as memory:
            shape = batch, channels, bucket.height // latents.VAE_SCALE, bucket.width // latents.VAE_SCALE
            condition = _condition(config, module, bucket, batch, dtype)
            x, noise = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            given = Denoising(bucket, x, condition, torch.empty(batch), noise, torch.empty(batch))
            losses = denoising_loss(module, models, given)
            losses.mean().backward()
            return memory.peak


def _fill(module: Qwen2VLFlux, stage: Stage, dtype: torch.dtype) -> None:
    """Give a module of the meta device fake weights; the trainable ones lie in one buffer, in ZeRO's order."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    parameters = dict(module.named_parameters())
    names = optim.products_together(stages.trainable_names(module, stage))
    flat, start = torch.empty(sum(parameters[name].numel() for name in names), dtype=dtype), 0
    for name in names:
        parameter = parameters[name]
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(_take_gradient)


def _take_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _condition(config: Config, module: Qwen2VLFlux, bucket: Bucket, batch: int, dtype: torch.dtype) -> Condition:
    tokens = token_counts(config, bucket)
    return Condition(
        torch.empty(batch * tokens.turns, tokens.turn, module.vlm.config.hidden_size, dtype=dtype),
        torch.ones(3, batch * tokens.turns, tokens.turn, dtype=torch.long),
        torch.ones(batch, tokens.condition, dtype=torch.long),
        turns=tokens.turns,
    )


def zero_peak(config: Config, module: Qwen2VLFlux, stage: int, ds_config: dict[str, Any]) -> tuple[int, int]:
    """(bytes in flight, bytes kept) of a real engine's ZeRO in the backward pass of its second update, when everything is
    allocated: beside weights and activations, on GPU and host together. The module is real and small; its forward is
    replaced by one that keeps nothing. Needs a process of one rank with its group (`distributed.start`)."""
    from megaflux.training.average import WeightAverage
    from megaflux.training.engine import StageEngine

    trained = [dict(module.named_parameters())[name] for name in stages.trainable_names(module, config.stages[stage])]
    weights = sum(parameter.nbytes for parameter in trained)
    vars(module)["forward"] = lambda: sum((parameter * 1.5).sum() for parameter in trained)
    with LiveMemory() as memory:
        engine = StageEngine(module, config, ds_config, stage, 1)
        average = WeightAverage(config.optim.ema_decay, World(0, 1))
        average.begin_stage(engine)
        for update in range(2):
            engine.set_learning_rates(update)
            for _ in range(accumulation_steps(config, 1)):
                memory.peak = memory.live
                engine.backward(engine())
                in_flight, kept = memory.peak - memory.live, memory.live - weights
                engine.step()
            average.follow(engine)
        engine.close()
    del vars(module)["forward"]
    return in_flight, kept


def vae_peaks(vae_config: dict[str, Any], pictures: int, bucket: Bucket, dtype: torch.dtype) -> tuple[int, int]:
    """(encode, decode): bytes alive at the peak of `latents.encode` and `decode` of pictures, without the VAE's weights and
    the workspace of convolutions."""
    size = bucket.height, bucket.width
    with FakeTensorMode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no scores, as on a GPU: of 16k tokens, 0.5 GB
        values = vae_config | {"shift_factor": 0.0, "scaling_factor": 1.0}
        vae = in_dtype(dtype, lambda: AutoencoderKL(**values)).requires_grad_(False).eval()
        pixels = torch.empty(pictures, 3, *size, dtype=torch.uint8)
        shape = pictures, vae.config.latent_channels, *(side // latents.VAE_SCALE for side in size)
        packed = torch.empty(shape, dtype=dtype)
        with LiveMemory() as encoding:
            latents.encode(vae, pixels)
        with LiveMemory() as decoding:
            latents.decode(vae, packed)
    return encoding.peak, decoding.peak
