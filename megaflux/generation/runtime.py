"""How a pipeline fits into a machine: device and dtype, CPU offload, fp8 weights, torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.common.errors import UserError
from megaflux.models.pretrained import Models, move_to
from megaflux_kernels import cudnn

# Layers that stay in bf16, as in the released tool: norms, their modulations, and the streams' inputs and outputs.
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


def device_and_dtype(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Device and dtype with defaults filled in: the GPU if there is one, bfloat16 on it, float32 on the CPU.

    On a GPU, cuDNN's attention is switched off, with a warning, where its version is wrong. UserError for a device that
    this machine does not have.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"device: {device} cannot be used here ({line}); use cpu") from None
    if chosen.type == "cuda" and (warning := cudnn.leave_out_if_wrong()):
        logging.getLogger("megaflux").warning(warning)
    return chosen, dtype or (torch.float32 if chosen.type == "cpu" else torch.bfloat16)


# --- CPU offload ---


@dataclass(frozen=True)
class Offload:
    """The weights stay in the host's memory and are on the device only while they are used."""

    kind: Literal["model", "sequential"]
    """model: one part at a time is on the device; sequential: one layer at a time, by hooks of `offload_layers`."""
    device: torch.device
    """Where the weights are used."""

    @contextmanager
    def encoding(self, models: Models, dtype: torch.dtype) -> Iterator[None]:
        """Kind "model": inside, Qwen2-VL, connector and T5 are on the device. Kind "sequential": nothing to do."""
        if self.kind == "sequential":
            yield
            return
        parts: list[nn.Module] = [models.trunk.vlm, models.trainable.vlm, models.trainable.connector]
        if models.trainable.fused:
            parts.append(models.trainable.transformer.context_embedder)
        if models.t5 is not None:
            parts += [models.t5.encoder, models.t5.embedder]
        try:
            for part in parts:
                move_to(part, self.device, dtype)
            yield
        finally:
            for part in parts:
                move_to(part, "cpu", dtype)
            _empty_cache()

    @contextmanager
    def sampling(self, flux: Any, models: Models, dtype: torch.dtype) -> Iterator[None]:
        """Kind "model": inside, diffusers moves the parts of its pipeline `flux` to the device, one at a time; T5's
        small linear is there all the time. Kind "sequential": nothing to do."""
        if self.kind == "sequential":
            yield
            return
        try:
            if models.t5 is not None:
                move_to(models.t5.embedder, self.device, dtype)
            flux.enable_model_cpu_offload(device=self.device)
            yield
        finally:
            flux.remove_all_hooks()
            for part in flux.components.values():
                if isinstance(part, nn.Module):
                    part.to("cpu")
            if models.t5 is not None:
                move_to(models.t5.embedder, "cpu", dtype)
            _empty_cache()


def offload_layers(models: Models, nets: Iterable[nn.Module], device: torch.device) -> None:
    """Have accelerate bring each layer of the models and of `nets` to the device when it runs, for good.

    Turns megaflux's own path off: it reads weights that are not there until their layer runs.
    """
    from accelerate import cpu_offload

    models.trainable.configure(False)
    parts: list[nn.Module] = [
        models.trunk.vlm,
        models.trainable.vlm,
        models.trainable.connector,
        models.trainable.transformer,
        models.vae,
    ]
    if models.t5 is not None:
        parts += [models.t5.encoder, models.t5.embedder]
    for part in (*parts, *nets):
        cpu_offload(part, device, offload_buffers=True)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- fp8 and torch.compile ---


def quantize_fp8(transformer: nn.Module) -> int:
    """Store the weights of the blocks' linears in float8 (e4m3, one scale per row; torchao) and compute in the old
    dtype. Returns the number of layers.

    megaflux's own path must be off: it reads plain weights. UserError if torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, quantize_
    except ImportError:
        raise UserError("quantize fp8: needs torchao; pip install 'megaflux[quantize]'") from None
    chosen = [name for name, module in transformer.named_modules() if is_quantized(module, name)]
    quantize_(transformer, Float8WeightOnlyConfig(), filter_fn=is_quantized)
    return len(chosen)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether fp8 applies to the layer: a linear outside of KEPT_IN_BF16. A single block's own proj_out is quantized."""
    parts = name.split(".")
    inside_block = "blocks" in parts[0]
    kept = [part for part in parts if part in KEPT_IN_BF16 and not (inside_block and part == "proj_out")]
    return isinstance(module, nn.Linear) and not kept


def compile_blocks(transformer: FluxTransformer2DModel) -> None:
    """torch.compile each block, once per kind of block: minutes less than for the whole model."""
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile()
