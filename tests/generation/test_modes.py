"""Each mode against diffusers' own pipeline, batches against single pictures, Euler's steps against the formula."""

import numpy as np
import pytest
import torch

from megaflux.common import compat  # noqa: F401  (before diffusers)
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)
from PIL import Image, ImageDraw

from megaflux import Dot, Qwen2VLFluxPipeline, Reference, Weighting
from megaflux.common.errors import UserError
from megaflux.generation.condition import prompt_embeds
from megaflux.generation.request import ControlMaps
from megaflux.generation.sampling import EulerScheduler, scheduler_like
from megaflux.models import latents as latent_ops
from megaflux.models.latents import image_ids, text_ids
from megaflux.runs import load_pipeline
from tests.conftest import picture
from tests.icc_profiles import DISPLAY_P3

STEPS, HEIGHT, WIDTH = 4, 48, 64
MODES = ("text", "variation", "img2img", "inpaint", "controlnet", "controlnet-img2img", "controlnet-inpaint")


@pytest.fixture(scope="module")
def controlnet_folder(tmp_path_factory, small_config):
    """A tiny ControlNet-Union with random weights, also in its zero-initialised outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        net = FluxControlNetModel(**small_config.model.flux_config, num_mode=10)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("controlnet") / "union"
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(run_folder, controlnet_folder):
    pipeline = load_pipeline(run_folder, dtype=torch.float32, device="cpu").load_controlnet(str(controlnet_folder))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipeline.models.trainable.transformer.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return pipeline


@pytest.fixture
def pipeline(loaded):
    yield loaded
    loaded.models.trainable.configure(True)


def hole() -> Image.Image:
    mask = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).rectangle([16, 16, 47, 31], fill=255)
    return mask


def given(mode: str) -> dict:
    """Keyword arguments of the pipeline for a mode."""
    values = {"reference": picture(84, 56, seed=1), "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}
    if mode == "text":
        values |= {"reference": None, "prompt": "a red fox"}
    if mode in ("img2img", "inpaint", "controlnet-img2img", "controlnet-inpaint"):
        values |= {"image": picture(WIDTH, HEIGHT, seed=2), "strength": 0.7}
    if "inpaint" in mode:
        values["mask_image"] = hole()
    if "controlnet" in mode:
        values |= {
            "control_image": [picture(WIDTH, HEIGHT, seed=3), picture(WIDTH, HEIGHT, seed=4)],
            "control_mode": ["depth", "line"],
            "controlnet_conditioning_scale": [0.4, 0.9],
            "control_guidance_end": 0.8,
        }
    return values


def theirs(pipeline, mode: str, seed: int, output_type: str = "pil", embeds=None, **arguments):
    """The pictures of diffusers' own pipeline, with the transformer on diffusers' path and our prompt_embeds. arguments: more
    of the pipeline's own."""
    models, values = pipeline.models, given(mode)
    models.trainable.configure(False)
    if embeds is None:
        references = [Reference(values["reference"])] if values["reference"] is not None else []
        embeds = prompt_embeds(pipeline.encode_all(references, values.get("prompt", "")), Weighting(), seed)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(models.scheduler.config),
        "vae": models.vae,
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "transformer": models.trainable.transformer,
    }
    kinds = {
        "text": FluxPipeline,
        "variation": FluxPipeline,
        "img2img": FluxImg2ImgPipeline,
        "inpaint": FluxInpaintPipeline,
        "controlnet": FluxControlNetPipeline,
        "controlnet-img2img": FluxControlNetImg2ImgPipeline,
        "controlnet-inpaint": FluxControlNetInpaintPipeline,
    }
    more = {}
    if "image" in values:
        more |= {"image": values["image"], "strength": 0.7}
    if "inpaint" in mode:
        more["mask_image"] = values["mask_image"]
    if "controlnet" in mode:
        parts["controlnet"] = FluxMultiControlNetModel([pipeline.controlnet.nets[""]])
        more |= {
            "control_image": values["control_image"],
            "control_mode": [2, 0],
            "controlnet_conditioning_scale": [0.4, 0.9],
            # of numbers, diffusers makes lists as long as the nets, and ignores the maps beyond
            "control_guidance_start": [0.0, 0.0],
            "control_guidance_end": [0.8, 0.8],
        }
    plain = kinds[mode](**parts)
    plain.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return plain(
            prompt_embeds=embeds.prompt_embeds,
            pooled_prompt_embeds=models.pooled_projections,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=3.5,
            generator=[torch.Generator().manual_seed(seed)],
            output_type=output_type,
            **more,
            **arguments,
        ).images


