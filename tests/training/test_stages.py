"""Every parameter has one place; the published lists train what is published; nothing else can move
unnoticed."""

import json
import re
from collections import Counter

import pytest
import torch

from megaflux.common.errors import FrozenParameterError, UserError
from megaflux.config.parse import build_config
from megaflux.config.presets import PUBLISHED_STAGES, dev
from megaflux.config.schema import Stage
from megaflux.models import latents as ops
from megaflux.models.pretrained import load_models, meta_models
from megaflux.training import components, stages
from megaflux.training.planning.checks import find_problems
from tests.training.carry_worker import Toy

PUBLISHED = [Stage(name=name, share=1, blocks=tuple(blocks)) for name, blocks in PUBLISHED_STAGES.items()]
ALL = Stage(name="base", share=1, blocks="all", components="model")


@pytest.fixture
def models(small_config):
    """Fresh for each test; every weight random, so that each gets a gradient."""
    made = load_models(small_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.trainable.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def velocity(models) -> torch.Tensor:
    condition = models.trunk.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    x = torch.randn(1, 4, models.vae.config.latent_channels * 4)
    return models.trainable(
        condition, x, torch.tensor([0.5]), ops.image_ids(32, 32), models.pooled_projections, torch.tensor([3.5])
    )


def numel(module, names, part: str) -> int:
    parameters = dict(module.named_parameters())
    num_double = len(module.transformer.transformer_blocks)
    return sum(parameters[name].numel() for name in names if stages.locate(name, num_double).group == part)


def test_every_name_of_dev_has_one_place(dev_meta):
    module, _ = dev_meta
    places = {name: stages.locate(name, 19) for name, _ in module.named_parameters()}
    assert {place.block for place in places.values()} == {None, *range(57)}
    matches = {name: [part for part, pattern in stages.PATTERNS if re.fullmatch(pattern, name)] for name in places}
    assert all(len(parts) == 1 for parts in matches.values())
    assert {parts[0] for parts in matches.values()} == {part for part, _ in stages.PATTERNS}  # none is useless
    per_part = Counter(place.part for place in places.values())
    assert per_part["connector"] == per_part["context_embedder"] == 2 and per_part["vlm_norm"] == 1
    assert places["transformer.single_transformer_blocks.0.norm.linear.weight"].block == 19
    groups = {name.split(".")[0]: place.group for name, place in places.items()}
    assert groups == {"transformer": "flux", "connector": "connector", "vlm": "vlm"}
    assert places["vlm.norm.weight"].group == "vlm"  # though it never trains
    assert places["transformer.transformer_blocks.18.attn.to_q.bias"] == stages.Place("double", "attn.to_q.bias", 18)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.new_part.weight",
        "transformer.transformer_blocks.weight",
        "vlm.layers.x.mlp.up_proj.weight",
        "",
        "connector",
        "module.connector.weight",
        "transformer.transformer_blocks.x.norm1.linear.weight",
    ],
)
def test_a_name_without_a_place_is_an_error(name):
    with pytest.raises(ValueError, match="exactly one"):
        stages.locate(name, 19)


def test_published_lists_are_as_published():
    lists = [set(stage.blocks) for stage in PUBLISHED]
    assert lists[0] & lists[1] == {16, 56} and not lists[0] & lists[2] and not lists[1] & lists[2]
    never = {10, 13, 17, 20, 22, 27, 31, 35, 38, 43, 47, 51}
    assert set(range(57)) - set.union(*lists) == never
    doubles = [sum(block < 19 for block in blocks) for blocks in lists]
    singles = [len(blocks) - count for blocks, count in zip(lists, doubles, strict=True)]
    assert doubles == [5, 6, 6] and singles == [10, 10, 10]


@pytest.mark.parametrize(
    ("components", "counts"),
    [
        ("attention", (1_334_221_824, 1_485_265_920, 1_485_265_920)),
        ("block", (3_127_660_544, 3_467_491_840, 3_467_491_840)),
    ],
)
def test_published_stages_train_the_published_counts(dev_meta, components, counts):
    module, _ = dev_meta
    for stage, count in zip(PUBLISHED, counts, strict=True):
        names = stages.trainable_names(module, stage.model_copy(update={"components": components}))
        assert numel(module, names, "flux") == count
        assert numel(module, names, "connector") == 14_684_160
        assert numel(module, names, "vlm") == 233_057_792
        assert "transformer.context_embedder.weight" in names and "vlm.norm.weight" not in names


