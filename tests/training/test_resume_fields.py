"""What may change when a run is resumed: every field is refused by name, applied, or without effect (checkpoint/identity.py).
Those without effect: test_runs.py, test_a_run_stopped_at_a_stages_end_goes_on_with_its_moments."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.parse import build_config, merge
from megaflux.config.schema import Stage, field_paths
from megaflux.training import distributed
from megaflux.training.checkpoint import extend, identity, manifest, resume, saved
from megaflux.training.checkpoint.retention import milestones
from megaflux.training.checkpoint.state import Checkpoint
from megaflux.training.ds_config import sharding
from megaflux.training.engine import StageEngine
from megaflux.training.planning.checks import find_problems
from megaflux.training.survival.guard import Guard
from tests.training.carry_worker import Toy, gradient, toy_config
from tests.training.runs import ROOT, ds_config

DS = json.loads((ROOT / "ds_configs/zero2.json").read_text())
OTHER = {
    "preset": "dev",
    "run.seed": 9,
    "model.flux_config": {"guidance_embeds": False},
    "model.vlm_config": {"qk_bias_std": 1.0},
    "model.clip_config": {"num_hidden_layers": 2},
    "model.seeded": "torch",
    "model.latent_channels": 4,
    "model.attention": "eager",
    "model.vlm_max_tokens": 65,
    "model.caption_max_tokens": 7,
    "model.vlm_layers": 2,
    "data.longest_side": 128,
    "data.aspect_ratios": ["1:1"],
    "data.condition": {"image": 0.5, "image_text": 0.5},
    "data.caption_weights": [1.0, 2.0],
    "data.references": {"min": 1, "max": 2},
    "data.reference_crop": 0.5,
    "data.reference_flip": 0.5,
    "train.global_batch_size": 4,
    "train.drawn_per_rank": 1,
    "train.stage_ends": [2, 8],
    "train.ended_at": [3],
    "flow.density": "logit_normal",
    "flow.logit_mean": 1.0,
    "flow.logit_std": 2.0,
    "flow.shift": "none",
    "flow.guidance": [1.0, 2.0],
    "stages.*.share": 0.7,
    "stages.*.name": "other",
    "stages.*.blocks": "none",
    "stages.*.components": "norms",
    "stages.*.connector": False,
    "stages.*.vlm_layers": 0,
}
"""Field -> another value than that of the run."""


def test_every_field_is_in_one_list():
    lists = [identity.REFUSED, identity.OF_BEGUN_STAGES, identity.APPLIED, identity.NO_EFFECT]
    listed = [field for fields in lists for field in fields]
    whole = ("data.condition", "data.references")
    fields = {
        path for path in field_paths() if path != "stages" and not path.startswith(tuple(f"{name}." for name in whole))
    }
    assert sorted(listed) == sorted({*fields, *whole, *(f"stages.*.{name}" for name in Stage.model_fields)})
    assert set(OTHER) == {*identity.REFUSED, *identity.OF_BEGUN_STAGES}
    assert set(identity.APPLIED) == {*CHANGES, *APPLIED_ELSEWHERE}


def resumed(run, tmp_path, field: str, value: object, update: int, stage: int = 1) -> None:
    """What a start with this field in a file does up to the checkpoint of an update; UserError where it is refused."""
    *parents, last = field.split(".")
    over: dict = {last: value}
    if field.startswith("stages."):
        stages = saved.load(run).model_dump(mode="json")["stages"]
        stages[stage][last] = value
        over = {"stages": stages}
    else:
        for name in reversed(parents):
            over = {name: over}
    file = tmp_path / "over.yaml"
    file.write_text(yaml.safe_dump(over))
    parser = Parser(prog="test")
    add_config_arguments(parser)
    argv = ["--run.dir", str(run), "--config", str(file)]
    _, config = parse_config(parser, argv, saved=lambda run_dir: saved.begun(run_dir).values)
    begun = saved.begun(str(run))
    saved.refuse_changes(config, begun.values)
    config = extend.extended(config, begun)
    path = manifest.listed(run)[update]
    if problem := identity.problem(path, manifest.read(path) | {"deepspeed": sharding(DS)}, config, DS, 1):
        raise UserError(problem)


@pytest.mark.parametrize("field", OTHER)
def test_what_is_fixed_when_a_run_begins_is_refused_by_name(run_folder, tmp_path, field):
    with pytest.raises(UserError) as caught:
        resumed(run_folder, tmp_path, field, OTHER[field], 8)
    assert field.replace("*", "1") in str(caught.value) and "\n" not in str(caught.value)
    kept = saved.load(run_folder).model_dump(mode="json")  # the run's own value is no change
    same = kept["stages"][1][field.rpartition(".")[2]] if "*" in field else saved.at(kept, field)
    if same not in (None, []):
        resumed(run_folder, tmp_path, field, same, 8)


@pytest.mark.parametrize("field", identity.OF_BEGUN_STAGES)
def test_a_stage_that_has_not_begun_may_change(run_folder, tmp_path, field):
    resumed(run_folder, tmp_path, field, OTHER[field], 4)  # saved in the first stage
    if field != "stages.*.blocks":  # the first stage's set, model, allows no others
        with pytest.raises(UserError, match=field.replace("*", "0").replace(".", r"\.")):
            resumed(run_folder, tmp_path, field, OTHER[field], 4, stage=0)


CHANGES = {
    "optim.lr": 0.02,
    "optim.betas": [0.5, 0.6],
    "optim.eps": 0.3,
    "optim.weight_decay": 0.4,
    "optim.schedule": "per_stage",
    "optim.warmup_fraction": 0.5,
    "optim.plateau_fraction": 0.5,
    "optim.max_grad_norm": 0.05,
    "stages.*.lr": {"connector": 0.5},  # also a change from one group to one for each part
    "stages.*.weight_decay": 0.7,
}
APPLIED_ELSEWHERE = {
    "train.updates": "below, and test_runs.py: test_a_run_given_more_updates_twice",
    "train.stop_after": "test_runs.py, by every run that is stopped and resumed",
    "train.bad_updates": "below: test_the_guards_values_are_those_of_the_start",
    "optim.spike_sigma": "the same",
    "optim.spike_window": "the same",
    "optim.large_gradient_share": "the same",
    "optim.large_gradient": "carry_worker.py counts by the engine's own configuration",
    "optim.ema_decay": "test_runs.py, where it is switched off; test_average.py, where it is switched on",
    "data.sample_posterior": "test_objective.py: a function of the configuration and the update alone",
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_set_when_resuming_is_applied(tmp_path, precision):
    """One step after a resume on the same ranks, against AdamW's formula with the new value. DeepSpeed itself brings back
    the values that were saved."""
    ds = json.loads(ds_config(tmp_path, precision).read_text())
    before = toy_config(lr=0.01, weight_decay=0.1, max_grad_norm=1.0, warmup_fraction=0.17, plateau_fraction=0.0)
    first = StageEngine(Toy().to(torch.bfloat16 if precision == "bf16" else torch.float32), before, ds, 0, 1)
    for update in range(3):
        first.set_learning_rates(update)
        first.backward(first(update))
        first.step()
    state = first.carry(set(first.first_stage))
    first.deepspeed.save_checkpoint(str(tmp_path), tag="deepspeed", exclude_frozen_parameters=True)
    torch.save(distributed.rng_state(), tmp_path / "rng-rank0000.pt")
    content = {"world_size": 1, "groups_by_part": first.by_part, "update": 3}
    module = first.module
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    first.close()
    moved = {}
    for field, value in {"": None, **CHANGES}.items():
        values = before.model_dump()
        if field.startswith("stages"):
            values["stages"] = [stage | {field.rpartition(".")[2]: value} for stage in values["stages"]]
        elif field:
            values = merge(values, {"optim": {field.rpartition(".")[2]: value}})
        config = build_config(values)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        engine = StageEngine(module, config, ds, 0, 1)
        resume.load_training_state(Checkpoint(tmp_path, content), engine, World(0, 1, torch.device("cpu")))
        rates = engine.set_learning_rates(3)
        engine.backward(engine(3))
        engine.step()
        found = {name: tensors["master"] for name, tensors in engine.carry(set(engine.first_stage)).tensors.items()}
        clip = config.optim.max_grad_norm / engine.grad_norm()
        (b1, b2), eps, peaks = config.optim.betas, config.optim.eps, config.optim.peaks(config.stages[0])
        engine.close()
        for name, was in state.tensors.items():
            part = {"c": "connector", "v": "vlm"}.get(name[0], "flux")
            grad = gradient(name, weights[name], 3).to(weights[name].dtype).double() * min(1.0, clip)
            m = b1 * was["exp_avg"].double() + (1 - b1) * grad
            v = b2 * was["exp_avg_sq"].double() + (1 - b2) * grad**2
            step = (m / (1 - b1**4)) / ((v / (1 - b2**4)).sqrt() + eps)
            wanted = was["master"].double() * (1 - rates[part] * peaks[part].weight_decay) - rates[part] * step
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6, msg=f"{field} {name}")
        moved[field] = found["connector.weight"]
    unmoved = [field for field, weight in moved.items() if field and torch.allclose(weight, moved[""], rtol=1e-4)]
    assert unmoved == []  # each of these changes is one that the formula's value shows


def test_the_guards_values_are_those_of_the_start():
    set_now = {"spike_sigma": 3.0, "spike_window": 5, "large_gradient_share": 0.5}
    values = merge(toy_config().model_dump(), {"optim": set_now, "train": {"bad_updates": 2}})
    guard = Guard.of(build_config(values))
    guard.load_state_dict({"norms": [1.0] * 128, "in_a_row": 1, "dropped": 4})
    assert len(guard.norms) == 5 and guard.patience == 2 and guard.sigma == 3.0 and guard.most_large == 0.5


def extended(stages=("a", "b"), updates=10, stage=0, at=3, old_updates=8, **train) -> tuple[list[int], tuple[int, ...]]:
    """(ends, former ends) of a run of two stages of equal shares, saved in `stage` after `at` updates."""

    def config(names, number, **more):
        values = toy_config().model_dump() | {
            "stages": [
                {"name": name, "share": 3.0 if i > 1 and i % 2 else 1.0, "blocks": [0]} for i, name in enumerate(names)
            ]
        }
        return build_config(merge(values, {"train": {"updates": number, **more}}))

    old = config(("a", "b"), old_updates, **train)
    found = extend.extended(config(stages, updates), saved.Begun({}, {}, old, stage, at))
    return found.stage_ends(), found.train.ended_at


def test_added_updates_go_to_the_running_stage_the_last_one_or_the_appended_ones():
    assert extended(updates=8) == ([4, 8], ())
    assert extended(stage=0, at=3) == ([6, 10], ())  # the stage after it moves with its end
    assert extended(stage=0, at=4) == ([4, 10], ())  # finished; the next one has not begun, but is the one to run
    assert extended(stage=1, at=6) == ([4, 10], ())
    assert extended(stage=1, at=8) == ([4, 10], (8,))
    again = {"stage_ends": [6, 10], "ended_at": [8]}
    assert extended(stage=1, at=10, updates=13, old_updates=10, **again) == ([6, 13], (8, 10))
    assert extended(stage=1, at=9, updates=10, old_updates=10, **again) == ([6, 10], (8,))
    assert extended(("a", "b", "c", "d"), updates=16, stage=0, at=3) == ([4, 8, 10, 16], ())
    assert extended(("a", "b", "c", "d"), updates=10, stage=1, at=8) == ([4, 8, 9, 10], (8,))


def test_the_checkpoint_at_a_former_end_stays():
    values = toy_config().model_dump()
    values["train"] |= {"stage_ends": [4, 8, 12], "ended_at": [6]}
    assert milestones(build_config(values)) == {4, 6, 8, 12}


@pytest.fixture
def resumable(run_folder, tmp_path):
    """A copy whose newest manifest says of DeepSpeed what training writes, with ZeRO-2 in bf16."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    file = manifest.listed(run)[8] / manifest.MANIFEST
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "seal"}
    file.write_text(json.dumps(manifest.sealed(content | {"deepspeed": sharding(DS)})))
    return run


