"""GridDot's weights by hand, and their exact properties in FLUX's velocity in float64."""

import json
import math

import numpy as np
import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.generation.condition import PromptEmbeds, prompt_embeds, token_weights
from megaflux.generation.dots import griddot
from megaflux.generation.dots.dots import Dot, Weighting, parse_dot, read_dots
from megaflux.generation.dots.heat_map import attention_picture, heat_map
from megaflux.generation.request import Reference, check_weighting
from megaflux.models.latents import image_ids, text_ids
from megaflux.runs import load_pipeline
from tests.conftest import picture


def by_hand(dots, grid, background=1.0):
    """The definition, token by token, in pixels of an encoder input of 28 px a token."""
    H, W = grid
    ph, pw = 28 * H, 28 * W
    weights = np.empty(grid)
    for j in range(H):
        for k in range(W):
            x, y = (k + 0.5) / W * pw, (j + 0.5) / H * ph
            up = down = 0.0
            for dot in dots:
                d = math.hypot(x - dot.x * pw, y - dot.y * ph)
                f = min(1, max(0, 1 - d / (dot.radius * min(ph, pw))))
                if dot.weight >= background:
                    up = max(up, f * (dot.weight - background))
                else:
                    down = max(down, f * (background - dot.weight))
            weights[j, k] = max(0, background + up - down)
    return weights


DOTS = (
    Dot(x=0.3, y=0.4, radius=0.5, weight=3),
    Dot(x=0.8, y=0.7, radius=0.4, weight=0),
    Dot(x=0.35, y=0.5, radius=0.3, weight=2),
    Dot(x=1, y=1, radius=2, weight=0.5),
)


@pytest.mark.parametrize("grid", [(4, 7), (7, 4), (1, 9), (5, 5)])
@pytest.mark.parametrize("background", [0.0, 0.5, 1.0, 2.0])
def test_weights_are_the_definitions(grid, background):
    ours = griddot.token_weights(DOTS, grid, background).numpy()
    assert np.abs(ours - by_hand(DOTS, grid, background)).max() < 1e-12


def test_a_dot_alone():
    weights = griddot.token_weights([Dot(x=0.5, y=0.5, radius=0.5, weight=2)], (5, 5))
    assert weights[2, 2] == 2 and weights[0, 0] == 1 and (weights >= 1).all()
    assert torch.equal(weights, weights.T) and torch.equal(weights, weights.flip(0))
    only = griddot.token_weights([Dot(x=0.1, y=0.1, radius=0.2, weight=1)], (5, 5), background=0)
    assert only[0, 0] == 1 and (only > 0).sum() == 1
    assert torch.equal(griddot.token_weights([], (3, 4)), torch.ones(3, 4, dtype=torch.float64))
    assert torch.equal(griddot.token_weights([], (3, 4), 0.5), torch.full((3, 4), 0.5, dtype=torch.float64))
    # order and repetition change nothing: it is a maximum
    assert torch.equal(griddot.token_weights(DOTS, (6, 6)), griddot.token_weights(DOTS[::-1] + DOTS, (6, 6)))


def test_a_dot_too_small_to_see_leaves_no_nan():
    """On a token's centre and beside all of them, of the background's own weight and of others."""
    for x in (0.5, 0.43):
        for weight in (0.0, 1.0, 3.0):
            weights = griddot.token_weights([Dot(x=x, y=0.5, radius=5e-324, weight=weight)], (5, 5))
            assert weights[2, 2] == (weight if x == 0.5 else 1) and (weights == 1).sum() >= 24


def test_mass_and_variety():
    weights = griddot.token_weights(DOTS, (6, 6))
    assert griddot.preserve_mass(weights).mean().item() == pytest.approx(1, abs=1e-12)
    assert torch.equal(griddot.preserve_mass(torch.ones(3, 3)), torch.ones(3, 3))
    ones, generator = torch.ones(6, 6, dtype=torch.float64), torch.Generator().manual_seed(3)
    dropped = griddot.drop(ones, 0.7, generator)
    assert (dropped == 0).sum() == 25 and (dropped[dropped > 0] == 1).all()
    assert (griddot.drop(ones, 0.999, generator) > 0).sum() == 1  # one token always stays
    assert (ones == 1).all()  # not in place
    again = griddot.drop(ones, 0.7, torch.Generator().manual_seed(3))
    assert torch.equal(again, dropped) and not torch.equal(griddot.drop(ones, 0.7, generator), dropped)
    few = torch.zeros(6, 6, dtype=torch.float64)
    few[2, 3] = few[4, 4] = 1
    assert (griddot.drop(few, 0.5, generator) > 0).sum() == 1  # a fraction of the positive weights


