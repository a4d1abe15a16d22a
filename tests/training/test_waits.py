"""What the host waits for while the GPU computes: only what docs/training.md lists, counted on a stand-in GPU."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from megaflux import flow
from megaflux.common.ranks import World
from megaflux.config.parse import build_config
from megaflux.config.schema import Config, Flow
from megaflux.data.batches import Batch
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import Models, load_models
from megaflux.training import distributed, monitor, objective
from megaflux.training.distributed import generator_for
from megaflux.training.engine import StageEngine
from megaflux.training.monitor import Monitor
from megaflux.training.objective import Denoising
from megaflux.training.survival.events import Events
from megaflux.training.survival.guard import Guard
from megaflux.training.update_result import MicroBatch, UpdateResult
from tests.conftest import small_values
from tests.stand_in_gpu import GPU, StandInGpu
from tests.training.runs import ds_config

pytestmark = pytest.mark.usefixtures("process_group")
BUCKET = Bucket("1:1", 64, 64)
CAPTIONS = ["a cat", "a longer caption than that"]  # one of them is padded
MODES = {"image": {"image": 1.0}, "image_text": {"image": 0.0, "image_text": 1.0}, "text": {"image": 0.0, "text": 1.0}}
DEEPSPEED = {"stage_1_and_2.py", "utils.py"}  # where its own waits are; all others are ours
POLICY = {"image": "none", "image_text": "full", "text": "mlp"}
INDEX = ("copy of an index", "vlm.py:_see", "modeling_qwen2_vl.py:rot_pos_emb")  # in transformers 4; 5 has none
NORMS = ("tolist", "flux.py:uneven_norms", "flux.py:uneven_norms")
ONCE = ("copy from pageable memory", "vlm.py:_see", "image_processing_utils_fast.py:_fuse_mean_std_and_rescale_factor")


def configured(folder, **condition: float) -> Config:
    values = small_values()
    values["run"] = {"dir": str(folder), "seed": 3}
    values["data"]["condition"] = condition or {"image": 1.0}
    values["monitor"] = {"every": 1, "grad_norms_every": 1, "peak_tflops": 1.0}
    values["model"]["flux_config"] |= {
        "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    }  # as Triton's kernels take
    return build_config(values)


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = len(CAPTIONS), 3, BUCKET.height, BUCKET.width
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(["first", "second"], CAPTIONS, BUCKET, pixels, None, None)


def micro_batch(model, config: Config, models: Models, batch: Batch, device: torch.device):
    """Steps 1 to 5 of loop.update: losses (B,) and times (B,)."""
    batch = batch.to(device)
    samples = objective.count_up(batch.keys, Counter())
    latents = objective.encode_latents(config, models, batch, 0)
    condition = objective.encode_condition(config, models, batch, samples, 0, 0)
    t, n = objective.draw_time_and_noise(config.flow, config.run.seed, 0, samples, latents)
    guidance = objective.draw_guidance(config.flow, config.run.seed, 0, samples, latents.device)
    return objective.denoising_loss(model, models, Denoising(batch.bucket, latents, condition, t, n, guidance)), t


def monitored(config: Config, models: Models, device: torch.device, size: int = 1) -> Monitor:
    return Monitor(config, World(0, size, device), models.trainable, 0, Events(config.run.dir, enabled=False))


def result_of(micro_batches=(), grad_norm: float = 1.0, grad_norms=None) -> UpdateResult:
    return UpdateResult({"flux": 0.1}, grad_norm, 0.0, None, list(micro_batches), 0.0, grad_norms or {})


def trained(config: Config, models: Models, device: torch.device, shown: Monitor, batch: Batch):
    """Steps 1 to 7 but for DeepSpeed: losses and gradients by name."""
    losses, t = micro_batch(models.trainable, config, models, batch, device)
    losses.mean().backward()
    shown._count(MicroBatch(batch.keys, batch.bucket, batch.replaced, losses.detach(), t), 0, 0)
    gradients = {name: p.grad for name, p in models.trainable.named_parameters() if p.grad is not None}
    models.trainable.zero_grad(set_to_none=True)
    return losses.detach(), gradients


@dataclass
class Ran:
    """The micro-batches of a mode on the CPU and on the stand-in."""

    expected: tuple
    results: list[tuple] = field(default_factory=list)
    waits: list[Counter] = field(default_factory=list)
    mixed: list = field(default_factory=list)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """By mode of condition: two micro-batches on a stand-in GPU, and one on the CPU.

    The kernels' torch path stands for Triton's, whose launches are asynchronous and read nothing back."""
    folder = tmp_path_factory.mktemp("waits")
    models = load_models(configured(folder))
    models.trainable.train()
    runs: dict[str, Ran] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megaflux_kernels.dispatch.CHOICE", "torch")
        for mode in MODES:
            config, cpu = configured(folder, **MODES[mode]), torch.device("cpu")
            models.trainable.configure(True, POLICY[mode])
            runs[mode] = Ran(trained(config, models, cpu, monitored(config, models, cpu), a_batch()))
        with StandInGpu() as gpu:
            for module in (models.trainable, models.trunk.vlm, models.vae):
                gpu.put(module)
            models.pooled_projections = gpu.on_gpu(models.pooled_projections)
            batch = a_batch()
            gpu.pin(batch.pixel_values)  # as the loader has it
            for mode, run in runs.items():
                config = configured(folder, **MODES[mode])
                models.trainable.configure(True, POLICY[mode])
                shown = monitored(config, models, GPU)
                for _ in range(2):
                    gpu.waits.clear()
                    run.results.append(trained(config, models, GPU, shown, batch))
                    run.waits.append(Counter(gpu.waits))
                run.mixed = [*gpu.mixed]
    return runs


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_waits_once_at_most(ran, mode):
    """Qwen's ViT looks rotary angles up by an index on the host (transformers 4). Every 16th forward FLUX looks at its
    norms' weights; the constants that normalise a picture are copied once in a run."""
    first, second = ran[mode].waits
    assert second == Counter({INDEX: 1} if mode != "text" else {})
    assert first - second <= Counter({NORMS: 1, ONCE: 2})
    assert first[NORMS] == 1
    assert ran[mode].mixed == []  # nor would the GPU refuse anything


