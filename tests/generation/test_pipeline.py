"""The pipeline computes training's condition, a picture depends on its own seed alone, and broken exports are refused."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megaflux.common.errors import UserError
from megaflux.data.buckets import Bucket, make_buckets
from megaflux.data.tensors import from_image, from_stored_image
from megaflux.generation.dots.dots import Weighting
from megaflux.generation.inputs import reference_tensor
from megaflux.generation.job import Job, JobControl, JobReference, check
from megaflux.generation.layout import Settings
from megaflux.generation.pipeline import Qwen2VLFluxPipeline
from megaflux.generation.request import Reference, output_size
from megaflux.runs import load_pipeline
from tests.conftest import picture
from tests.icc_profiles import DISPLAY_P3

STEPS = 2


@pytest.fixture(scope="module")
def pipeline(run_folder) -> Qwen2VLFluxPipeline:
    return load_pipeline(run_folder, dtype=torch.float32, device="cpu")


def png(image: Image.Image, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **kwargs)
    return buffer.getvalue()


def same_condition(ours, theirs) -> bool:
    pairs = [(value, getattr(theirs, name)) for name, value in vars(ours).items()]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("aspect", ["16:9", "1:1", "1:2"])
@pytest.mark.parametrize("caption", ["", "a red fox"])
def test_condition_is_trainings_own(pipeline, aspect, caption):
    bucket = make_buckets([aspect], pipeline.settings.longest_side)[0]
    stored = png(picture(bucket.width, bucket.height))
    trunk = pipeline.models.trunk
    pixel_values = from_stored_image(stored, bucket, "0")[None]
    trained = trunk.encode(pixel_values, [caption], "image_text" if caption else "image")
    given, _ = pipeline.encode(Image.open(io.BytesIO(stored)), caption)
    assert same_condition(given, trained)
    if not caption:  # the same as from the cache of the trunk's output
        cached = trunk.encode(from_image(stored)[None]).hidden_states
        assert same_condition(given, trunk.from_cache(cached, bucket.height, bucket.width))


def test_large_references_get_the_trained_token_grid_and_small_ones_stay(pipeline):
    side = pipeline.settings.longest_side
    for width, height in ((side, side), (4 * side, 4 * side), (1000, 1000)):
        condition, _ = pipeline.encode(picture(width, height))
        assert condition.select.shape == pipeline.encode(picture(side, side))[0].select.shape
    tensor, notes = reference_tensor(picture(400, 200), side)
    assert tensor.shape == (1, 3, side // 2, side) and notes == [
        f"reference: 400x200 scaled down to {side}x{side // 2}"
    ]
    small = picture(20, 30)
    tensor, notes = reference_tensor(small, side)
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), np.array(small)) and notes == []


def test_any_kind_of_picture_becomes_upright_rgb_on_white():
    upright = picture(32, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = Image.open(io.BytesIO(png(upright.rotate(90, expand=True), exif=exif)))
    assert turned.size == (48, 32)
    tensor, notes = reference_tensor(turned, 64)
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), np.array(upright)) and notes == [
        "reference: turned upright as its EXIF says"
    ]

    patch = Image.new("RGB", (16, 16), (200, 80, 60))
    patch.info["icc_profile"] = DISPLAY_P3
    wide, notes = reference_tensor(patch, 64)
    assert (wide[0, :, 0, 0].int() - torch.tensor([216, 69, 50])).abs().max() <= 2 and notes == [
        "reference: converted to sRGB by its colour profile"
    ]

    clear, _ = reference_tensor(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), 64)
    assert (clear == 255).all()
    ramp = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16))
    grey, _ = reference_tensor(ramp, 64)
    assert len(grey.unique()) == 256  # Pillow's own conversion would saturate nearly all of it
    for mode in ("L", "CMYK", "P", "1", "LA", "HSV"):
        assert reference_tensor(upright.convert(mode if mode != "LA" else "L").convert(mode), 64)[0].shape == (
            1,
            3,
            48,
            32,
        )


def test_a_picture_is_a_function_of_its_own_seed(pipeline):
    reference = picture(64, 64)
    together = pipeline(reference, num_inference_steps=STEPS, seed=[7, 8, 9]).images
    alone = [pipeline(reference, num_inference_steps=STEPS, seed=seed).images[0] for seed in (9, 8, 7)]
    assert [np.array(image).tobytes() for image in together] == [np.array(image).tobytes() for image in alone[::-1]]
    assert len({image.tobytes() for image in together}) == 3
    generator = pipeline(reference, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(8)).images[0]
    assert generator.tobytes() == together[1].tobytes()


def test_reference_prompt_and_size_matter(pipeline):
    def made(reference, prompt=None, **size):
        return pipeline(reference, prompt, num_inference_steps=STEPS, **size).images[0]

    plain = made(picture(64, 64))
    assert plain.size == (64, 64) and plain.mode == "RGB"
    assert made(picture(64, 64, seed=1)).tobytes() != plain.tobytes()
    assert made(picture(64, 64), "a fox").tobytes() != plain.tobytes()
    assert made(picture(64, 64), height=32, width=48).size == (48, 32)
    assert made(picture(64, 32)).size == (64, 64)  # the reference's size is not the output's


def test_notes_say_what_was_done_to_the_prompt(pipeline):
    reference = picture(64, 64)
    for nothing in (None, "", "  \n "):
        condition, notes = pipeline.encode(reference, nothing)
        assert notes == [] and same_condition(condition, pipeline.encode(reference)[0])
        assert pipeline.encode_all([Reference(reference)], nothing or "").notes == []
    notes = pipeline.encode_all([Reference(reference)], "a fox").notes
    assert any("without captions" in note for note in notes)  # the small run trains mode image only
    two = pipeline.encode_all([Reference(reference), Reference(picture(400, 200))])
    assert two.notes == ["reference 2: 400x200 scaled down to 64x32"]
    trunk, prompt = pipeline.models.trunk, "a fox"
    for spare in (0, -1):  # as many tokens as are read, and one more
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trunk, "max_caption_tokens", trunk.caption_tokens(prompt) + spare)
            notes = pipeline.encode_all([Reference(reference)], prompt).notes
        assert any("cut to the first" in note for note in notes) == (spare < 0)
    encoded = pipeline.encode_all([Reference(reference)], "fox " * 25_000)
    assert any("cut to the first 256" in note for note in encoded.notes)
    assert (
        encoded.text.shape[1] == 256 and encoded.references[0].hidden_states.shape[1] == 4
    )  # the prompt takes no token from the reference


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "a\0b"}, "character 2 is NUL"),
        ({"prompt": "ab\ud800"}, "character 3 .*surrogate"),
        ({"height": 40}, "height: 40"),
        ({"width": -16}, "width: -16"),
        ({"num_inference_steps": 0}, "^steps: 0; use 1 to 100000$"),
        ({"width": 8208, "height": 16}, "width: 8208; use a positive multiple of 16, at most 8192"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"guidance_scale": -1.0}, "guidance"),
        ({"reference": picture(1010, 10)}, "1010x10: too long and narrow, at most 100:1 is taken; crop it"),
    ],
)
def test_invalid_arguments_are_refused(pipeline, change, said):
    with pytest.raises(UserError, match=said):
        pipeline(**({"reference": picture(64, 64)} | change))


@pytest.mark.parametrize(
    ("of_job", "of_call"),
    [
        ({"prompt": "a\0b"}, {"prompt": "a\0b"}),
        ({"shift": 0.0}, {"shift": 0.0}),
        ({"variety": 1.0}, {"weighting": Weighting(variety=1.0)}),
        ({"background": -1.0}, {"weighting": Weighting(background=-1.0)}),
        (
            {"mode": "controlnet", "controls": (JobControl(kind="canny"),), "control_start": 0.9, "control_end": 0.1},
            {
                "control_image": picture(64, 64),
                "control_mode": "canny",
                "control_guidance_start": 0.9,
                "control_guidance_end": 0.1,
            },
        ),
    ],
)
def test_a_job_and_a_direct_call_are_refused_alike(pipeline, of_job, of_call):
    with pytest.raises(UserError) as job_error:  # before any file is opened
        check(Job(references=(JobReference(file="none.png"),), **of_job))
    with pytest.raises(UserError) as call_error:
        pipeline(picture(64, 64), **of_call)
    assert str(job_error.value) == str(call_error.value)


def test_output_sizes():
    trained = make_buckets(("16:9", "2:1", "2.35:1", "1:1", "1:2"), 1024)
    assert [output_size(bucket.name, 1024) for bucket in trained] == [(b.height, b.width) for b in trained]
    assert output_size("4:3", 1024) == (768, 1024) and output_size("3:4", 128) == (128, 96)
    assert isinstance(trained[0], Bucket)
    for bad in ("square", "1:0", "1", "-1:1", "1:1:1", ""):
        with pytest.raises(UserError, match="WIDTH:HEIGHT"):
            output_size(bad, 1024)


def test_settings_of_a_run(small_config):
    settings = Settings.of(small_config)
    assert settings.longest_side == 64 and settings.modes == ("image",) and settings.guidance == 3.5
    assert settings.aspect_ratios == ("16:9", "1:1", "1:2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_makes_its_runs_pictures(run_folder, export_folder, dtype):
    made = []
    for path in (run_folder, export_folder):
        loaded = load_pipeline(path, dtype=dtype, device="cpu")
        assert loaded.models.trainable.transformer.dtype == dtype
        made.append(loaded(picture(90, 64), "a fox", num_inference_steps=STEPS, seed=3).images[0])
        assert loaded.source["update"] == 8
    assert made[0].tobytes() == made[1].tobytes()
    loaded = Qwen2VLFluxPipeline.from_pretrained(export_folder, dtype, "cpu")
    again = loaded(picture(90, 64), "a fox", num_inference_steps=STEPS, seed=3).images[0]
    assert again.tobytes() == made[0].tobytes()


FILES = [
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/model.safetensors",
    "text_encoder/tokenizer.json",
    "connector/model.safetensors",
    "pooled_prompt_embeds.safetensors",
    "megaflux.json",
]


@pytest.mark.parametrize("gone", FILES)
def test_an_export_without_a_file_is_refused_by_name(export_folder, tmp_path, gone):
    shutil.copytree(export_folder, tmp_path / "export")
    (tmp_path / "export" / gone).unlink()
    with pytest.raises(UserError, match=f"{gone}: missing"):
        load_pipeline(tmp_path / "export")


def test_a_cut_file_is_refused_by_name(export_folder, tmp_path):
    shutil.copytree(export_folder, tmp_path / "export")
    file = tmp_path / "export/connector/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="connector/model.safetensors: .* bytes"):
        load_pipeline(tmp_path / "export")


@pytest.mark.parametrize(
    "part",
    [
        "transformer/diffusion_pytorch_model",
        "vae/diffusion_pytorch_model",
        "text_encoder/model",
        "connector/model",
        "pooled_prompt_embeds",
    ],
)
def test_an_export_without_a_key_is_refused_by_name(export_folder, tmp_path, part):
    shutil.copytree(export_folder, tmp_path / "export")
    file = tmp_path / "export" / f"{part}.safetensors"
    weights = load_file(file)
    gone = sorted(weights)[0]
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    manifest = json.loads((tmp_path / "export/megaflux.json").read_text())
    manifest["files"][f"{part}.safetensors"]["bytes"] = file.stat().st_size
    (tmp_path / "export/megaflux.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"missing key .*{gone.split('.', 1)[-1]}"):
        load_pipeline(tmp_path / "export")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "format 99"),
        ({"settings": {"longest_side": 64}}, "settings.aspect_ratios: Field required"),
        ({"files": 3}, "files: "),
        ({"files": {"x": 3}}, "files.x: "),
        ({"source": None}, "source: "),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "megaflux.json: ../x lies outside the export"),
        ({"files": {"x" * 300: {"bytes": 1, "sha256": "0" * 64}}}, "xxx: missing"),
    ],
)
def test_a_strange_manifest_is_refused(export_folder, tmp_path, change, said):
    shutil.copytree(export_folder, tmp_path / "export")
    file = tmp_path / "export/megaflux.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_pipeline(tmp_path / "export")


def test_from_pretrained_points_from_a_run_to_load_pipeline(run_folder):
    with pytest.raises(UserError, match="load_pipeline"):
        Qwen2VLFluxPipeline.from_pretrained(run_folder)


def test_a_device_that_is_not_there_is_refused(run_folder):
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(UserError, match="device"):
            load_pipeline(run_folder, device=device)
