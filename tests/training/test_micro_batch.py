"""The micro-batch that a run chooses: the fastest of all that fit, taken again when it resumes."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import dev, tiny
from megaflux.models.pretrained import load_models
from megaflux.training import distributed
from megaflux.training.checkpoint.elastic import fit
from megaflux.training.ds_config import divisors
from megaflux.training.engine import StageEngine
from megaflux.training.planning import costs, memory, throughput
from megaflux.training.planning import plan as plan_module
from megaflux.training.planning.candidates import Candidates
from megaflux.training.planning.dry_run_table import gpus_of, micro_batch_lines
from megaflux.training.planning.gpus import GPUS, Assumed, find_gpu
from megaflux.training.planning.micro_batch import Choice, Planner, best_of
from megaflux.training.planning.plan import Plan
from megaflux.training.planning.sizes import Sizes
from megaflux.training.planning.throughput import Cluster, Launches, Traffic, Work
from megaflux.training.planning.trial import highest_that_fits
from tests.training.runs import small_config
from tests.training.updates import drawn_losses, wake

ZERO2 = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text())
ALONE = World(0, 1, torch.device("cpu"))
TOY = replace(GPUS["a100"], name="toy", peak_tflops=0.2, reduced_gb_s=0.5)
"""So slow that recomputation, launches and reductions of the tiny models are all of one size."""


def small(run: Path, drawn: int = 8, micro: int | str = "auto", **changes):
    values = small_config(
        run,
        run,
        train__global_batch_size=drawn,
        train__drawn_per_rank=drawn,
        train__micro_batch_size=micro,
        **{"model__activation_checkpointing": "auto"} | changes,
    )
    return build_config(merge(tiny(), values))


@pytest.fixture
def little_vae(monkeypatch):
    """At these sizes the VAE needs more than all else, and alike for each micro-batch: without it."""
    monkeypatch.setattr(memory, "coding_peak", lambda *_: (0, 0))


# --- the choice ---


@pytest.mark.parametrize("drawn", [4, 6])
@pytest.mark.parametrize("activation_checkpointing", ["auto", "mlp"])
def test_it_is_the_fastest_of_all_that_fit(tmp_path, little_vae, drawn, activation_checkpointing):
    """Against every micro-batch with every policy of every block: 3 blocks, so 27 plans each."""
    config = small(tmp_path, drawn).for_world(2)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"activation_checkpointing": activation_checkpointing})}
    )
    planner, cluster = Planner(Sizes.of(config, ZERO2, 2)), Cluster(TOY, 2)
    sizes, stage = divisors(config.train.drawn_per_rank), config.stages[0]
    allowed = memory.POLICIES if activation_checkpointing == "auto" else [activation_checkpointing]
    plans = []
    for size, policies in itertools.product(sizes, itertools.product(allowed, repeat=3)):
        need = planner.with_needs(stage, size, policies, 0).bytes
        tokens = {bucket: costs.token_counts(config, bucket) for bucket in planner.sizes.buckets}
        seconds = []
        for bucket, counts in tokens.items():
            trunk, vae = costs.frozen_parts(config, planner.sizes.trunk, bucket)
            work = Work(costs.training_flops(planner.sizes.module, stage, counts, 0, policies).hardware, trunk, vae)
            trained = sum(memory.trained_sizes(planner.sizes.module, stage))
            moved = throughput.traffic(ZERO2, 2, trained, 0)
            launches = Launches(3 * 31, (2 + 2) * 35)
            seconds.append(cluster.update_seconds(work, launches, moved, size, config.train.global_batch_size))
        plans.append((need, sum(seconds) / len(seconds), size, policies))
    sought = set()
    for limit in [0, *sorted(need for need, *_ in plans)]:
        chosen = planner.best(stage, sizes, limit, cluster)
        fitting = [plan for plan in plans if plan[0] <= limit]
        assert chosen.fits == bool(fitting)
        if not fitting:
            assert chosen.bytes == min(plans)[0]
            continue
        assert chosen.bytes <= limit
        # Memory goes to blocks in a fixed order, so that now and then a little more would have fitted.
        fastest = min(fitting, key=lambda plan: plan[1])
        assert fastest[1] <= chosen.mean_seconds <= 1.04 * fastest[1]
        ordered = {planner.choices(stage, [size], limit, cluster)[0] for size in sizes}
        assert chosen.mean_seconds == min(c.mean_seconds for c in ordered if c.fits)
        sought.add(chosen.micro_batch_size)
    assert len(sought) > 1, "a choice that is always the same shows nothing"


def test_a_prediction_adds_up_its_parts():
    gpu = replace(GPUS["h100"], peak_tflops=100, flux=0.5, trunk=0.25, vae=0.1, reduced_gb_s=10, memory_gb_s=1000)
    work, launches = Work(10**12, 10**11, 10**10), Launches(1000, 2000, 100)
    moved = Traffic(per_micro_batch=10**9, per_update=5 * 10**8, optimizer=10**10)
    two = Cluster(gpu, 4).update_seconds(work, launches, moved, 2, 16)  # two micro-batches a rank
    assert two == pytest.approx(2 * (2 * 0.02 + max(2 * 0.004, 0.06) + max(2 * 0.001, 0.003) + 0.1) + 0.05 + 0.01)
    cached = Cluster(gpu, 4).update_seconds(replace(work, trunk=0, vae=0), launches, moved, 2, 16)
    assert cached == pytest.approx(two - 2 * (0.06 + 0.003))  # what is not run launches nothing
    assert Cluster(gpu, 16).update_seconds(work, launches, moved, 2, 64) == pytest.approx(two)  # 10 GB/s is the less
    wide = replace(gpu, reduced_gb_s=1000)
    assert Cluster(wide, 16).sent_gb_s == 25 and Cluster(wide, 16, per_machine=16).sent_gb_s == 1000
    assert gpu.with_share(0.25).trunk == 0.125


def test_what_is_sent_is_what_training_md_counts():
    """GB that a rank of 8 sends in an update of 2 micro-batches, stage 1 of dev: gradients 11.1, weights 2.8."""
    trained = 1_581_963_776
    moved = throughput.traffic(ZERO2, 8, trained, 0)
    assert (2 * moved.per_micro_batch / 1e9, moved.per_update / 1e9) == pytest.approx((11.1, 2.8), abs=0.05)
    on_all = {"use_multi_rank_bucket_allreduce": True}
    everywhere = throughput.traffic(ZERO2 | {"zero_optimization": ZERO2["zero_optimization"] | on_all}, 8, trained, 0)
    assert everywhere.per_micro_batch == 2 * moved.per_micro_batch
    assert throughput.traffic(ZERO2, 1, trained, 0).per_micro_batch == 0


def test_dev_on_8_h100_is_faster_than_with_all_that_are_drawn():
    config = build_config(dev())
    assert config.train.micro_batch_size == "auto"
    lines = micro_batch_lines(Sizes.of(config, ZERO2, 8), gpus_of(Assumed("h100")), True)
    for stage in config.stages:
        rates = {}
        for line in lines:
            if line.stage == stage and not line.cache:
                row = line.as_json("mean", 128)
                rates[row["micro"]] = row["images_per_s"]
                assert row["chosen"] == (row["micro"] == 2) and row["fits"] and row["memory_gb"] < 0.92 * 80
        assert set(rates) == {1, 2, 4, 8}
        assert rates[2] == max(rates.values()) >= 1.15 * rates[8]


def test_of_equals_the_smallest_and_of_none_that_fits_the_one_that_needs_least():
    def choice(size: int, need: int, seconds: float, fits: bool = True) -> Choice:
        return Choice(size, ("none",), need, fits, {"bucket": seconds})

    assert best_of([choice(4, 9, 1.0), choice(2, 9, 1.0), choice(1, 9, 2.0)]).micro_batch_size == 2
    assert best_of([choice(4, 9, 1.0, fits=False), choice(2, 7, 3.0, fits=False)]).micro_batch_size == 2
    assert best_of([choice(4, 9, 1.0, fits=False), choice(2, 7, 3.0)]).micro_batch_size == 2


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("file", ["zero2.json", "zero2_offload.json", "zero3.json"])
def test_an_engine_cut_into_other_micro_batches_trains_as_one_built_for_them(tmp_path, file):
    """Bit for bit, over two updates: built for one micro-batch of 4 an update and cut into two of 2."""
    ds, weights = json.loads((Path(__file__).parents[2] / "ds_configs" / file).read_text()), []
    for built in (2, 4):
        config = small(tmp_path, 4, built, model__activation_checkpointing="none").for_world(1)
        models, generator = load_models(config).to("cpu", torch.bfloat16), torch.Generator().manual_seed(0)
        wake(models, generator)
        engine = StageEngine(models.trainable, config, ds, 0, 1)
        models.trainable.configure(file != "zero3.json", "none")
        engine.cut_into(2)
        assert engine.accumulation_steps == 2
        for update in range(2):
            engine.set_learning_rates(update)
            for _ in range(2):
                engine.backward(drawn_losses(engine, config, models, generator).mean())
                engine.step()
        assert engine.deepspeed.global_steps == 2
        weights.append({name: state["master"] for name, state in engine.carry(set(engine.first_stage)).tensors.items()})
        engine.close()
    assert weights[0] and all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


# --- GPUs ---


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a100", ("A100 80 GB", 80)),
        ("H100", ("H100 80 GB", 80)),
        ("NVIDIA H100 80GB HBM3", ("H100 80 GB", 80)),
        ("NVIDIA A100-SXM4-40GB", ("A100 40 GB", 40)),
        ("NVIDIA H200", ("H200 141 GB", 141)),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_gpus_whose_speed_is_predicted(name, found):
    gpu = find_gpu(name)
    assert (gpu and (gpu.name, gpu.memory_gb)) == found


def test_what_a_person_says_of_a_gpu_wins():
    assert Assumed().of("NVIDIA H200") == GPUS["h200"]
    assert Assumed(name="a100").of("NVIDIA H200") == GPUS["a100"]
    given = Assumed(memory_gb=40, peak_tflops=500, mfu=0.26).of("NVIDIA H100 80GB HBM3")
    assert (given.memory_gb, given.peak_tflops, given.flux, given.trunk) == (40, 500, 0.26, 0.19)
    assert given.name == "H100 40 GB"
    assert "given: FLUX at 26% of 500 TFLOP/s" in given.provenance
    assert Assumed(mfu=0.4).of("NVIDIA L40S") is None
    unknown = Assumed(memory_gb=48).of("NVIDIA L40S")
    assert (unknown.name, unknown.memory_gb, unknown.peak_tflops) == ("NVIDIA L40S", 48, 362)
    assert "nothing is known of this GPU" in unknown.provenance


# --- a run's plan ---


def plan_of(config, assumed: Assumed | None = None, state: dict | None = None) -> Plan:
    fitted = fit(config, None, 1)
    plan = Plan(fitted, ZERO2, ALONE, config.train.micro_batch_size == "auto", assumed)
    plan.load_state_dict(state or {})
    plan.enter(config.stages[0])
    return plan


def candidates_of(plan: Plan) -> Candidates:
    """Those of a plan's stage, as if its engine were built."""
    return plan._candidates(plan.stage, Sizes.of(plan.config, ZERO2, 1))


