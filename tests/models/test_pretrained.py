"""Folders of the libraries' own save_pretrained load and equal; anything missing, left over or cut is
refused."""

import hashlib
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.config.presets import dev
from megaflux.models import pretrained, scratch
from megaflux.models.strict import load_linear
from tests.conftest import small_values

from transformers import CLIPTextModel, CLIPTokenizer, Qwen2VLForConditionalGeneration  # isort: skip

KEYS = Path(__file__).parents[3] / "shared/reference/keys"

# Sorted published names, one a line: black-forest-labs/FLUX.1-dev's index, and Qwen/Qwen2-VL-7B-Instruct's.
FLUX_NAMES = (1160, "17931a3e1a0300ec")
QWEN_NAMES = (730, "06359d7983e631bd")


def digest(names: list[str]) -> tuple[int, str]:
    return len(names), hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


def config_for(published: dict[str, Path]):
    values = small_values()
    values["model"] |= {"flux": str(published["flux"]), "vlm": str(published["qwen"]), "vae": None}
    return build_config(values)


def same(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].float(), tensor.float()), name


def test_published_folders_load_and_equal(published):
    config = config_for(published)
    models = pretrained.load_models(config)
    flux, qwen = published["flux"], published["qwen"]
    weights = load_file(flux / "transformer/diffusion_pytorch_model.safetensors")
    same(models.trainable.transformer.state_dict(), {k: v.to(torch.bfloat16) for k, v in weights.items()})
    assert models.trainable.transformer.dtype == models.trunk.dtype == torch.bfloat16
    same(models.vae.state_dict(), load_file(flux / "vae/diffusion_pytorch_model.safetensors"))
    assert models.scheduler.config.shift == 3.0

    last = config.model.vlm_config["text_config"]["num_hidden_layers"] - 1
    ours = {}
    for name, tensor in models.trunk.vlm.state_dict().items():
        ours[name.replace("language_model.", "model.")] = tensor
    for name, tensor in models.trainable.vlm.state_dict().items():
        ours["model." + name.replace("layers.0.", f"layers.{last}.")] = tensor
    theirs = load_file(qwen / "model.safetensors")
    lm_head = theirs.pop("lm_head.weight")
    same(ours, theirs)
    assert torch.equal(pretrained.read_lm_head(str(qwen)), lm_head)

    clip = CLIPTextModel.from_pretrained(flux / "text_encoder")
    tokens = CLIPTokenizer.from_pretrained(flux / "tokenizer")(
        "", padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(models.pooled_projections, clip(**tokens).pooler_output)


def test_a_vlm_without_lm_head_loads(published, tmp_path):
    shutil.copytree(published["qwen"], tmp_path / "qwen")
    weights = load_file(published["qwen"] / "model.safetensors")
    lm_head = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "qwen/model.safetensors", {"format": "pt"})
    vlm, _ = pretrained.load_vlm(str(tmp_path / "qwen"))
    assert torch.equal(vlm.language_model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert pretrained.read_lm_head(str(tmp_path / "qwen")) is None and lm_head is not None


def test_a_sharded_vlm_loads(published, tmp_path):
    whole = Qwen2VLForConditionalGeneration.from_pretrained(published["qwen"], dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "qwen", max_shard_size="100KB")
    scratch.tiny_processor().save_pretrained(tmp_path / "qwen")
    assert (tmp_path / "qwen/model.safetensors.index.json").is_file()
    vlm, _ = pretrained.load_vlm(str(tmp_path / "qwen"))
    same(vlm.state_dict(), whole.model.state_dict())
    assert torch.equal(pretrained.read_lm_head(str(tmp_path / "qwen")), whole.lm_head.weight)


def drop(file: Path) -> str:
    weights = load_file(file)
    gone = sorted(name for name in weights if name != "lm_head.weight")[0]
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    return f"missing key .*{gone.split('.', 1)[-1]}"


def add(file: Path) -> str:
    save_file(load_file(file) | {"surplus.weight": torch.zeros(1)}, file, {"format": "pt"})
    return "unexpected key .*surplus.weight"


def reshape(file: Path) -> str:
    weights = load_file(file)
    name = sorted(name for name in weights if weights[name].ndim > 1 and name != "lm_head.weight")[0]
    weights[name] = torch.zeros(3, 3, dtype=weights[name].dtype)
    save_file(weights, file, {"format": "pt"})
    return name.split(".", 1)[-1].replace(".", r"\.")


def truncate(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file.name}: cannot be loaded"


def pickle(file: Path) -> str:
    name = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    return "cannot be loaded"


PARTS = {
    "transformer": ("flux", "transformer/diffusion_pytorch_model.safetensors"),
    "vae": ("flux", "vae/diffusion_pytorch_model.safetensors"),
    "clip": ("flux", "text_encoder/model.safetensors"),
    "vlm": ("qwen", "model.safetensors"),
}


@pytest.mark.parametrize("damage", [drop, add, reshape, truncate, pickle])
@pytest.mark.parametrize("part", PARTS)
def test_strict(published, tmp_path, part, damage):
    which, file = PARTS[part]
    shutil.copytree(published[which], tmp_path / which)
    said = damage(tmp_path / which / file)
    load = {
        "transformer": lambda: pretrained.load_transformer(str(tmp_path / which), torch.bfloat16),
        "vae": lambda: pretrained.load_vae(None, str(tmp_path / which)),
        "clip": lambda: pretrained.load_clip(str(tmp_path / which)),
        "vlm": lambda: pretrained.load_vlm(str(tmp_path / which)),
    }[part]
    with pytest.raises(UserError, match=said) as caught:
        load()
    message = str(caught.value)
    assert str(tmp_path / which) in message and "\n" not in message


@pytest.mark.parametrize("gone", ["transformer/config.json", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(published, tmp_path, gone):
    shutil.copytree(published["flux"], tmp_path / "flux")
    path = tmp_path / "flux" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=gone.split("/")[0]):
        pretrained.load_models(config_for(published | {"flux": tmp_path / "flux"}))


def test_parts_that_do_not_fit_are_named(published, small_config):
    values = small_values()
    values["model"]["flux_config"]["in_channels"] = 64
    with pytest.raises(UserError, match="latent channels"):
        pretrained.load_models(build_config(values))
    values = small_values()
    values["model"]["flux_config"]["pooled_projection_dim"] = 48
    with pytest.raises(UserError, match="pooled"):
        pretrained.load_models(build_config(values))


def test_dev_has_the_published_names(dev_meta):
    trainable, trunk = dev_meta
    flux = [name for name, _ in trainable.transformer.named_parameters()]
    qwen = ["lm_head.weight"]
    qwen += [name.replace("language_model.", "model.") for name, _ in trunk.named_parameters()]
    qwen += ["model." + n.replace("layers.0.", "layers.27.") for n, _ in trainable.vlm.named_parameters()]
    assert digest(flux) == FLUX_NAMES
    assert digest(qwen) == QWEN_NAMES
    if KEYS.is_dir():
        assert sorted(flux) == sorted((KEYS / "flux1-dev-transformer.txt").read_text().split())
        assert sorted(qwen) == sorted((KEYS / "qwen2-vl-7b.txt").read_text().split())


def test_meta_models_have_dev_s_sizes_and_no_memory(dev_meta):
    trainable, trunk = dev_meta
    parameters = [*trainable.parameters(), *trunk.parameters()]
    assert all(parameter.is_meta for parameter in parameters)
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in [
            ("flux", trainable.transformer),
            ("connector", trainable.connector),
            ("layer", trainable.vlm.layers),
            ("trunk", trunk),
            ("norm", trainable.vlm.norm),
        ]
    }
    assert count["flux"] == 11_901_408_320
    assert count["connector"] == 14_684_160
    assert count["layer"] == 233_057_792
    # Qwen2-VL-7B's published 8,291,375,616 parameters less its lm_head.
    assert count["trunk"] + count["layer"] + count["norm"] == 8_291_375_616 - 152_064 * 3584


def test_devs_sizes_are_the_libraries_defaults_for_these_models():
    """Heads, axes of positions, patches: what no count of parameters shows."""
    from diffusers import FluxTransformer2DModel
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    model = dev()["model"]
    defaults = inspect.signature(FluxTransformer2DModel.__init__).parameters
    theirs = {name: defaults[name].default for name in model["flux_config"]}
    flux = {name: tuple(value) if isinstance(value, list) else value for name, value in model["flux_config"].items()}
    assert flux == theirs | {"guidance_embeds": True}  # FLUX.1-schnell has none
    vision = model["vlm_config"]["vision_config"]
    assert vision == {name: getattr(Qwen2VLVisionConfig(), name) for name in vision}


def test_meta_models_take_sizes_from_local_folders(published):
    config = config_for(published)
    values = config.model_dump()
    values["model"]["flux_config"] = dev()["model"]["flux_config"]  # the folder's config.json wins over the table
    values["model"]["vlm_config"] = dev()["model"]["vlm_config"]
    values["stages"] = [{"name": "one", "share": 1, "blocks": [1]}]
    trainable, trunk = pretrained.meta_models(build_config(values))
    loaded = pretrained.load_models(config)
    for ours, theirs in ((trainable, loaded.trainable), (trunk, loaded.trunk.vlm)):
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_seeds_reproduce_and_the_global_state_stays(small_config):
    values = small_config.model_dump()
    values["run"]["seed"] = 1
    before = torch.get_rng_state()
    once, again, other = (pretrained.load_models(c) for c in (small_config, small_config, build_config(values)))
    assert torch.equal(torch.get_rng_state(), before)
    for part in ("trainable", "trunk"):
        a, b, c = (getattr(m, part) for m in (once, again, other))
        a, b, c = (x.vlm.state_dict() for x in (a, b, c))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert any(not torch.equal(a[name], c[name]) for name in a)
    assert torch.equal(once.pooled_projections, again.pooled_projections)
    assert not torch.equal(once.trainable.connector.weight, other.trainable.connector.weight)


def test_a_fresh_transformer_answers_zero(small_config):
    transformer = pretrained.load_models(small_config).trainable.transformer
    assert not transformer.proj_out.weight.any() and not transformer.proj_out.bias.any()


def test_casting_leaves_ropes_frequencies_in_float32(small_config):
    models = pretrained.load_models(small_config).to("cpu", torch.bfloat16)
    assert {p.dtype for m in (models.trainable, models.trunk.vlm, models.vae) for p in m.parameters()} == {
        torch.bfloat16
    }
    assert models.trainable.vlm.rotary_emb.inv_freq.dtype == torch.float32
    assert models.trunk.vlm.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert models.trunk.vlm.visual.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert models.pooled_projections.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        {"weight": torch.zeros(2, 2)},
        {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
        {"weight": torch.zeros(2, 2), "bias": torch.zeros(2), "x": torch.zeros(1)},
    ],
)
def test_a_connector_is_whole_or_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    if isinstance(content, dict):
        save_file(content, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors"):
        load_linear(file)
