"""The average of the weights: what a checkpoint, an export and a resume make of it. What it is, update by update: test_engine.py
(carry_worker.py), test_runs.py, and test_survival.py, where other ranks go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megaflux import export, runs
from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import dev
from megaflux.generation.outputs import read_settings
from megaflux.infer.__main__ import main as infer
from megaflux.infer.request import to_runtime
from megaflux.training.average import WeightAverage
from megaflux.training.checkpoint import manifest, space, weights
from megaflux.training.engine import AVERAGE, StageEngine
from megaflux.training.planning.checks import find_notes
from megaflux.training.schedule import average_decay, left_of_beginning
from megaflux.training.survival.guard import NOT_FINITE
from tests.conftest import picture
from tests.training.carry_worker import Toy, toy_config
from tests.training.runs import ds_config

CPU = torch.device("cpu")


def with_averages(run: Path, to: Path, changes: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy of a run whose newest checkpoint also has averages of what its second stage trains, divided between two ranks:
    half of each weight. changes: other tensors in the first file."""
    shutil.copytree(run, to)
    folder = list(manifest.listed(to).values())[-1]
    trained = load_file(folder / weights.file_name(0, 1))
    averages = {name: tensor / 2 for name, tensor in trained.items() if "single" in name or "connector" in name}
    for rank, names in enumerate(weights.shares({n: t.numel() for n, t in averages.items()}, 2)):
        share = {n: averages[n] for n in names} | (changes or {} if rank == 0 else {})
        weights.write_share(share, folder, World(rank, 2, CPU), weights.AVERAGE)
    content = manifest.read(folder) | {"files": manifest.inventory(folder), "average": {"updates": 7}}
    (folder / manifest.MANIFEST).write_text(json.dumps(manifest.sealed(content)))
    return to


