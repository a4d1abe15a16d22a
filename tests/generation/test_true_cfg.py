"""True classifier-free guidance against diffusers' own, and against steps and velocities made by hand."""

import numpy as np
import pytest
import torch

from megaflux import Dot, Reference, Weighting
from megaflux.common.errors import UserError
from megaflux.generation.condition import prompt_embeds
from megaflux.models.latents import image_ids, text_ids
from megaflux.runs import load_pipeline
from tests.conftest import picture
from tests.generation.test_modes import (  # noqa: F401  (fixtures)
    HEIGHT,
    MODES,
    STEPS,
    WIDTH,
    controlnet_folder,
    given,
    loaded,
    pipeline,
    theirs,
    values_of,
)

SCALE = 2.5
DOTS = (Dot(x=0.3, y=0.5, radius=0.6, weight=4), Dot(x=5 / 6, y=0.25, radius=0.4, weight=0))
FOX, DOG = "a red fox", "a blue fox"  # as many tokens


def embeds_of(pipeline, prompt: str):  # noqa: F811
    """The tokens of a prompt alone, before context_embedder."""
    return prompt_embeds(pipeline.encode_all([], prompt, for_controlnet=True), Weighting(), 0).prompt_embeds


@pytest.mark.parametrize("mode", ["text", "img2img", "inpaint", "controlnet"])
def test_it_is_diffusers_own_where_that_has_it(pipeline, mode):  # noqa: F811
    pipeline.models.trainable.configure(False)
    encoded = prompt_embeds(pipeline.encode_all([], FOX), Weighting(), 0)
    negative = {
        "negative_prompt_embeds": embeds_of(pipeline, DOG),
        "negative_pooled_prompt_embeds": pipeline.models.pooled_projections,
    }
    want = theirs(pipeline, mode, 7, "latent", encoded, true_cfg_scale=SCALE, **negative)
    ours = given(mode) | {"reference": None, "prompt": FOX, "negative_prompt": DOG, "true_cfg_scale": SCALE, "seed": 7}
    assert torch.equal(pipeline(**ours, output_type="latent").images, want)
    pipeline.models.trainable.configure(True)
    assert (pipeline(**ours, output_type="latent").images - want).abs().max() < 1e-4 * want.abs().max()
    without = pipeline(**ours | {"true_cfg_scale": 1.0, "negative_prompt": None}, output_type="latent").images
    assert (without - want).abs().max() > 0.01


@pytest.fixture(scope="module")
def exact(run_folder):
    """A pipeline in float64 with weights large enough for the condition to count."""
    pipeline = load_pipeline(run_folder, dtype=torch.float64, device="cpu")  # noqa: F811
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in pipeline.models.trainable.transformer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 256})
    return pipeline


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("negative", ["", "at night in the rain, far away"])
def test_it_is_eulers_method_with_two_velocities(exact, kernels, negative):
    """With a mask of dots that the negative pass, of another length, must not see."""
    models = exact.models
    models.trainable.configure(kernels)
    reference, height, width, steps, scale = picture(168, 112), 48, 64, 4, -0.5 + 4
    dotted, weighting = Reference(reference, 0.7, DOTS), Weighting(variety=0.2)
    arguments = {"num_inference_steps": steps, "seed": 3, "weighting": weighting, "output_type": "latent"}
    ours = exact(dotted, None, height, width, negative_prompt=negative, true_cfg_scale=scale, **arguments).images

    condition = prompt_embeds(exact.encode_all([dotted], "", weighting, for_controlnet=True), weighting, 3)
    with torch.no_grad():
        away = models.trainable.encode_condition(models.trunk.encode(None, [negative], "text"))
    T, L = condition.prompt_embeds.shape[1], height * width // 256
    assert away.shape[1] == max(1, models.trunk.caption_tokens(negative)) != T
    mask = torch.zeros(1, 1, 1, T + L, dtype=torch.float64)
    mask[..., :T] = condition.bias
    assert mask.unique().numel() > 2

    def velocity(x, sigma, tokens, options):
        return models.trainable.transformer(
            hidden_states=x,
            encoder_hidden_states=tokens,
            timestep=torch.tensor([sigma]).double(),
            pooled_projections=models.pooled_projections,
            guidance=torch.tensor([3.5]).double(),
            img_ids=image_ids(height, width),
            txt_ids=text_ids(tokens.shape[1]),
            joint_attention_kwargs=options,
            return_dict=False,
        )[0]

    shape = (1, models.vae.config.latent_channels, height // 8, width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = noise.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    k = models.scheduler.config.shift
    sigmas = [k * s / (1 + (k - 1) * s) for s in (1 - i / steps for i in range(steps))] + [0.0]
    with torch.no_grad():
        for sigma, after in zip(sigmas, sigmas[1:]):
            towards = velocity(x, sigma, condition.prompt_embeds, {"attention_mask": mask})
            from_ = velocity(x, sigma, away, None)
            x = x + (after - sigma) * (from_ + scale * (towards - from_))
    assert ours.dtype == torch.float64
    assert (ours - x).abs().max() < 1e-9 * max(1, x.abs().max())


def steps_of(flux, run) -> list[tuple[dict, torch.Tensor]]:
    """(keyword arguments, velocity) of each call of FLUX by a pipeline while `run` runs."""
    calls = []
    hook = flux.register_forward_hook(lambda _, __, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_it(pipeline, mode):  # noqa: F811
    """The ControlNet's residuals are in both passes, as in FluxControlNetPipeline; with scale 1, nothing is another bit."""
    values = given(mode) | {"seed": 7, "output_type": "latent"}
    if mode != "text":
        values["reference"] = Reference(values["reference"], 1.0, DOTS[:1])
    guidance = {"negative_prompt": "rain at night", "true_cfg_scale": SCALE}
    flux, made, passes = pipeline.models.trainable.transformer, [], []
    hook = flux.x_embedder.register_forward_hook(lambda *_: passes.append(1))
    plain = pipeline(**values).images
    once = len(passes)
    assert torch.equal(pipeline(**values, true_cfg_scale=1.0).images, plain) and len(passes) == 2 * once
    steps = steps_of(flux, lambda: made.append(pipeline(**values, **guidance).images))
    hook.remove()
    assert len(steps) == once and len(passes) == 4 * once
    assert (made[0] - plain).abs().max() > 0.01 and "forward" in vars(flux)
    assert torch.equal(pipeline(**values).images, plain)  # FLUX is left as it was
    away, sigmas = embeds_of(pipeline, "rain at night"), []
    for call, velocity in steps:
        assert ("controlnet_block_samples" in call) == ("controlnet" in mode)
        other = {"encoder_hidden_states": away, "txt_ids": text_ids(away.shape[1]), "joint_attention_kwargs": None}
        with torch.no_grad():
            towards, from_ = flux(**call)[0], flux(**call | other)[0]
        want = from_ + SCALE * (towards - from_)
        assert (velocity - want).abs().max() < 1e-4 * want.abs().max()
        sigmas.append(float(call["timestep"][0]))
    if "inpaint" in mode:  # what is kept is mixed in after each step
        return
    for (call, velocity), (after, _), sigma, following in zip(steps, steps[1:], sigmas, sigmas[1:]):
        want = call["hidden_states"] + (following - sigma) * velocity
        assert (after["hidden_states"] - want).abs().max() < 1e-4 * want.abs().max()


def test_a_batch_of_several_references_is_its_pictures(pipeline):  # noqa: F811
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 256})
    references = [Reference(picture(168, 112), 0.6, DOTS), Reference(picture(112, 112, seed=1))]
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
    arguments |= {"weighting": Weighting(variety=0.25), "true_cfg_scale": SCALE}
    together = pipeline(references, FOX, **arguments, seed=[7, 8, 9], batch_size=3).images
    alone = torch.cat([pipeline(references, FOX, **arguments, seed=seed).images for seed in (7, 8, 9)])
    assert (together - alone).abs().max() < 1e-5 and (together[0] - together[1]).abs().max() > 0.01
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 64})