@pytest.fixture(scope="module")
def double(run_folder):
    """The small pipeline in float64."""
    pipeline = load_pipeline(run_folder, dtype=torch.float64, device="cpu")
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 256})  # references of more than 4 tokens
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.models.trainable.transformer.parameters():  # no weight near zero: every part matters
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return pipeline


def velocity(pipeline, embeds: PromptEmbeds) -> torch.Tensor:
    """FLUX's velocity for a 48 x 64 px picture and a condition, on the configured path."""
    model = pipeline.models.trainable
    x = torch.randn(
        1, 12, model.transformer.config.in_channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    kwargs = {"context_embedded": True} if embeds.embedded else {}
    bias = embeds.attention_bias(12, torch.float64)
    if bias is not None:
        kwargs["attention_mask"] = bias
    with torch.no_grad():
        return model.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds.prompt_embeds,
            timestep=torch.tensor([0.6]).double(),
            pooled_projections=pipeline.models.pooled_projections,
            guidance=torch.tensor([3.5]).double(),
            img_ids=image_ids(48, 64),
            txt_ids=text_ids(embeds.prompt_embeds.shape[1]),
            joint_attention_kwargs=kwargs or None,
            return_dict=False,
        )[0]


@pytest.fixture(params=["ours", "diffusers"])
def pipeline(double, request):
    double.models.trainable.configure(request.param == "ours")
    yield double
    double.models.trainable.configure(True)


def embeds_of(pipeline, weights=None, strength=1.0, **weighting):
    encoded = pipeline.encode_all([Reference(picture(84, 56), strength)])
    (tokens,) = encoded.references
    if weights is not None:
        encoded.references[0] = type(tokens)(tokens.hidden_states, tokens.grid, weights.view(tokens.grid), strength)
    return encoded, prompt_embeds(encoded, Weighting(**weighting), 0)


def test_weight_1_changes_nothing(pipeline):
    _, plain = embeds_of(pipeline)
    assert plain.bias is None
    neutral = pipeline.encode_all([Reference(picture(84, 56), 1.0, (Dot(x=0.2, y=0.3, radius=0.5, weight=1),))])
    assert prompt_embeds(neutral, Weighting(), 0).bias is None
    zero = PromptEmbeds(
        plain.prompt_embeds, torch.zeros(plain.prompt_embeds.shape[:2]).double(), plain.embedded, plain.num_own_tokens
    )
    assert (velocity(pipeline, zero) - velocity(pipeline, plain)).abs().max() < 1e-12


def test_integer_weights_are_repeated_tokens_and_0_is_deletion(pipeline):
    encoded, plain = embeds_of(pipeline)
    count = plain.prompt_embeds.shape[1]
    weights = torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(5)).double()
    weights[:2] = torch.tensor([2.0, 0.0])
    _, weighted = embeds_of(pipeline, weights)
    repeated = PromptEmbeds(
        plain.prompt_embeds.repeat_interleave(weights.long(), 1), None, plain.embedded, int(weights.sum())
    )
    assert weighted.prompt_embeds.shape[1] == (weights > 0).sum()
    ours, theirs = velocity(pipeline, weighted), velocity(pipeline, repeated)
    assert (ours - theirs).abs().max() < 1e-12 * max(1, theirs.abs().max())
    assert (ours - velocity(pipeline, plain)).abs().max() > 1e-6  # the weights do something
    # a bias of -inf instead of removing the tokens of weight 0
    masked = PromptEmbeds(plain.prompt_embeds, weights.log()[None], plain.embedded, count)
    assert (velocity(pipeline, masked) - ours).abs().max() < 1e-12 * max(1, ours.abs().max())


