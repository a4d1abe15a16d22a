"""What only a GPU can show of training; `make gpu-check` runs it where DeepSpeed is installed. Tiny models, one GPU."""

from __future__ import annotations

import json

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import load_models
from megaflux.training.engine import MOMENTS, Carried, StageEngine, release_memory
from megaflux.training.objective import Denoising, denoising_loss
from megaflux.training.planning import memory
from megaflux.training.planning.plan import Plan
from megaflux.training.planning.trial import forward_and_backward
from megaflux.training.stages import trainable_names
from tests.models.test_reading import SLACK, rise, write_large
from tests.training.faults import assert_same, final_state, final_weights
from tests.training.runs import copy_until, ds_config, launch, make_dataset, small_config, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.usefixtures("process_group"),
]
BUCKET = Bucket("1:1", 64, 64)


@pytest.fixture(scope="module")
def ds(tmp_path_factory) -> dict:
    values = json.loads(ds_config(tmp_path_factory.mktemp("ds")).read_text())
    values["zero_optimization"]["reduce_bucket_size"] = 100_000  # or it would be most of these models' memory
    return values


def configured(run, micro: int = 2, heads: int = 2, single: int = 2):
    """1 + `single` blocks of `heads` heads x 32, the least that the Triton kernels take."""
    values = small_config(run, run, model__activation_checkpointing="auto")
    values["model"]["flux_config"] |= {
        "num_attention_heads": heads,
        "num_single_layers": single,
        "joint_attention_dim": 48,
    }
    values["train"] |= {"updates": 4, "global_batch_size": micro, "micro_batch_size": micro}
    return build_config(merge(tiny(), values))


def loaded(config):
    models = load_models(config, torch.device("cuda", 0), torch.bfloat16)
    models.trainable.train()
    with torch.no_grad():  # away from the zeros of a fresh model
        for parameter in models.trainable.transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return models


def update(engine, config, models, micro: int = 2) -> None:
    pictures = torch.randint(0, 256, (micro, 3, 64, 64), dtype=torch.uint8, device="cuda")
    condition = models.trunk.encode(pictures)
    latents, noise = torch.randn(2, micro, 8, 8, 8, device="cuda")
    t = torch.linspace(0.2, 0.8, micro, device="cuda")
    engine.set_learning_rates(0)
    engine.backward(denoising_loss(engine, models, Denoising(BUCKET, latents, condition, t, noise, 1.0)).mean())
    engine.step()
    assert engine.dropped is None and engine.grad_norm() > 0


def test_a_closed_engine_gives_its_memory_back(tmp_path, ds):
    config = configured(tmp_path, heads=16)
    models = loaded(config)
    models.trainable.configure(True, "none")
    forward_and_backward(config.for_world(1), models, BUCKET)  # cuBLAS keeps its workspace from now on
    release_memory()
    before, carried = torch.cuda.memory_allocated(), None
    for stage in (0, 1):
        engine = StageEngine(models.trainable, config, ds, stage, 1, carried)
        update(engine, config, models)
        held = torch.cuda.memory_allocated() - before
        assert held > 8 * engine.num_trainable  # masters and one moment at least: there is something to give back
        if stage == 0:
            carried = engine.carry(set(trainable_names(models.trainable, config.stages[1])))
        engine.close()
        left = torch.cuda.memory_allocated() - before
        assert left < 0.01 * held + 2**20, f"{left} of {held} bytes stay"


def test_adams_state_of_another_number_of_ranks_is_taken_over(tmp_path, ds):
    """As repartition reads it: on the host, steps too."""
    config = configured(tmp_path)
    models = loaded(config)
    engine = StageEngine(models.trainable, config, ds, 0, 1)
    models.trainable.configure(True, "none")
    parameters = {n: p for n, p in models.trainable.named_parameters() if n in engine.first_stage}
    tensors = {
        name: {"master": p.detach().float().cpu()} | {key: torch.full(p.shape, 1e-4) for key in MOMENTS}
        for name, p in parameters.items()
    }
    engine.take_over(Carried(tensors, {0: torch.tensor(7.0)}))
    update(engine, config, models)
    (steps,) = {float(engine.deepspeed.optimizer.optimizer.state[flat]["step"]) for _, flat in engine.flat_groups()}
    assert steps == 8
    engine.close()


def test_a_plan_that_does_not_fit_is_lowered_and_leaves_nothing(tmp_path, ds):
    """A real out of memory, within a share of the GPU that recomputation fits and keeping everything does not."""
    config = configured(tmp_path, 1024, heads=16, single=14)
    models = loaded(config)
    engine = StageEngine(models.trainable, config, ds, 0, 1)
    world = World(0, 1, torch.device("cuda", 0))
    needs = {}
    for policy in ("none", "full"):
        models.trainable.configure(True, policy)
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        forward_and_backward(config.for_world(1), models, BUCKET)
        needs[policy] = torch.cuda.max_memory_reserved()
    release_memory()
    before = torch.cuda.memory_allocated()
    assert needs["none"] > 1.5 * needs["full"], needs
    held = sum(engine.coming(world.device)) + 20e6  # what a try holds besides
    between = needs["full"] + 0.4 * (needs["none"] - needs["full"])
    share = (between + held) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        plan = Plan(config, ds, world)
        plan.enter(config.stages[0])
        policies = plan.choose(models, engine).policies
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert set(policies) != {"none"}, memory.counted(policies)
    release_memory()
    assert torch.cuda.memory_allocated() - before < 2**21
    assert all(p.grad is None for p in models.trainable.parameters())
    update(engine, config, models)
    engine.close()


def test_two_continuations_are_bit_equal_where_that_is_asked_for(tmp_path):
    """train.deterministic: three processes, one that goes through and two that go on from its checkpoint. 1,024 image tokens,
    so that attention's backward pass has several blocks to add up."""
    continuations(tmp_path, side=512)


def continuations(folder, side: int) -> None:
    """Fails where what an update leaves depends on more than the checkpoint before it."""
    data = make_dataset(folder / "data", images=12, square=True, side=side)
    values = small_config(data, folder / "whole", data__longest_side=side, train__updates=4, train__deterministic=True)
    values["model"]["flux_config"] |= {
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "axes_dims_rope": [16, 24, 24],
    }
    config, ds = write_config(values, folder / "config.yaml"), ds_config(folder)
    runs = [folder / "whole"]
    for name in ("whole", "first", "second"):
        if name != "whole":
            runs.append(copy_until(folder / "whole", folder / name, 2))
        done = launch("--deepspeed", ds, "--config", config, "--run.dir", runs[-1], with_="python")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for part in (final_weights, final_state):
        for other in runs[1:]:
            assert_same(part(runs[0]), part(other))


def test_host_memory_stays_while_weights_go_to_the_gpu(tmp_path, published):
    config = build_config(write_large(tmp_path, published, 1024, 4))  # 0.3 GB
    load_models(config, torch.device("cuda", 0), torch.bfloat16)  # the libraries' own memory
    rose, models = rise(lambda: load_models(config, torch.device("cuda", 0), torch.bfloat16))
    modules = (models.trainable, models.trunk.vlm, models.vae)
    assert all(p.is_cuda for module in modules for p in module.parameters())
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    assert weights > 2.5e8 and rose < SLACK, (weights, rose)