def values_of(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_diffusers_own(pipeline, mode):
    want = values_of(theirs(pipeline, mode, 7)[0])
    pipeline.models.trainable.configure(False)
    off = values_of(pipeline(**given(mode), seed=7).images[0])
    assert np.array_equal(off, want)
    pipeline.models.trainable.configure(True)
    on = values_of(pipeline(**given(mode), seed=7).images[0])
    assert np.abs(on - want).max() <= 1
    assert on.std() > 5  # not one plain colour


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_pictures(pipeline, mode):
    seeds = [7, 8, 9, 10]
    weighting = Weighting(variety=0.25) if mode == "variation" else Weighting()
    arguments = given(mode) | {"weighting": weighting}
    together = pipeline(**arguments, seed=seeds, batch_size=4, output_type="latent").images
    alone = torch.cat([pipeline(**arguments, seed=s, output_type="latent").images for s in seeds])
    assert together.shape == alone.shape and (together - alone).abs().max() < 1e-5
    assert (together[0] - together[1]).abs().max() > 0.01
    pictures = pipeline(**arguments, seed=seeds, batch_size=4).images
    ones = [pipeline(**arguments, seed=s).images[0] for s in seeds]
    assert max(np.abs(values_of(a) - values_of(b)).max() for a, b in zip(pictures, ones)) <= 1


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("shift", "dynamic"), [(None, False), (3.0, False), (None, True)])
def test_variation_is_eulers_method_in_float64(run_folder, kernels, shift, dynamic):
    pipeline = load_pipeline(run_folder, dtype=torch.float64, device="cpu", kernels=kernels)
    models = pipeline.models
    if dynamic:
        models.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            models.scheduler.config, use_dynamic_shifting=True
        )
    with torch.no_grad():
        for parameter in models.trainable.transformer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).double())
    reference, height, width, steps = picture(64, 48), 48, 64, 5
    ours = pipeline(reference, None, height, width, steps, seed=3, shift=shift, output_type="latent").images

    # x_1 = noise; sigma_i = shifted (1 - i / steps); x <- x + (sigma_{i+1} - sigma_i) velocity(x, sigma_i)
    encoded = pipeline.encode_all([Reference(reference)], for_controlnet=True)  # before context_embedder
    embeds = prompt_embeds(encoded, Weighting(), 3).prompt_embeds
    shape = (1, models.vae.config.latent_channels, height // 8, width // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = noise.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    tokens = height * width // 256
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)  # FLUX's line through (256, 0.5) and (4096, 1.15)

    def shifted(s):
        if dynamic:
            return np.exp(mu) * s / (1 + (np.exp(mu) - 1) * s)
        k = 1.0 if shift is None else shift
        return k * s / (1 + (k - 1) * s)

    sigmas = [shifted(1 - i / steps) for i in range(steps)] + [0.0]
    with torch.no_grad():
        for sigma, after in zip(sigmas, sigmas[1:]):
            velocity = models.trainable.transformer(
                hidden_states=x,
                encoder_hidden_states=embeds,
                timestep=torch.tensor([sigma]).double(),
                pooled_projections=models.pooled_projections,
                guidance=torch.tensor([3.5]).double(),
                img_ids=image_ids(height, width),
                txt_ids=text_ids(embeds.shape[1]),
                return_dict=False,
            )[0]
            x = x + (after - sigma) * velocity
    assert ours.dtype == torch.float64
    assert (ours - x).abs().max() < 1e-9 * max(1, x.abs().max())