@pytest.mark.parametrize("mode", MODES)
def test_the_stand_in_changes_no_bit(ran, mode):
    losses, gradients = ran[mode].expected
    assert gradients
    for got_losses, got_gradients in ran[mode].results:
        assert torch.equal(got_losses.as_subclass(torch.Tensor), losses)
        assert got_gradients.keys() == gradients.keys()
        assert all(torch.equal(got_gradients[k].as_subclass(torch.Tensor), gradients[k]) for k in gradients)


def test_the_stand_in_counts_what_waits():
    with StandInGpu() as gpu:
        x, host = torch.arange(4.0, device="cuda"), torch.tensor([1, 2])
        assert x.device == GPU and x.is_cuda and (x + 1).device == GPU and host.device.type == "cpu"
        assert gpu.waits == []
        for wait in (
            x.sum().item,
            x.tolist,
            x.cpu,
            x.nonzero,
            lambda: float(x[0]),
            lambda: bool(x.any()),
            lambda: x[x > 1],
            lambda: x[host],
            lambda: x.to("cpu"),
            lambda: host.to("cuda"),
            lambda: host.pin_memory().to("cuda"),
            lambda: host.to(x.device, non_blocking=True),
            lambda: torch.tensor(1.0, device=x.device),
            lambda: x.masked_select(x > 1),
            lambda: host.float().copy_(x[:2]),
            lambda: torch.equal(x, x),
        ):
            wait()
            assert len(gpu.waits) == 1, gpu.waits
            gpu.waits.clear()
        for silent in (
            lambda: host.pin_memory().to("cuda", non_blocking=True),
            lambda: torch.full((), 1.0, device="cuda"),
            lambda: torch.where(x > 1, x, 0),
            lambda: x[1:],
            lambda: torch.as_tensor(x, device="cuda"),
            x.bfloat16,
            lambda: x[x.long()],
            lambda: torch.zeros(2, pin_memory=True).to("cuda", non_blocking=True),
        ):
            silent()
        assert gpu.waits == [] and gpu.mixed == []
        torch.add(x[:2], host)
        assert len(gpu.mixed) == 1


