"""Engines: what several ranks compute, and what one stage hands to the next."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import torch

from megaflux.common.errors import FrozenParameterError
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.models.packing import side_by_side
from megaflux.models.pretrained import load_models
from megaflux.training import distributed
from megaflux.training.engine import Carried, StageEngine, adam_state
from megaflux.training.schedule import learning_rate
from megaflux.training.stages import trainable_names
from megaflux.training.survival.guard import NOT_FINITE, Guard
from tests import forked
from tests.training.carry_worker import Toy, gradient, toy_config
from tests.training.runs import ROOT, ds_config, rank_environments, small_config
from tests.training.updates import drawn_losses, wake

CARRY = str(ROOT / "tests" / "training" / "carry_worker.py")
pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize(
    ("precision", "ranks", "rates"), [("fp32", 1, ""), ("fp32", 2, "by_part"), ("bf16", 2, "by_part")]
)
def test_survivors_of_a_stage_change_go_on_as_if_nothing_had_happened(tmp_path, precision, ranks, rates):
    """Also where the parts, and the stages, have rates and weight decays of their own."""
    command = [CARRY, str(ds_config(tmp_path, precision)), *filter(None, [rates])]
    done = forked.run_ranks(command, rank_environments(ranks), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("carried as expected") == ranks


def test_frozen_parameters_keep_every_bit_over_20_updates_with_weight_decay(tmp_path):
    stages = [{"name": "only", "share": 1, "blocks": [0, 2]}]
    values = small_config(None, None, run__dir="unused", data__path="unused", stages=stages, optim__weight_decay=0.5)
    values["train"] |= {"updates": 20, "global_batch_size": 2, "micro_batch_size": 2}
    config = build_config(merge(tiny(), values))
    models = load_models(config).to("cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    wake(models, generator)
    buffers = {name: b.clone() for name, b in models.trainable.named_buffers()}
    ds = json.loads(ds_config(tmp_path).read_text()) | {"data_types": {"buffer_dtype": "bf16"}}
    engine = StageEngine(models.trainable, config, ds, 0, 1)
    attn = models.trainable.transformer.transformer_blocks[0].attn
    layers = attn.to_q, attn.to_k, attn.to_v
    assert side_by_side([layer.weight for layer in layers])  # in ZeRO's buffer, so that they are one product
    assert side_by_side([layer.bias for layer in layers])
    before = {name: p.detach().clone() for name, p in models.trainable.named_parameters()}
    now = dict(models.trainable.named_buffers())  # RoPE's frequencies, never in bfloat16
    assert buffers and all(now[name].dtype == b.dtype and torch.equal(now[name], b) for name, b in buffers.items())
    shapes = {name: tuple(p.shape) for name, p in models.trainable.named_parameters() if p.requires_grad}
    assert engine.shapes() == shapes and engine.num_trainable == sum(map(math.prod, shapes.values()))
    for update in range(20):
        engine.set_learning_rates(update)
        engine.backward(drawn_losses(engine, config, models, generator).mean())
        engine.step()
    assert engine.deepspeed.skipped_steps == 0
    trainable = set(engine.first_stage)
    moved = {name for name, p in models.trainable.named_parameters() if not torch.equal(p, before[name])}
    assert 0 < len(trainable) < len(before)
    assert moved == trainable
    engine.close()


def hooks_on(module: torch.nn.Module) -> dict[str, int]:
    """How many of each kind every submodule and parameter has."""
    found = {}
    for name, part in [*module.named_modules(), *module.named_parameters()]:
        kinds = {kind: hooks for kind, hooks in vars(part).items() if "_hooks" in kind}
        if isinstance(part, torch.nn.Parameter):
            kinds = {kind: getattr(part, kind, None) for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")}
        found |= {f"{name} {kind}": len(hooks) for kind, hooks in kinds.items() if hooks}
    return found


@pytest.mark.parametrize("file", ["zero2.json", "zero2_offload.json", "zero3.json"])
def test_nothing_of_a_closed_engine_lives(tmp_path, file):
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    values = small_config(None, None, run__dir="unused", data__path="unused")
    values["train"] |= {"global_batch_size": 2, "micro_batch_size": 2}
    config = build_config(merge(tiny(), values))
    models = load_models(config).to("cpu", torch.bfloat16)
    module, guard = models.trainable, Guard(6.0, 128, 10)
    module.connector.register_forward_hook(lambda *_: None)  # somebody else's, which stays
    sizes = {name: p.numel() for name, p in module.named_parameters()}  # ZeRO-3 empties the parameters
    before, attributes = hooks_on(module), {name: set(vars(p)) for name, p in module.named_parameters()}
    ds, carried = json.loads(ds_config(tmp_path, base=file).read_text()), None
    generator = torch.Generator().manual_seed(0)
    wake(models, generator)
    for stage in (0, 1):  # as the loop changes from one to the next
        engine = StageEngine(module, config, ds, stage, 1, carried, guard.judge)
        module.configure(file != "zero3.json", "none")
        assert engine.num_trainable == sum(sizes[name] for name in engine.first_stage)
        # what is still to come on a device: at least the sum of the gradients, which offloading leaves on the GPU
        shards = sum(flat.nbytes for _, flat in engine.flat_groups())
        assert sum(engine.coming(torch.device("meta"))) == shards
        assert sum(engine.coming(torch.device("cpu"))) == shards * (3 if carried is None else 1)
        if carried is not None:  # begins with what was handed over, bit for bit
            begun = engine.carry(set(carried.tensors))
            assert begun.steps == carried.steps == {0: torch.tensor(1.0)}
            for name, tensors in carried.tensors.items():
                assert all(torch.equal(begun.tensors[name][key], value) for key, value in tensors.items()), name
        engine.set_learning_rates(stage)
        engine.backward(drawn_losses(engine, config, models, generator).mean())
        norms = engine.grad_norms()
        engine.step()
        assert engine.deepspeed.skipped_steps == 0
        parts = [norms.pop(part) for part in ("flux", "connector", "vlm")]
        assert torch.tensor(parts).norm().item() == pytest.approx(engine.grad_norm(), rel=1e-3)
        assert sorted(norms) == [f"block{block:02d}" for block in ((0, 1, 2) if stage == 0 else (0, 2))]
        of_blocks = torch.tensor(list(norms.values())).norm()
        assert 0.1 * parts[0] < of_blocks < parts[0]  # the rest is in embedders
        zero = engine.deepspeed.optimizer
        flats = [flat for _, flat in engine.flat_groups()]
        moments = [moment for flat in flats for moment in zero.optimizer.state[flat].values()]
        low = zero.bit16_groups_flat if engine.zero_stage < 3 else zero.lp_param_buffer
        low = low if isinstance(low, list) else [low]
        refs = {
            f"{type(x).__name__} {i}": weakref.ref(x)
            for i, x in enumerate([engine.deepspeed, zero, zero.optimizer, *flats, *moments, *low])
        }
        storages = {storage.data_ptr() for storage in (flat.untyped_storage() for flat in low)}
        del zero, flats, moments, low
        if stage == 0:
            carried = engine.carry(set(trainable_names(module, config.stages[1])))
        engine.close()
        assert [name for name, ref in refs.items() if ref() is not None] == []
        assert hooks_on(module) == before
        assert torch.nn.functional.linear is torch._C._nn.linear
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad and parameter.grad is None
            if engine.zero_stage < 3:
                assert set(vars(parameter)) == attributes[name]
                assert parameter.untyped_storage().data_ptr() not in storages
            else:  # the weights are in parts, and nothing else leads to the engine's buffers
                assert parameter.ds_tensor.untyped_storage().data_ptr() not in storages
                assert parameter.ds_tensor.untyped_storage().nbytes() <= 4 * parameter.ds_tensor.numel()
        assert not [part for part in module.modules() if {"pre_bwd_fn", "post_bwd_fn"} & vars(part).keys()]
        assert not [part for part in FWD_MODULE_STACK if part is module]


def test_adams_state_lies_with_its_tensor():
    flat = torch.empty(6, device="meta")  # in the place of a GPU's: the fused AdamW refuses a step that lies elsewhere
    for step in (None, torch.tensor(7.0)):
        state = adam_state(flat, step)
        assert {name: (x.device.type, x.shape) for name, x in state.items()} == {
            "step": ("meta", ()),
            "exp_avg": ("meta", (6,)),
            "exp_avg_sq": ("meta", (6,)),
        }
    step = torch.tensor(7.0)
    taken = adam_state(torch.empty(6), step)["step"]
    assert taken == 7 and taken.data_ptr() != step.data_ptr()  # Adam counts on in place


@pytest.mark.parametrize("guarded", [False, True])
def test_an_overflow_is_counted_and_changes_nothing(tmp_path, guarded):
    config, guard = toy_config().for_world(1), Guard(6.0, 128, 10)
    module, ds = Toy(), json.loads(ds_config(tmp_path, "bf16").read_text())
    engine = StageEngine(module, config, ds, 0, 1, judge=guard.judge if guarded else None)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine.set_learning_rates(0)
    engine.backward(engine(0) * float("inf"))
    engine.step()
    assert engine.deepspeed.skipped_steps == 1
    assert engine.dropped == NOT_FINITE and math.isnan(engine.grad_norm())
    assert guard.dropped == (1 if guarded else 0)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert engine.carry(set(engine.first_stage)) == Carried({}, {}) == Carried()  # no step was taken
    engine.set_learning_rates(1)
    engine.backward(engine(1))
    engine.step()
    assert engine.deepspeed.skipped_steps == 1 and engine.dropped is None and engine.grad_norm() > 0
    assert not torch.equal(module.connector.weight, before["connector.weight"])
    engine.close()


@pytest.mark.parametrize("base", ["zero2.json", "zero2_offload.json", "zero3.json"])
def test_an_update_with_too_many_large_gradient_values_is_dropped(tmp_path, base):
    """Counted before clipping, in whatever memory the gradients are, over several micro-batches."""
    import deepspeed

    guard, module = Guard(0, 128, 10, most_large=0.3), Toy()
    if "zero3" in base:  # the toy reads its layers' weights without calling them
        for parameter in module.parameters():
            deepspeed.zero.register_external_parameter(module, parameter)
    config = toy_config(max_grad_norm=1e-3, large_gradient=0.75).for_world(1)
    engine = StageEngine(
        module, config, json.loads(ds_config(tmp_path, base=base).read_text()), 0, 1, judge=guard.judge
    )
    engine.cut_into(1)
    for update, scale in enumerate((0.5, 2.0, 0.5)):
        engine.set_learning_rates(update)
        for _ in range(2):
            engine.backward(engine(update) * scale)
            engine.step()
        trained = [(n, p) for n, p in Toy().named_parameters() if n in engine.first_stage]
        values = torch.cat([gradient(n, p, update).flatten() for n, p in trained])
        expected = ((values.bfloat16() * scale).abs() > 0.75).float().mean().item()
        assert engine.large_gradient_share == pytest.approx(expected, abs=0.01)  # bf16 sums
        assert (engine.dropped is None) == (scale < 1) == (expected <= 0.3)
    assert guard.dropped == engine.deepspeed.skipped_steps == 1
    engine.close()


@pytest.mark.parametrize("base", ["zero2.json", "zero2_offload.json"])
def test_a_gradient_on_a_frozen_parameter_stops_the_step_and_is_named(tmp_path, base):
    """Also one that no hook has seen, as code leaves it that writes .grad itself; at any micro-batch of an update."""
    module, name = Toy(), "transformer.x_embedder.weight"
    engine = StageEngine(
        module, toy_config().for_world(1), json.loads(ds_config(tmp_path, base=base).read_text()), 0, 1
    )
    engine.cut_into(1)
    assert engine.accumulation_steps == 2
    frozen = module.get_parameter(name)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine.set_learning_rates(0)
    for _ in range(2):
        engine.backward(engine(0))
        frozen.grad = torch.zeros_like(frozen)
        with pytest.raises(FrozenParameterError, match=name):
            engine.step()
        frozen.grad = None
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
        engine.step()
    assert not torch.equal(module.connector.weight, before["connector.weight"])
    whole = torch.cat([gradient(name, before[name], 0).flatten() for name in engine.first_stage])
    assert engine.grad_norm() == pytest.approx(whole.norm().item(), rel=0.01)  # the mean of both micro-batches
    engine.close()


@pytest.mark.parametrize("asked", [False, True])
def test_blocks_are_labelled_if_the_configuration_says_so(tmp_path, asked):
    module, config = Toy(), toy_config().for_world(1)
    config = config.model_copy(update={"monitor": config.monitor.model_copy(update={"label_blocks": asked})})
    engine = StageEngine(module, config, json.loads(ds_config(tmp_path).read_text()), 0, 1)
    block = module.transformer.single_transformer_blocks[0]
    block.forward = lambda: None
    with torch.profiler.profile() as profile:
        block()
    assert [e.name for e in profile.events() if e.name.startswith("flux.")] == ["flux.block1"] * asked
    engine.close()


def test_learning_rate_is_a_trapezoid_over_all_stages():
    optim = toy_config(warmup_fraction=0.1, plateau_fraction=0.2, lr=1.0).optim
    rates = [learning_rate(optim.lr, update, 100, optim) for update in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])  # linear, and not 0 at first
    assert rates[10:31] == pytest.approx([1.0] * 21)
    steps = [a - b for a, b in zip(rates[30:], rates[31:])]
    assert steps == pytest.approx([1 / 70] * len(steps))
    assert rates[-1] == pytest.approx(1 / 70)  # 0 is what the update after the last would have


def test_a_wrong_cudnn_is_left_out_before_the_first_update(monkeypatch, caplog):
    monkeypatch.setattr(distributed.cudnn, "leave_out_if_wrong", lambda: "cuDNN 9.10.2 is left out")
    with caplog.at_level("WARNING", logger="megaflux"):
        distributed.start()
    assert "cuDNN 9.10.2 is left out" in caplog.text
