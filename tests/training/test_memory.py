"""The memory formulas beside what is counted: updates on fake tensors, a real engine's tensors, the VAE's maps; and plans
within what is really free."""

import copy
import json
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megaflux.bench import memory as bench
from megaflux.bench.live_memory import LiveMemory
from megaflux.bench.update_memory import update_peak, vae_peaks
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import FLUX_VAE, PRESETS
from megaflux.config.schema import Config
from megaflux.data.buckets import Bucket
from megaflux.generation import sampling
from megaflux.models.latents import coding_peak
from megaflux.models.pretrained import meta_models
from megaflux.models.scratch import TINY
from megaflux.training.planning import memory
from megaflux.training.planning.activations import activation_bytes
from megaflux.training.planning.costs import token_counts
from megaflux.training.planning.sizes import Sizes

DS_CONFIG = json.loads(bench.ZERO_CONFIG.read_text())
SQUARE, WIDE = Bucket("1:1", 1024, 1024), Bucket("2:1", 512, 1024)
GB = 10**9


def dev(batch: int = 8, double: int = 19, single: int = 38, **stage) -> Config:
    """dev at another depth, with stage 1 changed; its trunk is cut short, for nothing here runs it."""
    values = PRESETS["dev"]()
    values["model"]["flux_config"] |= {"num_layers": double, "num_single_layers": single}
    values["model"]["vlm_config"]["text_config"] |= {"num_hidden_layers": 2}
    values["model"]["vlm_config"]["vision_config"] |= {"depth": 1}
    values["stages"] = values["stages"][:1] if stage else values["stages"]
    values["stages"][0] |= stage
    values["train"] |= {"micro_batch_size": batch, "global_batch_size": batch * 8}
    return build_config(values)


def counted_and_formula(config: Config, stage: int, bucket: Bucket, batch: int, policies: list, fused: bool = True):
    module, spec = meta_models(config)[0], config.stages[stage]
    kept = activation_bytes(module, spec, token_counts(config, bucket), 2, policies, fused)
    return update_peak(config, module, spec, bucket, batch, policies, fused), batch * kept


# --- the formulas beside what is counted ---


@pytest.mark.parametrize("components", ["attention", "block"])
@pytest.mark.parametrize(
    ("policies", "bucket", "fused"),
    [
        (["none"] * 5, SQUARE, True),
        (["mlp"] * 5, WIDE, True),
        (["full"] * 5, SQUARE, True),
        (["none", "full", "mlp", "full", "full"], SQUARE, True),
        (["none"] * 5, SQUARE, False),
        (["full"] * 5, SQUARE, False),
    ],
)
def test_an_update_holds_what_the_formula_says(components, policies, bucket, fused):
    """Widths as published, at a depth where what the block at work adds weighs as much as what is kept."""
    config = dev(2, double=2, single=3, blocks=[1, 4], components=components)
    counted, formula = counted_and_formula(config, 0, bucket, 2, policies, fused)
    if components == "block" and fused:  # proj_out's gradient on its way, which zero_bytes counts
        formula += 2 * 5 * 3072**2
    assert formula == pytest.approx(counted, rel=0.05)


CONNECTOR_ALONE = {"blocks": "none", "vlm_layers": 0}
TWO_LAYERS = {"blocks": "none", "connector": False, "vlm_layers": 2}
IMAGE_BRANCH = {"blocks": [1], "components": "image_branch", "connector": False, "vlm_layers": 0}
WITH_CONNECTOR = {"blocks": [0, 1], "components": "image_branch", "vlm_layers": 0}
NORMS = {"blocks": "all", "components": "norms", "connector": False, "vlm_layers": 0}
A_LIST = {"blocks": [1, 4], "components": ["attn.to_[qkv]", "proj_out"], "connector": False, "vlm_layers": 0}