def test_an_update_waits_four_times_at_most(tmp_path):
    """On top of its micro-batches', with what is due now and then: gradient norms by part, a point of every curve.
    DeepSpeed's own (docs/training.md) are told apart by where they are."""
    config = configured(tmp_path)
    models = load_models(config).to("cpu", torch.bfloat16)
    models.trainable.configure(False, "none")  # the kernels look at their inputs' place
    guard = Guard(6.0, 64, 8)
    engine = StageEngine(models.trainable, config, json.loads(ds_config(tmp_path).read_text()), 0, 1, judge=guard.judge)
    gpu = StandInGpu()
    with gpu:
        shown = monitored(config, models, GPU, size=2)
    for update in range(2):
        engine.set_learning_rates(update)
        losses, t = micro_batch(engine, config, models, a_batch(), torch.device("cpu"))
        with gpu:
            gpu.waits.clear()
            gpu.everything = True
            engine.backward(losses.mean())
            norms = engine.grad_norms()
            engine.step()
            gpu.everything = False
            micro = MicroBatch(["first", "second"], BUCKET, [], gpu.on_gpu(losses.detach()), gpu.on_gpu(t))
            shown.update(result_of([micro], engine.grad_norm(), norms), 0, update + 1, guard.dropped)
            distributed.any_over_ranks(False, shown.world)
    assert guard.dropped == 0 and len(guard.norms) == 2
    parts = [norms[name] for name in ("flux", "connector", "vlm")]
    assert guard.norms[-1] == pytest.approx(torch.tensor(parts).norm().item(), rel=1e-4)
    ours = [wait for wait in gpu.waits if wait[2].partition(":")[0] not in DEEPSPEED]
    assert [(what, where) for what, where, _ in ours] == [
        ("tolist", "engine.py:grad_norms"),  # every monitor.grad_norms_every
        ("tolist", "engine.py:judged"),
        ("cpu", "monitor.py:_sum_over_ranks"),  # every monitor.every
        ("_local_scalar_dense", "distributed.py:min_over_ranks"),
    ]
    # Copies to "its device", the CPU, are none on a GPU.
    reads = Counter(wait[2] for wait in gpu.waits if wait[0] == "_local_scalar_dense" and wait not in ours)
    assert reads == {"stage_1_and_2.py:has_overflow": 1, "utils.py:is_invalid_grad_norm": 2}
    engine.close()


def test_replaced_samples_are_gathered_only_where_there_are_any(tmp_path, monkeypatch):
    """Gathering objects under NCCL waits some two times for each rank."""
    config, told = configured(tmp_path), []
    monkeypatch.setattr(monitor, "gathered", lambda value, world: told.append(value) or [value])
    shown = Monitor(config, World(0, 1, torch.device("cpu")), torch.nn.Linear(1, 1), 0, Events(tmp_path, enabled=False))
    shown.update(result_of(), 0, 1, 0)
    assert told == [] and shown.replaced == 0
    shown.replacements = [(2, "one"), (2, "another")]
    shown.update(result_of(), 0, 2, 0)
    assert told == [[(2, "one"), (2, "another")]] and shown.replaced == 2 and shown.replacements == []


