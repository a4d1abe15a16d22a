"""Counts of parameters, FLOPs and bytes: published figures, an independent counter, and laws that any count
obeys."""

import copy
import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaflux.config.parse import build_config
from megaflux.config.presets import FLUX_VAE, PRESETS
from megaflux.config.schema import Config
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import meta_models
from megaflux.models.tokens import Tokens, condition_grid
from megaflux.training import stages
from megaflux.training.planning import costs, memory
from megaflux.training.planning.activations import activation_bytes, flux_bytes
from megaflux.training.planning.costs import training_flops
from megaflux.training.planning.gpus import peak_tflops_for
from megaflux.training.planning.sizes import Sizes

ZERO2 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "communication_data_type": "fp32"}
SQUARE = Bucket("1:1", 1024, 1024)
TERA, GB = 1e12, 1e9


def dev(components: str = "attention", **stages_or_more) -> Config:
    values = PRESETS["dev"]()
    for stage in values["stages"]:
        stage["components"] = components
    return build_config(values | stages_or_more)


def small(**changes) -> Config:
    """tiny's sizes without its shipped files: its networks are named as on a hub, so that nothing is read."""
    values = PRESETS["tiny"]()
    values["model"] |= {"vlm": "none/vlm", "flux": "none/flux", "vae": None}
    values["model"]["vlm_config"]["text_config"]["vocab_size"] = 50
    values["data"]["cache"] = []
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value} if key else value
    return build_config(values)


@pytest.fixture(scope="module")
def dev_models():
    return meta_models(dev())


@pytest.fixture(scope="module")
def small_models():
    return meta_models(small())


# --- parameters ---


@pytest.mark.parametrize(
    "components, flux",
    [
        ("attention", [1_334_221_824, 1_485_265_920, 1_485_265_920]),
        ("block", [3_127_660_544, 3_467_491_840, 3_467_491_840]),
    ],
)
def test_published_stages_train_the_published_counts(dev_models, components, flux):
    table = costs.stage_table(dev(components), dev_models[0])
    assert [row.trainable["flux"] for row in table] == flux
    assert {row.trainable["connector"] for row in table} == {14_684_160}
    assert {row.trainable["vlm"] for row in table} == {233_057_792}
    assert sum(row.updates for row in table) == 100_000


def test_another_block_list_is_counted_from_its_layers(dev_models):
    """One double and two single blocks of width W, by hand."""
    W, mlp, context = 3072, 4 * 3072, 4096 * 3072 + 3072
    square = W * W + W
    attention = (4 * square + 2 * (6 * W * W + 6 * W)) + 2 * (3 * square + 3 * W * W + 3 * W)
    double = 2 * (6 * W * W + 6 * W) + 8 * square + 4 * 128 + 2 * (W * mlp + mlp + mlp * W + W)
    single = 3 * W * W + 3 * W + 3 * square + 2 * 128 + (W * mlp + mlp) + (W + mlp) * W + W
    for components, want in (("attention", attention), ("block", double + 2 * single)):
        stage = {"name": "mine", "share": 1, "blocks": [30, 3, 19], "components": components}
        (row,) = costs.stage_table(dev(stages=[stage]), dev_models[0])
        assert row.trainable["flux"] == want + context
        assert row.blocks == [30, 3, 19]


def test_all_means_every_block(small_models):
    rows = costs.stage_table(small(), small_models[0])
    assert rows[0].blocks == [0, 1, 2, 3, 4, 5]
    assert rows[0].trainable["flux"] == sum(p.numel() for p in small_models[0].transformer.parameters())


# --- FLOPs ---


@pytest.mark.parametrize(
    "text, linear, attention, dw, plain, full", [(512, 59.5, 14.9, 15.7, 187, 261), (256, 56.2, 13.3, 14.8, 174, 243)]
)
def test_flux_at_1024_meets_the_calculated_anchors(dev_models, text, linear, attention, dw, plain, full):
    """The anchors count FLUX alone; ours has the Qwen layer and the connector on top (0.25 forward)."""
    stage, tokens = dev("block").stages[0], Tokens(4096, text, text + 15, 4 * text)
    flops = training_flops(dev_models[0], stage, tokens, policies=["full"] * 57)
    assert flops.forward_linear / TERA == pytest.approx(linear, rel=0.01)
    assert flops.forward_attention / TERA == pytest.approx(attention, rel=0.01)
    assert flops.backward_inputs / TERA == pytest.approx(linear, rel=0.01)
    assert flops.backward_weights / TERA == pytest.approx(dw, rel=0.02)
    assert flops.backward_attention == 2 * flops.forward_attention
    assert flops.hardware / TERA == pytest.approx(full, rel=0.01)
    once = training_flops(dev_models[0], stage, tokens)
    assert once.hardware / TERA == pytest.approx(plain, rel=0.01)
    assert once.model == flops.model  # recomputing is no progress
    selective = training_flops(dev_models[0], stage, tokens, policies=["mlp"] * 57)
    assert once.hardware < selective.hardware < 1.12 * once.hardware


