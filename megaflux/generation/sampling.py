"""Condition -> velocity -> Euler steps -> pictures, by diffusers' own Flux pipelines: which one, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers)
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
)

from megaflux.generation.condition import PromptEmbeds
from megaflux.models.latents import TOKEN_PIXELS, chunk_size
from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.models.t5 import image_tokens_only, split_context
from megaflux.models.vlm import Condition


@dataclass(frozen=True)
class Start:
    """Where the steps begin, other than at noise: a picture (RGB, at the output's size) and how far it is undone."""

    image: Image.Image
    strength: float
    """0 to 1: share of the steps that are taken; 1 begins at pure noise."""
    mask: Image.Image | None = None
    """Mode L at the output's size: 255 is painted anew, 0 stays."""


@dataclass(frozen=True)
class Control:
    """Control maps (RGB, at the output's size) for a ControlNet."""

    controlnet: nn.Module
    """FluxMultiControlNetModel: one union net for all maps, or one net for each."""
    images: list[Image.Image]
    modes: list[int]
    """The union's number of each map's kind; 0 for nets that are none."""
    scales: list[float]
    start: float = 0.0
    end: float = 1.0
    """Shares of the steps between which it acts."""


class EulerScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler, which rounds sigmas and steps to float32, for a model in float64: nothing is rounded."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        wide = torch.as_tensor(sigmas, dtype=torch.float64)
        if self.config.use_dynamic_shifting:
            wide = torch.from_numpy(self.time_shift(mu, 1.0, wide.numpy()))
        else:
            wide = self.shift * wide / (1 + (self.shift - 1) * wide)
        self.timesteps = (wide * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([wide, wide.new_zeros(1)]).to(device)

    def step(self, model_output, timestep, sample, return_dict=True, **_: Any):
        if self.step_index is None:
            self._init_step_index(timestep)
        dt = self.sigmas[self.step_index + 1] - self.sigmas[self.step_index]
        self._step_index += 1
        return (sample + dt * model_output,)


def scheduler_like(scheduler: FlowMatchEulerDiscreteScheduler, shift: float | None, dtype: torch.dtype):
    """A scheduler of the same configuration; shift: a fixed one in the place of the configuration's own shifting."""
    changes = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    kind = EulerScheduler if dtype == torch.float64 else FlowMatchEulerDiscreteScheduler
    return kind.from_config(scheduler.config, **changes)


def flux_pipeline(transformer, vae, scheduler, start: Start | None = None, control: Control | None = None):
    """diffusers' pipeline for what is given, without text encoders: our condition comes as prompt_embeds."""
    parts = {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": transformer,
    }
    if control is not None:
        parts["controlnet"] = control.controlnet
    kinds = {
        (False, False, False): FluxPipeline,
        (True, False, False): FluxImg2ImgPipeline,
        (True, True, False): FluxInpaintPipeline,
        (False, False, True): FluxControlNetPipeline,
        (True, False, True): FluxControlNetImg2ImgPipeline,
        (True, True, True): FluxControlNetInpaintPipeline,
    }
    pipeline = kinds[start is not None, start is not None and start.mask is not None, control is not None](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(
    pipeline,
    model: Qwen2VLFlux,
    prompt: PromptEmbeds,
    pooled_projections: Tensor,
    generators: Sequence[torch.Generator],
    height: int,
    width: int,
    steps: int,
    guidance: float,
    start: Start | None = None,
    control: Control | None = None,
    t5_embedder: nn.Linear | None = None,
    output_type: str = "pil",
    callback: Callable[..., dict] | None = None,
    callback_inputs: Sequence[str] = ("latents",),
) -> Any:
    """What a pipeline of `flux_pipeline` makes of a batch: its `.images`, in diffusers' output_type.

    Picture i starts from noise that generators[i] draws, and so does whatever else is drawn for it.
    """
    B = len(generators)
    transformer = model.transformer
    arguments: dict[str, Any] = {}
    if start is not None:
        # one copy each: diffusers draws the posterior of a single picture by the first generator, for all
        arguments |= {"image": [start.image] * B, "strength": start.strength}
        if start.mask is not None:
            arguments["mask_image"] = [start.mask] * B
    if control is not None:
        arguments |= {
            "control_image": control.images,
            "control_mode": control.modes,
            "controlnet_conditioning_scale": control.scales,
            "control_guidance_start": control.start,
            "control_guidance_end": control.end,
        }
    options: dict[str, Any] = {"context_embedded": True} if prompt.embedded else {}
    num_image_tokens = (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
    # A bias of diffusers' own attention must be of the queries' dtype; our kernel takes any, and float32 is exact enough.
    wide = torch.promote_types(transformer.dtype, torch.float32)
    bias = prompt.attention_bias(num_image_tokens, wide if model.fused else transformer.dtype)
    if bias is not None:
        options["attention_mask"] = bias
    with ExitStack() as stack:
        if prompt.num_own_tokens < prompt.prompt_embeds.shape[1] and not prompt.embedded:
            stack.enter_context(split_context(transformer, t5_embedder, prompt.num_own_tokens))
            if control is not None:
                stack.enter_context(image_tokens_only(control.controlnet, prompt.num_own_tokens))
        return pipeline(
            prompt_embeds=prompt.prompt_embeds,
            pooled_prompt_embeds=pooled_projections.to(prompt.prompt_embeds).expand(B, -1),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            joint_attention_kwargs=options or None,
            generator=list(generators),
            output_type=output_type,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=list(callback_inputs),
            **arguments,
        ).images


@torch.no_grad()
def generate(
    pipeline: FluxPipeline,
    model: Qwen2VLFlux,
    condition: Condition,
    pooled_projections: Tensor,
    seeds: Sequence[int | torch.Generator],
    height: int,
    width: int,
    steps: int,
    guidance: float,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Variations in a batch, for validation: uint8 (B, 3, height, width) on the CPU, one per condition and seed.

    condition: B conditions of equal length; pooled_projections: (1, P). Picture i starts from noise drawn on the CPU
    from seeds[i] alone; batch mates can still change it in the last bits.
    """
    if condition.select_mask is not None:
        raise ValueError("conditions of unequal length: FluxPipeline would see their padding; give one at a time")
    tokens = model.encode_condition(condition, embedded=model.fused)
    prompt = PromptEmbeds(tokens, None, model.fused, tokens.shape[1])
    generators = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(s) for s in seeds]
    with decoding_in_chunks(pipeline.vae, len(seeds), height, width):
        images = sample(
            pipeline,
            model,
            prompt,
            pooled_projections,
            generators,
            height,
            width,
            steps,
            guidance,
            output_type="pt",
            callback=lambda *_: on_step() or {},
        )
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def decoding_in_chunks(vae, pictures: int, height: int, width: int) -> Iterator[None]:
    """Where the pictures are more than the VAE may take at once (`latents.chunk_size`), it takes them one by one inside,
    as diffusers can. It is left as it was: training encodes with it, and bits depend on the batch."""
    before = vae.use_slicing
    vae.use_slicing = before or pictures > chunk_size(height, width)
    try:
        yield
    finally:
        vae.use_slicing = before
