"""Plans of memory: tried out without a trace, lowered, remembered."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from megaflux.common.errors import UserError, is_out_of_memory
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.models.pretrained import load_models, meta_models
from megaflux.training import distributed, monitor, pictures, upkeep
from megaflux.training.checkpoint import write as checkpoint
from megaflux.training.checkpoint.space import NoRoom
from megaflux.training.engine import StageEngine
from megaflux.training.monitor import Monitor, allocator_scalars, allocator_state
from megaflux.training.planning import memory, out_of_memory, trial
from megaflux.training.planning.plan import Plan
from megaflux.training.planning.sizes import Sizes
from megaflux.training.planning.trial import held_by_others
from megaflux.training.survival.events import Events
from tests.training.runs import ds_config, small_config
from tests.training.updates import drawn_losses, wake

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = World(0, 1, torch.device("cpu"))
RAN_OUT = "CUDA out of memory. Tried to allocate 2.00 GiB"


def config_of(run, activation_checkpointing: str = "auto"):
    values = small_config(run, run, model__activation_checkpointing=activation_checkpointing)
    values["train"] |= {"updates": 4, "global_batch_size": 2, "micro_batch_size": 2}
    return build_config(merge(tiny(), values))


@pytest.fixture(scope="module")
def ds(tmp_path_factory) -> dict:
    return json.loads(ds_config(tmp_path_factory.mktemp("ds")).read_text())


def set_aside() -> list[int]:
    """Bytes of the tensors that stand for memory of the updates to come; smaller ones are states of generators."""
    found = (t for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.uint8 and t.ndim == 1)
    return [t.nbytes for t in found if t.nbytes > 10_000]


def one_update(config, ds, tmp_path, tried_out: bool) -> dict[str, torch.Tensor]:
    """Weights after an update of the first stage."""
    torch.manual_seed(0)
    models = load_models(config).to("cpu", torch.bfloat16)
    models.trainable.train()
    generator = torch.Generator().manual_seed(0)
    wake(models, generator)
    engine = StageEngine(models.trainable, config, ds, 0, 1)
    plan = Plan(config, ds, ALONE)
    plan.enter(config.stages[0])
    before = distributed.rng_state()["torch"]
    policies = plan.choose(models, engine).policies
    assert not set_aside()
    assert (set(policies) == {"full"}) == tried_out
    assert torch.equal(distributed.rng_state()["torch"], before)
    assert all(p.grad is None for p in models.trainable.parameters())
    assert (engine.deepspeed.micro_steps, engine.deepspeed.global_steps) == (0, 0)
    models.trainable.configure(True, "mlp")  # of both alike
    engine.set_learning_rates(0)
    engine.backward(drawn_losses(engine, config, models, generator).mean())
    engine.step()
    norm, weights = engine.grad_norm(), {n: p.detach().clone() for n, p in models.trainable.named_parameters()}
    engine.close()
    return weights | {"norm": torch.tensor(norm)}


def test_a_plan_is_tried_out_at_every_bucket_without_a_trace(tmp_path, ds, monkeypatch):
    config = config_of(tmp_path)
    expected = one_update(config, ds, tmp_path, tried_out=False)
    tried, made, held, real = [], [], [], trial.forward_and_backward

    def forward_and_backward(config, models, bucket):
        assert not [ref for ref in made if ref() is not None]  # each try begins with what the ones before gave back
        real(config, models, bucket)
        held.append(sum(set_aside()))
        activations = torch.zeros(1000)
        made.append(weakref.ref(activations))
        tried.append(bucket.name)
        if "none" in models.trainable.transformer.fused.policies:
            raise torch.OutOfMemoryError(RAN_OUT)

    monkeypatch.setattr(trial, "tries_out", lambda world, engine: True)
    monkeypatch.setattr(trial, "forward_and_backward", forward_and_backward)
    got = one_update(config, ds, tmp_path, tried_out=True)
    assert tried == ["1:1", "1:1", "2:1"]  # of the first plan no more than was needed
    # Beside each try: Adam's moments and the sum of the gradients, 12 bytes of all that trains, and gradients in flight.
    trained = sum(value.numel() for name, value in expected.items() if name != "norm")
    in_flight, *_ = memory.zero_bytes(ds, 1, meta_models(config)[0], config.stages[0], 2)
    assert [size - in_flight for size in held] == [pytest.approx(12 * trained, rel=0.01)] * 3
    assert float(expected["norm"]) > 0
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_what_fits_nowhere_is_refused_with_the_mend(tmp_path, ds, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError(RAN_OUT)

    monkeypatch.setattr(trial, "tries_out", lambda world, engine: True)
    monkeypatch.setattr(trial, "forward_and_backward", never)
    config = config_of(tmp_path)
    with pytest.raises(UserError, match=r"micro-batch of 2 does not fit .* lower train.micro_batch_size \(it is 2\)"):
        one_update(config, ds, tmp_path, tried_out=True)
    chosen = config_of(tmp_path, activation_checkpointing="none")  # a person's choice is not lowered
    with pytest.raises(UserError, match="set model.activation_checkpointing to auto"):
        one_update(chosen, ds, tmp_path, tried_out=True)


def planned(ds: dict, run) -> Plan:
    """A plan as if its engine were built, of micro-batches so large that activations are most of the memory."""
    values = tiny()
    values["model"]["activation_checkpointing"], values["data"]["cache"] = "auto", ["latents", "trunk"]
    values["data"]["aspect_ratios"] = ["1:1"]
    values["train"] |= {"micro_batch_size": 2000, "global_batch_size": 2000}
    config = build_config(values | {"run": {"dir": str(run)}}).for_world(1)
    plan = Plan(config, ds, ALONE)
    plan.enter(config.stages[0])
    plan.candidates, plan.trained, plan.updating = plan._candidates(plan.stage, Sizes.of(config, ds, 1)), True, True
    plan.choice = plan.candidates.within(10**15)
    return plan


def test_plans_are_lowered_by_a_twentieth_down_to_full(tmp_path, ds):
    plan = planned(ds, tmp_path)
    choice, steps = plan.choice, 0
    assert set(choice.policies) == {"none"}
    while (lower := plan.candidates.lower(choice)) is not None:
        assert lower[1] < plan.candidates.needs(choice) and plan.candidates.within(lower[1]) == lower[0] != choice
        choice, steps = lower[0], steps + 1
    assert set(choice.policies) == {"full"} and choice.micro_batch_size == 2000
    assert 3 <= steps <= 2 * len(choice.policies)


def test_word_is_left_by_whoever_runs_out_and_the_lowest_counts(tmp_path, ds, monkeypatch):
    left = []
    monkeypatch.setattr(out_of_memory.watch, "leave", lambda why, code: left.append((why, code)))
    plan = planned(ds, tmp_path)
    plan.update, name = 70, plan.stage.name
    (tmp_path / "memory.json").write_text('{"bytes": {"another": 5}}')
    lower, limit = plan.candidates.lower(plan.choice)
    second = plan.candidates.lower(lower)
    plan.choice = lower
    plan.leave(torch.OutOfMemoryError(RAN_OUT))
    assert json.loads((tmp_path / "memory.json").read_text())["bytes"] == {"another": 5, name: second[1]}
    higher = planned(ds, tmp_path)
    assert higher.limit == second[1] < limit
    higher.leave(torch.OutOfMemoryError(RAN_OUT))  # of a rank that planned higher: the lowest stays
    assert json.loads((tmp_path / "memory.json").read_text())["bytes"] == {"another": 5, name: second[1]}
    higher.choice = higher.candidates.within(0)
    higher.leave(torch.OutOfMemoryError(RAN_OUT))
    higher.enter(higher.stage)  # in the change to this stage, with its engine not yet built
    higher.leave(torch.OutOfMemoryError(RAN_OUT))
    assert [code for _, code in left] == [11] * 4
    assert "after update 70" in left[0][0] and memory.counted(second[0].policies) in left[0][0]
    assert "nothing is left to recompute: lower train.micro_batch_size (it is 2000)" in left[2][0]
    assert "the models and the stage's optimizer do not fit this GPU; shard them" in left[3][0]
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["what"], event["detail"]) for event in told] == [("out_of_memory", why) for why, _ in left]
    higher.trained = False  # in the first place: the next start would end here as well
    with pytest.raises(UserError, match="Tried to allocate .* do not fit this GPU; shard them"):
        higher.leave(torch.OutOfMemoryError(RAN_OUT))
    # unless another process holds memory, which may be gone by then
    monkeypatch.setattr(out_of_memory, "held_by_others", lambda device: 7 * 10**9)
    higher.leave(torch.OutOfMemoryError(RAN_OUT))
    assert left[-1][1] == 11 and "other processes hold 7.0 GB of this GPU" in left[-1][0]


def test_memory_that_nobody_here_holds_is_another_process_s(monkeypatch):
    gpu, free = torch.device("cuda", 0), 80 * 10**9 - memory.RUNTIME_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    for reserved, others in ((0, 0), (10**9, 0), (40 * 10**9, 7 * 10**9)):
        free = 80 * 10**9 - memory.RUNTIME_BYTES - reserved - others
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, reserved=reserved: reserved)
        assert held_by_others(gpu) == others
    free -= 3 * 10**9  # a little more than the libraries are known to take is anybody's
    assert held_by_others(gpu) == 10 * 10**9
    assert held_by_others(torch.device("cpu")) == 0


def test_only_what_an_update_needs_lowers_its_plan(tmp_path, ds, monkeypatch):
    left = []
    monkeypatch.setattr(out_of_memory.watch, "leave", lambda why, code: left.append((why, code)))
    plan = planned(ds, tmp_path)
    plan.updating = False
    with plan.one_update():
        assert plan.updating
    assert not plan.updating and plan.update == 1
    plan.leave(torch.OutOfMemoryError(RAN_OUT))  # in a validation, say
    assert not (tmp_path / "memory.json").exists() and left[0][1] == 11 and "outside an update" in left[0][0]


@pytest.mark.parametrize("text", ["", "[]", '{"bytes": [1]}', '{"bytes": {"base": -1}}', '{"bytes": {"base": true}}'])
def test_an_invalid_memory_file_is_named(tmp_path, ds, text):
    (tmp_path / "memory.json").write_text(text)
    with pytest.raises(UserError, match=r"memory.json: want .*; delete it"):
        Plan(config_of(tmp_path), ds, ALONE)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError(RAN_OUT), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("NCCL error ... Cuda failure 2 'out of memory'"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_memory_that_libraries_ask_cuda_for_counts_as_well(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_the_allocators_of_all_ranks_are_seen(tmp_path, monkeypatch):
    stats = {"reserved_bytes.all.peak": 70 * 10**9, "num_alloc_retries": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    gpu = allocator_state(SimpleNamespace(device=torch.device("cuda", 1)))
    other = {"reserved": 71 * 10**9, "retries": 3}
    assert allocator_scalars([gpu, other]) == {"memory/reserved_peak_gb": 71.0, "memory/allocator_retries": 5}
    assert allocator_scalars([allocator_state(ALONE)]) == {}
    told = []
    monkeypatch.setattr(monitor, "sum_over_ranks", lambda tensor, world: told.append(tensor) or sum(told))
    for rank in (0, 1):  # each in its own place of the one tensor that all sum
        shown = Monitor(
            config_of(tmp_path),
            World(rank, 2, torch.device("cpu")),
            torch.nn.Linear(1, 1),
            0,
            Events(tmp_path, enabled=False),
        )
        monkeypatch.setattr(monitor, "allocator_state", lambda world: [gpu, other][world.rank])
        shown.replacements, shown.cut = [(0, "a")] * rank, 2 + rank
        _, replaced, cut, states = shown._sum_over_ranks()
    assert (replaced, cut, states) == (1, 5, [gpu, other])


def test_a_save_that_runs_out_of_gpu_memory_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), checkpoint._written(tmp_path / "a", tmp_path / "b", ALONE):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(NoRoom, match="cannot be written"), checkpoint._written(tmp_path / "a", tmp_path / "b", ALONE):
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")


def test_pictures_that_do_not_fit_cost_no_run(tmp_path, monkeypatch):
    def variations(*_, **__):
        raise torch.OutOfMemoryError(RAN_OUT)

    monkeypatch.setattr(pictures, "variations", variations)
    run = SimpleNamespace(config=config_of(tmp_path), events=Events(tmp_path, enabled=True), world=ALONE, watch=None)
    shown = SimpleNamespace(timed=lambda *_: nullcontext(), picture=lambda *_: pytest.fail("a picture"))
    trainer = SimpleNamespace(
        run=run,
        monitor=shown,
        updates_done=7,
        models=None,
        engine=SimpleNamespace(zero_stage=2),
        references=SimpleNamespace(keys=["a", "b"]),
    )
    upkeep.show_panel(trainer)
    (told,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (told["what"], told["update"]) == ("out_of_memory", 7) and "the panel is left out" in told["detail"]
    with pytest.raises(torch.OutOfMemoryError):  # all ranks make it together there, and the others would wait
        trainer.engine.zero_stage = 3
        upkeep.show_panel(trainer)
