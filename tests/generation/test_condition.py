"""A condition's tokens and their attention bias, put together from parts: every weight belongs to the token beside it."""

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.generation import condition
from megaflux.generation.condition import (
    Encoded,
    PromptEmbeds,
    ReferenceTokens,
    attention_maps,
    downsampled,
    prompt_embeds,
    token_weights,
    weight_maps,
)
from megaflux.generation.dots.dots import Weighting

WIDTH = 5


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def reference(rows: int, columns: int, seed: int, strength: float = 1.0, plain: bool = False) -> ReferenceTokens:
    """Tokens with weights of 0, 1, 2, 3, in turn; plain: of 1."""
    weights = (torch.arange(rows * columns, dtype=torch.float64) % 4).view(rows, columns)
    return ReferenceTokens(
        tokens(rows * columns, seed), (rows, columns), torch.ones_like(weights) if plain else weights, strength
    )


def test_each_token_has_its_own_weight():
    """Two references, a prompt read by Qwen2-VL and one read by T5, in this order; tokens of weight 0 are gone."""
    a, b = reference(2, 4, 0, 0.5), reference(3, 3, 1)
    t5_embedder = torch.nn.Linear(7, WIDTH)
    t5 = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(2))
    encoded = Encoded([a, b], tokens(3, 3), t5, True)
    made = prompt_embeds(encoded, Weighting(), 0, t5_embedder)
    kept = [part.weights.flatten() > 0 for part in (a, b)]
    parts = [a.hidden_states[:, kept[0]], b.hidden_states[:, kept[1]], encoded.text, t5_embedder(t5)]
    assert torch.equal(made.prompt_embeds, torch.cat(parts, 1)) and not made.prompt_embeds.requires_grad
    want = torch.cat([0.5 * a.weights.flatten()[kept[0]], b.weights.flatten()[kept[1]], torch.ones(3 + 6)]).log()
    assert torch.equal(made.bias, want[None]) and made.bias.dtype == torch.float64
    assert made.embedded and made.num_own_tokens == sum(part.shape[1] for part in parts[:3])
    with pytest.raises(ValueError, match="t5_embedder"):
        prompt_embeds(encoded, Weighting(), 0)
    # not embedded: T5's tokens pass their linear later, in FLUX's context_embedder
    raw = prompt_embeds(Encoded([a], None, tokens(6, 4), False), Weighting(), 0, t5_embedder)
    assert torch.equal(raw.prompt_embeds[:, raw.num_own_tokens :], tokens(6, 4)) and not raw.embedded


def test_weights_of_1_need_no_bias():
    """And attention without a bias is flash attention."""
    encoded = Encoded([reference(2, 2, 0, plain=True)], tokens(3, 1), tokens(4, 2), False)
    made = prompt_embeds(encoded, Weighting(), 0)
    assert made.bias is None and made.attention_bias(9, torch.float32) is None
    assert PromptEmbeds.cat([made, made]).bias is None
    stronger = Encoded([reference(2, 2, 0, 2.0, plain=True)], None, None, False)
    assert prompt_embeds(stronger, Weighting(), 0).bias.exp().tolist() == [[2] * 4]


def test_a_batch_keeps_each_pictures_bias():
    bias = torch.tensor([[0.0, -1.5, 0.7]], dtype=torch.float64)
    one, other = (PromptEmbeds(tokens(3, 1), bias, True, 2), PromptEmbeds(tokens(3, 2), None, True, 2))
    batch = PromptEmbeds.cat([one, other, one])
    assert torch.equal(batch.prompt_embeds, torch.cat([tokens(3, 1), tokens(3, 2), tokens(3, 1)]))
    assert torch.equal(batch.bias, torch.cat([bias, torch.zeros(1, 3), bias])) and batch.bias.dtype == torch.float64
    assert batch.embedded and batch.num_own_tokens == 2
    mask = batch.attention_bias(4, torch.float32)  # as attention reads it: none on the picture that is made
    assert mask.shape == (3, 1, 1, 7) and mask.dtype == torch.float32
    assert torch.equal(mask[:, 0, 0, :3], batch.bias.float()) and not mask[..., 3:].any()


def test_variety_leaves_out_others_of_each_reference_and_the_same_again():
    first, second = reference(4, 4, 0, plain=True), reference(4, 4, 1, plain=True)
    encoded, half = Encoded([first, second], None, None, False), Weighting(variety=0.5)
    masks = [token_weights(part, half, 7, number) > 0 for number, part in enumerate(encoded.references)]
    assert [int(mask.sum()) for mask in masks] == [8, 8] and not torch.equal(*masks)
    made = prompt_embeds(encoded, half, 7)
    want = [part.hidden_states[:, mask] for part, mask in zip(encoded.references, masks, strict=True)]
    assert torch.equal(made.prompt_embeds, torch.cat(want, 1))
    # by no global generator, and in every version: a picture's file replays to the same pixels
    assert masks[1].nonzero().flatten().tolist() == [0, 1, 3, 4, 6, 7, 12, 14]
    assert (first.weights == 1).all()


def test_maps_show_the_weights_of_each_reference():
    references = [reference(2, 4, 0), reference(3, 3, 1), reference(1, 5, 2)]
    encoded, weighting = Encoded(references, None, None, False), Weighting(variety=0.4)
    for seed in (1, 2):
        maps = weight_maps(encoded, weighting, seed)
        assert [shown.shape for shown in maps] == [(2, 4), (3, 3), (1, 5)]
        kept = [token_weights(part, weighting, seed, i).numpy() for i, part in enumerate(encoded.references)]
        assert all((shown.ravel() == weights).all() for shown, weights in zip(maps, kept, strict=True))
        # attention: what each kept token was given, 0 where it was left out
        count = prompt_embeds(encoded, weighting, seed).prompt_embeds.shape[1]
        mass = torch.arange(1.0, count + 4)  # of the tokens of a prompt too, which is in no map
        shown = attention_maps(mass, encoded, weighting, seed)
        assert [(part.shape, part.dtype) for part in shown] == [(part.shape, "float32") for part in maps]
        assert all(((part.ravel() > 0) == (weights > 0)).all() for part, weights in zip(shown, kept, strict=True))
        assert [value for part in shown for value in part.ravel() if value] == list(range(1, count + 1))


@pytest.mark.parametrize(
    "grid, factor, new", [((4, 6), 1, (4, 6)), ((4, 6), 2, (2, 3)), ((6, 3), 3, (2, 1)), ((5, 4), 2, (3, 2))]
)
def test_downsampling_averages_squares_of_the_grid(grid, factor, new):
    given = tokens(grid[0] * grid[1], 0)
    made, size = downsampled(given, grid, factor)
    assert size == new and made.shape == (1, new[0] * new[1], WIDTH)
    corner = given.view(*grid, WIDTH)[:factor, :factor].mean((0, 1))
    torch.testing.assert_close(made[0, 0], corner)
    if not grid[0] % factor and not grid[1] % factor:
        squares = given.view(new[0], factor, new[1], factor, WIDTH).mean((1, 3))
        torch.testing.assert_close(made.view(*new, WIDTH), squares)


def test_dots_that_release_compatible_cuts_are_named_as_the_cause():
    """The release cuts the reference's tokens to the image's number; the dots lie in what is cut."""
    given = ReferenceTokens(torch.zeros(1, 6, 4), (3, 2), torch.tensor([[0, 0], [0, 0], [0, 1]]).double(), 1.0)
    with pytest.raises(UserError, match="lie behind its first 4, to which --release-compatible cuts it"):
        condition._cut(given, 4)
    assert condition._cut(given, 6).weights.tolist() == given.weights.tolist()