def test_frozen_networks_meet_the_anchors(dev_models):
    _, trunk = dev_models
    tokens = Tokens(4096, 256, 256 + 15, 4 * 256)
    last_layer = 2 * 233_057_792 * tokens.turn
    assert (costs.trunk_flops(trunk, tokens) + last_layer) / TERA == pytest.approx(5.2, rel=0.03)
    visual = costs.trunk_flops(trunk, tokens) - costs.trunk_flops(trunk, Tokens(4096, 0, tokens.turn, 0))
    assert visual / TERA == pytest.approx(1.5, rel=0.04)
    assert costs.vae_encode_flops(json.dumps(FLUX_VAE), 1024, 1024) / TERA == pytest.approx(4.9, rel=0.01)


def test_torch_counts_the_same_trunk():
    """A picture of 4 x 6 image tokens in a turn of 35."""
    config = small()
    trunk = meta_models(config)[1].to_empty(device="cpu")
    ids = torch.full((1, 35), 3)
    ids[:, 10:34] = trunk.config.image_token_id = 49
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trunk(
            input_ids=ids,
            position_ids=torch.zeros(3, 1, 35).long(),
            pixel_values=torch.zeros(96, 3 * 2 * 14 * 14),
            image_grid_thw=torch.tensor([[1, 8, 12]]),
            use_cache=False,
        )
    assert counter.get_total_flops() == pytest.approx(costs.trunk_flops(trunk, Tokens(0, 24, 35, 96)), rel=2e-3)


def test_flops_grow_with_what_trains_and_with_the_picture(small_models):
    module, trunk = small_models
    config = small()
    bucket, larger = Bucket("1:1", 128, 128), Bucket("1:1", 256, 256)
    per_stage = [costs.train_flops_per_image(config, module, i, bucket, trunk) for i in range(2)]
    assert per_stage[0] > per_stage[1]  # base trains everything, stage 1 two blocks
    assert costs.train_flops_per_image(config, module, 1, larger, trunk) > per_stage[1]
    cached = small(data__cache=["latents", "trunk"])
    without = costs.train_flops_per_image(cached, module, 1, bucket, trunk)
    assert per_stage[1] - without == costs.frozen_flops(config, trunk, bucket) > 0


def test_condition_grid_is_qwens_own_resize():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        height, width = torch.randint(28, 1400, (2,), generator=generator).tolist()
        if max(height, width) > 190 * min(height, width):
            continue
        most = int(torch.randint(4, 700, (), generator=generator))
        want = smart_resize(height, width, 28, 4 * 28**2, most * 28**2)
        assert tuple(28 * n for n in condition_grid(height, width, most)) == want
    assert math.prod(condition_grid(1024, 1024, 512)) == 484


# --- memory ---


def test_weights_and_optimizer_shards_meet_the_anchors(dev_models):
    for components, want in (("block", {1: 54, 8: 6.8, 64: 0.84}), ("attention", {1: 25, 8: 3.2, 64: 0.40})):
        first = dev(components).model_copy(update={"stages": dev(components).stages[:1]})
        for ranks, shard in want.items():
            found = memory.memory_per_gpu(Sizes(first, ZERO2, ranks, *dev_models))
            assert found.optimizer / GB == pytest.approx(shard, rel=0.02)
            assert found.weights["flux"] / GB == pytest.approx(23.8, rel=0.01)
            assert found.weights["vlm"] / GB == pytest.approx(15.5, rel=0.01)
    assert found.total < 80 * GB  # the published recipe fits its own GPUs


def test_activations_meet_the_anchors(dev_models):
    config, tokens = dev("block"), Tokens(4096, 512, 527, 2048)

    def gigabytes(policy, fused):
        """Without what the last block adds while it is at work: 9 units of a hidden state, 14 in mlp
        (13 without kernels)."""
        peak = activation_bytes(dev_models[0], config.stages[0], tokens, 2, [policy] * 57, fused)
        added = {"none": 9 if fused else 13, "mlp": 14, "full": 0}
        return (peak - added[policy] * 2 * 4608 * 3072) / GB

    assert gigabytes("full", fused=False) == pytest.approx(2.43, rel=0.03)  # with it: 86 units, as the bench counts
    assert gigabytes("none", fused=False) == pytest.approx(22, rel=0.02)
    assert gigabytes("none", fused=True) == pytest.approx(15.7, rel=0.02)
    assert gigabytes("mlp", fused=True) == pytest.approx(9.26, rel=0.02)  # docs/kernels.md


