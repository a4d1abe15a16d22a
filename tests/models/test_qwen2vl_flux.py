"""The velocity is what diffusers' and transformers' own components give on the same weights and inputs."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from megaflux.generation.sampling import SamplingRequest, flux_pipeline, generate
from megaflux.models import latents as ops
from megaflux.models.chat_turn import QUESTION
from megaflux.models.pretrained import load_models
from megaflux.models.qwen2vl_flux import Qwen2VLFlux
from megaflux.models.vlm import Trunk
from megaflux.models.vlm_parts import join_vlm, split_vlm
from tests.conftest import picture

from diffusers import FluxPipeline  # isort: skip  (after megaflux, whose compat it needs)

HEIGHT, WIDTH, GUIDANCE = 48, 64, 2.5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(small_config):
    """Small models in float32 with every weight random, the zero-initialised ones too."""
    made = load_models(small_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (made.trainable, made.trunk.vlm):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.trainable.eval()
    return made


@pytest.fixture(scope="module")
def whole_vlm(models):
    """The uncut Qwen2-VL of the same weights."""
    return join_vlm(copy.deepcopy(models.trunk.vlm), copy.deepcopy(models.trainable.vlm)).eval()


def pixels(batch: int) -> torch.Tensor:
    made = [np.array(picture(WIDTH, HEIGHT, seed)) for seed in range(batch)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def plain_prompt_embeds(models, whole_vlm, images: torch.Tensor) -> torch.Tensor:
    """What transformers and an nn.Linear make of the released code's turn, image tokens only: (B, T,
    joint)."""
    processor = models.trunk.processor
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * len(images), images=list(images), return_tensors="pt", **models.trunk.limits)
    with torch.no_grad():
        hidden = whole_vlm(**inputs).last_hidden_state
        tokens = hidden[inputs["input_ids"] == whole_vlm.config.image_token_id].unflatten(0, (len(images), -1))
        return torch.nn.functional.linear(tokens, models.trainable.connector.weight, models.trainable.connector.bias)


def test_velocity_is_the_libraries_own(models, whole_vlm):
    images = pixels(2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, models.vae.config.latent_channels * 4, generator=generator)
    t, guidance = torch.tensor([0.3, 0.9]), torch.full((2,), GUIDANCE)
    pooled = models.pooled_projections.expand(2, -1)
    with torch.no_grad():
        ours = models.trainable(models.trunk.encode(images), x, t, ops.image_ids(HEIGHT, WIDTH), pooled, guidance)
        prompt_embeds = plain_prompt_embeds(models, whole_vlm, images)
        theirs = models.trainable.transformer(  # as FluxPipeline calls it, with its 1000 steps of time
            hidden_states=x,
            timestep=(t * 1000) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, HEIGHT // 16, WIDTH // 16, "cpu", x.dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert ours.std() > 0.05  # a model that answers 0 would agree too


def test_the_norm_before_the_connector_has_its_models_epsilon(models):
    model = copy.deepcopy(models.trainable)
    model.vlm.norm.variance_epsilon = model.vlm.config.rms_norm_eps = 1e-4  # as of a Qwen2-VL that is not the 7B
    condition, made = models.trunk.encode(pixels(1)), []
    with torch.no_grad():
        for last in (model.vlm.layers[0].self_attn.o_proj, model.vlm.layers[0].mlp.down_proj):
            last.weight.zero_()
        small = replace(condition, hidden_states=condition.hidden_states * 1e-2)
        for kernels in (True, False):
            model.configure(kernels)
            made.append(model.encode_condition(small))
    torch.testing.assert_close(*made, **CLOSE)


def test_generate_is_flux_pipeline(models, whole_vlm):
    images, seeds = pixels(2), [7, 8]
    condition = models.trunk.encode(images)
    pipeline = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)
    ours = generate(pipeline, models, condition, seeds, SamplingRequest(HEIGHT, WIDTH, 3, GUIDANCE))

    def theirs(prompt_embeds):
        return pipeline(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=models.pooled_projections.expand(2, -1),
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=3,
            guidance_scale=GUIDANCE,
            output_type="pil",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images

    with torch.no_grad():
        same_embeds = theirs(models.trainable.encode_condition(condition))
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), np.stack([np.array(image) for image in same_embeds]))
    plain = theirs(plain_prompt_embeds(models, whole_vlm, images))
    for mine, image in zip(ours.permute(0, 2, 3, 1).numpy(), plain, strict=True):
        assert np.abs(mine.astype(int) - np.array(image).astype(int)).max() <= 1
    assert not torch.equal(ours[0], ours[1])


def test_generate_takes_generators(models):
    condition = models.trunk.encode(pixels(1))
    pipeline = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)
    request = SamplingRequest(HEIGHT, WIDTH, 4, GUIDANCE)
    by_seed = generate(pipeline, models, condition, [3], request)
    by_generator = generate(pipeline, models, condition, [torch.Generator().manual_seed(3)], request)
    assert torch.equal(by_seed, by_generator)


def test_generation_does_not_see_the_padding_of_a_condition(models):
    captions, request = ["a", "a longer caption"], SamplingRequest(HEIGHT, WIDTH, 2, GUIDANCE)
    pipeline = flux_pipeline(models.trainable.transformer, models.vae, models.scheduler)
    condition = models.trunk.encode(pixels(2), captions, "image_text")
    assert not condition.select_mask.all()
    together = generate(pipeline, models, condition, [1, 2], request).int()
    for i, caption in enumerate(captions):
        alone = models.trunk.encode(pixels(2)[i : i + 1], [caption], "image_text")
        one = generate(pipeline, models, alone, [1 + i], request).int()
        assert (together[i] - one[0]).abs().max() <= 1
        hidden = replace(condition.rows([i]), select_mask=None)
        if i == 0:  # what the mask keeps out would show
            assert (generate(pipeline, models, hidden, [1], request).int() - one).abs().max() > 1


@pytest.mark.parametrize("mode", ["image_text", "text"])
def test_masked_padding_is_the_shorter_batch(models, mode):
    images, captions = pixels(3), ["a", "a rather longer caption than the first", "middling"]
    x = torch.randn(3, 12, models.vae.config.latent_channels * 4, generator=torch.Generator().manual_seed(2))
    t, guidance = torch.tensor([0.1, 0.5, 0.8]), torch.full((3,), GUIDANCE)
    ids, pooled = ops.image_ids(HEIGHT, WIDTH), models.pooled_projections
    with torch.no_grad():
        condition = models.trunk.encode(images, captions, mode)
        assert not condition.select_mask.all()
        together = models.trainable(condition, x, t, ids, pooled.expand(3, -1), guidance)
        for i in range(3):
            one = slice(i, i + 1)
            condition = models.trunk.encode(images[one], captions[one], mode)
            assert condition.select_mask is None
            alone = models.trainable(condition, x[one], t[one], ids, pooled, guidance[one])
            torch.testing.assert_close(together[one], alone, **CLOSE)


@pytest.mark.parametrize("captions", [None, ["a", "a longer caption"]])
@pytest.mark.parametrize(
    "kernels, policies", [(False, "full"), (True, "none"), (True, "mlp"), (True, "full"), (True, ["full", "mlp"])]
)
def test_neither_kernels_nor_computing_again_changes_a_gradient(models, captions, kernels, policies):
    mode = "image_text" if captions else "image"
    condition = models.trunk.encode(pixels(2), captions, mode)
    x = torch.randn(2, 12, models.vae.config.latent_channels * 4, generator=torch.Generator().manual_seed(2))
    gradients = []
    for settings in ((False, "none"), (kernels, policies)):
        model = copy.deepcopy(models.trainable).train().requires_grad_(True)
        model.configure(*settings)
        velocity = model(
            condition,
            x,
            torch.tensor([0.2, 0.7]),
            ops.image_ids(HEIGHT, WIDTH),
            models.pooled_projections.expand(2, -1),
            torch.full((2,), GUIDANCE),
        )
        velocity.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    # The last double block's text stream still feeds the single blocks: every parameter has its gradient.
    assert [name for name, gradient in gradients[0].items() if gradient is None or not gradient.any()] == []
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_the_condition_is_the_same_wherever_qwen_is_cut(models, whole_vlm):
    """At none of its layers, at the last one, at all of them; without kernels, with them, and with context_embedder applied."""
    made = []
    for layers in (0, 1, 2):
        trunk_model, tail = split_vlm(copy.deepcopy(whole_vlm), layers)
        assert (len(trunk_model.language_model.layers), len(tail.layers)) == (2 - layers, layers)
        trunk = Trunk(trunk_model, models.trunk.processor, models.trunk.max_image_tokens)
        cut = Qwen2VLFlux(tail, models.trainable.connector, models.trainable.transformer)
        with torch.no_grad():
            for captions, mode in ((None, "image"), (["a cat", "a much longer text"], "image_text")):
                condition = trunk.encode(pixels(2), captions, mode)
                cut.configure(False)
                plain = cut.encode_condition(condition)
                cut.configure(True)
                fused = cut.encode_condition(condition)
                embedded = cut.encode_condition(condition, embedded=True)
                assert torch.allclose(plain, fused, **CLOSE)
                assert torch.allclose(models.trainable.transformer.context_embedder(plain), embedded, **CLOSE)
                made.append((plain, embedded))
        cut.configure(False)
    for one, other in zip(made[:2] * 2, made[2:], strict=True):
        assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(one, other))
    whole = plain_prompt_embeds(models, whole_vlm, pixels(2))
    assert torch.allclose(made[0][0], whole, **CLOSE)


def test_base_weights_have_one_fingerprint_wherever_qwen_is_cut(small_config):
    found = [
        small_config.model_copy(update={"model": small_config.model.model_copy(update={"vlm_layers": 2})}),
        small_config,
    ]
    stages = tuple(stage.model_copy(update={"vlm_layers": 0}) for stage in small_config.stages)
    found = [load_models(config) for config in (*found, small_config.model_copy(update={"stages": stages}))]
    assert [len(made.trainable.vlm.layers) for made in found] == [2, 1, 0]
    assert len({made.base for made in found}) == 1 and len({str(made.base_parts) for made in found}) == 1
    assert set(found[0].base_parts) == {"flux", "vlm", "vae", "connector", "clip"}