def test_the_wide_scheduler_is_diffusers_but_for_rounding():
    plain = FlowMatchEulerDiscreteScheduler(shift=3.0)
    wide = scheduler_like(plain, None, torch.float64)
    assert isinstance(wide, EulerScheduler) and type(scheduler_like(plain, None, torch.bfloat16)) is type(plain)
    for scheduler in (plain, wide):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=1.0)
    assert torch.allclose(wide.sigmas.float(), plain.sigmas, atol=1e-6) and torch.allclose(
        wide.timesteps.float(), plain.timesteps, atol=1e-3
    )
    fixed = scheduler_like(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 2.0, torch.float32)
    assert fixed.config.shift == 2.0 and not fixed.config.use_dynamic_shifting


def test_dots_count_in_every_mode(pipeline):
    dots = (Dot(x=0.3, y=0.5, radius=0.6, weight=4), Dot(x=5 / 6, y=0.25, radius=0.4, weight=0))
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 256})
    for mode in MODES[1:]:
        values = given(mode)
        plain = pipeline(**values, seed=7)
        dotted = pipeline(**values | {"reference": Reference(values["reference"], 1.0, dots)}, seed=7)
        neutral = (Dot(x=0.3, y=0.5, radius=0.6, weight=1),)
        same = pipeline(**values | {"reference": Reference(values["reference"], 1.0, neutral)}, seed=7)
        assert dotted.images[0].tobytes() != plain.images[0].tobytes() == same.images[0].tobytes()
        assert (dotted.weights[0][0] == 0).any() and dotted.weights[0][0].max() > 1
        told = any("ControlNet itself" in note for note in dotted.notes)
        assert told == ("controlnet" in mode)  # a note says what diffusers' ControlNet ignores
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 64})


def test_inpainting_changes_only_the_hole_and_img2img_follows_its_strength(pipeline):
    values = given("inpaint") | {"num_inference_steps": 8}
    image, mask = values["image"], np.array(values["mask_image"]) > 0
    made = values_of(pipeline(**values, seed=7).images[0])
    vae, pixels = pipeline.models.vae, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    through_vae = latent_ops.decode(vae, latent_ops.encode(vae, pixels))[0].permute(1, 2, 0).numpy().astype(int)
    changed = np.abs(made - through_vae).mean(-1)
    far = np.ones_like(mask)
    far[8:40, 8:56] = False  # the VAE sees a little around a pixel
    assert changed[mask].mean() > 4 * changed[far].mean()
    distances = []
    for strength in (0.2, 0.6, 1.0):
        other = pipeline(**given("img2img") | {"strength": strength}, seed=7).images[0]
        distances.append(np.abs(values_of(other) - values_of(image)).mean())
    assert distances[0] < distances[1] < distances[2]
    whole = pipeline(**given("img2img") | {"strength": 1.0, "image": picture(WIDTH, HEIGHT, seed=5)}, seed=7).images[0]
    assert whole.tobytes() == other.tobytes()  # strength 1 starts from noise: the picture does not matter


def test_a_photo_of_3_to_2_is_a_start_a_mask_and_a_map(pipeline):
    """In floating point their crop began at -1e-14, which Pillow refuses."""
    photo, white = picture(1500, 1000), Image.new("L", (1500, 1000), 255)
    size = {"height": 144, "width": 48, "num_inference_steps": 1, "strength": 1.0}
    made = pipeline(picture(64, 48), image=photo, mask_image=white, **size)
    assert made.images[0].size == (48, 144) and any("1500x1000 brought to 48x144" in note for note in made.notes)
    assert pipeline(picture(64, 48), control_image=photo, control_mode="line", **size).images[0].size == (48, 144)


def test_a_mask_of_another_size_is_the_whole_picture(pipeline):
    values = given("inpaint")
    made = pipeline(**values, seed=7)
    for scale in (2, 8):
        big = values["mask_image"].resize((scale * WIDTH, scale * HEIGHT), Image.Resampling.NEAREST)
        other = pipeline(**values | {"mask_image": big}, seed=7)
        assert other.images[0].tobytes() == made.images[0].tobytes()
        assert f"mask: {big.width}x{big.height} resized to the picture's 64x48" in other.notes
    assert not any("resized" in note for note in made.notes)


