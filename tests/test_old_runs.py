"""Runs and exports that earlier commits wrote (tests/old_runs) are resumed, exported and generated from."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megaflux import runs
from megaflux.common.command import Parser
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.command_line import add_config_arguments, parse_config
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import PRESETS
from megaflux.export import export
from megaflux.models.pretrained import load_models, load_vae
from megaflux.training.checkpoint import extend, identity, init_weights, manifest, saved
from megaflux.training.ds_config import load_ds_config, with_defaults
from tests import forked
from tests.conftest import picture
from tests.training.runs import LAUNCH, ROOT, rank_environments

# The end was recorded without bfloat16 matrix units, which round otherwise, by 2e-4 of the loss. oneDNN's own switch; a
# processor that has less uses what it has.
WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
OLD = Path(__file__).parent / "old_runs" / "a9a4819"
VAE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy, for resuming writes into a run's folder and into its data's."""
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]


def parse(*argv: object):
    parser = Parser(prog="test")
    add_config_arguments(parser)
    return parse_config(
        parser, list(map(str, argv)), saved=lambda run_dir: (found := saved.begun(run_dir)) and found.values
    )


# small was saved by two ranks: its shards are cut anew.
@pytest.mark.parametrize(("name", "ranks"), [("tiny", 1), ("small", 1)])
def test_an_old_run_is_resumed_with_its_own_values_to_the_end_that_it_would_have_had(old, name, ranks):
    # Nothing but its folder and where its data now is: no preset, no file, no learning rate.
    run = old / name
    envs = [rank | WITHOUT_AMX for rank in rank_environments(ranks)]
    done = forked.run_ranks([LAUNCH, "--run.dir", str(run), "--data.path", str(old / "data")], envs, 300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"at update {max(manifest.listed(OLD / name))}" in done.stdout + done.stderr
    # Another processor may round otherwise, so not to the bit.
    assert losses(run)[-1] == pytest.approx(json.loads((OLD / "end.json").read_text())[name][-1], rel=1e-4)
    values = yaml.safe_load((OLD / f"{name}.yaml").read_text())
    assert saved.begun(str(run)).ds_config["zero_optimization"]["use_multi_rank_bucket_allreduce"] is True
    config = saved.load(run)
    assert (config.preset, config.train.updates) == (values["preset"], values["train"]["updates"])
    assert manifest.read(manifest.listed(run)[config.train.updates])["format"] == manifest.FORMAT


def test_an_old_run_is_exported_and_generates(old, tmp_path):
    found = runs.find(old / "tiny")
    assert found.config.train.drawn_per_rank == 4
    export(found, tmp_path / "export")
    load_vae("tiny", None).save_pretrained(tmp_path / "vae")  # the weights that the fixture leaves out
    shutil.copy(tmp_path / "vae" / VAE, old / "export/vae")
    reference, made = picture(64, 64), []
    for source in (old / "tiny", old / "export", tmp_path / "export"):
        pipeline = runs.load_pipeline(source, device="cpu", dtype=torch.float32)
        images = pipeline(
            reference, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)
        ).images
        made.append(images)
    assert made[0].std() > 0.01
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_a_changed_default_never_changes_a_run(old, monkeypatch):
    """Today's presets with other values everywhere that a run's owner may change; and what the user sets counts."""
    run = old / "small"
    changed = PRESETS["dev"]()
    changed["optim"]["lr"], changed["train"]["checkpoint_every"] = 5.0, 77
    changed["train"]["drawn_per_rank"], changed["flow"] = 1, {"guidance": 9.0}
    changed["model"]["vlm_config"]["text_config"]["new_in_a_preset"] = 1
    monkeypatch.setitem(PRESETS, "dev", lambda: copy.deepcopy(changed))
    before = saved.filled(yaml.safe_load((run / "config.yaml").read_text()))
    before["run"]["dir"], before["train"]["stop_after"] = str(run), 0  # of one start only
    for preset in ([], ["--preset", "dev"]):
        args, config = parse("--run.dir", run, *preset)
        assert before == config.model_dump(mode="json")
        assert args.kept["optim.lr"] == 1e-3 and args.kept["train.checkpoint_every"] == 2
    given = parse("--run.dir", run, "--optim.lr", "2e-4", "--train.stop_after", "3")[1]
    assert given.optim.lr == 2e-4 and given.train.stop_after == 3 and given.train.checkpoint_every == 2
    with pytest.raises(UserError, match="--preset tiny: .* holds a run of the preset dev; leave it out"):
        saved.refuse_changes(parse("--run.dir", run, "--preset", "tiny")[1], saved.begun(str(run)).values)
    # They trained at generation's guidance value, which was the default, and go on so.
    monkeypatch.undo()
    assert parse("--run.dir", run)[1].flow.guidance == 3.5
    assert [build_config(PRESETS[name]()).flow.guidance for name in ("tiny", "dev")] == [1.0, 1.0]
    monkeypatch.setitem(PRESETS, "dev", lambda: copy.deepcopy(changed))
    # Where there is nothing to resume, today's defaults hold.
    shutil.rmtree(run / "checkpoints")
    assert parse("--run.dir", run, "--preset", "dev")[1].optim.lr == 5.0


