"""The objective: every random number of an update belongs to its seed, update and sample; the model is given what the
formula says, and its answer is judged by it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megaflux.config.data import KINDS, ConditionModes
from megaflux.config.parse import build_config
from megaflux.config.schema import Flow
from megaflux.data.batches import Batch
from megaflux.data.buckets import Bucket
from megaflux.models import latents as latent_ops
from megaflux.models import scratch
from megaflux.models.pretrained import load_models
from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.training import frozen, objective
from megaflux.training.distributed import generator_for
from megaflux.training.objective import Denoising, Sample, denoising_loss, draw_kind
from tests.conftest import small_values
from tests.training.updates import wake

from diffusers import FluxPipeline  # isort: skip  (after megaflux, whose compat it needs)

WIDE = Bucket("2:1", 64, 32)
CAPTIONS = ["a cat", "a longer caption than that"]
SAMPLES = [Sample("a", 0), Sample("b", 0)]


def configured(**sections):
    values = small_values()
    for name, changes in sections.items():
        values.setdefault(name, {}).update(changes)
    values["run"] = {"dir": "unused", "seed": 3} | sections.get("run", {})
    return build_config(values).for_world(1)


@pytest.fixture(scope="module")
def models():
    """Read only."""
    made = load_models(configured())
    wake(made, torch.Generator().manual_seed(0))
    return made


def pictures(count: int = 2) -> torch.Tensor:
    shape = count, 3, WIDE.height, WIDE.width
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# --- what is drawn ---


def drawn(config: Flow | None = None, seed: int = 5, update: int = 7, key: str = "a", seen: int = 0, side: int = 16):
    given = config or Flow(), seed, update, [Sample(key, seen)], torch.empty(1, 8, side, side)
    t, noise = objective.draw_time_and_noise(*given)
    return t[0], noise[0]


@pytest.mark.parametrize("other", [{"seed": 6}, {"update": 8}, {"key": "b"}, {"seen": 1}], ids=str)
def test_time_and_noise_are_drawn_anew(other):
    """A picture that met the same noise at the same t in every epoch would be learned by heart."""
    (t, noise), (other_t, other_noise) = drawn(), drawn(**other)
    assert abs(t - other_t) > 1e-3
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other_noise.flatten()]))[0, 1]) < 0.1
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_run_that_a_newer_version_resumes_draws_what_it_would_have_drawn(models):
    """Written down once: no later version may name its generators or take their numbers otherwise."""
    assert generator_for(5, "noise", 7, "a", 0).initial_seed() == 6980754206001151415
    modes = ConditionModes(image=0.4, image_text=0.3, text=0.3)
    config, batch = configured(data={"sample_posterior": True}), Batch(["a"], [""], WIDE, pictures(1), None, None)
    for update in range(8):
        u = torch.rand((), generator=generator_for(5, "mode", update, 1))
        assert draw_kind(modes, 5, update, 1) == ("image" if u < 0.4 else "image_text" if u < 0.7 else "text")
    drawn_by = [generator_for(3, "posterior", 6, "a")]
    expected = latent_ops.encode(models.vae, batch.pixel_values, drawn_by)
    assert torch.equal(objective.encode_latents(config, models, batch, 6), expected)


def test_t_has_the_configured_density_and_shift():
    """The same draw, taken through either density and every shift."""
    plain = {key: drawn(Flow(density="uniform", shift="none"), key=key)[0] for key in "abcdef"}
    for key, u in plain.items():
        z = 2**0.5 * torch.erfinv(2 * u - 1)
        t, _ = drawn(Flow(logit_mean=-0.4, logit_std=1.7, shift="none"), key=key)
        torch.testing.assert_close(torch.logit(t), -0.4 + 1.7 * z, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(drawn(Flow(density="uniform", shift=3.0), key=key)[0], 3 * u / (1 + 2 * u))
        for side, mu in ((32, 0.5), (128, 1.15)):  # FLUX's line: 256 tokens of 2 x 2 latents, and 4096
            shifted, _ = drawn(Flow(density="uniform"), key=key, side=side)
            torch.testing.assert_close(torch.logit(shifted), torch.logit(u) + mu, rtol=1e-3, atol=1e-3)


def test_posterior_latents_are_drawn_anew_and_the_mean_is_not_drawn(models):
    one = pictures(1).expand(2, -1, -1, -1)  # the same picture under two names
    batch = Batch(["a", "b"], CAPTIONS, WIDE, one, None, None)
    sampled = configured(data={"sample_posterior": True})
    first = objective.encode_latents(sampled, models, batch, 4)
    for config, update in ((sampled, 5), (configured(data={"sample_posterior": True}, run={"seed": 9}), 4)):
        other = objective.encode_latents(config, models, batch, update)
        assert not torch.isclose(first, other).all(0).any()
    assert not torch.equal(first[0], first[1])
    swapped = objective.encode_latents(sampled, models, replace(batch, keys=["b", "a"]), 4)
    assert torch.equal(swapped, first.flip(0))  # a sample's draw is its own, whatever it is computed with
    mean = objective.encode_latents(configured(), models, batch, 4)
    assert torch.equal(mean, latent_ops.encode(models.vae, one)) and torch.equal(mean[0], mean[1])
    assert not torch.isclose(first, mean).all()


def test_every_kind_of_condition_comes_as_often_as_configured_and_is_drawn_anew():
    modes = ConditionModes(image=0.4, image_text=0.3, text=0.2, none=0.1)
    found = Counter(draw_kind(modes, 1, update, 0) for update in range(1000))
    assert found["image"] == pytest.approx(400, abs=62)  # four standard deviations
    assert found["image_text"] == pytest.approx(300, abs=58)
    assert found["text"] == pytest.approx(200, abs=51)
    assert found["none"] == pytest.approx(100, abs=38)
    for varied in (
        ({"seed": i} for i in range(40)),
        ({"update": i} for i in range(40)),
        ({"drawn_index": i} for i in range(40)),
    ):
        kinds = {draw_kind(modes, **{"seed": 1, "update": 0, "drawn_index": 0} | change) for change in varied}
        assert kinds == set(KINDS)
    for kind in KINDS:
        always = ConditionModes(**{"image": 0.0} | {kind: 1.0})
        assert {draw_kind(always, 1, update, 0) for update in range(40)} == {kind}


def test_a_batch_is_conditioned_by_the_kind_that_was_drawn_for_it(models):
    modes = {"image": 0.3, "image_text": 0.2, "text": 0.2, "none": 0.3}
    config = configured(data={"condition": modes})
    empty = models.trunk.encode(None, ["", ""], "text")
    batch = Batch(["a", "b"], CAPTIONS, WIDE, pictures(), None, None)
    met = Counter()
    for update in range(3):
        for drawn_index in range(3):
            kind = draw_kind(config.data.condition, config.run.seed, update, drawn_index)
            met[kind] += 1
            got = objective.encode_condition(config, models, batch, SAMPLES, update, drawn_index)
            expected = empty if kind == "none" else models.trunk.encode(batch.pixel_values, CAPTIONS, kind)
            torch.testing.assert_close(got.hidden_states, expected.hidden_states)
            assert torch.equal(got.select, expected.select) and torch.equal(got.position_ids, expected.position_ids)
    assert len(met) == 4 and empty.select.shape == (2, 1)  # one token: the end of the turn
    tokenizer = models.trunk.processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(models.trunk.turn("text").input_ids)[-1] == "<|im_end|>"


def test_an_empty_condition_is_the_same_for_any_batch_also_when_the_trunk_is_gone(models):
    config = configured(data={"condition": {"image": 0.0, "none": 1.0}, "cache": ["trunk"]})
    alone = load_models(config).trunk
    before = alone.empty(3)
    assert all(torch.equal(row, before.hidden_states[0]) for row in before.hidden_states)
    assert torch.equal(before.hidden_states, models.trunk.empty(3).hidden_states)
    gone = replace(load_models(config), vae=None)
    frozen.send_away(config, gone)
    batch = Batch(["a", "b"], CAPTIONS, WIDE, None, None, torch.zeros(2, 3, 4))  # cached, and not used
    given = objective.encode_condition(config, gone, batch, SAMPLES, 0, 0)
    assert gone.trunk.released and torch.equal(given.hidden_states, before.hidden_states[:2])
    other = alone.vlm
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    alone.vlm = other  # as an export joins and splits it: what was kept is of the earlier weights
    assert not torch.equal(alone.empty(1).hidden_states, before.hidden_states[:1])


def test_the_guidance_value_is_drawn_for_each_sample_from_its_range():
    samples = objective.count_up(["a", "b", "a", "c"], Counter())
    config = Flow(guidance=(2.0, 5.0))
    drawn_values = objective.draw_guidance(config, 5, 7, samples, torch.device("cpu"))
    assert drawn_values.dtype == torch.float32 and len(set(drawn_values.tolist())) == 4
    swapped = objective.draw_guidance(config, 5, 7, samples[::-1], torch.device("cpu"))
    assert torch.equal(swapped, drawn_values.flip(0))  # a sample's own, whatever it is computed with
    assert not torch.isclose(objective.draw_guidance(config, 5, 8, samples, torch.device("cpu")), drawn_values).any()
    many = objective.draw_guidance(config, 5, 7, [Sample(str(i), 0) for i in range(2000)], torch.device("cpu"))
    assert 2 <= many.min() < 2.02 and 4.98 < many.max() <= 5
    assert many.mean() == pytest.approx(3.5, abs=0.08)  # four standard deviations
    assert objective.draw_guidance(Flow(), 5, 7, samples, torch.device("cpu")) == 1.0
    t = [objective.draw_time_and_noise(flow, 5, 7, samples, torch.empty(4, 8, 4, 4))[0] for flow in (Flow(), config)]
    assert torch.equal(*t)  # a range changes nothing else that is drawn


def test_each_sample_is_given_its_own_guidance(models):
    inputs = replace(given(models), guidance=torch.tensor([2.5, 9.0]))
    with torch.no_grad():
        losses = denoising_loss(models.trainable, models, inputs)
        torch.testing.assert_close(losses, plain_loss(models, inputs, inputs.guidance), rtol=1e-4, atol=1e-5)


# --- which of several captions ---

SEVERAL = {"none": "", "one": "x", "two": "a\0b", "four": "a\0b\0c\0d"}


def captions_drawn(keys, weights=None, seed=5, update=7) -> dict[str, str]:
    samples = objective.count_up(list(keys), Counter())
    return dict(zip(keys, objective.draw_captions(weights, seed, update, samples, [SEVERAL[key] for key in keys])))


def test_a_caption_is_a_function_of_seed_update_and_sample():
    together = captions_drawn(SEVERAL)
    assert captions_drawn([*SEVERAL][::-1]) == together  # in whatever order
    for key in SEVERAL:  # whatever it is computed with
        assert captions_drawn([key]) == {key: together[key]}
    assert (together["none"], together["one"]) == ("", "x")
    for change in ("seed", "update"):
        assert len({captions_drawn(["four"], **{change: i})["four"] for i in range(40)}) == 4
    again = [Sample("four", n) for n in range(40)]  # met again in the same update
    assert len(set(objective.draw_captions(None, 5, 7, again, [SEVERAL["four"]] * 40))) == 4


def test_a_run_that_a_newer_version_resumes_draws_the_same_captions():
    assert generator_for(5, "caption", 7, "four", 0).initial_seed() == 5998565109671502658
    for update in range(20):
        u = torch.rand((), dtype=torch.float64, generator=generator_for(5, "caption", update, "four", 0))
        assert captions_drawn(["four"], update=update)["four"] == "abcd"[int(4 * u)]


def test_one_caption_draws_nothing(monkeypatch):
    """So a run on such data is, bit for bit, what it was."""
    monkeypatch.setattr(objective, "generator_for", None)
    assert captions_drawn(["one", "none"], weights=(0.0, 1.0)) == {"one": "x", "none": ""}


@pytest.mark.parametrize(
    ("weights", "key", "shares"),
    [
        (None, "four", (0.25, 0.25, 0.25, 0.25)),
        ((6, 3, 1, 0), "four", (0.6, 0.3, 0.1, 0)),
        ((6, 3, 1, 0), "two", (2 / 3, 1 / 3)),  # the first weights
        ((1, 1), "four", (0.5, 0.5, 0, 0)),  # captions without a weight
        ((0, 0, 1), "four", (0, 0, 1, 0)),
        ((0, 0, 1), "two", (0.5, 0.5)),  # none that could be drawn by them
    ],
)
def test_captions_come_as_often_as_weighted(weights, key, shares):
    n = 2000
    found = Counter(captions_drawn([key], weights, update=update)[key] for update in range(n))
    for text, share in zip("abcd", shares):
        assert found[text] == pytest.approx(
            n * share, abs=4 * (n * share * (1 - share)) ** 0.5
        )  # 4 standard deviations


def test_the_trunk_sees_the_caption_that_was_drawn_and_counts_those_that_it_cuts(models, monkeypatch):
    stored = ["short\0a much longer caption than that one", "another"]
    batch = Batch(["a", "b"], stored, WIDE, pictures(), None, None)
    lengths = [models.trunk.caption_tokens(text) for text in (*stored[0].split("\0"), stored[1])]
    monkeypatch.setattr(models.trunk, "max_caption_tokens", lengths[1] - 1)
    assert max(lengths[0], lengths[2]) < lengths[1]
    tokenized, cuts = [], set()
    ids = models.trunk.chat.caption
    monkeypatch.setattr(models.trunk.chat, "caption", lambda text: tokenized.append(text) or ids(text))
    for mode in ("image_text", "text"):
        config = configured(data={"condition": {"image": 0.0, mode: 1.0}, "caption_weights": [2, 1]})
        for update in range(6):
            tokenized.clear()
            got = objective.encode_condition(config, models, batch, SAMPLES, update, 0)
            texts = objective.draw_captions((2, 1), config.run.seed, update, SAMPLES, stored)
            assert tokenized == texts  # once each
            assert got.cut_captions == (texts[0] != "short")
            cuts.add(got.cut_captions)
            assert torch.equal(got.hidden_states, models.trunk.encode(pictures(), texts, mode).hidden_states)
    assert cuts == {0, 1}
    image = objective.encode_condition(configured(), models, batch, SAMPLES, 0, 0)
    assert image.cut_captions == 0 and torch.equal(image.hidden_states, models.trunk.encode(pictures()).hidden_states)


# --- what is cached ---


def test_cached_output_is_used_as_it_is(models):
    """Neither encoded again nor read as another size: the cached run is the run."""
    pixels = pictures()
    encoded = models.trunk.encode(pixels)
    latents = torch.randn(2, 8, 4, 8)  # not what the VAE would give
    hidden_states = encoded.hidden_states + 1
    batch = Batch(["a", "b"], CAPTIONS, WIDE, pixels, latents, hidden_states)
    assert torch.equal(objective.encode_latents(configured(), models, batch, 0), latents)
    condition = objective.encode_condition(configured(), models, batch, SAMPLES, 0, 0)
    assert torch.equal(condition.hidden_states, hidden_states)
    assert torch.equal(condition.position_ids, encoded.position_ids) and torch.equal(condition.select, encoded.select)


# --- the loss ---


def given(models) -> Denoising:
    generator = torch.Generator().manual_seed(2)
    latents, noise = torch.randn(2, 2, 8, WIDE.height // 8, WIDE.width // 8, generator=generator)
    return Denoising(WIDE, latents, models.trunk.encode(pictures()), torch.tensor([0.3, 0.8]), noise, 1.0)


def plain_loss(models, inputs: Denoising, guidance: torch.Tensor | None) -> torch.Tensor:
    """The formula at the head of objective.py, in diffusers' layout of tokens."""
    t = inputs.t[:, None, None, None]
    x_t = (1 - t) * inputs.latents + t * inputs.noise
    height, width = WIDE.height // 8, WIDE.width // 8
    velocity = models.trainable(
        inputs.condition,
        FluxPipeline._pack_latents(x_t, 2, 8, height, width),
        inputs.t,
        FluxPipeline._prepare_latent_image_ids(2, height // 2, width // 2, "cpu", torch.float32),
        models.pooled_projections.expand(2, -1),
        guidance,
    )
    velocity = FluxPipeline._unpack_latents(velocity, WIDE.height, WIDE.width, 8)
    return (velocity - (inputs.noise - inputs.latents)).square().mean((1, 2, 3))


def test_the_loss_is_that_of_the_velocity_at_x_t_under_the_configured_guidance(models):
    inputs, losses = given(models), {}
    with torch.no_grad():
        for guidance in (2.5, 9.0):
            losses[guidance] = denoising_loss(models.trainable, models, replace(inputs, guidance=guidance))
            expected = plain_loss(models, inputs, torch.full((2,), guidance))
            torch.testing.assert_close(losses[guidance], expected, rtol=1e-4, atol=1e-5)
    assert (losses[2.5] - losses[9.0]).abs().min() > 1e-4  # the model reads it


def test_a_flux_without_guidance_is_given_none(models):
    """As FLUX.1-schnell, whose embedder takes no third input."""
    flux_config = configured().model.flux_config | {"guidance_embeds": False}
    transformer = scratch.build_transformer(flux_config, 3)
    trainable = Qwen2VLFlux(models.trainable.vlm, models.trainable.connector, transformer)
    plain = replace(models, trainable=trainable)
    wake(plain, torch.Generator().manual_seed(0))
    inputs = given(models)
    with torch.no_grad():
        losses = denoising_loss(trainable, plain, inputs)
        torch.testing.assert_close(losses, plain_loss(plain, inputs, None), rtol=1e-4, atol=1e-5)