def test_strength_and_other_references(pipeline):
    _, twice = embeds_of(pipeline, strength=2.0)
    _, once = embeds_of(pipeline)
    doubled = PromptEmbeds(once.prompt_embeds.repeat(1, 2, 1), None, once.embedded, 2 * once.num_own_tokens)
    ours, theirs = velocity(pipeline, twice), velocity(pipeline, doubled)
    assert (ours - theirs).abs().max() < 1e-12 * max(1, theirs.abs().max())
    # two references: the tokens that each has alone, one after the other
    a, b = picture(84, 56), picture(56, 56, seed=9)
    both = prompt_embeds(pipeline.encode_all([Reference(a), Reference(b, 0.25)]), Weighting(), 0)
    alone = [prompt_embeds(pipeline.encode_all([Reference(x)]), Weighting(), 0).prompt_embeds for x in (a, b)]
    assert torch.equal(both.prompt_embeds, torch.cat(alone, 1))
    count = alone[0].shape[1]
    assert (both.bias[0, :count] == 0).all() and torch.allclose(both.bias[0, count:], torch.tensor(0.25).double().log())


def test_variety_is_a_function_of_the_seed(pipeline):
    encoded = pipeline.encode_all([Reference(picture(168, 168))])
    (reference,) = encoded.references
    masks = [token_weights(reference, Weighting(variety=0.5), seed) for seed in (0, 1, 0)]
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert (
        len({int((mask > 0).sum()) for mask in masks}) == 1
    )  # equally many for each seed, so that they can be batched
    embeds = prompt_embeds(encoded, Weighting(variety=0.5), 0)
    assert torch.equal(embeds.prompt_embeds, reference.hidden_states[:, masks[0] > 0]) and embeds.bias is None
    kept_mass = prompt_embeds(encoded, Weighting(variety=0.5, preserve_mass=True), 0)
    assert kept_mass.bias.exp().sum().item() == pytest.approx(masks[0].numel())


def test_downsampling_averages_tokens(pipeline):
    whole = pipeline.encode_all([Reference(picture(112, 84))]).references[0]
    H, W = whole.grid
    small = pipeline.encode_all([Reference(picture(112, 84))], weighting=Weighting(downsample=max(H, W))).references[0]
    assert small.grid == (1, 1)
    assert torch.allclose(small.hidden_states, whole.hidden_states.mean(1, keepdim=True), atol=1e-12)


def test_a_reference_may_have_fewer_tokens_than_trained(pipeline):
    for most, grid in ((None, (8, 8)), (16, (4, 4)), (4, (2, 2))):
        encoded = pipeline.encode_all([Reference(picture(256, 256))], reference_tokens=most)
        assert encoded.references[0].grid == grid and encoded.text is None
        assert prompt_embeds(encoded, Weighting(), 0).prompt_embeds.shape[1] == grid[0] * grid[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.5,0.5,0,1", "radius: 0.0; must be above 0"),
        ("0.5,0.5,-1,1", "radius: -1.0; must be above 0"),
        ("1.5,0.5,0.1,1", "x: 1.5; must be inside"),
        ("0.5,-0.1,0.1,1", "y: -0.1; must be inside"),
        ("0.5,0.5,0.1,-1", "weight: -1.0; must be at least 0"),
        ("nan,0.5,0.1,1", "x: nan"),
        ("0.5,0.5,nan,1", "radius: nan"),
        ("0.5,0.5,inf,1", "radius: inf"),
        ("0.5,0.5,0.1,inf", "weight: inf"),
        ("0.5,0.5,0.1", "use X,Y,RADIUS,WEIGHT"),
        ("a,b,c,d", "use X,Y"),
        ("0:0.5,0.5,0.1,1", "use X,Y"),
        ("", "use X,Y"),
        ("x:0.5,0.5,0.1,1", "use X,Y"),
    ],
)
def test_bad_dots_are_one_line(text, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_dot(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("nonsense", "Expecting value"),
        ("3", "must be a list"),
        ('{"dots": 3}', "must be a list"),
        ('{"dots": [], "colour": 1}', "must be a list"),
        ("[3]", "dot 1: must be an object"),
        ('[{"x": 0.5}]', "dot 1: y: missing"),
        ('[{"x": 0.5, "y": 0.5, "radius": 0, "weight": 1}]', "dot 1: radius: 0; must be"),
        ('[{"x": 0.5, "y": 0.5, "radius": 1, "weight": 1, "size": 2}]', "dot 1: size"),
        ('[{"x": "a", "y": 0.5, "radius": 1, "weight": 1}]', "dot 1: x: a"),
        ('[{"x": 0.5, "y": 0.5, "radius": 1, "weight": 1, "reference": 0}]', "reference: 0"),
        ('{"dots": [], "background": "x"}', "background must be"),
        (None, "No such file"),
    ],
)
def test_bad_dot_files_are_one_line(tmp_path, content, said):
    file = tmp_path / "dots.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        read_dots(str(file))
    assert "dots.json" in str(caught.value) and "\n" not in str(caught.value)


