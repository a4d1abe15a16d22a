"""`python -m megaflux.bench recipes` and `guidance`: resume, refuse other options, and their runs are what they say."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megaflux.bench import guidance, recipes, small_runs
from megaflux.bench.__main__ import main
from megaflux.training.checkpoint import manifest
from tests import forked
from tests.training.runs import make_dataset, rank_environments, small_config


@pytest.fixture
def trained(monkeypatch):
    """Training replaced by what it leaves; the configurations that it was started with, in order."""
    started = []

    def run(command, **_):
        values = yaml.safe_load(Path(command[-1]).read_text())
        started.append(values)
        folder, updates = Path(values["run"]["dir"]), values["train"]["updates"]
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        first = 40 if "base" in str(folder) else 20
        losses = dict.fromkeys(("loss", "loss_guidance_3.5", "ema_loss", "ema_loss_guidance_3.5"), 1.0)
        lines = [{"update": n, "gap": n / 100, **losses} for n in range(0, updates + 1, first)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "validation.jsonl").write_text(text + '{"update": 6')  # torn
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(small_runs.subprocess, "run", run)
    monkeypatch.setattr(recipes, "write_flux", lambda run, folder: folder.mkdir())
    monkeypatch.setattr(manifest, "listed", lambda root: {60: root, 40: root})
    return started


def test_runs_differ_in_nothing_but_their_recipe_and_are_done_once(tmp_path, trained, capsys):
    options = ["recipes", "--out", str(tmp_path), "--base-updates", "40", "--updates", "60"]
    assert main(options) == 0
    base, *arms = trained
    assert base["model"]["flux"] is None and base["run"]["seed"] == 0
    for arm in arms:
        assert (arm["model"]["flux"], arm["run"]["seed"]) == (str(tmp_path / "flux"), 1)
    stages = [arm.pop("stages") for arm in arms]
    rates = [arm["optim"].pop("lr") for arm in arms]
    for arm in arms:
        arm["run"].pop("dir")
    assert arms[0] == arms[1] == arms[2]
    assert stages[0] == stages[1] and stages[2][1] == stages[0][0] | {"share": 3.0}
    assert (stages[2][0]["blocks"], stages[2][0]["vlm_layers"]) == ("none", 0)
    assert rates[1] == rates[2] == {"flux": rates[0], "connector": 10 * rates[0], "vlm": rates[0]}
    out = capsys.readouterr().out
    assert "| connector-first | 60 | 40 | 60 | 1.000 | 0.60 |" in out  # thresholds 0.25 and 0.5 by validations every 20
    found = json.loads((tmp_path / "recipes.json").read_text())
    assert found["runs"]["at-once"]["until"] == {"0.25": 40, "0.5": 60}
    (tmp_path / "connector-first" / "validation.jsonl").write_text("")  # killed in its last updates
    assert main(options) == 0
    assert [Path(values["run"]["dir"]).name for values in trained[4:]] == ["connector-first"]
    with pytest.raises(SystemExit):
        main([*options, "--every", "10"])
    assert "begun with other options" in capsys.readouterr().err


def test_guidance_is_all_that_its_runs_differ_in_and_nothing_is_measured_twice(tmp_path, trained, capsys, monkeypatch):
    asked = []

    def measure(run, ema, guidance):
        asked.append((run.name, ema, guidance))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"loss": 0.5, "gap": guidance, "retrieval": 1.0 - ema}

    monkeypatch.setattr(guidance, "measure", measure)
    options = ["guidance", "--out", str(tmp_path), "--updates", "60", "--seed", "3"]
    with pytest.raises(KeyboardInterrupt):  # a kill
        main(options)
    assert main(options) == 0
    one, other = trained
    assert (one["flow"].pop("guidance"), other["flow"].pop("guidance")) == (1.0, 3.5)
    assert Path(one["run"].pop("dir")).name == "guidance-1" and Path(other["run"].pop("dir")).name == "guidance-3.5"
    assert one == other and (one["optim"]["ema_decay"], one["run"]["seed"]) == (0.99, 3)
    names = ("guidance-1", "guidance-3.5")
    assert sorted(asked[:2] + asked[3:]) == [(n, e, g) for n in names for e in (False, True) for g in (1.0, 3.5)]
    out = capsys.readouterr().out
    assert "| guidance-3.5 | average | 1 | 0.5000 | 1.00 | 0.00 |" in out and "| 60 | 1.0000 |" in out
    found = json.loads((tmp_path / "guidance.json").read_text())
    assert [at["update"] for at in found["runs"]["guidance-1"]] == [0, 20, 40, 60] and len(found["measured"]) == 8


@pytest.mark.slow
def test_weights_and_averages_of_small_runs_are_measured(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "data", 16)
    values = small_config(data, tmp_path / "run", optim__lr=1e-3)
    given = {name: values[name] for name in ("model", "data", "stages", "optim")}
    given["train"] = {"global_batch_size": 4, "micro_batch_size": 2}
    given["validation"] = {"samples": 3, "panel_samples": 2, "steps": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(given))
    monkeypatch.setattr(small_runs.subprocess, "run", really_run)
    out = tmp_path / "out"
    options = ["--updates", "4", "--every", "2", "--config", str(tmp_path / "small.yaml")]
    assert main(["guidance", "--out", str(out), *options]) == 0
    found = json.loads((out / "guidance.json").read_text())
    for name, own in (("guidance-1", 1), ("guidance-3.5", 3.5)):  # at the end it is what the run itself has recorded
        last = found["runs"][name][-1]
        for weights, prefix in (("weights", ""), ("average", "ema_")):
            for at, key in ((own, "loss"), (3.5, "loss_guidance_3.5")):
                loss = found["measured"][f"{name}, {weights}, at {at:g}"]["loss"]
                assert loss == pytest.approx(last[prefix + key], rel=0.01)


def really_run(command, **_):
    done = forked.run_ranks(command[1:], rank_environments(1))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_a_small_comparison_from_a_written_flux(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "data", 16)
    values = small_config(data, tmp_path / "run")
    given = {name: values[name] for name in ("model", "data")}
    given["train"] = {"global_batch_size": 4, "micro_batch_size": 2}
    given["validation"] = {"samples": 3, "panel_samples": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(given))

    monkeypatch.setattr(small_runs.subprocess, "run", really_run)
    out = tmp_path / "out"
    options = ["--out", str(out), "--base-updates", "2", "--updates", "4", "--every", "2"]
    assert main(["recipes", *options, "--config", str(tmp_path / "small.yaml")]) == 0
    found = json.loads((out / "recipes.json").read_text())["runs"]
    assert [at["update"] for at in found["connector-first"]["curve"]] == [0, 1, 2, 4]  # and at the stage's end
    starts = {tuple(found[name]["curve"][0].values()) for name in recipes.ARMS}
    assert len(starts) == 1  # all begin alike
    assert (out / "flux/text_encoder/config.json").exists()