def test_attention_is_the_released_codes_list(dev_meta):
    module, _ = dev_meta
    names = stages.trainable_names(module, PUBLISHED[0])
    components = {
        (p.part, re.sub(r"\.(weight|bias)$", "", p.component))
        for p in (stages.locate(name, 19) for name in names)
        if p.block is not None
    }
    assert components == {
        ("double", "attn.to_q"),
        ("double", "attn.to_k"),
        ("double", "attn.to_v"),
        ("double", "attn.to_out.0"),
        ("double", "norm1.linear"),
        ("double", "norm1_context.linear"),
        ("single", "attn.to_q"),
        ("single", "attn.to_k"),
        ("single", "attn.to_v"),
        ("single", "norm.linear"),
    }


def test_every_parameter_of_a_block_has_a_name_in_the_lists(dev_meta):
    """components.NAMES, which lists are checked against before anything is loaded, are diffusers'."""
    found = {"double": set(), "single": set(), "context_embedder": set()}
    for name, _ in dev_meta[0].named_parameters():
        place = stages.locate(name, 19)
        if place.part in found:
            found[place.part].add(place.component)
    assert {kind: set(names) for kind, names in components.NAMES.items()} == found
    assert all(len(set(names)) == len(names) for names in components.NAMES.values())


W, MLP = 3072, 4 * 3072
LINEAR, MODULATION = W * W + W, 6 * W * W + 6 * W
IMAGE_BRANCH = 19 * (MODULATION + 4 * LINEAR + 2 * 128 + (W * MLP + MLP) + (MLP * W + W))
NORMS = 19 * (2 * MODULATION + 4 * 128) + 38 * (3 * W * W + 3 * W + 2 * 128)


@pytest.mark.parametrize(
    ("blocks", "chosen", "flux"),
    [
        ("none", "attention", 0),
        ("all", "image_branch", IMAGE_BRANCH),
        ("all", "norms", NORMS),
        ((18, 19), ("attn.to_q",), 2 * LINEAR),
        ((18, 19), (r"attn\.to_[qkv]\.weight", "norm1"), 6 * W * W + MODULATION),
        ((18,), ("ff.net.2.bias", "context_embedder"), W + 4096 * W + W),
        ("all", ("context_embedder",), 4096 * W + W),
    ],
)
def test_other_sets_and_lists_train_what_they_name(dev_meta, blocks, chosen, flux):
    module = dev_meta[0]
    stage = Stage(name="mine", share=1, blocks=blocks, components=chosen, vlm_layers=0)
    names = stages.trainable_names(module, stage)
    assert numel(module, names, "flux") == flux
    assert (numel(module, names, "connector"), numel(module, names, "vlm")) == (14_684_160, 0)
    text = [n for n in names if any(part in n for part in ("context", "added", ".add_", "to_add"))]
    assert chosen != "image_branch" or (not text and {stages.locate(n, 19).block for n in names} == {None, *range(19)})
    still = stages.trainable_names(module, stage.model_copy(update={"connector": False, "vlm_layers": 1}))
    assert numel(module, still, "connector") == 0 and numel(module, still, "vlm") == 233_057_792
    assert numel(module, still, "flux") == flux


def test_the_last_qwen_layers_train(small_config):
    values = small_config.model_dump()
    values["stages"] = [
        {"name": str(layers), "share": 1, "blocks": "none", "vlm_layers": layers} for layers in (0, 1, 2)
    ]
    config = build_config(values)
    module, trunk = meta_models(config)
    assert len(module.vlm.layers) == config.vlm_layers == 2 and len(trunk.language_model.layers) == 0
    for layers, stage in enumerate(config.stages):
        names = [name for name in stages.trainable_names(module, stage) if name.startswith("vlm.")]
        assert {stages.locate(name, 1).layer for name in names} == set(range(2 - layers, 2))
        assert "vlm.norm.weight" not in names


