"""Pictures <-> packed VAE latents, and the position ids that go with them.

Shapes: B batch, H W pixels, C latent channels (16 in FLUX), h = H/8, w = W/8, L = (h/2)(w/2) image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megaflux.common.transfer import to_device

VAE_SCALE = 8  # pixels per latent, each way
PACK = 2  # latents per token, each way
TOKEN_PIXELS = VAE_SCALE * PACK
CHUNK_PIXELS = 2 * 1024 * 1024  # pixels that the VAE takes at once


def to_unit_range(pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 (B, 3, H, W) in [0, 255] -> dtype in [-1, 1]."""
    return (pixel_values.float() / 127.5 - 1).to(dtype)


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> uint8 in [0, 255], rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode(vae: Any, pixel_values: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
    """uint8 pictures (B, 3, H, W) -> latents (B, C, h, w) of about unit variance, in the VAE's dtype.

    The posterior's mean, or a draw from it where a generator, or one per picture, is given. H and W are multiples of 16.
    The encoder takes `chunk_size` pictures at a time.
    """
    step = chunk_size(*pixel_values.shape[-2:])
    parts = []
    for i, pictures in enumerate(pixel_values.split(step)):
        of_these = generator[i * step : (i + 1) * step] if isinstance(generator, list) else generator
        parts.append(_encode(vae, pictures, of_these))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _encode(vae: Any, pixel_values: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    posterior = vae.encode(to_unit_range(pixel_values, vae.dtype).to(vae.device)).latent_dist
    if isinstance(generator, list):
        latents = posterior.mean + posterior.std * _drawn(posterior.mean, generator)
    else:
        latents = posterior.mode() if generator is None else posterior.sample(generator)
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def _drawn(like: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Normal numbers as diffusers' DiagonalGaussianDistribution.sample draws them, copied without waiting for the GPU."""
    noise = [torch.randn((1, *like.shape[1:]), generator=g, device=g.device, dtype=like.dtype) for g in generators]
    return to_device(torch.cat(noise), like.device)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) as `encode` gives them -> uint8 pictures (B, 3, H, W), `chunk_size` at a time."""
    step = chunk_size(*(VAE_SCALE * side for side in latents.shape[-2:]))
    parts = [_decode(vae, part) for part in latents.split(step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(vae: Any, latents: Tensor) -> Tensor:
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return to_uint8(vae.decode(latents).sample)


def chunk_size(height: int, width: int) -> int:
    """Pictures of height x width px that the VAE takes at once: two of 1024 x 1024 px, or as many smaller ones.

    Encoding them needs 3.8 GB in bfloat16, decoding 5.4 (`coding_peak`). The limit counts pixels, so that small pictures
    still go through in whole batches: a convolution may round by the size of its batch.
    """
    return max(1, CHUNK_PIXELS // (height * width))


def coding_peak(
    channels: Sequence[int], pictures: int, height: int, width: int, itemsize: int, workspace: bool = True
) -> tuple[int, int]:
    """(encode, decode): peak bytes of an AutoencoderKL beside its weights, without gradients.

    channels: its block_out_channels; itemsize: bytes per number. The outermost blocks decide: maps of the first width
    and, in the decoder, of the second, at the pictures' full size (the bench `memory` counts the tensors). workspace:
    count the largest convolution's input and output twice, since cuDNN may convert their layout: 3.77 and 5.37 GB for two
    pictures of 1024 px in bfloat16, where an H200 took 3.23 and 4.30.
    """
    first, second = channels[0], channels[min(1, len(channels) - 1)]
    encode_maps, decode_maps = 5 * first + 3, max(3 * second, second + 4 * first)
    if workspace:
        encode_maps, decode_maps = encode_maps + 2 * first, decode_maps + 2 * second
    numbers = min(pictures, chunk_size(height, width)) * height * width
    return encode_maps * numbers * itemsize, decode_maps * numbers * itemsize


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, L, 4C), 2 x 2 latents each; diffusers' FluxPipeline order."""
    cells = latents.unflatten(3, (-1, PACK)).unflatten(2, (-1, PACK))  # b c h ph w pw
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, L, 4C) of a picture of height x width px -> latents (B, C, h, w)."""
    rows, columns = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    cells = tokens.unflatten(2, (-1, PACK, PACK)).unflatten(1, (rows, columns))  # b h w c ph pw
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@lru_cache(maxsize=64)
def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's img_ids for a picture of height x width px: (L, 3) float32 rows of (0, row, column).

    The same tensor for the same arguments, so that FLUX's position table is computed once; do not write to it.
    """
    with torch.inference_mode(False):  # training may use what generation cached
        rows = torch.arange(height // TOKEN_PIXELS, device=device, dtype=torch.float32)
        columns = torch.arange(width // TOKEN_PIXELS, device=device, dtype=torch.float32)
        row, column = torch.meshgrid(rows, columns, indexing="ij")
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)


@lru_cache(maxsize=64)
def text_ids(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's txt_ids: (T, 3) float32 zeros, as FLUX sees the condition as a set. Cached as `image_ids` are; do not write
    to it."""
    with torch.inference_mode(False):
        return torch.zeros(tokens, 3, device=device)