def saved_need(plan: Plan) -> int:
    """Bytes of the plan that a checkpoint brought."""
    return plan.candidates.planner.with_needs(plan.stage, plan._saved.micro_batch_size, plan._saved.policies, 0).bytes


def limit_for(config, size: int) -> float:
    """--gpu-memory with which micro-batches up to `size`, with all recomputed, fit in the first stage, and no larger ones."""
    fitted = fit(config, None, 1)
    planner = Planner(Sizes.of(fitted, ZERO2, 1))
    needs = [planner.with_needs(config.stages[0], n, ["full"] * 3, 0).bytes for n in (size, 2 * size)]
    return sum(needs) / 2 / memory.USABLE / 1e9


@pytest.fixture
def engine_of():
    engines = []

    def make(config):
        models = load_models(config).to("cpu", torch.bfloat16)
        engines.append(StageEngine(models.trainable, fit(config, None, 1), ZERO2, 0, 1))
        return models, engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.usefixtures("process_group", "little_vae")
def test_a_run_chooses_and_a_resumed_one_takes_the_same_again(tmp_path, engine_of, caplog):
    config = small(tmp_path)
    models, engine = engine_of(config)
    assert engine.accumulation_steps == 1  # until something is chosen: all 8 that are drawn
    tight, roomy = Assumed(memory_gb=limit_for(config, 2)), Assumed(memory_gb=1000)
    plan = plan_of(config, tight)
    chosen = plan.choose(models, engine)
    assert chosen == plan.candidates.planner.best(
        config.stages[0], [1, 2, 4, 8], memory.usable(tight.memory_gb * 1e9), plan.cluster
    )
    assert (chosen.micro_batch_size, engine.accumulation_steps, engine.deepspeed.train_batch_size()) == (2, 4, 8)
    assert engine.deepspeed.train_micro_batch_size_per_gpu() == 2
    assert "predicted" in plan.why and "4 does not fit" in plan.why and "images/s with 1" in plan.why
    assert plan.scalars() == {"plan/micro_batch_size": 2} | {f"plan/blocks_{p}": n for p, n in chosen.counts.items()}

    saved = json.loads(json.dumps(plan.state_dict()))
    again = plan_of(config, Assumed(memory_gb=1.01 * tight.memory_gb), saved)
    assert again.choose(models, engine) == chosen and again.why == "as in the checkpoint"
    caplog.set_level(logging.WARNING, logger="megaflux")
    assert not caplog.records
    more = plan_of(config, roomy, saved)  # more memory changes nothing either
    assert more.choose(models, engine) == chosen
    for changed in ({"gpu": "NVIDIA H100"}, {"ranks": 2}):
        anew = plan_of(config, roomy, saved | changed)
        assert anew.choose(models, engine).micro_batch_size == 8 and engine.accumulation_steps == 1
        assert (
            caplog.records.pop()
            .getMessage()
            .startswith(
                "stage base: planned anew: micro-batch 8, of 3 blocks: 3 none, on 1 ranks (cpu); in the checkpoint"
            )
        )
        caplog.clear()
    less = plan_of(config, Assumed(memory_gb=limit_for(config, 1)), saved)
    assert less.choose(models, engine).micro_batch_size == 1
    assert "rounding may differ" in caplog.text
    caplog.clear()
    number = plan_of(small(tmp_path, micro=4), roomy, saved)  # what a person sets wins
    assert number.choose(models, engine).micro_batch_size == 4 and number.why == ""
    assert "planned anew: micro-batch 4" in caplog.text and "in the checkpoint micro-batch 2" in caplog.text
    caplog.clear()
    same = plan_of(small(tmp_path, micro=2, model__activation_checkpointing="auto"), roomy, saved)
    assert same.choose(models, engine) == chosen and not caplog.records
    other = plan_of(config, roomy, saved | {"stage": "one"})  # of another stage: this one is chosen
    assert other.choose(models, engine).micro_batch_size == 8