def test_dot_files(tmp_path):
    dot = {"x": 0.1, "y": 0.2, "radius": 0.3, "weight": 2}
    (tmp_path / "a.json").write_text(json.dumps({"dots": [dot, {**dot, "reference": 2}], "background": 0}))
    assert read_dots(str(tmp_path / "a.json")) == ({0: [Dot(**dot)], 1: [Dot(**dot)]}, {"background": 0})
    assert parse_dot("2:0.1,0.2,0.3,2") == (1, Dot(**dot)) and parse_dot("0.1,0.2,0.3,2") == (0, Dot(**dot))


def test_dots_that_leave_nothing_are_refused(double):
    everything = (Dot(x=0.5, y=0.5, radius=100, weight=0),)
    references = [Reference(picture(64, 64)), Reference(picture(64, 64), 1.0, everything)]
    for which, said in ((references[1:], "reference: its dots leave no token"), (references, "reference 2: its dots")):
        with pytest.raises(UserError, match=f"^{said}"):
            double.encode_all(which, weighting=Weighting(background=0))
    with pytest.raises(UserError, match="^reference: its dots leave no token"):
        griddot.check_weights(torch.zeros(2, 3))
    assert griddot.check_weights(torch.tensor([[0.0, 1e-9]])).shape == (1, 2)
    for bad, said in (
        ({"background": -1}, "background"),
        ({"variety": 1.0}, "variety"),
        ({"downsample": 0}, "downsample"),
        ({"background": math.nan}, "background"),
        ({"variety": math.nan}, "variety"),
    ):
        with pytest.raises(UserError, match=said):
            check_weighting(Weighting(**bad))
    for strength in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="strength"):
            double.encode_all([Reference(picture(64, 64), strength)])


def test_the_heat_map_shows_weights_where_they_are():
    base = picture(80, 40)
    weights = np.ones((2, 4))
    weights[0, 0], weights[1, 3] = 0, 2
    shown = np.array(heat_map(base, weights, side=80)).astype(int)
    plain = np.array(base).astype(int)
    inside = (slice(3, 17), slice(3, 17))
    assert shown.shape == (40, 80, 3)
    assert shown[inside].mean() < 0.5 * plain[inside].mean()  # left out: dark
    right = (slice(23, 37), slice(63, 77))
    assert shown[right][..., 0].mean() > shown[right][..., 2].mean() + 40  # boosted: orange
    neutral = (slice(3, 17), slice(23, 37))
    assert np.abs(shown[neutral] - plain[neutral]).max() <= 2


def test_the_attention_picture_is_bright_where_it_attended():
    base, mass = picture(80, 40), np.zeros((2, 4))
    mass[1, 3], mass[0, 0] = 3e-5, 1.5e-5  # small, as a token among thousands has it: the largest counts
    shown = np.array(attention_picture(base, mass, side=80)).astype(int)
    plain = np.array(base).astype(int)
    most, half, none = ((slice(23, 37), slice(63, 77)), (slice(3, 17), slice(3, 17)), (slice(3, 17), slice(63, 77)))
    assert np.abs(shown[most] - plain[most]).max() <= 2
    shares = [(shown[part].mean() / plain[part].mean()) for part in (half, none)]
    assert 0.5 < shares[0] < 0.75 and shares[1] < 0.4