def test_captions_that_were_cut_are_counted_since_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor.costs, "train_flops_per_image", lambda *_: 0.0)
    told = {}
    config = configured(tmp_path)
    shown = Monitor(config, World(0, 1, torch.device("cpu")), torch.nn.Linear(1, 1), 0, Events(tmp_path, enabled=False))
    monkeypatch.setattr(shown, "scalars", lambda values, update: told.setdefault(update, {}).update(values))
    one = torch.ones(1)
    for update, cuts in enumerate(([1, 2], [0], [3])):
        result = result_of([MicroBatch(["a"], BUCKET, [], one, one, cut) for cut in cuts])
        shown.update(result, 0, update + 1, 0)
    assert [told[update]["data/cut_captions"] for update in (1, 2, 3)] == [3, 3, 6]


def test_losses_are_shown_by_time_and_a_time_of_1_is_in_the_last_interval(tmp_path, monkeypatch):
    config = configured(tmp_path)
    monkeypatch.setattr(monitor.costs, "train_flops_per_image", lambda *_: 0.0)
    shown = Monitor(config, World(0, 1, torch.device("cpu")), torch.nn.Linear(1, 1), 0, Events(tmp_path, enabled=False))
    times, losses = torch.tensor([0.0, 0.124, 0.125, 0.5, 1.0]), torch.tensor([1.0, 2.0, 3.0, float("nan"), 5.0])
    shown._count(MicroBatch([*"abcde"], BUCKET, [], losses, times), 0, 0)
    assert shown.loss[:, 0].tolist() == [3, 3, 0, 0, 0, 0, 0, 5] and shown.loss[:, 1].tolist() == [
        2,
        1,
        0,
        0,
        0,
        0,
        0,
        1,
    ]


def test_noise_is_what_it_was_and_a_function_of_the_sample():
    """Each sample's t, then its noise, from one generator; bit for bit, so that runs resume."""
    config, latents, seen = Flow(), torch.empty(3, 8, 4, 6), Counter()
    t, n = objective.draw_time_and_noise(config, 5, 7, objective.count_up(["a", "b", "a"], seen), latents)
    z = []
    for i, (key, time) in enumerate([("a", 0), ("b", 0), ("a", 1)]):
        generator = generator_for(5, "noise", 7, key, time)
        z.append(torch.randn((), generator=generator))
        assert torch.equal(n[i], torch.randn(8, 4, 6, generator=generator))
    expected = flow.time_from_normal(torch.stack(z), config.density, config.logit_mean, config.logit_std)
    assert torch.equal(t, flow.shift_time(expected, flow.shift_factor(config.shift, 6)))
    assert t.dtype == n.dtype == torch.float32 and seen == {"a": 2, "b": 1}


def test_nothing_holds_a_trunk_that_was_dropped(tmp_path):
    """Without the collector: what a cache or a cycle held would stay, all of Qwen2-VL, beside the next one."""
    models = load_models(configured(tmp_path))
    trunk = models.trunk
    trunk.encode(a_batch().pixel_values, CAPTIONS, "image_text")
    trunk.from_cache(trunk.encode(a_batch().pixel_values).hidden_states, BUCKET.height, BUCKET.width)
    gone = [weakref.ref(trunk), weakref.ref(trunk.vlm), weakref.ref(trunk.vlm.visual.patch_embed.proj.weight)]
    gc.disable()
    try:
        del trunk, models
        assert [ref() for ref in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torch_itself_warns_of_no_other_wait(tmp_path):
    """A micro-batch on a real GPU under torch's own detector, which knows no pageable copy to the device."""
    config, device = configured(tmp_path), torch.device("cuda")
    models = load_models(config).to(device, torch.bfloat16)
    models.trainable.train()
    models.trainable.configure(True, "none")
    batch, shown = a_batch(), monitored(config, models, device)
    batch = Batch(batch.keys, batch.captions, batch.bucket, batch.pixel_values.pin_memory(), None, None)
    trained(config, models, device, shown, batch)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained(config, models, device, shown, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(found) <= 1, found
