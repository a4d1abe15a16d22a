"""The shipped assets of the preset `tiny`: two VAEs, a Qwen2-VL, a start and two tokenizers, loaded as the libraries load them."""

from __future__ import annotations

import copy
import json
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import megaflux
from launch import tiny_flux_lessons, tiny_vlm_figures, tiny_vlm_model, tiny_vlm_pictures, train_random, train_tiny_flux
from megaflux import flow, runs
from megaflux.common import compat  # noqa: F401  before diffusers and transformers
from megaflux.common.errors import UserError
from megaflux.common.paths import SHIPPED, SHIPPED_ICONS
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.data.buckets import ASPECT_RATIOS, make_buckets
from megaflux.data.writing.cells import held_out_cells
from megaflux.data.writing.chunks import is_held_out
from megaflux.data.writing.openmoji import OpenMoji, caption_of
from megaflux.data.writing.options import OPENMOJI_DEFAULTS
from megaflux.export import export
from megaflux.infer import parts
from megaflux.infer.request import to_runtime
from megaflux.models import latents, scratch, shipped
from megaflux.models.chat_turn import ChatTurns
from megaflux.models.pretrained import load_models, load_vae, meta_models
from megaflux.models.reading import dtypes, shapes
from megaflux.models.sources import model_problems
from megaflux.training.planning import costs
from tests.conftest import small_values, write_run

from diffusers import AutoencoderKL  # isort: skip  (after compat)
from transformers import (  # isort: skip
    AutoTokenizer,
    CLIPTokenizer,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorFast,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

TINY = Path(megaflux.__file__).parent / "assets" / "tiny"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": "Describe this image."}


def render(held_out: bool, every: int) -> list[np.ndarray]:
    """Every `every`-th picture of a split of the demo's data set; one array (N, H, W, 3) uint8 per canvas."""
    source = OpenMoji(make_buckets(ASPECT_RATIOS, OPENMOJI_DEFAULTS["longest_side"]))
    items = [
        item for item in source.list_items() if is_held_out(item.split_key, OPENMOJI_DEFAULTS["held_out"]) is held_out
    ][::every]
    images = sorted((np.asarray(loaded.image) for loaded in source.read(items)), key=lambda image: image.shape)
    return [np.stack(list(group)) for _, group in groupby(images, key=lambda image: image.shape)]


def to_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module", params=[SHIPPED, SHIPPED_ICONS])
def vae(request) -> AutoencoderKL:
    return load_vae(request.param, None).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2TokenizerFast:
    return Qwen2TokenizerFast.from_pretrained(TINY / "tokenizer")


def test_vae_has_flux_form_and_fits(vae):
    config = vae.config
    assert not config.use_quant_conv and not config.use_post_quant_conv
    assert config.scaling_factor and config.shift_factor is not None
    assert 2 ** (len(config.block_out_channels) - 1) == 8  # downsampling
    for folder in shipped.VAES.values():
        assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size <= 2_000_000
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())


@pytest.mark.parametrize("name", shipped.VAES)
def test_each_shipped_vae_is_found_by_its_name(name, tmp_path):
    config = build_config(merge(tiny(), {"model": {"vae": name}}))
    scale = json.loads((shipped.VAES[name] / "config.json").read_text())["scaling_factor"]
    assert load_vae(name, None).config.scaling_factor == costs.vae_config(config)["scaling_factor"] == scale
    assert parts._vae_part(config.model).parameters and not list(model_problems(config.model))
    assert to_runtime({"checkpoint": str(tmp_path), "vae": name}).vae == name
    random = config.model_copy(update={"model": config.model.model_copy(update={"vlm": None})})
    assert not [line for line in train_random.problems(random, {}, 1) if "model.vae" in line]


@torch.no_grad()
def test_vae_reconstructs_held_out_emoji(vae):
    values = []
    for images in render(held_out=True, every=6):
        pixels = to_pixels(images)
        latents = vae.encode(pixels).latent_dist.mode()
        assert latents.shape[2:] == (pixels.shape[2] // 8, pixels.shape[3] // 8)
        output = vae.decode(latents).sample.clamp(-1, 1)
        values.append(-10 * ((output - pixels) / 2).square().mean(dim=(1, 2, 3)).log10())
        assert values[-1].mean() >= 24, f"{images.shape[1:3]}: {values[-1].mean():.2f} dB"
    assert torch.cat(values).mean() >= 24


@torch.no_grad()
def test_the_vae_of_the_icons_reconstructs_better():
    squares = next(images for images in render(held_out=True, every=3) if images.shape[1] == images.shape[2])
    pixels, errors = to_pixels(squares), {}
    for name in shipped.VAES:
        vae = load_vae(name, None).eval()
        errors[name] = (vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1) - pixels).square().mean()
    assert errors[SHIPPED_ICONS] < 0.85 * errors[SHIPPED]


