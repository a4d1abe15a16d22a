"""Reference pictures in training: which are drawn, how they are altered, and what Qwen2-VL and FLUX see of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.config.data import Data, References
from megaflux.config.parse import build_config
from megaflux.config.presets import tiny
from megaflux.data.batches import Batch, collate
from megaflux.data.buckets import Bucket
from megaflux.data.references import ReferencePicture, StoredReference, pack, unpack
from megaflux.data.tensors import from_picture
from megaflux.generation.condition import encode, prompt_embeds
from megaflux.generation.dots.dots import Weighting
from megaflux.generation.request import ConditionRequest, Reference
from megaflux.models import latents as ops
from megaflux.models.pretrained import load_models
from megaflux.training.planning.costs import token_counts
from megaflux.training.references import altered, draw_count, draw_references

SIDE = 128
BUCKET = Bucket("1:1", 64, 64)


def picture(number: int, width: int = 64, height: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)


def data(**values) -> Data:
    return Data(path="somewhere", longest_side=SIDE, **values)


def batch_of(counts: list[int]) -> tuple[Batch, list[tuple[str, int]]]:
    """(samples with so many references each, named after them; their names)."""
    references = [
        [ReferencePicture(picture(100 * i + r), 1.0, f"{i}/{r}") for r in range(count)]
        for i, count in enumerate(counts)
    ]
    keys = [f"sample {i}" for i in range(len(counts))]
    targets = torch.stack([picture(i) for i in range(len(counts))])
    return Batch(keys, ["words"] * len(counts), BUCKET, targets, None, None, references), [(key, 0) for key in keys]


def names(chosen: list[list[ReferencePicture]]) -> list[list[str]]:
    return [[one.name for one in each] for each in chosen]


# --- what is drawn ---


def test_a_sample_has_all_that_it_has_some_that_are_drawn_or_itself():
    batch, samples = batch_of([0, 1, 4])
    seen: set[tuple[str, ...]] = set()
    for update in range(60):
        chosen = draw_references(data(references=References(min=2, max=2)), 0, update, samples, 0, batch)
        mine, only, two = names(chosen)
        assert mine == ["sample 0"] and only == ["1/0"] and len(two) == 2 and two == sorted(two)
        assert torch.equal(chosen[0][0].pixel_values, batch.pixel_values[0])
        seen.add(tuple(two))
    assert len(seen) == math.comb(4, 2)
    again = draw_references(data(references=References(min=2, max=2)), 0, 59, samples, 0, batch)
    assert names(again) == names(chosen)


def test_the_number_is_one_for_a_drawn_batch_and_spreads_over_the_range():
    numbers = References(min=0, max=3)
    drawn = [draw_count(numbers, 0, update, 0) for update in range(400)]
    assert all(70 <= drawn.count(number) <= 130 for number in range(4))
    assert [draw_count(References(min=2, max=2), 0, update, 0) for update in range(9)] == [2] * 9
    batch, samples = batch_of([3, 3, 3, 3])
    for update in range(20):
        chosen = draw_references(data(references=numbers), 0, update, samples, 0, batch)
        lengths = {1} if chosen is None else {len(each) for each in chosen}
        assert lengths == {max(1, drawn[update])}
        halves = [
            draw_references(data(references=numbers), 0, update, samples[part], 0, batch.rows(part.start, part.stop))
            for part in (slice(0, 2), slice(2, 4))
        ]  # however the drawn batch is cut
        assert chosen is None or names(chosen) == [*names(halves[0]), *names(halves[1])]


@pytest.mark.parametrize("counts, references", [([0, 0], (1, 2)), ([2, 1], (0, 0))])
def test_targets_are_their_own_references_unaltered(counts, references):
    batch, samples = batch_of(counts)
    config = data(references=References(min=references[0], max=references[1]))
    assert draw_references(config, 0, 0, samples, 0, batch) is None
    assert draw_references(config, 0, 0, samples, 0, replace(batch, references=None)) is None


def test_a_range_needs_an_order():
    with pytest.raises(UserError, match=r"references.*min 3 is more than max 1"):
        build_config(
            {"data": {"path": "x", "longest_side": 64, "references": {"min": 3, "max": 1}}, "stages": tiny()["stages"]}
        )


# --- how they are altered ---


def test_a_crop_keeps_its_share_and_the_size():
    whole = torch.arange(64 * 64).remainder(251).to(torch.uint8).view(64, 64).expand(3, 64, 64).contiguous()
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8).expand(3, 64, 64).contiguous()
    config = data(reference_crop=0.5)
    shares = []
    for update in range(40):
        cropped = altered(ramp, config, ("seed", update))
        assert cropped.shape == ramp.shape and cropped.dtype == torch.uint8
        assert not torch.equal(altered(whole, config, ("seed", update)), altered(whole, config, ("seed", update + 1)))
        shares.append(((int(cropped[0, 0, -1]) - int(cropped[0, 0, 0])) / 255) ** 2)  # of the ramp that is left
    assert 0.44 < min(shares) < 0.65 and 0.9 < max(shares) <= 1
    assert torch.equal(altered(ramp, config, ("seed", 7)), altered(ramp, config, ("seed", 7)))


def test_a_flip_is_as_frequent_as_it_says_and_exact():
    given = picture(1)
    flips = 0
    for update in range(200):
        got = altered(given, data(reference_flip=0.25), ("seed", update))
        flipped = torch.equal(got, given.flip(-1))
        assert flipped or torch.equal(got, given)
        flips += flipped
    assert 30 <= flips <= 70


def test_a_target_that_is_its_own_reference_is_altered_too():
    batch, samples = batch_of([0, 2])
    chosen = draw_references(data(reference_crop=0.3), 0, 5, samples, 0, batch)
    assert names(chosen) in ([["sample 0"], ["1/0"]], [["sample 0"], ["1/1"]])
    assert not torch.equal(chosen[0][0].pixel_values, batch.pixel_values[0])
    cached = data(cache=("latents", "trunk"), reference_flip=0.5)
    with pytest.raises(UserError, match="data.cache: a cached trunk has seen the references as they are"):
        build_config({**tiny(), "data": {**tiny()["data"], **cached.model_dump(include={"cache", "reference_flip"})}})


# --- what Qwen2-VL and FLUX see ---


@pytest.fixture(scope="module")
def models():
    config = build_config(tiny())
    found = load_models(config)
    found.trainable.eval()
    torch.nn.init.normal_(
        found.trainable.transformer.proj_out.weight, std=0.2, generator=torch.Generator().manual_seed(0)
    )
    for name, parameter in found.trainable.transformer.named_parameters():
        if name.endswith("linear.weight"):  # AdaLN starts at zero: without this no block would read the condition
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return found


def as_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("prompt", ["", "a red cat"])
@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.5, 2.0)])
def test_two_references_are_what_generation_encodes(models, prompt, strengths):
    pictures = [picture(1), picture(2, 128, 64)]
    mode = "image_text" if prompt else "image"
    condition = models.trunk.encode_references([pictures], [prompt], mode, [strengths])
    with torch.no_grad():
        ours = models.trainable.encode_condition(condition)
    given = [Reference(as_pil(one), strength=s) for one, s in zip(pictures, strengths, strict=True)]
    encoded = encode(models, SIDE, ConditionRequest(references=given, prompt=prompt, weighting=Weighting()))
    theirs = prompt_embeds(encoded, Weighting(), seed=0)
    torch.testing.assert_close(ours, theirs.prompt_embeds, rtol=1e-4, atol=1e-5)
    bias = condition.bias()
    assert (bias is None) == (theirs.bias is None) == (strengths == (1.0, 1.0))
    if bias is not None:
        torch.testing.assert_close(bias, theirs.bias, rtol=1e-6, atol=1e-7)


def velocity(models, condition, samples: int) -> torch.Tensor:
    """FLUX's, on inputs that are the same for every sample."""
    channels = models.vae.config.latent_channels * 4
    x = torch.randn(1, 16, channels, generator=torch.Generator().manual_seed(3)).expand(samples, -1, -1)
    t, guidance = torch.full((samples,), 0.6), torch.ones(samples)
    with torch.no_grad():
        return models.trainable(
            condition, x, t, ops.image_ids(64, 64), models.pooled_projections.expand(samples, -1), guidance
        )