def test_an_old_runs_gradients_are_summed_in_the_order_that_they_were(old):
    theirs = saved.begun(str(old / "small")).ds_config
    given = load_ds_config(ROOT / "ds_configs/zero2.json")
    new, resumed = with_defaults(given)["zero_optimization"], with_defaults(given, theirs)["zero_optimization"]
    assert (resumed["use_multi_rank_bucket_allreduce"], resumed["reduce_bucket_size"]) == (True, 5e8)
    assert new["use_multi_rank_bucket_allreduce"] is False and new["reduce_bucket_size"] < 1e8
    assert with_defaults(given, with_defaults(given))["zero_optimization"] == new  # a run of today, resumed
    mine = given | {"zero_optimization": given["zero_optimization"] | {"reduce_bucket_size": 7}}
    assert with_defaults(mine, theirs)["zero_optimization"]["reduce_bucket_size"] == 7


def test_a_start_that_stopped_early_does_not_stop_the_next_one(old):
    config = old / "small/config.yaml"
    assert "stop_after: 2" in config.read_text()
    assert parse("--run.dir", old / "small")[1].train.stop_after == 0


def test_options_are_for_the_run_and_not_for_the_preset_that_is_the_default(old):
    # tiny, the default preset, caches its trunk, has 6 blocks and 4 stages; this run has none of these
    given = ["--data.condition.image", "0.8", "--data.condition.image_text", "0.2", "--train.micro_batch_size", "1"]
    config = parse("--run.dir", old / "small", *given)[1]
    assert config.data.condition.image_text == 0.2 and config.preset == "dev"


def test_a_preset_that_is_gone_is_no_hindrance(old, monkeypatch):
    monkeypatch.delitem(PRESETS, "dev")
    args, config = parse("--run.dir", old / "small")
    assert config.preset == "dev" and args.kept == {}


def test_an_old_run_holds_its_updates_and_shares_though_config_yaml_is_lost_or_edited(old):
    """Before format 3 the manifest holds these, and not the whole configuration."""
    root = old / "tiny"
    content = manifest.read(manifest.listed(root)[max(manifest.listed(root))])
    assert "started_with" not in content
    config = parse("--run.dir", root)[1]
    assert identity.changed(content, config) == []
    more = extend.extended(parse("--run.dir", root, "--train.updates", 40)[1], saved.begun(str(root)))
    assert identity.changed(content, more) == []  # more updates may be given where the old ones are known
    file = root / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace(f"updates: {config.train.updates}", "updates: 40"))
    edited = extend.extended(parse("--run.dir", root)[1], saved.begun(str(root)))
    assert identity.changed(content, edited) == ["train.updates"]
    values = config.model_dump()
    file.unlink()
    values["train"]["updates"] = 40
    values["stages"][0]["share"] = 3.0
    assert saved.begun(str(root)).config is None
    assert identity.changed(content, build_config(values)) == ["train.updates", "stages.0.share"]