@pytest.mark.parametrize("double, single", [(4, 4), (2, 6)])
@pytest.mark.parametrize("stage, policy", [(0, "none"), (1, "mlp")])
def test_statistics_of_norms_and_attention_are_in_the_formula(stage, policy, double, single):
    """What two more blocks keep, counted, at a width of 32 where statistics are a twentieth of it; in float32, since a
    CPU keeps those of 16-bit norms in 16 bits. The formula gives single blocks a second norm's two: 8 bytes a token."""
    from megaflux.bench import activations

    config, tokens = small(), Tokens(1024, 512, 527, 0)
    spec, found = config.stages[stage], []
    for depth in ((2, 4), (double, single)):
        sizes = config.model.flux_config | {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "axes_dims_rope": [4, 6, 6],
            "num_layers": depth[0],
            "num_single_layers": depth[1],
        }
        with torch.device("meta"):
            module = torch.nn.Module()
            module.transformer = activations.build(sizes, torch.float32)
        trainable = {name.removeprefix("transformer.") for name in stages.trainable_names(module, spec)}
        kept = activations.count(sizes, trainable, f"ours-{policy}", 1024, 512, 1, torch.float32, backward=False)
        formula = flux_bytes(module.transformer, spec, tokens, 4, [policy] * sum(depth))
        found.append((kept["saved_bytes"], formula))
    counted, formula = (after - before for before, after in zip(*found, strict=True))
    assert abs(formula - counted) <= 2 * 1536 * 8


def test_sharding_and_offloading_move_bytes(small_models):
    config = small()

    def need(ranks, **zero):
        ds_config = copy.deepcopy(ZERO2)
        ds_config["zero_optimization"] |= zero
        return memory.memory_per_gpu(Sizes(config, ds_config, ranks, *small_models))

    assert need(4).optimizer == pytest.approx(need(1).optimizer / 4, rel=1e-6)
    assert need(4).weights == need(1).weights
    assert need(4, stage=3).weights["flux"] == pytest.approx(need(1).weights["flux"] / 4, rel=1e-6)
    offloaded = need(2, offload_optimizer={"device": "cpu"})
    assert offloaded.host_optimizer > need(2).optimizer > 3 * offloaded.optimizer  # the sum of gradients stays
    full = memory.memory_per_gpu(Sizes(config, {"zero_optimization": {"stage": 2}}, 1, *small_models))
    assert full.weights["flux"] == 2 * need(1).weights["flux"]


# --- speed ---


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("Tesla V100", None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_tflops_for(name) == peak


# --- the policy auto ---


def test_auto_recomputes_no_more_than_the_memory_asks_for(dev_models):
    config = dev()
    stage = config.stages[0]

    def choose(gigabytes, uneven=None):
        return memory.policies_for(Sizes(config, ZERO2, 8, *dev_models, uneven), stage, gigabytes * GB)

    def need(policies, uneven=None):
        sizes = Sizes(config, ZERO2, 8, *dev_models, uneven)
        return max(memory.stage_memory(sizes, stage, bucket, policies).total for bucket in sizes.buckets)

    assert choose(50) == ["full"] * 57  # too little for anything else, and the problem is the dry run's to tell
    assert choose(1000) == ["none"] * 57
    recomputed = {"none": 0, "mlp": 1, "full": 2}
    before = 2 * 57
    for gigabytes in (72, 90, 120, 160):
        policies = choose(gigabytes)
        assert need(policies) <= gigabytes * GB
        assert sum(map(recomputed.get, policies)) < before  # more memory, less recomputation
        before = sum(map(recomputed.get, policies))
    assert need(choose(90)) > 88 * GB  # and it is used
    assert need(choose(90), [True] * 57) > 90 * GB  # blocks that keep q, k and v would not fit so
    assert need(choose(90, [True] * 57), [True] * 57) <= 90 * GB


def test_auto_without_kernels_is_all_or_nothing(dev_models):
    config = dev().model_copy(update={"model": dev().model.model_copy(update={"kernels": "off"})})
    sizes = Sizes(config, ZERO2, 8, *dev_models)
    found = [memory.policies_for(sizes, config.stages[0], n * GB) for n in (90, 1000)]
    assert found == [["full"] * 57, ["none"] * 57]


def test_the_frozen_networks_are_built_once_for_all_stages_and_buckets(small_models, monkeypatch):
    """Each build takes the host up to half a second for `dev`, between two micro-batches."""
    built, module = [], copy.deepcopy(small_models[0])
    monkeypatch.setattr(costs, "meta_models", lambda config: built.append(1) or meta_models(config))
    config, buckets = small(), [Bucket("1:1", 128, 128), Bucket("2:1", 128, 64)]
    flops = [costs.train_flops_per_image(config, module, stage, bucket) for stage in range(2) for bucket in buckets * 2]
    assert len(built) == 1
    assert flops[1] == costs.train_flops_per_image(config, small_models[0], 0, buckets[1], small_models[1])
    assert len(built) == 1  # given one, it builds none