def test_samples_with_other_numbers_of_references_do_not_see_each_other(models):
    references = [[picture(1), picture(2, 96, 64)], [picture(3, 48, 128)], [picture(4), picture(5), picture(6, 64, 32)]]
    captions, strengths = ["a", "a longer caption", ""], [[1.0, 0.5], [2.0], [1.0, 1.0, 1.0]]
    together = models.trunk.encode_references(references, captions, "image_text", strengths)
    assert together.turns == 3 and not together.select_mask.all()
    whole = velocity(models, together, 3)
    for i in range(3):
        alone = models.trunk.encode_references([references[i]], [captions[i]], "image_text", [strengths[i]])
        torch.testing.assert_close(whole[i : i + 1], velocity(models, alone, 1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(whole[i : i + 1], velocity(models, together.rows([i]), 1), rtol=1e-3, atol=1e-4)
    few = models.trunk.encode_references(references, captions, "image_text", strengths, at_once=2)
    torch.testing.assert_close(velocity(models, few, 3), whole, rtol=1e-3, atol=1e-4)
    other = models.trunk.encode_references([[picture(1), picture(9, 96, 64)]], ["a"], "image_text", [[1.0, 0.5]])
    assert (velocity(models, other, 1) - whole[:1]).abs().max() > 1e-3  # the second reference is read


def test_strength_two_is_the_reference_twice_and_zero_is_without_it(models):
    a, b = picture(1), picture(2)
    encode_all = models.trunk.encode_references
    twice = velocity(models, encode_all([[a, b, b]]), 1)
    torch.testing.assert_close(
        velocity(models, encode_all([[a, b]], strengths=[[1.0, 2.0]]), 1), twice, rtol=1e-3, atol=1e-4
    )
    without = velocity(models, encode_all([[a]]), 1)
    torch.testing.assert_close(
        velocity(models, encode_all([[a, b]], strengths=[[1.0, 0.0]]), 1), without, rtol=1e-3, atol=1e-4
    )


def test_one_reference_of_the_targets_size_is_what_it_was(models):
    pictures, captions = torch.stack([picture(1), picture(2)]), ["one", "the other one"]
    before = models.trunk.encode(pictures, captions, "image_text")
    now = models.trunk.encode_references([[one] for one in pictures], captions, "image_text")
    for name, value in vars(before).items():
        other = getattr(now, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


# --- around it ---


def test_a_column_comes_back_as_it_was():
    stored = [StoredReference("a/b \N{WHITE SQUARE}.png", b"123", 0.25), StoredReference("", b"4", 1.0)]
    assert unpack(pack(stored)) == stored and unpack(pack([])) == []
    for damaged in (b"1", pack(stored)[:-1], pack(stored) + b"1", b"\xff\xff\xff\xff{}", b"\2\0\0\0[1"):
        with pytest.raises(ValueError):
            unpack(damaged)


def test_a_batch_carries_references_and_cuts_them():
    samples = [
        {
            "key": str(i),
            "caption": "",
            "bucket": 0,
            "pixel_values": from_picture(as_pil(picture(i))),
            "references": [ReferencePicture(picture(10 + i), 0.5, "r")] * i,
        }
        for i in range(3)
    ]
    fields = collate(samples, [BUCKET])
    batch = Batch(**{**fields, "bucket": BUCKET}).to(torch.device("cpu"))
    assert [len(each) for each in batch.references] == [0, 1, 2]
    assert names(batch.rows(1, 3).references) == [["r"], ["r", "r"]]
    assert torch.equal(batch.references[2][1].pixel_values, picture(12)) and batch.references[1][0].strength == 0.5


def test_memory_is_planned_for_the_most_references_and_flops_for_their_mean():
    config = build_config({**tiny(), "data": {**tiny()["data"], "cache": [], "references": {"min": 0, "max": 4}}})
    one = token_counts(build_config(tiny()), BUCKET)
    mean, most = token_counts(config, BUCKET), token_counts(config, BUCKET, config.data.references.turns)
    assert (mean.turns, most.turns) == (3, 4)  # 1, 1, 2, 3, 4: the mean is 2.2
    assert most.condition == 4 * one.condition and (most.turn, most.patches, most.image) == (
        one.turn,
        one.patches,
        one.image,
    )