@torch.no_grad()
def test_scaled_latents_have_zero_mean_and_unit_variance(vae):
    latents = [vae.encode(to_pixels(images)).latent_dist.mode() for images in render(held_out=False, every=60)]
    scaled = (torch.cat([part.flatten() for part in latents]) - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(scaled.mean()) < 0.1
    assert abs(scaled.std() - 1) < 0.1


@torch.no_grad()
def test_encoding_does_not_depend_on_the_batch(vae):
    pixels = to_pixels(np.concatenate(render(held_out=True, every=60)[-1:]))
    together = vae.encode(pixels).latent_dist.mode()
    alone = torch.cat([vae.encode(one[None]).latent_dist.mode() for one in pixels])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "text", ["woman, medium skin tone, personal computer", "Grüße 😀 1,234\n\n  x", "flag of country code fr"]
)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_small_and_normalises_as_qwen(tokenizer):
    assert type(AutoTokenizer.from_pretrained(TINY / "tokenizer")) is Qwen2TokenizerFast
    assert len(tokenizer) <= 8000
    assert sum(path.stat().st_size for path in (TINY / "tokenizer").iterdir()) < 500_000
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("\u00e9")["input_ids"]  # NFC
    assert len(tokenizer("2024")["input_ids"]) == 4  # digits one by one


def test_special_tokens_are_single_ids(tokenizer):
    ids = [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS]
    assert all(len(one) == 1 for one in ids)
    assert sorted(one[0] for one in ids) == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_captions_cost_few_tokens(tokenizer):
    captions = [caption_of(code) for code in ("1F408", "1F600", "1F469-1F3FD-200D-1F4BB")]
    assert [len(tokenizer(caption)["input_ids"]) for caption in captions] == [1, 2, 8]


def test_chat_template_is_qwen2_vls(tokenizer):
    caption = {"type": "text", "text": "a cat"}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [caption, IMAGE, QUESTION]}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\na cat<|vision_start|><|image_pad|><|vision_end|>Describe this image.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert len(tokenizer(text)["input_ids"]) <= 30


def test_chat_template_with_system_message_turns_and_numbered_pictures(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "video"}, IMAGE, QUESTION]},
        {"role": "assistant", "content": "A cat."},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_vision_id=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|>"
        "Picture 2: <|vision_start|><|image_pad|><|vision_end|>Describe this image.<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )


