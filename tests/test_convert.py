"""The authors' layout <-> an export, on a tiny folder of exactly that layout; T5's text path through FLUX and ControlNet."""

import json
import pickle
import shutil

from pathlib import Path

import numpy as np
import pytest
import torch

from megaflux.common import compat  # noqa: F401  (before diffusers and transformers)
from diffusers import FluxControlNetModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from megaflux.infer import __main__ as infer
from megaflux import Qwen2VLFluxPipeline, Reference, convert
from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.generation.condition import encode, prompt_embeds
from megaflux.generation.dots.dots import NEUTRAL, Weighting
from megaflux.generation.request import ConditionRequest
from megaflux.models.latents import image_ids, text_ids
from megaflux.models.pretrained import load_vlm
from megaflux.models.vlm_folder import open_vlm, rewrite_as_published
from megaflux.models.t5 import image_tokens_only, split_context
from megaflux.runs import load_pipeline
from tests import forked
from tests.conftest import picture, small_values
from tests.models.test_vlm_folder import edit, flat_config, template_in_json, transformers_5
from tests.release_by_hand import ByHand
from tests.training.test_init import begun

JOINT, WIDTH, HIDDEN = 24, 32, 32


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """T5's special tokens around a vocabulary of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "at", "night", "in", "the", "snow"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def files_of_transformers_4_45(folder: Path) -> None:
    flat_config(folder)
    edit(folder / "config.json", lambda c: c.update(architectures=["Qwen2VLForConditionalGeneration"]))
    template_in_json(folder)
    (folder / "video_preprocessor_config.json").unlink()
    kept = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "processor_class")
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    values = {name: stored[name] for name in kept} | {"min_pixels": 3136, "max_pixels": 12845056}
    values["image_processor_type"] = "Qwen2VLImageProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def release(tmp_path_factory, published) -> Path:
    """flux/ and qwen2-vl/ as the authors ship them, tiny, every tensor random."""
    root = tmp_path_factory.mktemp("release") / "qwen2vl-flux"
    shutil.copytree(published["flux"], root / "flux")
    shutil.copytree(published["qwen"], root / "qwen2-vl")
    files_of_transformers_4_45(root / "qwen2-vl")
    with torch.random.fork_rng():
        torch.manual_seed(8)
        config = T5Config(vocab_size=11, d_model=JOINT, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        T5EncoderModel(config).to(torch.bfloat16).save_pretrained(root / "flux/text_encoder_2")
        t5_tokenizer().save_pretrained(root / "flux/tokenizer_2")
        connector = {"linear.weight": 0.2 * torch.randn(JOINT, HIDDEN), "linear.bias": 0.2 * torch.randn(JOINT)}
        torch.save({k: v.bfloat16() for k, v in connector.items()}, root / "qwen2-vl/connector.pt")
        embedder = {"weight": 0.2 * torch.randn(WIDTH, JOINT), "bias": 0.2 * torch.randn(WIDTH)}
        torch.save({k: v.bfloat16() for k, v in embedder.items()}, root / "qwen2-vl/t5_embedder.pt")
    return root


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "export"
    assert convert.main([str(release), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pipeline(converted) -> Qwen2VLFluxPipeline:
    return Qwen2VLFluxPipeline.from_pretrained(converted, torch.float64, "cpu")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by file and key."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        found |= {f"{file.relative_to(folder)}:{k}": v for k, v in load_file(file).items()}
    for file in sorted(folder.rglob("*.pt")):
        found |= {f"{file.relative_to(folder)}:{k}": v for k, v in torch.load(file, weights_only=True).items()}
    return found


def test_there_and_back_changes_no_bit(release, converted, tmp_path):
    back = tmp_path / "back"
    assert convert.main([str(converted), str(back)]) == 0
    before, after = tensors(release), tensors(back)
    assert set(before) == set(after) and len(before) > 60
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before)
    assert {
        "qwen2-vl/connector.pt:linear.weight",
        "qwen2-vl/connector.pt:linear.bias",
        "qwen2-vl/t5_embedder.pt:weight",
        "qwen2-vl/t5_embedder.pt:bias",
    } <= set(after)
    for file in release.rglob("*.*"):
        if file.suffix in (".json", ".txt"):
            content, again = (
                json.loads(f.read_text()) if f.suffix == ".json" else f.read_text()
                for f in (file, back / file.relative_to(release))
            )
            if file.name == "scheduler_config.json":  # which the release sets when it loads it
                assert content["shift"] == 3.0
                content["shift"] = 1.0
            assert content == again, file


def test_a_converted_release_is_its_parts(release, pipeline):
    connector = torch.load(release / "qwen2-vl/connector.pt", weights_only=True)
    assert torch.equal(pipeline.models.trainable.connector.weight, connector["linear.weight"].double())
    settings = pipeline.settings
    assert settings.text_encoders == ("t5",) and settings.sizes == "release" and settings.guidance == 3.5
    assert (settings.vlm_min_tokens, settings.vlm_max_tokens) == (512, 512)
    assert pipeline.source["released"] == "qwen2vl-flux"
    assert pipeline.models.scheduler.config.shift == 1.0  # the folder's is 3, and the released tool sets it
    # the reference has about 512 tokens alone and 256 beside a T5 prompt, whatever its size
    for size in ((64, 64), (1500, 1000)):
        (alone,) = pipeline.encode_all([Reference(picture(*size))]).references
        (beside,) = pipeline.encode_all([Reference(picture(*size))], "a red fox").references
        assert 480 <= alone.hidden_states.shape[1] <= 512 + 32 and 240 <= beside.hidden_states.shape[1] <= 256 + 24
    (fewer,) = pipeline.encode_all([Reference(picture(1500, 1000))], "a red fox", reference_tokens=100).references
    assert 80 <= fewer.hidden_states.shape[1] <= 100  # fewer than these weights' least


def velocity(pipeline, embeds, controls=None, **kwargs) -> torch.Tensor:
    model = pipeline.models.trainable
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 12, model.transformer.config.in_channels, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            timestep=torch.tensor([0.6]).double(),
            pooled_projections=pipeline.models.pooled_projections,
            guidance=torch.tensor([3.5]).double(),
            img_ids=image_ids(48, 64),
            txt_ids=text_ids(embeds.shape[1]),
            return_dict=False,
            **kwargs,
        )[0]


@pytest.mark.parametrize("kernels", [True, False])
def test_t5_tokens_pass_their_own_linear_after_the_image_tokens(pipeline, kernels):
    model, t5 = pipeline.models.trainable, pipeline.models.t5
    model.configure(kernels)
    try:
        encoded = pipeline.encode_all([Reference(picture(64, 64))], "a red fox at night")
        embeds = prompt_embeds(encoded, NEUTRAL, 0, t5.embedder)
        n = embeds.num_own_tokens
        assert encoded.t5.shape == (1, 256, JOINT) and embeds.prompt_embeds.shape[1] == n + 256
        assert (
            encoded.text is None and n == encoded.references[0].hidden_states.shape[1]
        )  # Qwen2-VL does not read it too
        raw = prompt_embeds(
            pipeline.encode_all([Reference(picture(64, 64))], "a red fox at night", for_controlnet=True),
            NEUTRAL,
            0,
            t5.embedder,
        )
        # by hand: the image tokens through context_embedder, T5's through their linear, joined
        with torch.no_grad():
            ids = t5.tokenizer(
                ["a red fox at night"], padding="max_length", max_length=256, return_tensors="pt"
            ).input_ids
            tokens = t5.encoder(input_ids=ids).last_hidden_state
            own = model.transformer.context_embedder(raw.prompt_embeds[:, :n])
            joined = torch.cat([own, torch.nn.functional.linear(tokens, t5.embedder.weight, t5.embedder.bias)], 1)
        real = model.transformer.context_embedder
        model.transformer.context_embedder = torch.nn.Identity()
        want = velocity(pipeline, joined)
        model.transformer.context_embedder = real
        with split_context(model.transformer, t5.embedder, n):
            ours = velocity(pipeline, raw.prompt_embeds)
        assert (ours - want).abs().max() < 1e-12 * want.abs().max()
        if kernels:  # embedded beforehand, as a run without a ControlNet does
            given = velocity(pipeline, embeds.prompt_embeds, joint_attention_kwargs={"context_embedded": True})
            assert (given - want).abs().max() < 1e-11 * want.abs().max()
        assert (
            model.transformer.context_embedder is real and "context_embedder.weight" in model.transformer.state_dict()
        )
        with pytest.raises(ZeroDivisionError), split_context(model.transformer, t5.embedder, n):
            raise ZeroDivisionError
        assert model.transformer.context_embedder is real
    finally:
        model.configure(True)


def test_the_prompt_matters_and_is_cut_at_256(pipeline, converted, tmp_path, capsys):
    def made(prompt):
        return pipeline(picture(64, 64), prompt, 32, 32, 2, seed=1)

    fox, night, none = made("a red fox"), made("at night"), made(None)
    assert len({x.images[0].tobytes() for x in (fox, night, none)}) == 3
    assert any("1001 T5 tokens, cut to the first 256" in note for note in made("fox " * 1000).notes)
    picture(64, 64).save(tmp_path / "cat.png")
    arguments = [
        "--checkpoint",
        str(converted),
        "--reference",
        str(tmp_path / "cat.png"),
        "--prompt",
        "a red fox",
        "--width",
        "32",
        "--height",
        "32",
        "--steps",
        "1",
        "--count",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert infer.main(arguments) == 0
    assert infer.main(["--from-image", str(tmp_path / "out/cat-seed0.png"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again/cat-seed0.png").read_bytes()[-200:] == (tmp_path / "out/cat-seed0.png").read_bytes()[
        -200:
    ]
    # as the release: without a reference the image is one, also beside a prompt; stored, and so replayed
    picture(600, 60).save(tmp_path / "wide.png")
    released = ["--image", str(tmp_path / "wide.png"), "--release-compatible", *arguments[:2], *arguments[4:]]
    assert infer.main(released) == 0
    file = tmp_path / "out/wide-seed0.png"
    job = json.loads(Image.open(file).text["megaflux"])["job"]
    assert job["release_compatible"] and [Path(r["file"]).name for r in job["references"]] == ["wide.png"]
    assert infer.main(["--from-image", str(file), "--out", str(tmp_path / "again")]) == 0
    again = ["--from-image", str(file), "--no-release-compatible", "--out", str(tmp_path / "plain")]
    assert infer.main(again) == 0
    pixels = [Image.open(tmp_path / folder / "wide-seed0.png").tobytes() for folder in ("out", "again", "plain")]
    assert pixels[0] == pixels[1] != pixels[2]
    capsys.readouterr()
    assert infer.main([*arguments, "--dry-run"]) == 0
    assert "T5" in capsys.readouterr().out
    only = pipeline(None, "a red fox", 32, 32, 2, seed=1).images[0]  # T5 alone
    assert only.tobytes() != fox.images[0].tobytes()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("with_control", [False, True])
@pytest.mark.parametrize(("prompt", "negative"), [("a red fox", "at night"), ("", "at night"), ("a red fox", "")])
def test_true_guidance_reads_the_negative_prompt_as_the_prompt(
    pipeline, union, prompt, negative, with_control, kernels
):
    """By T5 alone, of which only the passes that have its tokens know; nothing is Qwen2-VL's empty condition."""
    models, flux, scale, calls = pipeline.models, pipeline.models.trainable.transformer, 2.5, []
    given = {"height": 48, "width": 64, "num_inference_steps": 2, "seed": 5, "output_type": "latent"}
    if with_control:
        pipeline.load_controlnet(str(union))
        given |= {"control_image": picture(64, 48), "control_mode": "line", "release_compatible": bool(prompt)}
    models.trainable.configure(kernels)
    hook = flux.register_forward_hook(lambda _, __, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True)
    try:
        pipeline(picture(64, 64), prompt, **given, negative_prompt=negative, true_cfg_scale=scale)
        hook.remove()
        models.trainable.configure(False)
        n = pipeline.encode_all([Reference(picture(64, 64))], prompt).references[0].hidden_states.shape[1]
        raw = prompt_embeds(pipeline.encode_all([Reference(picture(64, 64))], prompt), NEUTRAL, 0).prompt_embeds
        real, (call, found) = flux.context_embedder, calls[0]
        with torch.no_grad():
            towards = real(raw[:, :n])
            if prompt:
                towards = torch.cat([towards, models.t5.embedder(raw[:, n:])], 1)
            if negative:
                from_ = models.t5.embedder(models.t5.encode([negative]))
            else:
                from_ = real(models.trainable.encode_condition(models.trunk.encode(None, [""], "text")))
            assert towards.shape[1] == n + 256 * bool(prompt) and from_.shape[1] == (256 if negative else 1)
            flux.context_embedder, velocities = torch.nn.Identity(), []
            for tokens in (towards, from_):
                given = {"encoder_hidden_states": tokens, "txt_ids": text_ids(tokens.shape[1])}
                velocities.append(flux(**call | given | {"joint_attention_kwargs": None})[0])
        want = velocities[1] + scale * (velocities[0] - velocities[1])
        assert (found - want).abs().max() < 1e-7 * want.abs().max() and len(calls) == 2  # a norm in float32
        assert (velocities[0] - velocities[1]).abs().max() > 1e-3
    finally:
        hook.remove()
        flux.context_embedder = real
        models.trainable.configure(True)
        pipeline.controlnet = None


