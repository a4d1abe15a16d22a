"""Pictures <-> packed VAE latents, and the position ids that go with them.

Shapes: B batch, H W pixels, C latent channels (16 in FLUX), h = H/8, w = W/8, L = (h/2)(w/2) image tokens.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

VAE_SCALE = 8  # pixels per latent, each way
PACK = 2  # latents per token, each way
TOKEN_PIXELS = VAE_SCALE * PACK


def to_unit_range(pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, 3, H, W) in [0, 255] -> dtype in [-1, 1]."""
    return (pixel_values.float() / 127.5 - 1).to(dtype)


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 in [0, 255], rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode(vae, pixel_values: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """uint8 pictures (B, 3, H, W) -> latents (B, C, h, w) of about unit variance, in the VAE's dtype.

    The posterior's mean, or a draw from it where a generator, or one for each picture, is given. H and W are multiples of 16.
    """
    posterior = vae.encode(to_unit_range(pixel_values, vae.dtype).to(vae.device)).latent_dist
    latents = posterior.mode() if generator is None else posterior.sample(generator)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as `encode` gives them -> uint8 pictures (B, 3, H, W)."""
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return to_uint8(vae.decode(latents).sample)


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, L, 4C), 2 x 2 latents each; diffusers' FluxPipeline order."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=PACK, pw=PACK)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, L, 4C) of a picture of height x width px -> latents (B, C, h, w)."""
    return rearrange(
        tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", ph=PACK, pw=PACK,
        h=height // TOKEN_PIXELS, w=width // TOKEN_PIXELS,
    )  # fmt: skip


@lru_cache(maxsize=64)
def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's img_ids for a picture of height x width px: (L, 3) float32 rows of (0, row, column).

    The same tensor for the same arguments, so that FLUX's position table is made once; read only.
    """
    with torch.inference_mode(False):  # kept for training, whoever asks first
        rows = torch.arange(height // TOKEN_PIXELS, device=device, dtype=torch.float32)
        columns = torch.arange(width // TOKEN_PIXELS, device=device, dtype=torch.float32)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)


@lru_cache(maxsize=64)
def text_ids(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's txt_ids: (T, 3) float32 zeros, for FLUX sees the condition as a set. Kept as `image_ids` are; read only."""
    with torch.inference_mode(False):
        return torch.zeros(tokens, 3, device=device)