@pytest.mark.parametrize(
    ("blocks", "chosen", "problem"),
    [
        ((0,), "atention", "'atention' matches no parameter of the stage's blocks (did you mean the set attention?)"),
        ((0,), "image-branch", "(did you mean the set image_branch?)"),
        ((0,), ("attn.to_x",), "'attn.to_x' matches no parameter of the stage's blocks (names are as attn.to_q"),
        ((30,), ("ff",), "'ff' matches no parameter of the stage's blocks (the stage lists no double block)"),
        ("all", ("attn.to_q", r".*to_q\.bias"), "attn.to_q.bias is named twice, by 'attn.to_q' and by '.*to_q"),
        ((3, 30), "image_branch", "block 30"),
        ((30, 3), ("norm1",), "block 30"),
    ],
)
def test_a_list_that_names_nothing_or_something_twice_is_an_error(dev_meta, blocks, chosen, problem):
    """Before anything is loaded, and not when the stage begins, which may be weeks later."""
    values = dev() | {"stages": [{"name": "mine", "share": 1, "blocks": blocks, "components": chosen}]}
    config = build_config(values)
    with pytest.raises(UserError) as caught:
        stages.trainable_names(dev_meta[0], config.stages[0])
    (found,) = [line for line in find_problems(config, {"zero_optimization": {"stage": 2}}, 8) if "stages.0" in line]
    assert "'mine'" in str(caught.value) and problem in str(caught.value) and problem in found


def test_names_are_looked_for_in_the_blocks_of_the_folder_that_is_loaded(tmp_path):
    """A pruned FLUX (8 + 38 blocks): block 10 is a single one there, and a double one in the preset's sizes."""
    sizes = dev()["model"]["flux_config"] | {"num_layers": 8}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(sizes))
    stage = {"name": "mine", "share": 1, "blocks": [10]}
    for chosen, wrong in (("proj_mlp", False), ("ff", True)):
        values = dev() | {"stages": [stage | {"components": [chosen]}]}
        values["model"] |= {"flux": str(tmp_path)}
        found = find_problems(build_config(values), {"zero_optimization": {"stage": 2}}, 8)
        assert any(line.startswith("stages.0.") for line in found) == wrong


def test_set_model_trains_all_but_the_final_norm(models):
    names = set(stages.trainable_names(models.trainable, ALL))
    assert {name for name, _ in models.trainable.named_parameters()} - names == {"vlm.norm.weight"}


def test_a_block_that_is_not_there_is_named(models):
    with pytest.raises(UserError, match="'late': block 7 matches no parameter"):
        stages.trainable_names(models.trainable, Stage(name="late", share=1, blocks=(0, 7)))


def test_a_stage_of_all_blocks_needs_some():
    module = Toy()
    module.transformer.transformer_blocks = module.transformer.single_transformer_blocks = torch.nn.ModuleList()
    with pytest.raises(UserError, match="'base': block list matches no parameter"):
        stages.trainable_names(module, ALL)


def test_first_stages_follow_the_overlap(dev_meta):
    module, _ = dev_meta
    first = stages.first_stages(module, PUBLISHED, 1)
    assert first["transformer.transformer_blocks.16.attn.to_q.weight"] == 0  # in stages 1 and 2
    assert first["transformer.transformer_blocks.14.attn.to_q.weight"] == 1
    assert first["connector.weight"] == 0
    assert set(first) == set(stages.trainable_names(module, PUBLISHED[1]))
    third = stages.first_stages(module, PUBLISHED, 2)
    assert third["connector.weight"] == 0 and set(third.values()) == {0, 2}


FROZEN = "transformer.transformer_blocks.0.ff.net.2.weight"
STAGE = Stage(name="stage1", share=1, blocks=(1,))


def hooked(models, **kwargs) -> stages.FreezingHooks:
    return stages.FreezingHooks(models.trainable, stages.trainable_names(models.trainable, STAGE), **kwargs)


def test_only_the_stages_parameters_get_gradients(models):
    hooks = hooked(models)
    velocity(models).square().mean().backward()
    held = {name for name, parameter in models.trainable.named_parameters() if parameter.grad is not None}
    assert held == set(stages.trainable_names(models.trainable, STAGE))
    hooks.check()