def test_the_attention_map_is_of_the_condition_alone(pipeline):  # noqa: F811
    """At the first step both see the same latents, so it is that of a run without guidance."""
    reference = Reference(picture(84, 56), 1.0, DOTS)
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "seed": 3, "attention_map": True}
    plain = pipeline(reference, **arguments)
    for negative in ("", "one two three four five six seven"):  # fewer tokens than the reference's, and more
        made = pipeline(reference, **arguments, true_cfg_scale=SCALE, negative_prompt=negative)
        assert np.array_equal(made.attention[0][0], plain.attention[0][0])
        assert made.images[0].tobytes() != plain.images[0].tobytes()


def test_what_is_noted(pipeline):  # noqa: F811
    def notes(negative: str | None, *modes: str, scale: float = SCALE) -> list[str]:
        before = pipeline.settings
        pipeline.settings = before.model_copy(update={"modes": ("image", *modes)})
        try:
            return pipeline(
                picture(64, 64),
                height=16,
                width=16,
                num_inference_steps=1,
                negative_prompt=negative,
                true_cfg_scale=scale,
            ).notes
        finally:
            pipeline.settings = before

    for nothing in (None, "", "  \n"):
        (note,) = notes(nothing)
        assert note.startswith("true CFG: these weights never saw an empty condition (data.condition.none)")
        assert notes(nothing, "none") == notes(nothing, scale=1.0) == []
    assert notes("rain", "text") == []
    assert notes("rain") == [
        "negative prompt: these weights were trained without captions, so it may do little or harm"
    ]
    (cut,) = notes("fox " * 300, "text")
    assert cut.startswith("negative prompt: ") and cut.endswith("tokens, cut to the first 256")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"negative_prompt": "rain"},
            "^negative prompt: without effect at true CFG scale 1; give true CFG scale another",
        ),
        ({"true_cfg_scale": -1.0}, r"^true CFG scale: -1.0; use 0 to 100 \(1 is off\)$"),
        ({"true_cfg_scale": float("nan")}, "^true CFG scale: nan"),
        ({"true_cfg_scale": 1000.0}, "^true CFG scale: 1000"),
        ({"true_cfg_scale": 3.0, "negative_prompt": ["a"]}, "^negative prompt: a list; use one text"),
        ({"true_cfg_scale": 3.0, "negative_prompt": "a\0"}, "^negative prompt: character 2 is NUL"),
        ({"true_cfg_scale": 3.0, "negative_prompt": "a", "text_encoder": "t5"}, "these weights have no T5"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, change, said):  # noqa: F811
    with pytest.raises(UserError, match=said) as caught:
        pipeline(**given("variation") | change)
    assert "\n" not in str(caught.value)


def test_a_scale_of_0_is_the_negative_alone(pipeline):  # noqa: F811
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "seed": 7}
    away = pipeline(picture(84, 56), **arguments, negative_prompt=DOG, true_cfg_scale=0.0).images[0]
    alone = pipeline(None, DOG, **arguments).images[0]
    assert np.abs(values_of(away) - values_of(alone)).max() <= 1
