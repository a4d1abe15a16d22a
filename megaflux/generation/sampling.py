"""Tokens and noise -> pictures, by Euler steps in diffusers' own Flux pipelines.

`flux_pipeline` chooses the pipeline, by where the steps start and whether a ControlNet acts; `sample` runs it on one
batch; `generate` is the same for training's validation, from a Condition to uint8 tensors.

Shapes: B pictures of a batch, T condition tokens, P width of CLIP's pooled vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
# From their own modules: to a type checker, the names in diffusers/__init__.py are its stand-ins for missing packages.
from diffusers.models import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_controlnet import FluxControlNetPipeline
from diffusers.pipelines.flux.pipeline_flux_controlnet_image_to_image import FluxControlNetImg2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux_controlnet_inpainting import FluxControlNetInpaintPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from megaflux.generation.condition import PromptEmbeds
from megaflux.generation.true_cfg import TrueCfg, guided
from megaflux.models.latents import TOKEN_PIXELS, chunk_size
from megaflux.models.pretrained import Models
from megaflux.models.t5 import image_tokens_only, split_context, text_of_its_own
from megaflux.models.vlm import Condition


@dataclass(frozen=True)
class Start:
    """A picture that the steps start from instead of noise."""

    image: Image.Image
    """RGB, of the output's size."""
    strength: float
    """Fraction of the steps that are taken, above 0; 1 starts from pure noise."""
    mask: Image.Image | None = None
    """Mode L, of the output's size: 255 is repainted, 0 stays. None: all is repainted."""


@dataclass(frozen=True)
class Control:
    """Control maps and the ControlNet that reads them."""

    controlnet: nn.Module
    """FluxMultiControlNetModel: one union net for all maps, or one net per map."""
    images: list[Image.Image]
    """RGB, of the output's size."""
    modes: list[int]
    """Per map: the union's number of its kind; 0 for a net that is not a union."""
    scales: list[float]
    """Per map: the factor on what the net adds."""
    start: float = 0.0
    end: float = 1.0
    """The net acts from `start` to `end`, as fractions of all steps."""


@dataclass(frozen=True)
class SamplingRequest:
    """What all pictures of a request share, apart from their condition."""

    height: int
    """px, a multiple of 16."""
    width: int
    """px, a multiple of 16."""
    steps: int
    """Euler steps from noise to picture."""
    guidance: float
    """The value that FLUX's guidance embedding gets."""
    start: Start | None = None
    """None: the steps start from noise."""
    control: Control | None = None
    output_type: str = "pil"
    """pil: a list of B pictures; np: float32 (B, height, width, 3) in [0, 1]; pt: (B, 3, height, width) in [0, 1];
    latent: packed latents (B, L, C)."""
    callback: Callable[..., dict[str, Any]] | None = None
    """diffusers' callback_on_step_end: called as (pipeline, step, timestep, tensors), returns the tensors to replace."""
    callback_inputs: Sequence[str] = ("latents",)
    """Names of the tensors that the callback gets."""
    cfg: TrueCfg | None = None
    """The negative condition that all pictures are led away from. None: FLUX runs once a step."""