@pytest.mark.usefixtures("process_group", "little_vae")
def test_what_a_person_changes_is_planned_anew(tmp_path, engine_of):
    """A plan is not taken again where it was made under what no longer holds: a number, a policy, a limit in memory.json."""
    config, roomy = small(tmp_path), Assumed(memory_gb=1000)
    models, engine = engine_of(config)

    def saved_by(config, limits=None, assumed=roomy) -> dict:
        plan = plan_of(config, assumed)
        plan.limits = limits or {}
        plan.choose(models, engine)
        return json.loads(json.dumps(plan.state_dict()))

    fresh = plan_of(config, roomy).choose(models, engine)
    tight = limit_for(config, 1)
    for state in (
        saved_by(small(tmp_path, micro=2)),  # now auto
        saved_by(config, assumed=None) | {"micro_batch_size": 2},  # now --gpu-memory, without which nothing was chosen
        saved_by(
            config.model_copy(update={"model": config.model.model_copy(update={"activation_checkpointing": "full"})})
        ),
        saved_by(config, {"base": memory.usable(1e9 * tight)}),  # memory.json, now deleted
    ):
        plan = plan_of(config, roomy, state)
        assert state["micro_batch_size"] != 8 or state["policies"] != list(fresh.policies)
        assert plan.choose(models, engine) == fresh and plan.why.startswith("predicted")
    # --gpu-memory counts also where a try would find room
    plan = plan_of(config, Assumed(memory_gb=tight), saved_by(config))
    plan.candidates = candidates_of(plan)
    assert plan._take_saved(plan.candidates, memory.usable(1e9 * tight), tried_out=True) is None
    # free memory counts where nothing is tried out; a hundredth less may be chance
    plan.assumed, need = roomy, saved_need(plan)
    assert plan._take_saved(plan.candidates, int(0.995 * need), tried_out=False) is not None
    assert plan._take_saved(plan.candidates, int(0.98 * need), tried_out=False) is None
    assert plan._take_saved(plan.candidates, memory.usable(1e9 * tight), tried_out=True) == fresh


