"""Condition -> velocity -> Euler steps -> pictures, by diffusers' own FluxPipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaflux import compat  # noqa: F401  (before diffusers)
from diffusers import FluxPipeline

from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.models.vlm import Condition


def flux_pipeline(transformer, vae, scheduler) -> FluxPipeline:
    """diffusers' pipeline without text encoders: it is given our condition as prompt_embeds."""
    pipeline = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: FluxPipeline, model: Qwen2VLFlux, condition: Condition, pooled_projections: Tensor,
    seeds: Sequence[int | torch.Generator], height: int, width: int, steps: int, guidance: float,
    on_step: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """One picture per condition and seed: uint8 (B, 3, height, width) on the CPU.

    condition: B conditions of equal length; pooled_projections: (1, P); seeds: B, generators too; on_step:
    called after each step. Picture i starts from noise drawn on the CPU from seeds[i] alone; batch mates can
    still change it in the last bits, so ask for one at a time where it must be the same in any company.
    """
    if condition.select_mask is not None:
        raise ValueError("conditions of unequal length: FluxPipeline would see their padding; give one at a time")

    def after_step(*_: object) -> dict[str, Tensor]:
        if on_step is not None:
            on_step()
        return {}

    prompt_embeds = model.encode_condition(condition, embedded=model.fused)
    images = pipeline(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_projections.to(prompt_embeds).expand(len(seeds), -1),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        joint_attention_kwargs={"context_embedded": True} if model.fused else None,
        generator=[s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(s) for s in seeds],
        output_type="pt",
        callback_on_step_end=after_step,
    ).images
    return (images.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
