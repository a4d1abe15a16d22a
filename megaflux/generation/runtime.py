"""Fitting a pipeline into a machine: offload, fp8 weights, torch.compile, and how much memory all that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from megaflux.common.errors import UserError
from megaflux.models.pretrained import cast

if TYPE_CHECKING:
    from megaflux.generation.pipeline import Qwen2VLFluxPipeline

# Layers that stay in bf16, as in the released tool: norms and their modulations, and what reads and writes the streams.
KEPT_IN_BF16 = (
    "norm",
    "norm1",
    "norm1_context",
    "norm2",
    "norm2_context",
    "norm_out",
    "proj_out",
    "x_embedder",
    "context_embedder",
    "time_text_embed",
)


@dataclass(frozen=True)
class Offload:
    """Where the weights are between uses (the host's memory) and where they are used."""

    kind: Literal["model", "sequential"]
    """model: one part at a time on the device; sequential: one layer at a time."""
    device: torch.device


def offload(pipeline: Qwen2VLFluxPipeline, kind: Literal["model", "sequential"], device: torch.device | str) -> None:
    """Keep the weights on the host from now on. Load the pipeline on the CPU first: that is the point.

    sequential is accelerate's cpu_offload, for good: it hooks every layer."""
    models, device = pipeline.models, torch.device(device)
    if pipeline.device.type != "cpu":
        pipeline.to("cpu")
    if kind == "sequential":
        from accelerate import cpu_offload

        models.trainable.configure(False)  # our own path reads weights, and they are elsewhere until a layer runs
        parts = [
            models.trunk.vlm,
            models.trainable.vlm,
            models.trainable.connector,
            models.trainable.transformer,
            models.vae,
        ]
        if models.t5 is not None:
            parts += [models.t5.encoder, models.t5.embedder]
        if pipeline.controlnet is not None:
            parts += pipeline.controlnet.nets.values()
        for part in parts:
            cpu_offload(part, device, offload_buffers=True)
    pipeline.offload = Offload(kind, device)


@contextmanager
def encoding(pipeline: Qwen2VLFluxPipeline) -> Iterator[None]:
    """With model offload: Qwen2-VL, connector and T5 on the device while inside."""
    chosen, models = pipeline.offload, pipeline.models
    if chosen is None or chosen.kind == "sequential":
        yield
        return
    parts: list[nn.Module] = [models.trunk.vlm, models.trainable.vlm, models.trainable.connector]
    if models.trainable.fused:
        parts.append(models.trainable.transformer.context_embedder)
    if models.t5 is not None:
        parts += [models.t5.encoder, models.t5.embedder]
    try:
        for part in parts:
            cast(part, chosen.device, pipeline.dtype)
        yield
    finally:
        for part in parts:
            cast(part, "cpu", pipeline.dtype)
        _empty_cache()


@contextmanager
def offloaded(pipeline: Qwen2VLFluxPipeline, flux) -> Iterator[None]:
    """With model offload: diffusers' own, for the parts of its pipeline, while inside. T5's linear is small and stays."""
    chosen, t5 = pipeline.offload, pipeline.models.t5
    if chosen is None or chosen.kind == "sequential":
        yield
        return
    try:
        if t5 is not None:
            cast(t5.embedder, chosen.device, pipeline.dtype)
        flux.enable_model_cpu_offload(device=chosen.device)
        yield
    finally:
        flux.remove_all_hooks()
        for part in flux.components.values():
            if isinstance(part, nn.Module):
                part.to("cpu")
        if t5 is not None:
            cast(t5.embedder, "cpu", pipeline.dtype)
        _empty_cache()


def quantize_fp8(transformer: nn.Module) -> int:
    """Store the block linears' weights in float8 (e4m3, a scale per row; torchao), computing in the old dtype; returns
    how many layers. Turns off nothing: the caller must not be on megaflux's own path, which reads plain weights.

    UserError where torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("quantize fp8: needs torchao; pip install 'megaflux[quantize]'") from None
    chosen = [name for name, module in transformer.named_modules() if is_quantized(module, name)]
    quantize_(transformer, Float8WeightOnlyConfig(), filter_fn=is_quantized)
    return len(chosen)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether fp8 takes a layer: linears outside of KEPT_IN_BF16 (a single block's proj_out is of its block: taken)."""
    parts = name.split(".")
    inside_block = "blocks" in parts[0]
    kept = [part for part in parts if part in KEPT_IN_BF16 and not (inside_block and part == "proj_out")]
    return isinstance(module, nn.Linear) and not kept


def compile_blocks(transformer: nn.Module) -> None:
    """torch.compile each block, once per kind of block: minutes less than the whole model."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
