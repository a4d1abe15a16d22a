"""Fused FLUX at the ends of its range is diffusers' FLUX: at float16's bound, and where norms divide by their epsilon."""

import pytest
import torch

from megaflux.models.flux import fuse
from tests.models.test_flux import build, given, relative, step


@pytest.mark.parametrize("stream", ["text", "joint"])
def test_float16_is_cut_where_diffusers_cuts_it(stream):
    """Hidden states of FLUX.1 reach thousands, which must pass; beyond 65504 is infinity, and the next norm gives NaN."""
    flux = build(torch.float16).requires_grad_(False)
    if stream == "text":
        block = flux.transformer_blocks[0]
        embedder, modulation, out, gate = flux.context_embedder, block.norm1_context.linear, block.ff_context.net[2], 5
    else:
        block = flux.single_transformer_blocks[0]
        embedder, modulation, out, gate = flux.x_embedder, block.norm.linear, block.proj_out, 2
    embedder.weight.mul_(3000)
    channels = slice(gate * 64, gate * 64 + 2)  # two whose last residual goes out of range, one on either side
    modulation.weight[channels] = 0
    modulation.bias[channels] = torch.tensor([1000.0, -1000.0]).to(modulation.bias)
    out.bias[:2] = 200
    largest = []
    block.register_forward_hook(
        lambda block, args, output: largest.append(max(x.abs().max().item() for x in output if torch.is_tensor(x)))
    )
    arguments = given(flux)
    with torch.no_grad():
        plain = flux(**arguments, return_dict=False)[0]
        fuse(flux)
        ours = flux(**arguments, return_dict=False)[0]
    assert largest == [65504, 65504]  # both had to cut
    assert relative(ours, plain) < 0.01


def test_norms_of_values_as_small_as_their_epsilon_are_diffusers():
    """Epsilons of the layer norms and of the norms of q and k, which values of about 1 hide."""
    flux = build().train()
    small = ("x_embedder", "context_embedder", "to_q", "to_k", "add_q_proj", "add_k_proj", "to_out.0", "to_add_out")
    with torch.no_grad():
        for name, parameter in flux.named_parameters():
            if name.rpartition(".")[0].endswith((*small, "net.2", "proj_out")):
                parameter.mul_(1e-3)
    arguments = given(flux)
    plain = step(flux, arguments)
    fuse(flux)
    ours = step(flux, arguments)
    assert {n: relative(ours[n], plain[n]) for n in plain if relative(ours[n], plain[n]) > 1e-4} == {}