def test_a_photo_turned_by_its_exif_keeps_its_size_and_mask(pipeline):
    upright, exif = picture(48, 64, seed=2), Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.info["exif"] = exif.tobytes()
    stored.getexif()[0x0112] = 6
    mask = Image.new("L", (48, 64))
    ImageDraw.Draw(mask).rectangle([0, 0, 47, 20], fill=255)
    common = {"mask_image": mask, "num_inference_steps": 1, "strength": 1.0, "seed": 3}
    turned = pipeline(picture(64, 48), image=stored, **common)
    assert turned.images[0].size == (48, 64)
    assert turned.images[0].tobytes() == pipeline(picture(64, 48), image=upright, **common).images[0].tobytes()


def test_control_start_and_end_and_scale(pipeline):
    values = given("controlnet")
    plain = pipeline(**given("variation"), seed=7).images[0].tobytes()
    zero = values | {"controlnet_conditioning_scale": 0.0}
    other = zero | {"control_image": values["control_image"][::-1]}
    assert pipeline(**zero, seed=7).images[0].tobytes() == pipeline(**other, seed=7).images[0].tobytes()
    whole = pipeline(**values | {"control_guidance_end": 1.0}, seed=7).images[0].tobytes()
    half = pipeline(**values | {"control_guidance_end": 0.5}, seed=7).images[0].tobytes()
    late = pipeline(**values | {"control_guidance_start": 0.5, "control_guidance_end": 1.0}, seed=7).images[0].tobytes()
    assert len({plain, whole, half, late}) == 4


def test_the_attention_map_is_the_softmax_and_changes_no_picture(pipeline):
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 256})
    reference = Reference(picture(168, 112), 1.0, (Dot(x=0.1, y=0.1, radius=0.3, weight=0),))
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "seed": 3}
    asked = pipeline(reference, **arguments, attention_map=True)
    plain = pipeline(reference, **arguments)
    assert asked.images[0].tobytes() == plain.images[0].tobytes() and plain.attention == []
    (mass,) = asked.attention[0]
    weights = asked.weights[0][0]
    assert mass.shape == weights.shape and ((mass > 0) == (weights > 0)).all() and 0 < mass.sum() < 1

    # the same from the queries and keys of diffusers' own path
    from diffusers.models.transformers import transformer_flux

    seen, real = [], transformer_flux.dispatch_attention_fn

    def watched(query, key, value, attn_mask=None, **kwargs):
        q, k = (x.transpose(1, 2).double() for x in (query, key))  # (B, S, H, D) -> (B, H, S, D)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if attn_mask is None else scores + attn_mask.double()
        T = int((weights > 0).sum())
        seen.append(scores.softmax(-1)[0, :, T:, :T].mean((0, 1)))
        return real(query, key, value, attn_mask=attn_mask, **kwargs)

    pipeline.models.trainable.configure(False)
    transformer_flux.dispatch_attention_fn = watched
    try:
        pipeline(reference, **arguments)
    finally:
        transformer_flux.dispatch_attention_fn = real
    want = torch.stack(seen).mean(0).numpy()
    assert np.abs(mass[weights > 0] - want).max() < 1e-5
    with pytest.raises(UserError, match="attention map"):
        pipeline(reference, **arguments, attention_map=True)
    pipeline.settings = pipeline.settings.model_copy(update={"longest_side": 64})


def test_diffusers_conventions(pipeline, tmp_path):
    values, seen = given("variation"), []

    def halfway(pipe, step, timestep, kwargs):
        seen.append((step, float(timestep), kwargs["latents"].shape))
        return {"latents": kwargs["latents"] * 0} if step == STEPS - 1 else {}

    blank = pipeline(**values, callback_on_step_end=halfway).images[0]
    assert [step for step, *_ in seen] == list(range(STEPS)) and seen[0][1] == 1000
    assert values_of(blank).std() < values_of(pipeline(**values).images[0]).std()
    array, tensor = (pipeline(**values, output_type=kind).images for kind in ("np", "pt"))
    assert array.shape == (1, HEIGHT, WIDTH, 3) and tensor.shape == (1, 3, HEIGHT, WIDTH)
    many = pipeline(**values, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1)).images
    assert len(many) == 2 and many[0].tobytes() != many[1].tobytes()
    before = pipeline(**values).images[0].tobytes()
    pipeline.save_pretrained(tmp_path / "saved")
    assert pipeline(**values).images[0].tobytes() == before  # saving does not change it
    again = load_pipeline(tmp_path / "saved", dtype=torch.float32, device="cpu")
    assert again(**values).images[0].tobytes() == before
    assert again.to(torch.float64).dtype == torch.float64 and again.to("cpu", torch.float32).dtype == torch.float32
    assert again(**values).images[0].tobytes() == before
    with pytest.raises(UserError, match="exists"):
        pipeline.save_pretrained(tmp_path / "saved")
    (images,) = pipeline(**values, seed=np.int64(0), return_dict=False)
    assert images[0].tobytes() == before
    named = Qwen2VLFluxPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float64, device="cpu")
    assert named.dtype == torch.float64
    tall = pipeline(**values | {"height": 80, "width": None}, image=picture(32, 64)).images[0]
    assert tall.size == (32, 80)  # the width is the image's own