@pytest.mark.usefixtures("little_vae")
def test_a_plan_that_fits_here_is_lowered_as_often_as_another_ranks(tmp_path, monkeypatch):
    plan = plan_of(small(tmp_path, 2048), Assumed(memory_gb=1000))
    plan.candidates = candidates_of(plan)
    highest = plan.candidates.within(10**15)
    twice = plan.candidates.lower(plan.candidates.lower(highest)[0])[0]
    monkeypatch.setattr(distributed, "min_over_ranks", lambda value, world: min(value, -2))
    assert highest_that_fits(plan.candidates, highest, lambda choice: True, ALONE) == (twice, 2) and twice != highest


@pytest.mark.usefixtures("process_group", "little_vae")
def test_all_ranks_plan_within_the_least_memory(tmp_path, engine_of, monkeypatch):
    config = small(tmp_path)
    models, engine = engine_of(config)
    plan, least = plan_of(config, Assumed(memory_gb=1000)), memory.usable(limit_for(config, 4) * 1e9)
    monkeypatch.setattr(memory, "min_over_ranks", lambda value, world: min(value, least))
    assert plan.choose(models, engine).micro_batch_size == 4


@pytest.mark.usefixtures("process_group", "little_vae")
def test_without_a_gpu_that_is_known_all_that_are_drawn(tmp_path, engine_of, monkeypatch):
    config = small(tmp_path)
    models, engine = engine_of(config)
    plan = plan_of(config)
    assert plan.choose(models, engine).micro_batch_size == 8
    assert plan.describe().startswith("micro-batch 8 of 8 drawn (no GPU, so none is chosen; --gpu-memory GB lets")
    monkeypatch.setattr(plan_module, "gathered", lambda value, world: ["NVIDIA H100", "NVIDIA H200"])
    mixed = plan_of(config)
    assert not mixed.free and mixed.gpu == "NVIDIA H100 and NVIDIA H200"
    for said in (Assumed(memory_gb=1000), Assumed("h100")):  # it can be told what to plan for
        assert plan_of(config, said).free


@pytest.mark.usefixtures("process_group", "little_vae")
def test_out_of_memory_lowers_the_micro_batch_too(tmp_path):
    values = tiny()
    values["model"]["activation_checkpointing"] = "auto"
    values["train"] |= {
        "global_batch_size": 2048,
        "micro_batch_size": "auto",
    }  # so that activations are most of the memory
    config = build_config(values | {"run": {"dir": str(tmp_path)}})
    plan = plan_of(config, Assumed(memory_gb=1000))
    plan.candidates = candidates_of(plan)
    choice, seen = plan.candidates.within(10**15), []
    while (lower := plan.candidates.lower(choice)) is not None:
        assert lower[0].bytes < choice.bytes
        choice = lower[0]
        seen.append(choice.micro_batch_size)
    assert choice == plan.candidates.within(0) and choice.micro_batch_size == 1 and set(choice.policies) == {"full"}
    assert len(set(seen)) > 1
    assert "micro_batch_size is 1 already" in plan.candidates.remedy(choice)