def parsed(run, *arguments: object):
    parser = Parser(prog="test")
    add_config_arguments(parser)
    argv = ["--run.dir", str(run), *map(str, arguments)]
    _, config = parse_config(parser, argv, saved=lambda run_dir: saved.begun(run_dir).values)
    return extend.extended(config, saved.begun(str(run)))


def test_an_appended_stage_may_be_small_and_a_dry_run_says_what_a_resume_refuses(resumable, tmp_path):
    values = saved.load(resumable).model_dump(mode="json")
    stages = [*values["stages"], {"name": "more", "share": 0.001, "blocks": "none", "vlm_layers": 0}]
    file = tmp_path / "over.yaml"
    file.write_text(yaml.safe_dump({"stages": stages, "train": {"updates": 11}}))
    config = parsed(resumable, "--config", file)
    assert config.stage_ends() == [4, 8, 11]

    def found(ds=DS, ranks=1, **run):
        given = config.model_copy(update={"run": config.run.model_copy(update=run)})
        return [line for line in find_problems(given, ds, ranks) if not line.startswith("data.")]

    zero3 = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    assert found() == found(ranks=2) == []
    for lines, words in (
        (found(seed=9), "holds a run with other run.seed; restore"),
        (found(zero3), "update-0000008 was saved with {'zero_stage': 2"),
        (found(DS | {"bf16": {"enabled": False}}), "this file says {'zero_stage': 2, 'bf16': False"),
        (found(resume="never"), "holds checkpoints and run.resume is never"),
        (found(dir=str(tmp_path), resume="must"), "holds no checkpoint and run.resume is must"),
    ):
        assert len(lines) == 1 and words in lines[0], lines
    file = manifest.listed(resumable)[8] / manifest.MANIFEST
    content = {k: v for k, v in json.loads(file.read_text()).items() if k != "seal"}
    file.write_text(json.dumps(manifest.sealed(content | {"deepspeed": sharding(zero3)})))
    assert "saved by 1 ranks, this run has 2, and ZeRO-3" in found(zero3, 2)[0]
    config = parsed(resumable, "--optim.lr.vlm", 1e-3)
    assert "one rate for all parts, and ZeRO-3's shards cannot be grouped anew; leave lr and" in found(zero3)[0]