@pytest.fixture(scope="module")
def by_hand(release) -> ByHand:
    return ByHand(release)


@pytest.fixture(scope="module")
def union(small_config, tmp_path_factory) -> Path:
    """A tiny ControlNet-Union, every weight random."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = FluxControlNetModel(**small_config.model.flux_config, num_mode=10)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("union") / "net"
    net.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("prompt", "sizes"), [("", [(1500, 1000), (4000, 1000), (2400, 300)]), ("a red fox", [(64, 64), (1030, 500)])]
)
def test_release_compatible_tokens_are_the_releases(pipeline, by_hand, prompt, sizes):
    """Its image processor, and no shrinking beforehand: of any size and shape, also beyond 4:1."""
    for size in sizes:
        shown, differences = Reference(picture(*size)), []
        want = by_hand.image_tokens(shown.image, 256 if prompt else 512)
        for as_released in (True, False):
            request = ConditionRequest([shown], prompt, text_encoder="t5", as_released=as_released)
            (tokens,) = encode(pipeline.models, 1024, request).references
            same = tokens.hidden_states.shape == want.shape
            differences.append((tokens.hidden_states - want).abs().max() / want.abs().max() if same else np.inf)
        assert differences[0] < 1e-5
        if max(size) > 1024:  # as documented; beyond about 2.6:1 the grid is another one
            assert differences[1] > 1e-3


CASES = {
    "reference, image and prompt": (picture(300, 140, seed=3), "a red fox"),
    "reference and image": (picture(300, 140, seed=3), ""),
    "image and prompt": (None, "a red fox"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_control", [False, True])
def test_release_compatible_latents_are_the_releases(pipeline, by_hand, union, case, with_control):
    reference, prompt = CASES[case]
    image, line, depth = picture(48, 32, seed=4), picture(48, 32, seed=5), picture(48, 32, seed=6)
    given = {"image": image, "strength": 0.7, "num_inference_steps": 4, "height": 32, "width": 48, "seed": 5}
    maps = []
    pipeline.load_controlnet(str(union))
    if with_control:
        given |= {
            "control_image": [line, depth],
            "control_mode": ["line", "depth"],
            "controlnet_conditioning_scale": [0.4, 0.2],
        }
        net = pipeline.controlnet.nets[""]
        maps = [(net, line, 0, 0.4), (net, depth, 2, 0.2)]
    try:
        made = pipeline(reference, prompt, **given, release_compatible=True, output_type="latent")
        # beside a T5 prompt alone, a union has nothing to read by default
        plain = pipeline(reference or image, prompt, **given, output_type="latent").images
        pooled = pipeline.models.pooled_projections
        want = by_hand.sample(reference or image, prompt, image, maps, 0.7, 4, 5, pooled)
    finally:
        pipeline.controlnet = None
    assert made.images.shape == want.shape and made.images.dtype == torch.float64
    scale = max(1.0, float(want.abs().max()))
    assert (made.images - want).abs().max() < 1e-5 * scale
    if with_control and prompt:
        assert (plain - want).abs().max() > 1e-3 * scale


def test_release_compatible_forces_shift_1(pipeline):
    """Also on an export that was converted before convert wrote it."""
    given = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    want, own = pipeline(picture(64, 64), **given, release_compatible=True).images, pipeline.models.scheduler
    pipeline.models.scheduler = type(own).from_config(own.config, shift=3.0)
    try:
        assert torch.equal(pipeline(picture(64, 64), **given, release_compatible=True).images, want)
        asked = pipeline(picture(64, 64), **given, release_compatible=True, shift=3.0).images
        assert not torch.equal(asked, want) and not torch.equal(pipeline(picture(64, 64), **given).images, want)
    finally:
        pipeline.models.scheduler = own


def test_release_compatible_control_from_noise_reads_t5(pipeline, union):
    """Without an image to read, the net is given the reference's tokens, and T5's, in batches too."""
    net = pipeline.load_controlnet(str(union)).controlnet.nets[""]
    seen, block = [], net.transformer_blocks[0]
    hook = block.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["encoder_hidden_states"].shape[:2]), with_kwargs=True
    )
    common = {"height": 32, "width": 32, "num_inference_steps": 1, "control_image": picture(32, 32), "control_mode": 0}
    try:
        for reference, drop in ((picture(64, 64), 0.25), (None, 0.0)):
            n = 0
            if reference is not None:
                (tokens,) = pipeline.encode_all([Reference(reference)], "at night").references
                n = tokens.weights.numel() - int(drop * tokens.weights.numel())
            weighting = Weighting(variety=drop)
            more = {"num_images_per_prompt": 2, "batch_size": 2, "release_compatible": True, "weighting": weighting}
            made = pipeline(reference, "at night", **common, **more).images
            assert seen == [(2, 1 + n + 256)] and made[0].tobytes() != made[1].tobytes()
            seen.clear()
    finally:
        hook.remove()
        pipeline.controlnet = None


@pytest.mark.parametrize("kernels", [True, False])
def test_a_controlnet_sees_the_image_tokens_alone(pipeline, union, kernels):
    pipeline.load_controlnet(str(union))
    loaded, seen = pipeline.controlnet.nets[""], []
    real = loaded.context_embedder.forward
    loaded.context_embedder.forward = lambda x: seen.append(x.shape[1]) or real(x)
    pipeline.models.trainable.configure(kernels)
    try:
        common = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 2,
            "seed": 1,
            "control_image": picture(32, 32),
            "control_mode": "line",
        }
        prompted = pipeline(picture(64, 64), "a red fox", **common).images[0]
        (reference,) = pipeline.encode_all([Reference(picture(64, 64))], "a red fox").references
        assert set(seen) == {reference.hidden_states.shape[1]}
        other = pipeline(picture(64, 64), "at night", **common).images[0]
        assert prompted.tobytes() != other.tobytes()
        with pytest.raises(UserError, match="a prompt read by T5 has none; give a reference"):
            pipeline(None, "at night", **common)
    finally:
        pipeline.models.trainable.configure(True)
        pipeline.controlnet = None
    with pytest.raises(ZeroDivisionError), image_tokens_only(loaded, 3):
        raise ZeroDivisionError
    assert "forward" not in vars(loaded)


def test_a_saved_pipeline_keeps_t5(pipeline, tmp_path):
    want = pipeline(picture(64, 64), "a red fox", 32, 32, 2, seed=1).images[0].tobytes()
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(tmp_path / "saved", dtype=torch.float64, device="cpu")
    assert again(picture(64, 64), "a red fox", 32, 32, 2, seed=1).images[0].tobytes() == want


def test_an_export_of_our_own_goes_back_with_a_flux_folder(export_folder, published, release, tmp_path):
    with pytest.raises(UserError, match="holds no CLIP.*--flux"):
        convert.main([str(export_folder), str(tmp_path / "out")])
    assert convert.main([str(export_folder), str(tmp_path / "out"), "--flux", str(published["flux"])]) == 0
    assert (tmp_path / "out/flux/text_encoder/model.safetensors").is_file()
    assert not (tmp_path / "out/qwen2-vl/t5_embedder.pt").exists()
    assert "text_config" not in json.loads((tmp_path / "out/qwen2-vl/config.json").read_text())
    ours = load_pipeline(export_folder, dtype=torch.float32, device="cpu")
    weight = torch.load(tmp_path / "out/qwen2-vl/connector.pt", weights_only=True)["linear.weight"]
    assert torch.equal(weight, ours.models.trainable.connector.weight)


@pytest.mark.parametrize("dress", [None, transformers_5])
def test_qwens_files_go_back_as_published(export_folder, release, tmp_path, dress):
    """Without nested or newer fields: transformers 4.45, which the authors pin, would take its defaults for them."""
    folder = Path(shutil.copytree(export_folder / "text_encoder", tmp_path / "qwen"))
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]  # exports hold it already
    assert template == (folder / "chat_template.jinja").read_text()
    if dress is not None:
        dress(folder)
        (folder / "chat_template.json").unlink()
    before = open_vlm(str(folder))
    rewrite_as_published(folder)
    config, processor, known = (
        json.loads((place / f"{name}.json").read_text())
        for place, name in ((folder, "config"), (folder, "preprocessor_config"), (release / "qwen2-vl", "config"))
    )
    later = {"text_config", "rope_parameters", "layer_types", "dtype"}
    assert known.keys() <= config.keys() and not later & config.keys()
    assert config["model_type"] == "qwen2_vl" and config["torch_dtype"] == "float32"
    assert config["rope_scaling"] == known["rope_scaling"] and config["rope_theta"] == known["rope_theta"] == 3.0
    assert processor["image_processor_type"] == "Qwen2VLImageProcessor" and None not in processor.values()
    size = before.processor.image_processor.size
    limits = size["shortest_edge"], size["longest_edge"]
    assert (processor["min_pixels"], processor["max_pixels"]) == limits and "size" not in processor
    assert json.loads((folder / "chat_template.json").read_text())["chat_template"] == template
    after = open_vlm(str(folder))
    ours, theirs = (load_vlm(f)[0].state_dict() for f in (after, before))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("hidden_size", "num_hidden_layers", "rope_scaling", "rope_theta", "rms_norm_eps", "vocab_size"):
        assert getattr(after.config.text_config, name) == getattr(before.config.text_config, name), name
    assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == {"model", "visual"}
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    rewrite_as_published(folder)
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}  # there is nothing left to do


def test_keys_of_distributed_training_are_read(release, tmp_path):
    shutil.copytree(release, tmp_path / "src")
    file = tmp_path / "src/qwen2-vl/connector.pt"
    torch.save({f"module.{k}": v for k, v in torch.load(file, weights_only=True).items()}, file)
    assert convert.main([str(tmp_path / "src"), str(tmp_path / "out")]) == 0


class Bomb:
    def __reduce__(self):
        return (Path("/tmp/megaflux-pickle-ran").touch, ())


def damage(root: Path, how: str) -> str:
    """Break a copied release; returns what the error must say."""
    connector, t5 = root / "qwen2-vl/connector.pt", root / "qwen2-vl/t5_embedder.pt"
    content = torch.load(connector, weights_only=True)
    if how == "no connector":
        connector.unlink()
        return "connector.pt: missing"
    if how == "missing key":
        torch.save({"linear.weight": content["linear.weight"]}, connector)
        return "connector.pt: missing key linear.bias"
    if how == "extra key":
        torch.save(content | {"linear.scale": torch.ones(1)}, connector)
        return "connector.pt: unexpected key linear.scale"
    if how == "wrong shape":
        torch.save(content | {"linear.bias": torch.ones(3)}, connector)
        return r"connector.pt: linear.bias has the shape \(3,\), not \(24,\)"
    if how == "not a dictionary":
        torch.save([1, 2], connector)
        return "connector.pt: holds no dictionary"
    if how == "truncated":
        t5.write_bytes(t5.read_bytes()[:100])
        return "t5_embedder.pt: holds more than tensors, or is damaged"
    if how == "empty":
        t5.write_bytes(b"")
        return "t5_embedder.pt: .*damaged"
    if how == "a pickle":
        connector.write_bytes(pickle.dumps({"linear.weight": Bomb()}))
        return "connector.pt: holds more than tensors"
    if how == "a pickle inside":
        torch.save(content | {"linear.bias": Bomb()}, connector)
        return "connector.pt: holds more than tensors"
    if how == "no clip":
        shutil.rmtree(root / "flux/text_encoder")
        return "flux/text_encoder: missing"
    if how == "no flux":
        shutil.rmtree(root / "flux")
        return "flux: missing"
    file = (
        root
        / {
            "transformer": "flux/transformer/diffusion_pytorch_model.safetensors",
            "t5": "flux/text_encoder_2/model.safetensors",
            "qwen": "qwen2-vl/model.safetensors",
        }[how]
    )
    weights = load_file(file)
    gone = sorted(k for k in weights if "lm_head" not in k and "embed_tokens" not in k)[0]
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    return "missing key"


@pytest.mark.parametrize(
    "how",
    [
        "no connector",
        "missing key",
        "extra key",
        "wrong shape",
        "not a dictionary",
        "truncated",
        "empty",
        "a pickle",
        "a pickle inside",
        "no clip",
        "no flux",
        "transformer",
        "t5",
        "qwen",
    ],
)
def test_a_damaged_release_is_one_line_and_nothing_is_written(release, tmp_path, how):
    shutil.copytree(release, tmp_path / "src")
    said = damage(tmp_path / "src", how)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said) as caught:
        convert.main([str(tmp_path / "src"), str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before
    assert not Path("/tmp/megaflux-pickle-ran").exists()


def test_bad_arguments(release, converted, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        convert.main([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    with pytest.raises(UserError, match="exists"):
        convert.main([str(release), str(converted)])
    with pytest.raises(UserError, match="--flux: is for converting an export"):
        convert.main([str(release), str(tmp_path / "out"), "--flux", str(release / "flux")])
    done = forked.run(["-m", "megaflux.convert", str(tmp_path), str(tmp_path / "out")])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_without_t5_it_is_left_out_and_said(release, tmp_path, capsys):
    shutil.copytree(release, tmp_path / "src")
    (tmp_path / "src/qwen2-vl/t5_embedder.pt").unlink()
    assert convert.main([str(tmp_path / "src"), str(tmp_path / "out")]) == 0
    assert "no T5 text path: t5_embedder.pt is missing" in capsys.readouterr().out
    loaded = load_pipeline(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert loaded.models.t5 is None and loaded.settings.text_encoders == ("qwen",)
    assert np.array(loaded(picture(64, 64), None, 32, 32, 1).images[0]).shape == (32, 32, 3)


def test_a_run_begins_from_a_converted_release(converted, published, tmp_path):
    """model.init: over a FLUX.1 with other weights, the release's own; its pictures at the first update."""
    flux = shutil.copytree(published["flux"], tmp_path / "flux")
    file = flux / "transformer/diffusion_pytorch_model.safetensors"
    changed = load_file(file)
    changed["proj_out.weight"] += 1
    save_file(changed, file, {"format": "pt"})
    values = small_values() | {"run": {"dir": str(tmp_path / "run"), "seed": 1}}
    values["model"] |= {"flux": str(flux), "vlm": str(published["qwen"]), "vae": None, "init": str(converted)}
    config = build_config(values)
    theirs = Qwen2VLFluxPipeline.from_pretrained(converted, torch.float32, "cpu")
    models = begun(config)
    stored = {name for part in (tmp_path / "run/init").glob("*.safetensors") for name in load_file(part)}
    # This FLUX.1 is stored in float32, which the release's pictures see and a run's base does not; its Qwen2-VL in bfloat16.
    assert {"transformer.proj_out.weight", "connector.bias"} < stored and not any(n.startswith("vlm.") for n in stored)
    models.trunk.min_image_tokens, models.trunk.max_image_tokens = 512, 512  # its settings, not its weights
    models.scheduler = theirs.models.scheduler  # as are the scheduler's
    ours = Qwen2VLFluxPipeline(models, theirs.settings)
    made = [p(picture(64, 64), None, 64, 64, 2, seed=3, output_type="pt").images for p in (ours, theirs)]
    assert torch.equal(*made)