def test_averages_are_loaded_in_the_place_of_weights_and_exported(run_folder, tmp_path):
    run = with_averages(run_folder, tmp_path / "run")
    raw, averaged = (dict(runs.load(runs.find(run, ema=ema)).trainable.named_parameters()) for ema in (False, True))
    halved = {name for name in raw if not torch.equal(raw[name], averaged[name])}
    assert halved and all(torch.equal(averaged[name], raw[name] / 2) for name in halved)
    assert all("single" in name or "connector" in name for name in halved)  # the first stage's others have no average
    assert export.main([str(run), str(tmp_path / "export"), "--ema"]) == 0
    exported = load_file(tmp_path / "export/connector/model.safetensors")
    assert torch.equal(exported["weight"], averaged["connector.weight"])
    of_run, of_export = (runs.load_pipeline(path, dtype=torch.float32, ema=True) for path in (run, tmp_path / "export"))
    with pytest.raises(UserError, match="--no-ema: .* is an export of a run's averaged weights; leave it out"):
        to_runtime({"checkpoint": str(tmp_path / "export"), "ema": False})
    assert of_run.source == of_export.source and of_run.source["ema"] is True
    plain = runs.load_pipeline(run, dtype=torch.float32)
    assert plain.source["weights_sha256"] != of_run.source["weights_sha256"] and "ema" not in plain.source
    made = [
        p(picture(64, 64), num_inference_steps=1, output_type="pt", seed=1).images for p in (of_run, of_export, plain)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_a_command_line_that_asks_for_averages_makes_pictures_with_them(run_folder, tmp_path, capsys):
    run = with_averages(run_folder, tmp_path / "run")
    picture(64, 64).save(tmp_path / "reference.png")
    arguments = [
        "--checkpoint",
        run,
        "--reference",
        tmp_path / "reference.png",
        "--count",
        1,
        "--steps",
        1,
        "--device",
        "cpu",
    ]
    for option, out in ((["--ema"], "averaged"), ([], "plain")):
        assert infer([*map(str, arguments), *option, "--out", str(tmp_path / out)]) == 0
    made = [next((tmp_path / out).glob("*seed0.png")) for out in ("averaged", "plain")]
    assert [read_settings(str(file))[2]["source"].get("ema") for file in made] == [True, None]
    assert Image.open(made[0]).tobytes() != Image.open(made[1]).tobytes()
    assert infer(["--from-image", str(made[0]), "--out", str(tmp_path / "again")]) == 0
    again = next((tmp_path / "again").glob("*seed0.png"))
    assert Image.open(again).tobytes() == Image.open(made[0]).tobytes()


def test_what_holds_no_averages_says_so(run_folder, export_folder, tmp_path):
    with pytest.raises(UserError, match="update-0000008: holds no average of the weights; leave --ema out .*--no-ema"):
        runs.find(run_folder, ema=True)
    with pytest.raises(UserError, match="--ema: .* is an export of a run's weights; export the run again, with --ema"):
        runs.load_pipeline(export_folder, dtype=torch.float32, ema=True)
    with pytest.raises(UserError, match="--ema: .* is an export of a run's weights"):  # before anything is loaded
        to_runtime({"checkpoint": str(export_folder), "ema": True})
    run = with_averages(run_folder, tmp_path / "run", {"connector.weight": torch.zeros(2, 2)})
    with pytest.raises(
        UserError, match=r"average-00000-of-00002.safetensors: connector.weight does not fit this model"
    ):
        runs.load(runs.find(run, ema=True))
    runs.load(runs.find(run))  # without them nothing looks at it
    damaged = list(manifest.listed(run).values())[-1] / "average-00001-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="average-00001-of-00002.safetensors: damaged"):
        runs.find(run, ema=True)


def test_a_replay_takes_what_its_picture_was_made_with(run_folder, export_folder):
    of_picture = to_runtime({"checkpoint": str(run_folder), "ema": True})
    assert of_picture.ema and to_runtime({}, of_picture).ema
    assert not to_runtime({"ema": False}, of_picture).ema  # --no-ema
    assert not to_runtime({"checkpoint": str(export_folder)}, of_picture).ema  # it holds one set of weights


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("base", ["zero2.json", "zero2_offload.json"])
def test_an_average_that_is_switched_on_in_a_resumed_run_begins_at_its_weights(tmp_path, base):
    """And one that is switched off is discarded, with its memory."""
    config = build_config(merge(toy_config().for_world(1).model_dump(), {"optim": {"ema_decay": 0.4}}))
    module, ds = Toy(), json.loads(ds_config(tmp_path, base=base).read_text())
    engine, world = StageEngine(module, config, ds, 0, 1), World(0, 1, CPU)
    engine.set_learning_rates(0)
    engine.backward(engine(0))
    engine.step()
    average = WeightAverage(0.4, world)
    average.begin_stage(engine)
    average.load(tmp_path, {}, engine)  # a checkpoint without
    masters = {name: tensors["master"] for name, tensors in engine.carry(set(engine.first_stage)).tensors.items()}
    assert average.updates == 0
    assert all(torch.equal(tensor, masters[name]) for name, tensor in average.gather_share(engine).items())
    engine.dropped = NOT_FINITE
    average.follow(engine)
    assert average.updates == 0
    engine.dropped = None
    before, update = average.gather_share(engine), 1
    engine.set_learning_rates(update)
    engine.backward(engine(update))
    engine.step()
    average.follow(engine)
    after = average.gather_share(engine)
    assert average.updates == 1 and any(not torch.equal(before[name], after[name]) for name in after)
    save_file(after, tmp_path / "average.safetensors")
    stored = {"files": {"average.safetensors": {}}, "average": {"updates": 1}}
    off, again = WeightAverage(0, world), WeightAverage(0.4, world)
    for one in (off, again):
        engine.close()
        engine = StageEngine(module, config, ds, 0, 1)
        one.begin_stage(engine)
        one.load(tmp_path, stored, engine)
        state = engine.deepspeed.optimizer.optimizer.state
        assert any(AVERAGE in of_flat for of_flat in state.values()) == (one is again)
        assert one.updates == (one is again)
    found = again.gather_share(engine)
    assert found.keys() == after.keys() and all(torch.equal(found[name], after[name]) for name in after)
    engine.close()


@pytest.mark.parametrize(
    ("decay", "start", "end"), [(0.9999, 0, 300), (0.99, 0, 2000), (0.99, 700, 1300), (0.05, 3, 9)]
)
def test_what_is_left_of_an_averages_beginning(decay, start, end):
    left = 1.0
    for n in range(start + 1, end + 1):
        left *= min(decay, (1 + n) / (10 + n))
    assert left_of_beginning(decay, start, end) == pytest.approx(left, rel=1e-6)
    assert average_decay(decay, end) == min(decay, (1 + end) / (10 + end))


def test_a_dry_run_says_where_an_average_is_too_slow_for_a_stage():
    def notes(decay: float, updates: int, share: float = 1.0) -> list[str]:
        values = merge(dev(), {"optim": {"ema_decay": decay}, "train": {"updates": updates}})
        values["stages"][2]["share"] = share
        config = build_config(values)
        return [note for note in find_notes(config, 8) if note.startswith("optim.ema_decay")]

    assert notes(0.9999, 100_000) == notes(0.999, 30_000) == notes(0, 300) == []
    # A short last stage, of 990 updates: 0.99 forgets in a hundred, 0.9999 does not in a thousand.
    assert notes(0.99, 100_000, 0.02) == []
    assert notes(0.9999, 100_000, 0.02) == [
        "optim.ema_decay: after the 990 updates of stage 'stage3', 91% of the average of what begins to train in it is still "
        "its beginning; lower 0.9999"
    ]
    assert left_of_beginning(0.99999, 0, 2**53) == 0.0  # at once


@pytest.mark.usefixtures("process_group")
def test_an_error_of_one_rank_while_the_average_is_in_place_ends_it_without_waiting_for_others(tmp_path, monkeypatch):
    """Out of memory in a validation, say: putting the weights back is collective, and the others are not there."""
    engine = StageEngine(Toy(), toy_config().for_world(1), json.loads(ds_config(tmp_path).read_text()), 0, 1)
    average, put = WeightAverage(0.4, World(0, 1, CPU)), []
    average.begin_stage(engine)
    monkeypatch.setattr(average, "_put", lambda engine, name, parameter, key, kept: put.append(key))
    with pytest.raises(torch.OutOfMemoryError), average.in_place_of_weights(engine):
        raise torch.OutOfMemoryError
    assert put == [AVERAGE] * len(engine.first_stage)
    with average.in_place_of_weights(engine):
        pass
    assert put == [key for key in (AVERAGE, AVERAGE, None) for _ in engine.first_stage]
    engine.close()


def test_a_checkpoint_with_averages_takes_four_bytes_more_for_all_that_has_trained():
    assert space.checkpoint_bytes(10**6, 3 * 10**6, 2, True) - space.checkpoint_bytes(10**6, 3 * 10**6, 2) == (
        pytest.approx(12 * 10**6, rel=0.05)
    )
