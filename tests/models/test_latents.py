"""Packing and position ids are diffusers' own; encode and decode are the VAE's with its shift and scale."""

import numpy as np
import pytest
import torch

from megaflux.models import latents as ops
from megaflux.models.pretrained import load_vae
from tests.conftest import picture

from diffusers import FluxPipeline  # isort: skip  (after megaflux, whose compat it needs)

SIZES = [(64, 64), (16, 64), (48, 32), (128, 16)]


@pytest.fixture(scope="module")
def vae():
    return load_vae("tiny", None).eval()


def pixels(*sizes_and_seeds) -> torch.Tensor:
    made = [np.array(picture(width, height, seed)) for height, width, seed in sizes_and_seeds]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pack_and_unpack_are_diffusers(height, width):
    latents = torch.randn(2, 8, height // 8, width // 8)
    tokens = ops.pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 8, height // 8, width // 8))
    assert torch.equal(ops.unpack(tokens, height, width), latents)
    assert torch.equal(FluxPipeline._unpack_latents(tokens, height, width, 8), latents)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_image_ids_are_diffusers(height, width):
    theirs = FluxPipeline._prepare_latent_image_ids(1, height // 16, width // 16, "cpu", torch.float32)
    assert torch.equal(ops.image_ids(height, width), theirs)


def test_every_pixel_value_survives_the_unit_range():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(ops.to_uint8(ops.to_unit_range(values, torch.float32)), values)
    beyond = torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert ops.to_uint8(beyond)[0, 0, 0].tolist() == [0, 255]


def test_encode_is_the_posterior_shifted_and_scaled(vae):
    batch = pixels((32, 48, 0), (32, 48, 1))
    with torch.no_grad():
        posterior = vae.encode(batch.float() / 127.5 - 1).latent_dist
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    assert torch.equal(ops.encode(vae, batch), (posterior.mean - shift) * scale)
    drawn = ops.encode(vae, batch, torch.Generator().manual_seed(1))
    expected = (posterior.sample(torch.Generator().manual_seed(1)) - shift) * scale
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, ops.encode(vae, batch))
    assert drawn.shape == (2, vae.config.latent_channels, 4, 6)


def test_decode_is_the_vaes_on_encodes_scale(vae):
    batch = pixels((64, 64, 0), (64, 64, 1))
    latents = ops.encode(vae, batch)
    decoded = ops.decode(vae, latents)
    assert decoded.dtype == torch.uint8 and decoded.shape == batch.shape
    with torch.no_grad():
        plain = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert torch.equal(decoded, ops.to_uint8(plain))


def test_the_vae_takes_as_many_pictures_at_once_as_fit_and_small_ones_all(vae, monkeypatch):
    assert [ops.chunk_size(side, side) for side in (128, 1024, 2048)] == [128, 2, 1]
    assert ops.chunk_size(512, 1024) == 4
    batch = pixels(*((32, 48, seed) for seed in range(5)))
    drawing = [torch.Generator().manual_seed(seed) for seed in range(5)]
    whole = ops.encode(vae, batch), ops.encode(vae, batch, drawing), ops.decode(vae, ops.encode(vae, batch))
    seen = []

    def counted(run):
        return lambda x, *args, **kwargs: seen.append(len(x)) or run(x, *args, **kwargs)

    monkeypatch.setattr(ops, "CHUNK_PIXELS", 2 * 32 * 48)
    monkeypatch.setattr(vae, "encode", counted(vae.encode))
    monkeypatch.setattr(vae, "decode", counted(vae.decode))
    drawing = [torch.Generator().manual_seed(seed) for seed in range(5)]
    parts = ops.encode(vae, batch), ops.encode(vae, batch, drawing), ops.decode(vae, whole[0])
    assert seen == [2, 2, 1] * 3
    for one, other in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (whole[2].int() - parts[2].int()).abs().max() <= 1
    single = ops.encode(vae, batch, torch.Generator().manual_seed(1))  # one generator draws for one after the other
    assert len(single) == 5 and not torch.equal(single[0], parts[0][0])


def test_encoding_in_chunks_draws_each_picture_by_its_own_generator(vae, monkeypatch):
    batch = pixels(*((32, 48, 0) for _ in range(3)))
    monkeypatch.setattr(ops, "CHUNK_PIXELS", 32 * 48)
    drawn = ops.encode(vae, batch, [torch.Generator().manual_seed(seed) for seed in (4, 5, 4)])
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    with torch.no_grad():
        posterior = vae.encode(batch[1:2].float() / 127.5 - 1).latent_dist
    theirs = posterior.sample([torch.Generator().manual_seed(5)])
    assert torch.equal(drawn[1:2], (theirs - vae.config.shift_factor) * vae.config.scaling_factor)
