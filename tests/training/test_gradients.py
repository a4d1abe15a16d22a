"""Where gradients flow: FLOPs that torch counts and bytes that autograd keeps, for stages of every kind."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaflux.config.schema import Config
from megaflux.models.pretrained import meta_models
from megaflux.models.tokens import Tokens
from megaflux.models.vlm import Condition
from megaflux.training import stages
from megaflux.training.planning.activations import block_units, saved_by_mlp
from megaflux.training.planning.costs import training_flops
from megaflux.training.planning.micro_batch import Planner
from megaflux.training.planning.sizes import Sizes
from megaflux.training.planning.throughput import BLOCK_LAUNCHES
from tests.training.test_costs import small

STAGES: dict[str, dict] = {
    "base": {"blocks": "all", "components": "model"},
    "attention": {"blocks": [0, 3]},
    "block": {"blocks": [1, 2, 5], "components": "block"},
    "connector alone": {"blocks": "none", "vlm_layers": 0},
    "two layers": {"blocks": "none", "connector": False, "vlm_layers": 2},
    "frozen front": {"blocks": [1], "vlm_layers": 1},
    "context_embedder": {"blocks": [4], "connector": False, "vlm_layers": 0},
    "image branch": {"blocks": [1], "components": "image_branch", "connector": False, "vlm_layers": 0},
    "image branch, connector": {"blocks": [0, 1], "components": "image_branch", "vlm_layers": 0},
    "norms": {"blocks": "all", "components": "norms", "connector": False, "vlm_layers": 0},
    "late norms": {"blocks": [4], "components": "norms", "connector": False, "vlm_layers": 0},
    "list": {"blocks": [1, 4], "components": ["attn.to_out.0", "proj_out"], "connector": False, "vlm_layers": 0},
    "mlp list": {"blocks": [1, 4], "components": ["ff.net.0.proj", "proj_mlp"], "connector": False, "vlm_layers": 0},
    "text list": {"blocks": [0, 1], "components": [r"ff_context\..+", "context_embedder.bias"], "connector": False},
}


def one_stage(name: str, **model) -> Config:
    config = small()
    stage = {"name": "s", "share": 1} | STAGES[name]
    vlm = copy.deepcopy(config.model.vlm_config)
    vlm["text_config"] |= {"num_hidden_layers": 3, "layer_types": None}
    return small(stages=[stage], model=config.model.model_dump() | {"vlm_config": vlm} | model)


@pytest.mark.parametrize(
    "stage, policy, kernels",
    [
        ("base", "none", True),
        ("attention", "full", True),
        ("block", "mlp", True),
        ("attention", "mlp", True),
        ("attention", "full", False),
        ("block", "none", False),
        ("connector alone", "none", False),
        ("connector alone", "full", True),
        ("two layers", "full", True),
        ("frozen front", "none", True),
        ("frozen front", "full", False),
        ("context_embedder", "none", False),
        ("image branch", "mlp", True),
        ("image branch", "full", False),
        ("image branch, connector", "none", True),
        ("norms", "none", False),
        ("late norms", "mlp", True),
        ("list", "none", False),
        ("mlp list", "mlp", True),
        ("text list", "none", True),
    ],
)
def test_torch_counts_the_same_flops(stage, policy, kernels):
    """Forward and backward of one image under torch's FlopCounterMode; attention as plain products, so that
    no flash kernel recomputes. The rotary tables (outer products) are all the difference there may be."""
    config = one_stage(stage, vlm_layers=2, activation_checkpointing=policy)
    module = meta_models(config)[0].to_empty(device="cpu")
    tokens = Tokens(image=48, condition=20, turn=35, patches=80)
    names = set(stages.trainable_names(module, config.stages[0]))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.data.normal_()  # no norm weight of 0, whose q and k would be kept twice
    module.train()
    module.configure(kernels, policy)
    width = config.model.vlm_config["text_config"]["hidden_size"]
    condition = Condition(torch.zeros(1, 35, width), torch.zeros(3, 1, 35).long(), torch.zeros(1, 20).long())
    inputs = (condition, torch.zeros(1, 48, 32), torch.zeros(1), torch.zeros(48, 3), torch.zeros(1, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*inputs, guidance=torch.zeros(1)).sum().backward()
    ours = training_flops(module, config.stages[0], tokens, policies=[policy] * 6)
    assert (ours.backward_attention < 2 * ours.forward_attention) == (stage != "two layers")
    want = ours.hardware - ours.backward_attention // 4
    assert counter.get_total_flops() == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("stage", [0, 1, *(name for name in STAGES if name not in ("base", "attention", "two layers"))])
def test_autograd_keeps_what_the_formula_says(stage):
    """Bytes counted by the bench at FLUX's head size, where statistics weigh little. Outside the blocks lie about two
    units: the input of the last norm, and the position table."""
    from megaflux.bench import activations

    config = small() if isinstance(stage, int) else one_stage(stage)
    stage, upstream = (stage, True) if isinstance(stage, int) else (0, STAGES[stage].get("connector", True))
    sizes = config.model.flux_config | {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    with torch.device("meta"):
        module = torch.nn.Module()
        module.transformer = activations.build(sizes, torch.float32)
    spec = config.stages[stage]
    trainable = {name.removeprefix("transformer.") for name in stages.trainable_names(module, spec)}
    tokens = Tokens(1024, 512, 527, 0)
    for arm, fused in (("diffusers-eager", False), ("ours-none", True), ("ours-mlp", True)):
        for batch in (1, 2):
            kept = activations.count(sizes, trainable, arm, 1024, 512, batch, torch.bfloat16, False, upstream)
            units = block_units(module.transformer, spec, tokens, fused)
            saved = saved_by_mlp(module.transformer, spec, tokens) if arm == "ours-mlp" else []
            measured = kept["saved_bytes"] / (2 * batch * 512 * 1536)
            assert measured == pytest.approx(sum(units) - sum(saved) + 2, rel=0.03, abs=2.5), (arm, batch)


def test_a_block_without_a_backward_pass_is_launched_forward_only():
    """image branch: block 1 of 6 trains and nothing is upstream of it, so that block 0 has no backward pass."""
    found = {}
    for connector in (False, True):
        config = one_stage("image branch")
        stage = config.stages[0].model_copy(update={"connector": connector})
        sizes = Sizes.of(config.model_copy(update={"stages": (stage,)}), {"zero_optimization": {"stage": 2}}, 1)
        found[connector] = Planner(sizes)._launches(stage).flux
    assert found[True] == 6 * BLOCK_LAUNCHES[True] and found[True] - found[False] == 31 - 10
