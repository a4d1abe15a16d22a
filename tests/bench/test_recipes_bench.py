"""`python -m megaflux.bench recipes`: resumes, refuses other options, and its runs are what it says."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megaflux.bench import recipes, small_runs
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
        lines = [{"update": n, "loss": 1.0, "gap": n / 100} for n in range(0, updates + 1, first)]
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


@pytest.mark.slow
def test_a_small_comparison_from_a_written_flux(tmp_path, monkeypatch):
    data = make_dataset(tmp_path / "data", 16)
    values = small_config(data, tmp_path / "run")
    given = {name: values[name] for name in ("model", "data")}
    given["train"] = {"global_batch_size": 4, "micro_batch_size": 2}
    given["validation"] = {"samples": 3, "panel_samples": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(given))

    def run(command, **_):
        done = forked.run_ranks(command[1:], rank_environments(1))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    monkeypatch.setattr(small_runs.subprocess, "run", run)
    out = tmp_path / "out"
    options = ["--out", str(out), "--base-updates", "2", "--updates", "4", "--every", "2"]
    assert main(["recipes", *options, "--config", str(tmp_path / "small.yaml")]) == 0
    found = json.loads((out / "recipes.json").read_text())["runs"]
    assert [at["update"] for at in found["connector-first"]["curve"]] == [0, 1, 2, 4]  # and at the stage's end
    starts = {tuple(found[name]["curve"][0].values()) for name in recipes.ARMS}
    assert len(starts) == 1  # all begin alike
    assert (out / "flux/text_encoder/config.json").exists()