def test_a_start_that_saved_nothing_leaves_nothing(old):
    """What is kept is what the newest checkpoint was saved with, from format 3 on."""
    root = old / "small"
    newest = manifest.folder(root) / "update-0000002"
    content = manifest.read(newest)
    text = (root / "config.yaml").read_text()
    new = content | {
        "format": manifest.FORMAT,
        "started_with": {"config": text, "ds_config": {"zero_optimization": {}}},
    }
    (newest / "manifest.json").write_text(json.dumps(manifest.sealed({k: v for k, v in new.items() if k != "seal"})))
    (root / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.5"))
    assert parse("--run.dir", root)[1].optim.lr == 1e-3
    (root / "config.yaml").unlink()
    assert parse("--run.dir", root)[1].optim.lr == 1e-3


def test_what_an_old_run_draws_is_what_it_drew_when_it_began(old):
    file = old / "small/config.yaml"  # as a later start with smaller micro-batches left it
    file.write_text(file.read_text().replace("micro_batch_size: 2", "micro_batch_size: 1"))
    train = parse("--run.dir", old / "small")[1].train
    assert (train.drawn_per_rank, train.micro_batch_size) == (2, 1)


def test_what_is_drawn_together_cannot_be_changed_while_resuming(old):
    run = str(old / "small")
    _, config = parse("--run.dir", run, "--train.drawn_per_rank", "2", "--train.micro_batch_size", "1")
    saved.refuse_changes(config, saved.begun(run).values)  # what it is
    _, config = parse("--run.dir", run, "--train.drawn_per_rank", "4")
    with pytest.raises(UserError, match="train.drawn_per_rank: 4, but .*begun with 2; leave it out"):
        saved.refuse_changes(config, saved.begun(run).values)


def test_a_field_that_is_added_raises_the_format():
    """Whoever adds one: a new entry of ADDED, a higher manifest.FORMAT, and a line here. A released entry never changes."""
    assert {version: sorted(fields) for version, fields in saved.ADDED.items()} == {
        3: ["train.drawn_per_rank"],
        4: ["model.seeded", "train.deterministic"],
        5: [],
        6: [
            "model.init",
            "model.vlm_layers",
            "optim.schedule",
            "stages.*.connector",
            "stages.*.lr",
            "stages.*.vlm_layers",
            "stages.*.weight_decay",
            "train.ended_at",
            "train.stage_ends",
        ],
        7: [
            "data.caption_weights",
            "data.condition.none",
            "flow.guidance",
            "optim.ema_decay",
            "optim.large_gradient",
            "optim.large_gradient_share",
        ],
        8: ["data.reference_crop", "data.reference_flip", "data.references"],
    }
    assert max(saved.ADDED) == manifest.FORMAT


def test_fields_are_filled_in_by_the_format_that_they_came_with(monkeypatch):
    monkeypatch.setattr(
        saved,
        "ADDED",
        {
            3: {"train.drawn_per_rank": lambda values: values["train"].get("micro_batch_size")},
            4: {"stages.*.weight": 1.0, "flow.new": {"a": 1}, "deepspeed.new": "x"},
        },
    )
    old = {"train.micro_batch_size": 6, "stages": [{"name": "a"}, {"name": "b"}], "flow": {"shift": 3.0}, "run.seed": 0}
    new = {"name": "a", "weight": 1.0}, {"name": "b", "weight": 1.0}
    found = saved.completed(old, 2)
    assert found["stages"] == list(new) and found["flow"] == {"shift": 3.0, "new": {"a": 1}}
    assert saved.at(found, "train.drawn_per_rank") == 6 and saved.at(found, "run.seed") == 0
    assert saved.completed(old, 4)["flow"] == {"shift": 3.0}  # a manifest of that format lacks nothing by age


def test_a_configuration_that_cannot_be_read_is_named(old):
    (old / "small/config.yaml").write_text("train: [")
    with pytest.raises(UserError, match=r"^/.*small/config.yaml line"):  # no word of --config, which nobody gave
        parse("--run.dir", old / "small")


def test_a_new_run_begins_from_an_old_one(old, tmp_path):
    """It drew its weights another way, which a new run has to be told; its last Qwen layer is found by number."""
    values = runs.find(old / "tiny").config.model_dump() | {"run": {"dir": str(tmp_path / "new"), "seed": 1}}
    values["model"] |= {"init": str(old / "tiny"), "seeded": "portable", "vlm_layers": 2}
    (tmp_path / "new").mkdir()
    alone = World(0, 1)

    def begin(**changes):
        config = build_config(merge(values, changes))
        init_weights.prepare(config, None, load_models, alone)
        models = load_models(config)
        init_weights.lay_over(models, config.run.dir, init_weights.expected(config, None))
        return models

    seed = runs.find(old / "tiny").config.run.seed
    with pytest.raises(
        UserError, match=f"model.init: .*tiny: began from other .* --run.seed {seed} --model.seeded torch"
    ):
        begin()
    models, theirs = begin(run={"seed": seed}, model={"seeded": "torch"}), runs.load(runs.find(old / "tiny"))
    for name, parameter in models.trainable.transformer.named_parameters():
        assert torch.equal(parameter, theirs.trainable.transformer.get_parameter(name)), name
    assert torch.equal(models.trainable.connector.weight, theirs.trainable.connector.weight)
    last, there = models.trainable.vlm.layers[-1], theirs.trainable.vlm.layers[-1]
    assert all(torch.equal(p, there.get_parameter(name)) for name, p in last.named_parameters())