def test_saving_keeps_the_credit_and_leaves_the_nets_out(pipeline, tmp_path):
    credited = Qwen2VLFluxPipeline(
        pipeline.models, pipeline.settings, {"run": "x", "controlnet": {"": "y"}}, attribution="by them"
    )
    credited.save_pretrained(tmp_path / "saved")
    again = Qwen2VLFluxPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.attribution == "by them" and "controlnet" not in again.source
    assert len(again.source["weights_sha256"]) == 64  # made for a source without one


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strength": 0.0, "image": picture(64, 48)}, "strength: 0.0"),
        ({"strength": 1.5, "image": picture(64, 48)}, "strength"),
        ({"mask_image": hole()}, "mask: without a picture"),
        ({"shift": 0.0}, "shift: 0.0"),
        ({"batch_size": 0}, "batch size"),
        ({"image": picture(64, 48), "mask_image": Image.new("L", (64, 48), 0)}, "mask.*nothing"),
        ({"output_type": "jpeg"}, "output type"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**64}, "seed"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"reference": None}, "neither a reference nor a prompt"),
        ({"text_encoder": "t5", "prompt": "x"}, "these weights have no T5"),
        ({"text_encoder": "bert"}, "use qwen or t5"),
        ({"reference": "cat.png"}, "reference: a str; use a PIL picture"),
        ({"prompt": ["a", "b"]}, "prompt: a list"),
        ({"image": np.zeros((8, 8, 3))}, "image: a ndarray"),
        ({"seed": 1.5}, "seed: 1.5"),
        ({"seed": []}, "seed: an empty"),
        ({"generator": [torch.Generator(), torch.Generator()], "num_images_per_prompt": 3}, "generator: 2 for 3"),
        ({"height": 0}, "height: 0"),
        ({"weighting": Weighting(background=0.5)}, "background: 0.5 without a dot"),
        ({"reference_tokens": 2}, "reference tokens: 2"),
        ({"control_image": picture(64, 48)}, "control: kind None"),
        ({"control_image": picture(64, 48), "control_mode": "smell"}, "unknown kind 'smell'"),
        ({"control_image": [picture(64, 48)], "control_mode": ["line", "depth"]}, "1 maps, 2 modes"),
        (
            {
                "control_image": picture(64, 48),
                "control_mode": "line",
                "control_guidance_start": 0.9,
                "control_guidance_end": 0.1,
            },
            "is not before",
        ),
        (
            {"control_image": picture(64, 48), "control_mode": "line", "controlnet_conditioning_scale": -1.0},
            "control scale",
        ),
        ({"control_image": picture(64, 48), "control_mode": 12}, "kind 12 is not one"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, change, said):
    with pytest.raises(UserError, match=said) as caught:
        pipeline(**given("variation") | change)
    assert "\n" not in str(caught.value)


def test_a_controlnet_that_does_not_fit_is_refused(pipeline, small_config, tmp_path, controlnet_folder):
    other = FluxControlNetModel(**{**small_config.model.flux_config, "joint_attention_dim": 48})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="joint_attention_dim 48, the transformer has 24"):
        pipeline.load_controlnet(str(tmp_path / "other"))
    with pytest.raises(UserError, match="nowhere"):
        pipeline.load_controlnet(str(tmp_path / "nowhere"))
    bare = Qwen2VLFluxPipeline(pipeline.models, pipeline.settings)
    with pytest.raises(UserError, match="no ControlNet is loaded"):
        bare(**given("controlnet"))