class EulerScheduler(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler for a model in float64: diffusers rounds sigmas and steps to float32, this does not."""

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        wide = torch.as_tensor(sigmas, dtype=torch.float64)
        if self.config["use_dynamic_shifting"]:
            shifted = self.time_shift(mu, 1.0, wide.numpy())  # type: ignore[arg-type]  # arithmetic alone: an array will do
            wide = torch.as_tensor(shifted)
        else:
            wide = self.shift * wide / (1 + (self.shift - 1) * wide)
        self.timesteps = (wide * self.config["num_train_timesteps"]).to(device)
        self.sigmas = torch.cat([wide, wide.new_zeros(1)]).to(device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        self._step_index = index + 1
        return (sample + (self.sigmas[index + 1] - self.sigmas[index]) * model_output,)


def scheduler_like(
    scheduler: FlowMatchEulerDiscreteScheduler, shift: float | None, dtype: torch.dtype
) -> FlowMatchEulerDiscreteScheduler:
    """A scheduler of the same configuration for a model of that dtype. shift: a fixed timestep shift instead of the
    configuration's own."""
    changes = {} if shift is None else {"shift": shift, "use_dynamic_shifting": False}
    kind = EulerScheduler if dtype == torch.float64 else FlowMatchEulerDiscreteScheduler
    return kind.from_config(scheduler.config, **changes)


def flux_pipeline(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    scheduler: FlowMatchEulerDiscreteScheduler,
    start: Start | None = None,
    control: Control | None = None,
) -> Any:
    """diffusers' pipeline for this start and control, without text encoders: our condition comes as prompt_embeds."""
    parts: dict[str, Any] = {
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
    kinds: dict[tuple[bool, bool, bool], Callable[..., Any]] = {
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
    flux: Any, models: Models, prompt: PromptEmbeds, generators: Sequence[torch.Generator], request: SamplingRequest
) -> Any:
    """The pictures of one batch, in the request's output_type.

    flux: of `flux_pipeline` for the same start and control. prompt: B conditions. generators: B; generators[i] draws
    picture i's noise and whatever else is drawn for it.
    """
    B, start, control = len(generators), request.start, request.control
    transformer = models.trainable.transformer
    arguments: dict[str, Any] = {}
    if start is not None:
        # a list: from a single picture diffusers would draw the posterior once, by the first generator, for all
        arguments |= {"image": [start.image] * B, "strength": start.strength}
        if start.mask is not None:
            arguments["mask_image"] = [start.mask] * B
    if control is not None:
        maps = len(control.images)
        arguments |= {
            "control_image": control.images,
            "control_mode": control.modes,
            "controlnet_conditioning_scale": control.scales,
            # one for each map: diffusers would repeat a number once for each net, and then ignore a union's further maps
            "control_guidance_start": [control.start] * maps,
            "control_guidance_end": [control.end] * maps,
        }
    num_image_tokens = (request.height // TOKEN_PIXELS) * (request.width // TOKEN_PIXELS)
    # diffusers' attention wants a bias of the queries' dtype; our kernel takes any, and float32 is exact enough
    wide = torch.promote_types(transformer.dtype, torch.float32)
    bias_dtype = wide if models.trainable.fused else transformer.dtype
    options = partial(_attention_options, num_image_tokens=num_image_tokens, bias_dtype=bias_dtype)
    with _control_text(models, prompt, control), _guidance(models, prompt, request.cfg, B, options):
        return flux(
            prompt_embeds=prompt.prompt_embeds,
            pooled_prompt_embeds=models.pooled_projections.to(prompt.prompt_embeds).expand(B, -1),
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            joint_attention_kwargs=options(prompt) or None,
            generator=list(generators),
            output_type=request.output_type,
            callback_on_step_end=request.callback,
            callback_on_step_end_tensor_inputs=list(request.callback_inputs),
            **arguments,
        ).images


def _attention_options(prompt: PromptEmbeds, num_image_tokens: int, bias_dtype: torch.dtype) -> dict[str, Any]:
    """FLUX's joint_attention_kwargs for a condition."""
    options: dict[str, Any] = {"context_embedded": True} if prompt.embedded else {}
    bias = prompt.attention_bias(num_image_tokens, bias_dtype)
    return options if bias is None else options | {"attention_mask": bias}


@contextmanager
def _guidance(
    models: Models,
    prompt: PromptEmbeds,
    cfg: TrueCfg | None,
    batch: int,
    options: Callable[[PromptEmbeds], dict[str, Any]],
) -> Iterator[None]:
    """Inside, FLUX embeds each condition as it has to be, and runs twice a step where there is a negative one."""
    if cfg is None:
        with _embedding(models, prompt):
            yield
        return
    negative = PromptEmbeds.cat([cfg.negative] * batch)
    tokens = negative.prompt_embeds
    arguments = {
        "encoder_hidden_states": tokens,
        "txt_ids": tokens.new_zeros(tokens.shape[1], 3),
        "joint_attention_kwargs": options(negative),
    }
    embeddings = partial(_embedding, models, prompt), partial(_embedding, models, negative)
    with guided(models.trainable.transformer, cfg.scale, arguments, *embeddings):
        yield


def _embedding(models: Models, prompt: PromptEmbeds) -> AbstractContextManager[None]:
    """Inside, diffusers' own path embeds T5's tokens of the condition with T5's linear."""
    t5_embedder = _t5_embedder(models, prompt)
    if t5_embedder is None:
        return nullcontext()
    return split_context(models.trainable.transformer, t5_embedder, prompt.num_own_tokens)


def _t5_embedder(models: Models, prompt: PromptEmbeds) -> nn.Linear | None:
    """T5's linear, where the condition has tokens of T5 that have not passed it."""
    has_t5 = prompt.num_own_tokens < prompt.prompt_embeds.shape[1]
    return models.t5.embedder if models.t5 is not None and has_t5 and not prompt.embedded else None


@contextmanager
def _control_text(models: Models, prompt: PromptEmbeds, control: Control | None) -> Iterator[None]:
    """Inside, a ControlNet is given what it is to read: its own text, or else FLUX's without T5's tokens."""
    t5_embedder = _t5_embedder(models, prompt)
    with ExitStack() as stack:
        if control is not None and prompt.control is not None:
            text = prompt.control
            stack.enter_context(text_of_its_own(control.controlnet, text.tokens, text.num_own_tokens, t5_embedder))
        elif control is not None and t5_embedder is not None:
            stack.enter_context(image_tokens_only(control.controlnet, prompt.num_own_tokens))
        yield


@torch.no_grad()
def generate(
    flux: FluxPipeline,
    models: Models,
    condition: Condition,
    seeds: Sequence[int | torch.Generator],
    request: SamplingRequest,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Pictures for validation: uint8 (B, 3, height, width) on the CPU.

    condition: of B pictures; those of unequal length are padded, which the attention does not see. seeds: B; picture i starts from noise that is
    drawn on the CPU from seeds[i] alone, but others in the batch can change its last bits. on_step: called after each
    step. The request's output_type and callback are not used.
    """
    fused = models.trainable.fused
    tokens = models.trainable.encode_condition(condition, embedded=fused)
    prompt = PromptEmbeds(tokens, condition.bias(), fused, tokens.shape[1])
    generators = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(s) for s in seeds]

    def after_step(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    with decoding_in_chunks(flux.vae, len(seeds), request.height, request.width):
        images = sample(flux, models, prompt, generators, replace(request, output_type="pt", callback=after_step))
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def decoding_in_chunks(vae: AutoencoderKL, pictures: int, height: int, width: int) -> Iterator[None]:
    """Inside, the VAE decodes one picture at a time if there are more than fit at once (`latents.chunk_size`).

    The VAE is left as it was: training encodes with it, and bits depend on the batch's size.
    """
    before = vae.use_slicing
    vae.use_slicing = before or pictures > chunk_size(height, width)
    try:
        yield
    finally:
        vae.use_slicing = before