def test_guard_fires_when_a_frozen_parameter_is_unfrozen_behind_its_back(models):
    hooked(models)
    parameter = dict(models.trainable.named_parameters())[FROZEN]
    parameter.requires_grad_(True)
    with pytest.raises(FrozenParameterError, match=re.escape(FROZEN)):
        velocity(models).square().mean().backward()


def test_guard_fires_on_every_frozen_parameter(models):
    hooks = hooked(models)
    for name, parameter in models.trainable.named_parameters():
        if name not in hooks.trainable:
            parameter.requires_grad_(True)
            with pytest.raises(FrozenParameterError, match=re.escape(name)):
                parameter.sum().backward()
            parameter.requires_grad_(False)


def test_guard_fires_when_a_gradient_is_assigned(models):
    hooks = hooked(models)
    parameter = dict(models.trainable.named_parameters())[FROZEN]
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(FrozenParameterError, match=re.escape(FROZEN)):
        hooks.check()


def test_applying_drops_gradients_that_frozen_parameters_hold(models):
    velocity(models).square().mean().backward()
    hooks = hooked(models)
    hooks.check()
    held = {name for name, parameter in models.trainable.named_parameters() if parameter.grad is not None}
    assert held == hooks.trainable


def test_remove_leaves_the_module_as_found(models):
    module = models.trainable
    frozen_before = dict(module.named_parameters())["connector.bias"]
    frozen_before.requires_grad_(False)
    dict(module.named_parameters())["vlm.norm.weight"].requires_grad_(False)  # which the stage freezes too

    def hook_counts():
        return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in module.modules()]

    flags, counts = [p.requires_grad for p in module.parameters()], hook_counts()
    hooks = hooked(models, label_blocks=True)
    assert [p.requires_grad for p in module.parameters()] != flags and hook_counts() != counts
    hooks.remove()
    assert [p.requires_grad for p in module.parameters()] == flags and hook_counts() == counts
    velocity(models).square().mean().backward()  # no guard is left to fire
    assert dict(module.named_parameters())[FROZEN].grad is not None and frozen_before.grad is None


def test_one_stage_after_another(models):
    for stage in (ALL, STAGE, Stage(name="stage2", share=1, blocks=(0,), components="block")):
        names = stages.trainable_names(models.trainable, stage)
        hooks = stages.FreezingHooks(models.trainable, names)
        velocity(models).square().mean().backward()
        assert {n for n, p in models.trainable.named_parameters() if p.grad is not None} == set(names)
        models.trainable.zero_grad()
        hooks.remove()


def labels(profile) -> list[tuple[str, float, float]]:
    """(name, start, end) of the blocks' labels and our own, in order."""
    found = [event for event in profile.events() if event.name.startswith(("flux.", "after"))]
    return sorted([(e.name, e.time_range.start, e.time_range.end) for e in found], key=lambda label: label[1])


@torch.no_grad()
def test_blocks_are_labelled_for_the_profiler_if_asked(models):
    hooked(models)
    with torch.profiler.profile() as profile:
        velocity(models)
    assert labels(profile) == []
    hooked(models, label_blocks=True)
    with torch.profiler.profile() as profile:
        velocity(models)
    (first, _, end), (second, start, _) = labels(profile)
    assert (first, second) == ("flux.block0", "flux.block1") and end <= start


@torch.no_grad()
def test_a_label_ends_where_its_block_fails(models):
    """As where memory runs out while a plan is tried out."""
    hooked(models, label_blocks=True)
    with torch.profiler.profile() as profile:
        models.trainable.transformer.transformer_blocks[0].forward = lambda *_, **__: 1 / 0
        with pytest.raises(ZeroDivisionError):
            velocity(models)
        with torch.profiler.record_function("after"):
            pass
    (first, _, end), (second, start, _) = labels(profile)
    assert (first, second) == ("flux.block0", "after") and end <= start


def test_a_misspelt_parameter_is_refused(models):
    with pytest.raises(ValueError, match="no parameter named"):
        stages.FreezingHooks(models.trainable, ["connector.wieght"])