CONTROLLED = ("controlnet", "controlnet-img2img", "controlnet-inpaint")


def random_net(config, folder, seed: int = 3, **changes) -> str:
    """A folder with a ControlNet of FLUX's sizes with random weights, also in its zero-initialised outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FluxControlNetModel(**config.model.flux_config | changes)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    return str(folder)


def calls_of(flux, run) -> list[dict]:
    """The keyword arguments of each call of FLUX while `run` runs."""
    calls = []
    hook = flux.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return calls


def spread(samples: list, blocks: int) -> list:
    """What FLUX adds to each of its blocks, by its own rule."""
    return [samples[i // -(-blocks // len(samples))] for i in range(blocks)]


def check_controls(pipeline, values, nets) -> None:
    """FLUX's residuals are, at each block and step, sum over k of scale_k keep net_k(x, latents of map k, kind k).

    nets: one for each map. keep: 1 while the step's share is within start and end, else 0.
    """
    models = pipeline.models
    flux, vae = models.trainable.transformer, models.vae
    steps = calls_of(flux, lambda: pipeline(**values, seed=7))
    assert len(steps) > 1
    draws, maps = torch.Generator().manual_seed(7), []
    for image in values["control_image"]:  # diffusers draws them first, in this order, from the posterior
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        z = (vae.encode(pixels).latent_dist.sample(draws) - vae.config.shift_factor) * vae.config.scaling_factor
        maps.append(z.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
    kinds = [{"depth": 2, "line": 0}[kind] for kind in values["control_mode"]]
    for i, call in enumerate(steps):
        keep = float((i + 1) / len(steps) <= values["control_guidance_end"])
        given = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
        wanted = {"double": 0, "single": 0}
        for net, latents, kind, scale in zip(nets, maps, kinds, values["controlnet_conditioning_scale"], strict=True):
            with torch.no_grad():
                double, single = net(
                    **{name: call[name] for name in given},
                    controlnet_cond=latents,
                    controlnet_mode=torch.tensor([[kind]]),
                    guidance=call["guidance"] if net.config.guidance_embeds else None,
                    return_dict=False,
                )
            for name, samples, blocks in (
                ("double", double, flux.transformer_blocks),
                ("single", single, flux.single_transformer_blocks),
            ):
                if samples is not None:
                    wanted[name] = wanted[name] + keep * scale * torch.stack(spread(samples, len(blocks)))
        found = {
            "double": spread(call["controlnet_block_samples"], len(flux.transformer_blocks)),
            "single": spread(call["controlnet_single_block_samples"], len(flux.single_transformer_blocks)),
        }
        for name, samples in found.items():
            scale = max(1.0, float(wanted[name].abs().max()))
            assert (torch.stack(samples) - wanted[name]).abs().max() < 1e-5 * scale
            assert bool(wanted[name].any()) == bool(keep)


@pytest.mark.parametrize("mode", CONTROLLED)
def test_every_map_of_a_union_counts(pipeline, mode):
    values = given(mode)
    net = pipeline.controlnet.nets[""]
    check_controls(pipeline, values, [net, net])
    strong = values | {"controlnet_conditioning_scale": [0.4, 50.0]}
    first, second = values["control_image"]
    made = [
        pipeline(**strong | {"control_image": [first, other]}, seed=7).images[0].tobytes()
        for other in (second, picture(WIDTH, HEIGHT, seed=9))
    ]
    assert made[0] != made[1]


@pytest.mark.parametrize("mode", CONTROLLED)
def test_nets_of_any_depth_and_guidance_add_up(pipeline, small_config, tmp_path, mode):
    """A deep net, one without single blocks and without guidance, and a union beside them."""
    shallow = {"num_layers": 1, "num_single_layers": 0, "guidance_embeds": False}
    folders = {
        "depth": random_net(small_config, tmp_path / "shallow", 4, **shallow),
        "line": random_net(small_config, tmp_path / "deep", 5, num_mode=10),
    }
    both = Qwen2VLFluxPipeline(pipeline.models, pipeline.settings).load_controlnet(folders)
    values = given(mode)
    turned = {name: values[name][::-1] for name in values if name.startswith("control") and name[-3:] != "end"}
    nets = both.controlnet.nets
    # the net that reads the guidance comes first, and its map is drawn first
    check_controls(both, values | turned, [nets["line"], nets["depth"]])
    assert both(**values, seed=7).images[0].tobytes() == both(**values | turned, seed=7).images[0].tobytes()


def test_nets_that_read_pixels_and_latents_do_not_mix(pipeline, small_config, tmp_path):
    folders = {
        "depth": random_net(small_config, tmp_path / "pixels", 4, conditioning_embedding_channels=4),
        "line": random_net(small_config, tmp_path / "latents", 5),
    }
    both = Qwen2VLFluxPipeline(pipeline.models, pipeline.settings).load_controlnet(folders)
    with pytest.raises(UserError, match="some of these ControlNets read pixels.*give nets of one sort"):
        both(**given("controlnet"))


@pytest.mark.parametrize("mode", CONTROLLED)
def test_a_net_for_one_kind_is_diffusers_own(pipeline, small_config, tmp_path, mode):
    random_net(small_config, tmp_path / "net")
    values = given(mode) | {
        "control_image": picture(WIDTH, HEIGHT, seed=3),
        "control_mode": "depth",
        "controlnet_conditioning_scale": 0.4,
    }
    ours = Qwen2VLFluxPipeline(pipeline.models, pipeline.settings).load_controlnet(str(tmp_path / "net"))
    made = values_of(ours(**values, seed=7).images[0])
    kind = {
        "controlnet": FluxControlNetPipeline,
        "controlnet-img2img": FluxControlNetImg2ImgPipeline,
        "controlnet-inpaint": FluxControlNetInpaintPipeline,
    }[mode]
    pipeline.models.trainable.configure(False)
    embeds = prompt_embeds(pipeline.encode_all([Reference(values["reference"])]), Weighting(), 7)
    plain = kind(
        FlowMatchEulerDiscreteScheduler.from_config(pipeline.models.scheduler.config),
        pipeline.models.vae,
        None,
        None,
        None,
        None,
        pipeline.models.trainable.transformer,
        ours.controlnet.nets[""],
    )
    plain.set_progress_bar_config(disable=True)
    more = {key: values[key] for key in ("image", "strength", "mask_image") if key in values}
    want = plain(
        prompt_embeds=embeds.prompt_embeds,
        pooled_prompt_embeds=pipeline.models.pooled_projections,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        generator=[torch.Generator().manual_seed(7)],
        control_image=values["control_image"],
        controlnet_conditioning_scale=0.4,
        control_guidance_end=0.8,
        **more,
    ).images[0]
    assert np.abs(made - values_of(want)).max() <= 1
    without = ours(**values | {"controlnet_conditioning_scale": 0.0}, seed=7).images[0]
    assert np.abs(made - values_of(without)).max() > 8


def test_nets_for_one_kind_each(pipeline, small_config, tmp_path):
    values = given("controlnet")
    folders = {kind: random_net(small_config, tmp_path / kind, seed) for seed, kind in enumerate(("depth", "line"))}
    two = Qwen2VLFluxPipeline(pipeline.models, pipeline.settings)
    both = two.load_controlnet(folders)(**values, seed=1).images[0].tobytes()
    one = (
        two(
            **values
            | {
                "control_image": values["control_image"][:1],
                "control_mode": ["depth"],
                "controlnet_conditioning_scale": [0.4],
            },
            seed=1,
        )
        .images[0]
        .tobytes()
    )
    assert both != one
    with pytest.raises(UserError, match="control tile: no ControlNet for it; loaded are depth, line"):
        two(**values | {"control_mode": ["depth", "tile"]})


def test_a_maps_values_are_no_colours(pipeline):
    """A profile, as image editors attach them, would bend the depths of a map given in Python."""
    plain = picture(WIDTH, HEIGHT)
    tagged = plain.copy()
    tagged.info["icc_profile"] = DISPLAY_P3
    notes: list[str] = []
    fitted = [
        pipeline._control(ControlMaps([one], ["depth"], [0.5], 0.0, 1.0), (HEIGHT, WIDTH), notes).images[0]
        for one in (plain, tagged)
    ]
    assert np.array_equal(*map(np.asarray, fitted)) and notes == []
    assert tagged.info["icc_profile"] == DISPLAY_P3
