"""Control maps and masks, with tiny random models of the detectors' own classes."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megaflux.common.errors import UserError
from megaflux.generation.control.detectors import (
    UNION_MODES,
    Detectors,
    Sources,
    canny,
    check_points,
    lacking,
    parse_point,
    read_mask,
)
from megaflux.generation.request import DETECTED
from tests.conftest import picture

POINTS = [(0.5, 0.5, 1), (0.1, 0.2, 0)]


def randomize(model: torch.nn.Module, scale: float, seed: int) -> torch.nn.Module:
    """Random weights, large enough for the output to depend on the picture."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Sources:
    """A folder of each detector, as save_pretrained writes it. Tests do not change them."""
    from megaflux.common import compat  # noqa: F401

    root = tmp_path_factory.mktemp("detectors")
    write_depth(root / "depth")
    write_sam(root / "sam")
    write_line(root / "line")
    return Sources(*(str(root / name) for name in ("depth", "line", "sam")))


def write_depth(folder: Path) -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    model = randomize(DepthAnythingForDepthEstimation(config), 0.2, 0)
    with torch.no_grad():
        model.head.conv3.weight.abs_()  # or the ReLU after it would make negative depths 0
        model.head.conv3.bias.fill_(1.0)
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(
        folder
    )


def write_sam(folder: Path) -> None:
    from transformers import Sam2Config, Sam2ImageProcessorFast, Sam2Model, Sam2Processor
    from transformers.models.sam2.configuration_sam2 import (
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 4],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=32,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=64, mask_input_channels=4),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32
        ),
    )
    model = Sam2Model(config)
    randomize(model, 0.3, 2)  # proposals that differ, and none empty
    model.save_pretrained(folder)
    processor = Sam2ImageProcessorFast(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    Sam2Processor(processor).save_pretrained(folder)


def write_line(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about packages that controlnet_aux misses
        from controlnet_aux.teed.ted import TED

    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(TED().state_dict(), folder / "MTEED.pth")


def small(sources: Sources) -> Detectors:
    """Detectors whose line detector is fast."""
    detectors = Detectors(sources)
    detectors.line_resolution = 128
    return detectors


def fault(call, *args) -> str:
    """The message, of one line, of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        call(*args)
    line = str(caught.value)
    assert "\n" not in line
    return line


def check_map(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    values = np.asarray(image)
    assert image.mode == "RGB" and image.size == size and values.dtype == np.uint8
    assert (values == values[..., :1]).all()
    return values[..., 0]


# ---- the maps


def test_the_kinds_have_union_modes():
    assert {kind: UNION_MODES[kind] for kind in DETECTED} == {"depth": 2, "line": 0, "canny": 0}
    assert sorted(set(UNION_MODES.values())) == list(range(7))


@pytest.mark.parametrize("kind", DETECTED)
def test_a_map_has_the_pictures_size_and_is_the_same_again(sources, kind):
    shown = picture(90, 70)
    state = torch.get_rng_state()
    values = check_map(small(sources).map(kind, shown), shown.size)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    np.testing.assert_array_equal(np.asarray(small(sources).map(kind, shown))[..., 0], values)
    if kind != "canny":  # a smooth picture has no Canny edges
        assert values.max() > values.min()


def test_depth_is_the_models_own_normalised(sources):
    from transformers import AutoImageProcessor, DepthAnythingForDepthEstimation

    shown = picture(90, 70)
    model = DepthAnythingForDepthEstimation.from_pretrained(sources.depth)
    inputs = AutoImageProcessor.from_pretrained(sources.depth, use_fast=False)(shown, return_tensors="pt")
    with torch.no_grad():
        depth = model(**inputs).predicted_depth[None]
    width, height = shown.size
    depth = torch.nn.functional.interpolate(depth, (height, width), mode="bicubic", align_corners=False)[0, 0]
    depth = ((depth - depth.min()) / (depth.max() - depth.min()) * 255).numpy().astype(np.uint8)
    assert depth.min() == 0 and depth.max() == 255 and len(np.unique(depth)) > 20
    np.testing.assert_array_equal(check_map(Detectors(sources).map("depth", shown), shown.size), depth)


def test_depth_that_is_constant_is_black_and_one_that_is_not_finite_is_refused(sources, tmp_path):
    for bias, name in ((1.0, "flat"), (float("nan"), "nan")):
        folder = tmp_path / name
        shutil.copytree(sources.depth, folder)
        weights = load_file(folder / "model.safetensors")
        weights["head.conv3.weight"].zero_()
        weights["head.conv3.bias"].fill_(bias)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert not check_map(Detectors(Sources(str(tmp_path / "flat"))).map("depth", picture(40, 30)), (40, 30)).any()
    line = fault(Detectors(Sources(str(tmp_path / "nan"))).map, "depth", picture(40, 30))
    assert line.startswith("--depth-model") and "not finite" in line


def test_depth_of_a_far_scene_is_not_taken_for_constant(sources, tmp_path):
    shutil.copytree(sources.depth, tmp_path / "far")
    weights = load_file(tmp_path / "far/model.safetensors")
    weights["head.conv3.bias"] += 3000 * weights["head.conv3.weight"].abs().sum()
    save_file(weights, tmp_path / "far/model.safetensors", {"format": "pt"})
    depth = check_map(Detectors(Sources(str(tmp_path / "far"))).map("depth", picture(40, 30)), (40, 30))
    assert depth.min() == 0 and depth.max() > 250 and len(np.unique(depth)) > 20


def test_depth_of_a_picture_one_pixel_wide(sources):
    check_map(Detectors(sources).map("depth", picture(1, 4)), (1, 4))


def test_line_is_anylines_own(sources):
    from controlnet_aux import AnylineDetector

    shown = picture(90, 70).convert("L")
    shown.paste(0, (20, 20, 24, 60))  # a dark stroke, for Anyline's second layer
    shown = shown.convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about skimage's renamed argument
        own = AnylineDetector.from_pretrained(sources.line, filename="MTEED.pth")(shown, 128)
    assert own.size == shown.size and len(np.unique(own)) > 20
    np.testing.assert_array_equal(np.asarray(small(sources).map("line", shown)), np.asarray(own))


def test_line_looks_at_the_resolution_that_anyline_does():
    from controlnet_aux import AnylineDetector

    default = inspect.signature(AnylineDetector.__call__).parameters["detect_resolution"].default
    assert Detectors.line_resolution == default == 1280


def test_line_reads_the_layout_of_mistoline_and_grey_pictures(sources, tmp_path):
    (tmp_path / "Anyline").mkdir()
    shutil.copy(Path(sources.line) / "MTEED.pth", tmp_path / "Anyline")
    check_map(small(Sources(line=str(tmp_path))).map("line", picture(64, 64).convert("L")), (64, 64))


def test_line_without_weights_is_canny_and_says_so():
    detectors, shown = Detectors(Sources()), square()
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(detectors.map("line", shown)), np.asarray(canny(shown)))
    assert detectors.notes == ["line: no Anyline weights given, Canny is used"]
    detectors = Detectors(Sources())
    detectors.map("canny", shown)
    assert detectors.notes == [] and detectors.loaded == {}


def square() -> Image.Image:
    values = np.zeros((64, 96), np.uint8)
    values[20:40, 30:70] = 255
    return Image.fromarray(values)


def test_canny_marks_a_squares_border_and_only_that():
    edges = check_map(canny(square()), (96, 64))
    assert set(np.unique(edges)) == {0, 255}
    border = np.zeros((64, 96), bool)
    border[18:42, 28:72] = True  # two pixels around the step
    border[22:38, 32:68] = False
    assert not edges[~border].any()
    on = edges == 255
    for line in (on[18:22, 32:68], on[38:42, 32:68]):  # all of each side
        assert line.any(0).all()
    for line in (on[22:38, 28:32], on[22:38, 68:72]):
        assert line.any(1).all()


def test_canny_ignores_a_faint_step():
    assert not np.asarray(canny(square().point(lambda value: value // 16))).any()


# ---- masks from points


@pytest.mark.parametrize("points", [POINTS, POINTS[:1]])
def test_mask_is_the_proposal_of_the_best_iou(sources, points):
    from transformers import Sam2Model, Sam2Processor

    shown = picture(90, 70)
    model, processor = Sam2Model.from_pretrained(sources.sam).eval(), Sam2Processor.from_pretrained(sources.sam)
    inputs = processor(
        images=shown,
        input_points=[[[[x * 90, y * 70] for x, y, _ in points]]],
        input_labels=[[[label for *_, label in points]]],
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(**{k: inputs[k] for k in ("pixel_values", "input_points", "input_labels")})
    scores = output.iou_scores[0, 0]
    assert scores.shape == (3,) and len(set(scores.tolist())) == 3
    logits = torch.nn.functional.interpolate(output.pred_masks[0], (70, 90), mode="bilinear", align_corners=False)[0]
    best = (logits[scores.argmax()] > 0).numpy()
    assert 0 < best.mean() < 1 and not np.array_equal(best, (logits[scores.argmin()] > 0).numpy())
    for _ in range(2):
        mask = Detectors(sources).mask(shown, points)
        assert mask.mode == "L" and mask.size == (90, 70)
        np.testing.assert_array_equal(np.asarray(mask), best.astype(np.uint8) * 255)
    read_mask(mask, shown.size)


def test_a_mask_of_nothing_is_refused(sources, tmp_path):
    shutil.copytree(sources.sam, tmp_path / "sam")
    weights = load_file(tmp_path / "sam/model.safetensors")
    for key in weights:  # mask logits are the product of these and the picture's features
        if "output_hypernetworks_mlps" in key:
            weights[key].zero_()
    save_file(weights, tmp_path / "sam/model.safetensors", {"format": "pt"})
    line = fault(Detectors(Sources(sam=str(tmp_path / "sam"))).mask, picture(90, 70), POINTS)
    assert line.startswith("--mask-point: nothing is found")


# ---- loading


def test_detectors_load_when_asked_and_once(sources, tmp_path):
    copies = [shutil.copytree(getattr(sources, name), tmp_path / name) for name in ("depth", "line", "sam")]
    detectors, shown = small(Sources(*map(str, copies))), picture(90, 70)
    assert detectors.loaded == {}
    made = {"depth": detectors.map("depth", shown)}
    assert list(detectors.loaded) == ["depth"]
    made["sam"] = detectors.mask(shown, POINTS)
    made["line"] = detectors.map("line", shown)
    assert list(detectors.loaded) == ["depth", "sam", "line"] and detectors.notes == []
    for copy in copies:  # detectors in memory need no files
        shutil.rmtree(copy)
    assert detectors.map("depth", shown) == made["depth"] and detectors.map("line", shown) == made["line"]
    assert detectors.mask(shown, POINTS) == made["sam"]


@pytest.mark.parametrize("name, key", [("depth", "head.conv1.weight"), ("sam", "no_memory_embedding")])
def test_loading_is_strict(sources, tmp_path, name, key):
    def loads(weights: dict) -> str:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        detectors = Detectors(Sources(**{name: str(folder)}))
        line = fault(lambda: use(detectors, name))
        assert detectors.loaded == {}
        return line

    folder = tmp_path / name
    shutil.copytree(getattr(sources, name), folder)
    weights = load_file(folder / "model.safetensors")
    missing_key = {k: v for k, v in weights.items() if k != key}
    assert f"missing key {key}" in loads(missing_key)
    assert "unexpected key surplus" in loads(weights | {"surplus": torch.zeros(1)})
    assert f"wrong shape {key}" in loads(weights | {key: torch.zeros(1, 2, 3)})


def use(detectors: Detectors, name: str) -> Image.Image:
    shown = picture(90, 70)
    return detectors.mask(shown, POINTS) if name == "sam" else detectors.map(name, shown)


def test_sam_reads_the_weights_of_a_video_checkpoint(sources, tmp_path):
    """The released SAM 2.1 also holds its video part, which pictures do not need."""
    folder = shutil.copytree(sources.sam, tmp_path / "sam")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"memory_attention.x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    assert use(Detectors(Sources(sam=str(folder))), "sam") == use(Detectors(sources), "sam")


def test_line_loads_strictly(sources, tmp_path):
    def loads(tensors) -> str:
        torch.save(tensors, tmp_path / "MTEED.pth")
        return fault(lambda: use(Detectors(Sources(line=str(tmp_path))), "line"))

    good = torch.load(Path(sources.line) / "MTEED.pth", weights_only=True)
    key = "block_1.conv1.weight"
    where = f"{tmp_path / 'MTEED.pth'}: "
    assert loads({k: v for k, v in good.items() if k != key}).startswith(f"{where}missing key {key} (1 in all)")
    assert loads(good | {"surplus": torch.zeros(1)}).startswith(f"{where}unexpected key surplus")
    assert loads(good | {key: torch.zeros(2)}).startswith(f"{where}wrong shape {key}")
    assert loads([1, 2]).startswith(f"{where}holds no weights by name")
    (tmp_path / "MTEED.pth").write_bytes((Path(sources.line) / "MTEED.pth").read_bytes()[:2000])
    assert fault(lambda: use(Detectors(Sources(line=str(tmp_path))), "line")).startswith(where)


def test_a_depth_model_in_a_pickle_does_not_run(sources, tmp_path):
    folder = shutil.copytree(sources.depth, tmp_path / "depth")
    (folder / "model.safetensors").unlink()
    torch.save({"head.conv1.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    line = fault(lambda: use(Detectors(Sources(depth=str(folder))), "depth"))
    assert line == (
        f"--depth-model {folder} lacks model.safetensors or model.safetensors.index.json (pickle files are not read); "
        "give a complete folder"
    )
    assert not (tmp_path / "ran").exists()


class Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_in_the_line_weights_does_not_run(tmp_path):
    torch.save({"block_1.conv1.weight": Payload(tmp_path / "ran")}, tmp_path / "MTEED.pth")
    line = fault(lambda: use(Detectors(Sources(line=str(tmp_path))), "line"))
    assert line == f"{tmp_path / 'MTEED.pth'}: not a file of plain tensors, so it is not read; give Anyline's MTEED.pth"
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "MTEED.pth", weights_only=False)  # unpickling would have run the code
    assert (tmp_path / "ran").exists()


def test_a_missing_source_names_its_option(tmp_path):
    shown, none = picture(32, 32), Detectors(Sources())
    assert fault(none.map, "depth", shown) == (
        "--control depth: needs a depth detector; give --depth-model DIR or a ready map with --control-image depth=FILE"
    )
    assert fault(none.mask, shown, POINTS) == (
        "--mask-point: needs SAM 2; give --sam-model DIR or a mask with --mask FILE"
    )
    assert fault(none.map, "tile", shown) == (
        "--control tile: only depth, line, canny are made from a picture;"
        " give a ready map with --control-image tile=FILE"
    )
    gone = str(tmp_path / "gone")
    for name, option in (("depth", "--depth-model"), ("line", "--line-model"), ("sam", "--sam-model")):
        line = fault(lambda name=name: use(Detectors(Sources(**{name: gone})), name))
        assert line.startswith(f"{option} {gone}: does not exist; give a folder, or a hub name")


@pytest.mark.parametrize("kind, package", [("canny", "cv2"), ("line", "controlnet_aux.anyline")])
def test_without_the_optional_packages_the_error_names_the_extra(sources, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = fault(Detectors(sources).map, kind, picture(32, 32))
    assert line == f"{kind}: needs controlnet_aux; pip install 'megaflux[control]'"


def test_the_detectors_libraries_are_quiet(sources):
    code = (
        "import sys\nfrom PIL import Image\nfrom megaflux.generation.control.detectors import Detectors, Sources, parse_point\n"
        "parse_point('0,1')\nassert 'torch' not in sys.modules\n"
        "Detectors.line_resolution = 128\n"
        "Detectors(Sources(line=sys.argv[1])).map('line', Image.new('RGB', (64, 64), 'white'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, sources.line], capture_output=True, text=True, check=True)
    assert done.stdout == "" and done.stderr == ""


# ---- what is on disk


def test_lacking(sources, tmp_path):
    assert lacking(sources) == [] and lacking(Sources()) == []
    depth, sam, line = tmp_path / "depth", tmp_path / "sam", tmp_path / "line"
    shutil.copytree(sources.depth, depth)
    (depth / "model.safetensors").unlink()
    (depth / "preprocessor_config.json").unlink()
    shutil.copytree(sources.sam, sam)
    (sam / "model.safetensors").rename(sam / "model-1.safetensors")
    index = sam / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    line.mkdir()
    assert lacking(Sources(str(depth), str(line), str(sam))) == [
        f"--depth-model {depth} lacks preprocessor_config.json or processor_config.json, model.safetensors or "
        "model.safetensors.index.json; give a complete folder",
        f"--line-model {line}: holds no MTEED.pth; give Anyline's folder",
        f"--sam-model {sam} lacks model-2.safetensors; give a complete folder",
        f"--sam-model {sam} holds damaged files: model-1.safetensors lacks a, which the index says it holds; fetch them again",
    ]
    (line / "MTEED.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert lacking(Sources(line=str(line))) == [
        f"--line-model {line}: holds a git-lfs pointer in the place of MTEED.pth; fetch the file with `git lfs pull`"
    ]
    index.write_text("[]")
    assert lacking(Sources(sam=str(sam))) == [
        f"--sam-model {sam} holds damaged files: {index.name}: weight_map does not name safetensors files beside it; fetch them again"
    ]
    assert lacking(Sources(depth=str(index), line="owner/name", sam="/no/where/at/all")) == [
        f"--depth-model {index}: is a file; give the folder it belongs to",
        "--sam-model /no/where/at/all: does not exist; give a folder, or a hub name (hub:owner/name, or owner/name where no "
        "folder owner is here)",
    ]
    assert fault(Detectors(Sources(depth=str(depth))).map, "depth", picture(32, 32)).startswith(
        f"--depth-model {depth}"
    )


# ---- points


def test_points():
    assert parse_point("0.25,1") == (0.25, 1.0, 1) and parse_point(" 0 , .5, 0") == (0.0, 0.5, 0)
    assert isinstance(parse_point("0,0")[2], int)
    assert check_points([[0, 1, True], (0.5, 0.5, 0)]) == ((0.0, 1.0, 1), (0.5, 0.5, 0))


@pytest.mark.parametrize(
    "text, what",
    [
        ("a,b", "use x,y or x,y,label in numbers, as in 0.5,0.4,1"),
        ("", "use x,y or x,y,label in numbers, as in 0.5,0.4,1"),
        ("0.5", "use three numbers: x, y, and a label (1 in, 0 out)"),
        ("0,0,1,1", "use three numbers: x, y, and a label (1 in, 0 out)"),
        ("1.5,0", "x is 1.5; use 0 (left, top) to 1 (right, bottom)"),
        ("0,-1", "y is -1; use 0 (left, top) to 1 (right, bottom)"),
        ("0,nan", "y is nan; use 0 (left, top) to 1 (right, bottom)"),
        ("0,0,2", "the label is 2; use 1 (in) or 0 (out)"),
        ("0,0,0.5", "the label is 0.5; use 1 (in) or 0 (out)"),
        ("0,0,nan", "the label is nan; use 1 (in) or 0 (out)"),
    ],
)
def test_a_bad_point_has_its_line(text, what):
    assert fault(parse_point, text) == f"--mask-point {text}: {what}"


def test_bad_lists_of_points_have_their_line(sources):
    assert fault(check_points, []).startswith("mask points: none given")
    assert fault(check_points, [(0, 0, 0)]).startswith("mask points: all have label 0")
    assert fault(check_points, [(0, 0, 1), (2, 0, 1)]).startswith("mask point 2,0,1: x is 2;")
    assert fault(check_points, [(0, 0)]).startswith("mask point 0,0: use three numbers")
    assert fault(check_points, ["x"]).startswith("mask point x: use three numbers")
    detectors = Detectors(sources)
    fault(detectors.mask, picture(32, 32), [(0, 3, 1)])
    assert detectors.loaded == {}  # checked before anything is loaded


# ---- ready masks


def half(mode: str = "L", white=255) -> Image.Image:
    """White on the left half."""
    values = np.zeros((6, 8), {"I": np.int32, "I;16": np.uint16, "F": np.float32}.get(mode, np.uint8))
    values[:, :4] = white
    image = Image.fromarray(values)
    return image if image.mode == mode else image.convert(mode)


@pytest.mark.parametrize(
    "image",
    [
        half(),
        half("1"),
        half("RGB"),
        half("RGBA"),
        half("LA"),
        half("P"),
        half("CMYK"),
        half(white=128),
        half("I;16", 65535),
        half("I", 65535),
        half("I", 255),
        half("F", 1),
        half("F", 255),
    ],
    ids=lambda image: image.mode,
)
def test_any_picture_is_a_mask(image):
    mask = read_mask(image, (8, 6))
    assert mask.mode == "L" and mask.size == (8, 6)
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(half()))


def test_a_mask_is_cut_at_half_of_white():
    values = np.array([[0, 127, 128, 255]], np.uint8)
    assert np.asarray(read_mask(Image.fromarray(values), (4, 1))).tolist() == [[0, 0, 255, 255]]


def test_transparent_is_not_painted():
    image = half("RGBA")
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[:3] = 0
    image.putalpha(Image.fromarray(alpha))
    expected = np.asarray(half()).copy()
    expected[:3] = 0
    np.testing.assert_array_equal(np.asarray(read_mask(image, (8, 6))), expected)
    whole = Image.new("RGBA", (8, 6), (255, 255, 255, 255))  # an opaque alpha channel
    assert np.asarray(read_mask(whole, (8, 6))).min() == 255


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "I;16", "F"])
def test_a_mask_of_another_size_is_resized(mode):
    notes: list[str] = []
    white = {"I;16": 65535, "F": 1.0}.get(mode, 255)
    mask = np.asarray(read_mask(half(mode, white), (80, 36), notes))  # another ratio, too: it is the whole picture
    assert notes == ["mask: 8x6 resized to the picture's 80x36"]
    assert (mask[:, :39] == 255).all() and (mask[:, 41:] == 0).all()
    smaller = np.asarray(read_mask(half(mode, white).resize((800, 600), Image.Resampling.NEAREST), (8, 6)))
    np.testing.assert_array_equal(smaller, np.asarray(half()))
    notes.clear()
    read_mask(half(mode, white), (8, 6), notes)
    assert not notes


def test_a_small_mask_has_no_stairs():
    """A diagonal edge, enlarged eight times, lies within a pixel of the line."""
    rows, columns = np.mgrid[:16, :16]
    small = Image.fromarray((255 * (rows >= columns)).astype(np.uint8))
    mask = np.asarray(read_mask(small, (128, 128))) > 0
    rows, columns = np.mgrid[:128, :128]
    off = mask != (rows + 4 >= columns)  # the cells' corners are half a cell from the line through their centres
    assert np.abs((rows + 4 - columns)[off]).max(initial=0) <= 4


@pytest.mark.parametrize("colour", ["white", "black"])
def test_a_mask_in_the_alpha_channel_is_refused(colour):
    image = Image.new("RGB", (8, 6), colour)
    image.putalpha(half())
    assert fault(read_mask, image, (8, 6)) == (
        "mask: one colour, its shape is in the alpha channel;"
        " save it as black and white without alpha, white where it is to be repainted"
    )


def test_bad_masks_have_their_line():
    assert fault(read_mask, Image.new("L", (8, 6), 1), (8, 6)) == (
        "mask: nothing to paint, its brightest value is 1 of 255; make white what is to be repainted"
    )
    spot = Image.new("L", (300, 200))
    spot.paste(255, (10, 10, 12, 12))
    assert fault(read_mask, spot, (8, 6)) == (
        "mask: nothing to paint, its brightest value is 255 of 255, 0.702 once it is resized from 300x200 to 8x6;"
        " make white what is to be repainted"
    )
