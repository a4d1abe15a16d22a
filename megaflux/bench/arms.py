"""The arms of the step bench: one FLUX with random weights, and the paths that it takes in turns.

diffusers-eager[-full]    diffusers as it is [checkpointing every block]
diffusers-compile[-full]  the same, each block under torch.compile
ours-none, -mlp, -full    fused FLUX with this activation policy
"""

from __future__ import annotations

from typing import Any

import torch

from megaflux.common import compat  # noqa: F401  (before diffusers)

# isort: split
from diffusers.models import FluxTransformer2DModel

from megaflux.bench import activations
from megaflux.models.flux import all_blocks

ARMS = (
    "diffusers-eager",
    "diffusers-eager-full",
    "diffusers-compile",
    "diffusers-compile-full",
    "ours-none",
    "ours-mlp",
    "ours-full",
)
VARIANTS = 64  # of one block that torch.compile may hold: double and single, frozen and not, recomputed and not


def is_compiled(arm: str) -> bool:
    return "-compile" in arm


def random_flux(
    flux_config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> FluxTransformer2DModel:
    """A FLUX with all weights random, gates and modulations too, drawn in place: no second copy exists."""
    with torch.device(device):
        transformer = activations.build(flux_config, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".norm_" in name and parameter.ndim == 1 and "linear" not in name:  # RMSNorm of q and k
                parameter.normal_(1, 0.1, generator=generator)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.02, generator=generator)
    return transformer.train()


def random_inputs(
    transformer: FluxTransformer2DModel,
    batch: int,
    grid: tuple[int, int],
    text: int,
    device: torch.device,
    seed: int = 1,
) -> dict[str, Any]:
    """Arguments of the transformer's forward: normal numbers and the real positions of a grid (rows, columns)."""
    rows, columns = grid
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        given = activations.inputs(transformer.config, batch, rows * columns, text, transformer.dtype, str(device))
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    ids = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return given | {"img_ids": ids.reshape(-1, 3).float()}


class Arms:
    """A transformer that takes one arm after another; its weights exist once."""

    def __init__(self, transformer: FluxTransformer2DModel):
        self.transformer = transformer
        self.compiled: list[Any] | None = None

    def set(self, arm: str) -> None:
        """Take the path of an arm. Compiled blocks are kept for the next turn of theirs."""
        blocks = all_blocks(self.transformer)
        for block in blocks:
            block._compiled_call_impl = None  # the switch that nn.Module.compile sets
        activations.set_arm(self.transformer, arm.replace("-compile", "-eager"))
        if is_compiled(arm):
            if self.compiled is None:
                self._compile()
                self.compiled = [block._compiled_call_impl for block in blocks]
            for block, compiled in zip(blocks, self.compiled, strict=True):
                block._compiled_call_impl = compiled

    def _compile(self) -> None:
        torch._dynamo.config.recompile_limit = VARIANTS
        self.transformer.compile_repeated_blocks(dynamic=False)

    def forget_compiled(self) -> None:
        """Drop what was compiled, before another shape, which cannot use it."""
        if self.compiled is not None:
            self.compiled = None
            torch._dynamo.reset()

    def clear(self, given: dict[str, Any]) -> None:
        """Drop all gradients."""
        given["encoder_hidden_states"].grad = None
        for parameter in self.transformer.parameters():
            parameter.grad = None

    def step(self, given: dict[str, Any]) -> None:
        """Forward and backward of one step; the loss is the mean square of the velocity."""
        velocity = self.transformer(**given, return_dict=False)[0]
        velocity.float().square().mean().backward()

    def saved_bytes(self, arm: str, given: dict[str, Any]) -> int:
        """Bytes that autograd keeps of a forward pass, on real tensors."""
        run = lambda: self.transformer(**given, return_dict=False)[0]  # noqa: E731
        return activations.saved_bytes(self.transformer, run, checkpointed=arm.endswith("-full"))[0]