def test_single_fields_of_a_resumed_runs_stages_are_set_by_options(resumable):
    config = parsed(resumable, "--stages.1.lr", 1e-4, "--stages.0.weight_decay.vlm", 0.5)
    assert config.stages[1].lr == 1e-4 and config.stages[0].weight_decay.vlm == 0.5
    assert [stage.share for stage in config.stages] == [0.5, 0.5]
    whole = parsed(resumable, "--stages.1", "{name: stage1, share: 0.5, blocks: [1], lr: 2e-4}")
    assert whole.stages[1].lr == 2e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"updates": 7}, "train.updates: 7, but .* a run of 8, and a run may only be given more"),
        ({"stages": ("a",)}, "stages: .* a run with the stages a, b; list them all"),
        ({"stages": ("a", "b", "c"), "updates": 8}, "stages.2: appended to a run of 8 updates"),
        ({"stages": ("a", "b", "c", "d"), "updates": 9}, "stages.2: appended to a run of 8 updates"),
    ],
)
def test_a_run_is_not_given_less(given, message):
    with pytest.raises(UserError, match=message):
        extended(**given)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_run_keeps_how_many_qwen_layers_are_apart_from_its_trunk(layers):
    """Where model.vlm_layers followed from stages that have not begun."""
    stages = [{"name": name, "share": 1, "blocks": [0], "vlm_layers": 1} for name in "ab"]
    values = toy_config().model_dump() | {"stages": stages}
    old = build_config(values)
    values["stages"][1]["vlm_layers"] = layers
    begun = saved.Begun({}, {}, old, 0, 1)
    if layers:
        with pytest.raises(UserError, match="stages.1.vlm_layers: 2, but .* a run begun with 1 of Qwen2-VL's"):
            extend.extended(build_config(values), begun)
    else:
        values["stages"][0]["vlm_layers"] = 0
        found = extend.extended(build_config(values), begun)
        assert found.vlm_layers == 1 and [stage.vlm_layers for stage in found.stages] == [0, 0]


def test_one_line_says_what_more_updates_do():
    old = toy_config(lr={"flux": 1.0, "connector": 2.0, "vlm": 1.0}, plateau_fraction=0.0)
    begun = saved.Begun({}, {}, old, 1, 6)
    more = old.model_copy(update={"train": old.train.model_copy(update={"updates": 18})})
    assert extend.describe(extend.extended(more, begun), begun) == (
        "train.updates: 12 -> 18; the learning rate of update 7 goes flux from 0.5 to 0.706, connector from 1 to 1.41, "
        "vlm from 0.5 to 0.706; updates by stage from here: two 5 to 14, three 15 to 18"
    )
    assert extend.describe(extend.extended(old, begun), begun) is None