@pytest.mark.parametrize(
    ("stage", "policy", "fused"),
    [
        (CONNECTOR_ALONE, "none", True),
        (CONNECTOR_ALONE, "full", True),
        (TWO_LAYERS, "none", True),
        (TWO_LAYERS, "full", True),
        (IMAGE_BRANCH, "none", True),
        (IMAGE_BRANCH, "mlp", True),
        (IMAGE_BRANCH, "full", True),
        (IMAGE_BRANCH, "none", False),
        (WITH_CONNECTOR, "mlp", True),
        (NORMS, "none", True),
        (NORMS, "none", False),
        (A_LIST, "mlp", True),
        (A_LIST, "none", False),
    ],
)
def test_an_update_of_another_recipe_holds_what_the_formula_says(stage, policy, fused):
    config = dev(2, double=2, single=3, **stage)
    counted, formula = counted_and_formula(config, 0, SQUARE, 2, [policy] * 5, fused)
    if stage is A_LIST and fused:  # proj_out's gradient on its way, which zero_bytes counts
        formula += 2 * 5 * 3072**2
    assert formula == pytest.approx(counted, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("plan", ["none", "mlp", "full", "auto"])
def test_an_update_of_dev_holds_what_the_formula_says(stage, batch, plan):
    config = dev(batch)
    policies = [plan] * 57
    if plan == "auto":
        policies = memory.policies_for(Sizes.of(config, DS_CONFIG, 8), config.stages[stage], memory.usable(80 * GB))
    for bucket in (SQUARE, WIDE):
        counted, formula = counted_and_formula(config, stage, bucket, batch, policies)
        assert formula == pytest.approx(counted, rel=0.01)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("averaged", [False, True])
def test_an_engine_of_zero_2_holds_what_the_formula_says(averaged):
    for counted, formula in bench.small_zero(DS_CONFIG, averaged).values():
        assert formula == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_vae_holds_what_the_formula_says_however_many_pictures_there_are(dtype):
    tiny = {k: v for k, v in json.loads((TINY / "vae/config.json").read_text()).items() if not k.startswith("_")}
    for values, pictures, bucket in ((FLUX_VAE, 1, SQUARE), (FLUX_VAE, 8, WIDE), (tiny, 5, SQUARE)):
        sizes = values["block_out_channels"], pictures, bucket.height, bucket.width, dtype.itemsize
        for counted, formula, allowed in zip(
            vae_peaks(values, pictures, bucket, dtype), coding_peak(*sizes, False), coding_peak(*sizes), strict=True
        ):
            results = 0.05 * counted  # latents or pictures of all chunks
            assert counted - results <= formula < 1.3 * counted
            assert 1.25 * formula < allowed < 2 * formula
    assert coding_peak([128, 256], 8, 1024, 1024, 2) == coding_peak([128, 256], 2, 1024, 1024, 2)


def test_live_memory_knows_views_and_the_end_of_storages():
    with FakeTensorMode():
        weight = torch.empty(256, 256)
        with LiveMemory() as found:
            product = weight @ weight
            view = product.view(-1)[5:]
            product += 1
            del product
            assert found.live == found.peak == 4 * 256 * 256
            del view
            assert found.live == 0
            torch.empty(3, device="meta")
            _ = torch.empty(3)
            assert found.live == 512  # an allocator's granule
        assert found.peak == 4 * 256 * 256


def test_generating_takes_large_pictures_one_by_one_and_leaves_the_vae_as_it_was(monkeypatch):
    vae, seen = SimpleNamespace(use_slicing=False), []
    tokens = torch.zeros(1, 2, 4)
    models = SimpleNamespace(trainable=SimpleNamespace(encode_condition=lambda condition, embedded: tokens, fused=True))
    monkeypatch.setattr(
        sampling, "sample", lambda pipeline, *_, **__: seen.append(pipeline.vae.use_slicing) or torch.zeros(1)
    )
    for pictures, side in ((8, 1024), (2, 1024), (32, 128)):
        seeds = list(range(pictures))
        request = sampling.SamplingRequest(side, side, 2, 3.5)
        sampling.generate(SimpleNamespace(vae=vae), models, SimpleNamespace(bias=lambda: None), seeds, request)
        assert not vae.use_slicing  # training encodes with it
    assert seen == [True, False, False]


# --- DeepSpeed's part ---


@lru_cache(maxsize=1)
def dev_models():
    return meta_models(dev())


def zero(changes: dict, ranks: int = 8, bf16: bool = True, averaged: bool = False) -> tuple[int, int, int]:
    ds_config = copy.deepcopy(DS_CONFIG)
    ds_config["zero_optimization"] |= changes
    if not bf16:
        del ds_config["bf16"], ds_config["communication_data_type"]
    return memory.zero_bytes(ds_config, ranks, dev_models()[0], dev().stages[0], 2 if bf16 else 4, averaged)


def test_what_zero_holds_beside_the_weights():
    trained, largest = 1_581_963_776, 3584 * 18944
    gradients, optimizer, host = zero({"reduce_bucket_size": 10**8})
    assert (optimizer, host) == (16 * trained // 8, 0)
    assert gradients == 2 * 10**8 + 6 * 10**8 + 2 * largest
    assert zero({"reduce_bucket_size": 10**10})[0] == 8 * 10**10 + 2 * largest  # whole, however little trains
    assert zero({"reduce_bucket_size": 10**6})[0] == 2 * 10**6 + 8 * largest  # a larger gradient is reduced alone
    assert zero({"overlap_comm": True})[0] - zero({})[0] == 2 * 70_000_000
    gradients, optimizer, host = zero({"offload_optimizer": {"device": "cpu"}})
    assert optimizer == 4 * trained // 8 + 2 * largest  # the float32 sum stays on the GPU
    assert host == 18 * trained // 8 + 2 * largest
    assert zero({"stage": 3, "offload_optimizer": {"device": "cpu"}})[1] == 0
    assert zero({}, bf16=False)[1] == 20 * trained // 8
    assert zero({}, averaged=True) == (zero({})[0], 20 * trained // 8, 0)  # the weights' average
    offloaded = zero({"offload_optimizer": {"device": "cpu"}}, averaged=True)
    assert offloaded == (gradients, optimizer, host + 4 * trained // 8)
    config = build_config(merge(PRESETS["dev"](), {"optim": {"ema_decay": 0.9999}}))
    sized = [Sizes(c, DS_CONFIG, 8, *dev_models()) for c in (dev(), config)]
    plain, averaged = (memory.stage_memory(sizes, sizes.config.stages[0], SQUARE) for sizes in sized)
    assert averaged.total - plain.total == averaged.optimizer - plain.optimizer == 4 * trained // 8


# --- plans within what is free ---


class Allocator:
    """torch.cuda's numbers for a GPU of 80 GB: `allocated` in use, of what is reserved; `others` of other processes."""

    def __init__(self, allocated: int, reserved: int, others: int = 0):
        self.allocated, self.reserved, self.others, self.total = allocated, reserved, others, 80 * GB

    def into(self, monkeypatch) -> None:
        free = self.total - self.others - memory.RUNTIME_BYTES - self.reserved
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: self.reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: self.allocated)


@pytest.fixture(scope="module")
def on_a_gpu():
    """Models of dev's bytes on a fake GPU: weights, and an optimizer's masters and moments at 8 ranks."""

    def module(size: int) -> nn.Module:
        held = nn.Module()
        held.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="cuda"), requires_grad=False)
        return held

    config = dev(8)
    with FakeTensorMode():
        weights = memory.stage_memory(Sizes(config, DS_CONFIG, 8, *dev_models()), config.stages[0], SQUARE).weights
        trainable, vlm, vae = (module(weights[name]) for name in ("flux", "vlm", "vae"))
        master = torch.empty(1_581_963_776 // 8, device="cuda")
        moments = {key: torch.empty_like(master) for key in ("exp_avg", "exp_avg_sq")} | {"step": torch.zeros(())}
    models = SimpleNamespace(resident=lambda: (trainable, vlm, vae))
    optimizer = SimpleNamespace(param_groups=[{"params": [master]}], state={master: moments})
    own = sum(weights.values()) - weights["connector"] + 12 * master.numel()
    return config, models, optimizer, own


def test_a_plan_is_made_for_what_is_free_and_not_for_what_a_leak_holds(on_a_gpu, monkeypatch):
    config, models, optimizer, own = on_a_gpu
    sizes = Sizes(config, DS_CONFIG, 1, *dev_models())

    def plan(with_optimizer: bool = True, **numbers) -> int:
        Allocator(**numbers).into(monkeypatch)
        world = World(0, 1, torch.device("cuda"))
        given = [optimizer] if with_optimizer else []
        most = memory.budget(world, models, *given)
        policies = memory.policies_for(sizes, config.stages[0], most)
        return sum({"none": 2, "mlp": 1, "full": 0}[policy] for policy in policies)

    clean = plan(allocated=own, reserved=own)
    assert clean > 0
    assert plan(allocated=own + 5 * GB, reserved=own + 5 * GB) < clean  # an engine that was not freed
    assert plan(allocated=own, reserved=own, others=5 * GB) < clean  # another process
    assert plan(allocated=own, reserved=own + 5 * GB) == clean  # cached, but in nobody's use
    assert plan(False, allocated=own, reserved=own) <= clean  # unknown shards are planned for anew


def test_what_may_be_planned_with():
    total, own = 80 * GB, 46 * GB
    numbers = memory.DeviceMemory(total, free=total - own - 2 * GB, reserved=own, allocated=own)
    assert numbers.plannable(own) == memory.usable(total)  # all of it is ours or free
    leaked = memory.DeviceMemory(total, free=total - own - 7 * GB, reserved=own + 5 * GB, allocated=own + 5 * GB)
    assert numbers.plannable(own) - leaked.plannable(own) == 5 * GB