def test_processor_repeats_the_image_token(tokenizer):
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorFast(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )
    turns = [{"role": "user", "content": [IMAGE, QUESTION]}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    picture = torch.zeros(3, 112, 112, dtype=torch.uint8)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (inputs["input_ids"] == image_id).sum() == inputs["image_grid_thw"].prod() // 4


def test_clip_tokenizer_pads_the_empty_prompt():
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "clip_tokenizer")
    ids = tokenizer("", padding="max_length", max_length=77, truncation=True)["input_ids"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids == [begin] + [end] * 76  # CLIP pads with its end of text
    assert end == len(tokenizer) - 1  # CLIP finds the end as the highest id
    assert tokenizer("a cat")["input_ids"][0] == begin


# --- Qwen2-VL ---


def test_the_shipped_qwen2vl_is_small_and_has_the_presets_sizes():
    file = shipped.VLM / "model.safetensors"
    assert sum(path.stat().st_size for path in shipped.VLM.iterdir()) <= 5_000_000
    assert set(dtypes(file).values()) == {"BF16"} and "lm_head.weight" not in dtypes(file)
    with torch.device("meta"):
        model = Qwen2VLModel(
            scratch.vlm_configuration(tiny()["model"]["vlm_config"], scratch.tiny_processor().tokenizer)
        )
    assert shapes(file) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shipped.vlm_problem(tiny()["model"]["vlm_config"]) is None


@pytest.mark.parametrize("asset", [shipped.VLM, shipped.START, shipped.VAES[SHIPPED_ICONS]], ids=lambda path: path.name)
def test_what_is_shipped_was_trained_on_no_picture_that_is_held_out_anywhere(asset):
    """Of the second VAE its further training: the first one, from which it begins, saw the demo's training emoji alone."""
    demo, cells, grid = tiny_vlm_pictures.read_seen(asset / "seen.txt.gz")
    codes = {item.split_key for item in OpenMoji(make_buckets(ASPECT_RATIOS, 128), 1.25).list_items()}
    held_codes = {code for code in codes if is_held_out(code, OPENMOJI_DEFAULTS["held_out"])}
    held_cells = held_out_cells(grid.names, grid.styles, 0.1, 0.02)
    assert len(demo) > 3000 and len(cells) > 4000 and len(grid.names) == 1034 and len(grid.styles) == 5
    assert not demo & held_codes and not cells & held_cells

    def same(code: str) -> str:  # whatever its skin tone
        return re.sub("-(FE0F|1F3F[B-F])(?=-|$)", "", code.upper())

    # OpenMoji's drawings are in both, by code and by name.
    drawn = {name: {same(code) for code in grid.codes[name]} for name in grid.names}
    assert all(drawn.values())
    kept = set().union(*(drawn[name] for name, style in held_cells if style == "openmoji"))
    assert not {same(code) for code in demo} & kept
    seen_drawings = set().union(*(drawn[name] for name, style in cells if style == "openmoji"))
    assert not seen_drawings & {same(code) for code in held_codes}
    # And nothing else was left out, but for long captions by the start.
    split = tiny_vlm_pictures.split_pictures(codes, grid)
    most = tiny_flux_lessons.MOST_TOKENS if asset == shipped.START else 99
    chat = ChatTurns(scratch.tiny_processor(), 0, "tiny")

    def short(caption: str) -> bool:
        return len(chat.caption(caption)) <= most

    assert cells == {cell for cell in split.cells if short(cell[0].replace("-", " "))}
    expected = {code for code in split.demo if short(caption_of(code))}
    assert demo & codes <= expected and len(expected - demo) < 30  # newer Unicode


def test_the_shipped_start_is_small_and_of_the_presets_sizes():
    assert sum(path.stat().st_size for path in shipped.START.iterdir()) <= 6_000_000
    assert set(dtypes(shipped.START_WEIGHTS).values()) == {"BF16"}
    assert shipped.start_sizes() == tiny()["model"]["flux_config"]


@torch.no_grad()
def test_the_shipped_start_hears_held_out_pictures_and_their_names():
    """Their loss beside their own condition is lower than beside others. docs/tiny-assets.md has the figures of all of them."""
    models = load_models(train_tiny_flux.configuration())
    train_tiny_flux.read(models, shipped.START)
    source = OpenMoji(make_buckets(ASPECT_RATIOS, 128), 1)
    items = [item for item in source.list_items() if is_held_out(item.split_key, 0.05)][:64]
    loaded = list(source.read(items))
    pixels = torch.from_numpy(np.stack([np.asarray(one.image) for one in loaded])).permute(0, 3, 1, 2)
    x = latents.pack(latents.encode(models.vae, pixels).float())
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = (torch.arange(len(x)) + 0.5) / len(x)
    names = models.trunk.encode(None, [one.caption.texts[0] for one in loaded], "text")

    def loss(condition):
        pooled, guidance = models.pooled_projections.expand(len(x), -1), torch.ones(len(x))
        ids = latents.image_ids(128, 128)
        velocity = models.trainable(condition, flow.interpolate(x, noise, t), t, ids, pooled, guidance)
        return flow.velocity_loss(velocity, flow.velocity_target(x, noise)).mean().item()

    for own, most in ((names, 0.45), (models.trunk.encode(pixels), 0.25)):
        assert loss(own) < most and loss(own) * 1.5 < loss(own.rows([*range(32, 64), *range(32)]))


def test_the_shipped_qwen2vl_knows_held_out_pictures_by_their_names():
    """docs/tiny-assets.md has the figures of all of them."""
    source = OpenMoji(make_buckets(ASPECT_RATIOS, 128), 1)
    items = [item for item in source.list_items() if is_held_out(item.split_key, 0.05)][::2]
    loaded = list(source.read(items))
    pictures = tiny_vlm_pictures.Pictures(
        np.stack([np.asarray(one.image) for one in loaded]), [one.caption.texts[0] for one in loaded], []
    )
    trained = tiny_vlm_figures.measure(tiny_vlm_model.load(shipped.VLM, 0), pictures)
    assert trained["pictures"] > 100
    assert min(trained["retrieval_trunk"], trained["retrieval_whole"]) > 0.4 and trained["token"] > 0.7


def test_a_run_on_the_shipped_qwen2vl_is_exported_with_it_and_one_on_a_drawn_one_without(tmp_path):
    weights = load_file(shipped.VLM / "model.safetensors")
    name = "visual.merger.mlp.0.weight"
    drawn = small_values()
    values = drawn | {"model": drawn["model"] | {"vlm": "tiny", "vlm_config": tiny()["model"]["vlm_config"]}}
    run = runs.find(write_run(tmp_path / "run", values, updates=(8,)))
    export(run, tmp_path / "export")
    stored = load_file(tmp_path / "export/text_encoder/model.safetensors")
    found = next(value for key, value in stored.items() if key.endswith(name))
    assert torch.equal(found.float(), weights[name].float())
    assert not any("lm_head" in key for key in stored)
    trainable, trunk = meta_models(run.config)
    assert trunk.get_submodule("visual.merger.mlp.0").weight.shape == weights[name].shape
    assert trainable.vlm.config.hidden_size == 192


def test_other_sizes_than_the_shipped_qwen2vls_are_refused_in_one_line():
    model = copy.deepcopy(tiny()["model"])
    model["vlm_config"]["text_config"]["hidden_size"] = 96
    config = build_config(tiny() | {"model": model})
    with pytest.raises(
        UserError, match=r"^model.vlm_config.text_config.hidden_size: 96, but the shipped .* has 192; .*"
    ):
        load_models(config)
    drawn = build_config(tiny() | {"model": model | {"vlm": None}})
    assert not list(model_problems(drawn.model)) and len(list(model_problems(config.model))) == 1
    model["vlm_config"]["text_config"] = tiny()["model"]["vlm_config"]["text_config"] | {"initializer_range": 1.0}
    assert shipped.vlm_problem(model["vlm_config"]) is None  # says how weights are drawn
