"""The whole command: on checkpoints whose pictures are known, killed and continued, on two ranks, against another, and for real."""

from __future__ import annotations

import json
import re

import pytest
import torch
from PIL import Image

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.evaluate import command, evaluation, work
from megaflux.evaluate import loss as losses
from megaflux.evaluate.conditions import Conditions, Given, choose, others
from megaflux.evaluate.evaluation import Subject
from megaflux.evaluate.judge import Judge
from megaflux.evaluate.making import PipelineMaker
from megaflux.evaluate.options import parse
from megaflux.evaluate.samples import cell_of, load
from megaflux.models.vlm import Condition
from tests.conftest import picture
from tests.evaluate.conftest import STEPS, KnownMaker, known, prepared_grid

MODES = ("image_text", "text", "none")


def subject(picture_of, **more) -> Subject:
    return Subject("known", {"weights_sha256": "0", **more}, MODES, None, KnownMaker(picture_of), 1.0)


def evaluate(out, data, judge, picture_of, *options, against=None, interrupt_at=None):
    """(exit code, report.json) of the command with known pictures, without losses."""

    def loaded(request, path, update, world):
        found = subject(picture_of if path == "first" or against is None else against)
        found.maker.left = interrupt_at
        return found

    arguments = ["--checkpoint", "first", "--data", str(data), "--out", str(out)]
    arguments += [] if judge is None else ["--judge", str(judge)]
    arguments += ["--only", "pictures,words,grid", "--batch-size", "4", "--samples", "8", *options]
    code = command.run(parse(arguments), loaded)
    return code, json.loads((out / "report.json").read_text())


def truth(data):
    """Makes the true picture of the sample whose words and style it is asked for."""
    held_out = load(str(data), 64, None)
    cells = {}
    for sample in held_out.samples:
        cells[sample.caption, cell_of(sample.references[0].name).style] = sample.target
        cells[sample.caption, None] = sample.target
    styles = {one.references[0].pixel_values.numpy().tobytes(): cell_of(one.key).style for one in held_out.samples}

    def make(given, seed, bucket):
        style = styles.get(given.references[0].pixel_values.numpy().tobytes()) if given.references else None
        return cells.get((given.words, style), known(given, bucket))

    return make


def copied(given, seed, bucket):
    """Makes the reference."""
    return given.references[0].pixel_values if given.references else known(given, bucket)


def test_a_model_that_makes_the_true_cells_reaches_the_ceiling(tmp_path, grid_data, judge_file):
    code, report = evaluate(tmp_path, grid_data, judge_file, truth(grid_data))
    cells = report["held_out_cells"]
    assert code == 0
    for name in ("style", "content"):
        assert cells[f"{name}_top1"] == cells[f"judge_{name}"]
        assert cells[f"{name}_of_ceiling"]["value"] == 1.0
    assert cells["leakage"] == cells["judge_leakage"]
    assert cells["baselines"]["vae"]["content_top1"] == cells["judge_content"]  # the stub's VAE loses nothing
    # the empty condition gives one grey picture: one style and one content, right by chance
    assert cells["baselines"]["empty"]["style_top1"]["value"] < 0.7
    assert report["pictures"]["pixels"]["retrieval_target"]["value"] == 1.0
    assert report["held_out_contents"]["content_top1"] == report["held_out_contents"]["judge_content"]
    assert set(report["held_out_cells"]["style_top1"]) >= {"value", "interval", "n"}


def test_a_model_that_copies_its_reference_leaks_it(tmp_path, grid_data, judge_file):
    _, report = evaluate(tmp_path, grid_data, judge_file, copied)
    cells, pixels = report["held_out_cells"], report["pictures"]["pixels"]
    assert cells["leakage"]["value"] >= 0.9  # the references are training cells, which the judge knows
    assert cells["style_top1"]["value"] >= 0.9
    assert cells["content_top1_of_all"]["value"] <= 0.1
    assert pixels["copying"]["value"] == pytest.approx(1.0)
    assert pixels["distance_to_reference"]["value"] == 0.0
    assert pixels["nearer_to_reference_than_to_seed"]["value"] == 1.0
    assert cells["baselines"]["other_style"]["style_top1"]["value"] <= 0.2  # it follows the other style's reference


def test_a_model_that_ignores_its_condition(tmp_path, grid_data, judge_file):
    def noise(given, seed, bucket):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (3, bucket.height, bucket.width), generator=generator, dtype=torch.uint8)

    _, report = evaluate(tmp_path, grid_data, judge_file, noise)
    assert report["pictures"]["pixels"]["retrieval_target"]["value"] == pytest.approx(1 / 8)
    assert report["words"]["retrieval_target"]["value"] == pytest.approx(1 / 8)
    assert abs(report["pictures"]["pixels"]["copying"]["value"]) < 0.1
    cells = report["held_out_cells"]
    for name in ("style_top1", "content_top1", "leakage"):
        assert cells[name] == cells["baselines"]["empty"][name]


def test_killed_and_continued_it_writes_the_same_report(tmp_path, grid_data, judge_file):
    make = truth(grid_data)
    evaluate(tmp_path / "whole", grid_data, judge_file, make)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "killed", grid_data, judge_file, make, interrupt_at=3)
    made = sorted((tmp_path / "killed" / "checkpoint").rglob("*.png"))
    made[0].write_bytes(made[0].read_bytes())  # what is there is kept
    before = [file.stat().st_mtime_ns for file in made]
    evaluate(tmp_path / "killed", grid_data, judge_file, make)
    assert made and before == [file.stat().st_mtime_ns for file in made]
    assert (tmp_path / "killed" / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()


def test_ranks_share_the_batches_and_change_nothing(tmp_path, grid_data, monkeypatch):
    """Each rank's share alone, one after the other: together what one rank makes."""
    for name in ("raise_first", "barrier"):
        monkeypatch.setattr(evaluation, name, lambda *_: None)
    held_out = load(str(grid_data), 8, None)
    settings = parse(["--checkpoint", "c", "--data", "d", "--out", "o", "--only", "pictures,grid"]).settings
    files, counts = {}, []
    for size in (1, 2):
        root = tmp_path / str(size)
        for rank in reversed(range(size)):
            one, world, count = subject(truth(grid_data)), World(rank, size), []
            task = evaluation.plan(one, held_out, settings)
            evaluation.compute(one, task, held_out, settings, root, world, lambda count=count: count.append(1))
            assert len(count) == evaluation.share(task, world)
            counts.append(len(count))
        files[size] = {file.relative_to(root): file.read_bytes() for file in root.rglob("*.png")}
    assert files[1] == files[2]
    assert counts[0] == counts[1] + counts[2] and abs(counts[1] - counts[2]) <= 1


def test_against_itself_nothing_differs(tmp_path, grid_data, judge_file):
    make = truth(grid_data)
    _, report = evaluate(tmp_path, grid_data, judge_file, make, "--against", "second", against=make)
    cells = report["differences"]["held_out_cells"]
    assert {name: cells[name]["value"] for name in ("style_top1", "content_top1", "leakage")} == {
        "style_top1": 0.0,
        "content_top1": 0.0,
        "leakage": 0.0,
    }
    assert cells["content_top1"]["interval"] == [0.0, 0.0]
    html = (tmp_path / "report.html").read_text()
    assert "difference" in html and html.count("data:image/png;base64,") == 4  # two sheets of each
    assert not re.search(r'(?:src|href)="(?!data:)', html)  # it opens from a disk, without a network
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_other_settings_in_one_folder_are_refused(tmp_path, grid_data, judge_file):
    evaluate(tmp_path, grid_data, judge_file, copied)
    with pytest.raises(UserError, match=r"evaluation.json: was begun with seeds \[0, 1\], not \[5, 6\]; give another"):
        evaluate(tmp_path, grid_data, judge_file, copied, "--seed", "5")


def test_an_earlier_versions_judge_is_trained_anew_in_out_and_refused_where_it_is_given(
    tmp_path, grid_data, judge_file, monkeypatch, capsys
):
    judge, out = Judge.load(judge_file), tmp_path / "out"
    with monkeypatch.context() as earlier:
        earlier.setattr("megaflux.evaluate.judge.FORMAT", "1")
        judge.save(out / "judge.safetensors")
    with pytest.raises(UserError, match="not a judge of this version; leave --judge out"):
        evaluate(tmp_path / "given", grid_data, out / "judge.safetensors", copied)
    assert not Judge.is_current(out / "judge.safetensors")
    _, report = evaluate(out, grid_data, None, copied, "--judge-steps", "2")
    assert "of another version of megaflux; training another judge" in capsys.readouterr().out
    assert Judge.is_current(out / "judge.safetensors") and report["judge"]["steps"] == 2


def test_a_judge_of_other_data_is_refused(tmp_path, grid_data, judge_file, monkeypatch):
    monkeypatch.setattr("megaflux.evaluate.samples.fingerprint", lambda path: "another")
    with pytest.raises(UserError, match="the judge of other data"):
        evaluate(tmp_path, grid_data, judge_file, copied)


def test_a_judge_learns_on_a_larger_grid(tmp_path, grid_sets, grid_data):
    part = prepared_grid(grid_sets, tmp_path / "part", most_contents=8)
    options = ("--judge-data", str(grid_data), "--judge-steps", str(STEPS))
    _, report = evaluate(tmp_path / "out", part, None, truth(part), *options)
    grid, whole = (load(str(data), 8, None).grid for data in (part, grid_data))
    assert len(grid.contents) == 8 < len(whole.contents) and set(grid.held_out) < set(whole.held_out)
    judge = Judge.load(tmp_path / "out" / "judge.safetensors")
    assert judge.contents == sorted({cell.content for cell in grid.train})
    assert len(judge.prototypes) == len(judge.hubs) == len(judge.contents)
    assert report["judge"]["cells"] == report["held_out_cells"]["style_top1"]["n"]
    assert report["held_out_cells"]["content_top1"] == report["held_out_cells"]["judge_content"]
    with pytest.raises(UserError, match="was begun with judge_data"):
        evaluate(tmp_path / "out", part, None, truth(part), "--judge-steps", str(STEPS))
    other_styles = tmp_path / "sets"
    other_styles.mkdir()
    for style in ("flat", "line"):
        (other_styles / style).symlink_to(grid_sets / style)
    for data, other, problem in (
        (part, prepared_grid(other_styles, tmp_path / "fewer"), "of flat, line, not flat, line, soft"),
        (grid_data, part, "lacks content"),
        (part, prepared_grid(grid_sets, tmp_path / "others", hold_out_cells=0.05), "which the data hold out"),
    ):
        with pytest.raises(UserError, match=problem):
            evaluate(tmp_path / "refused" / problem[:5], data, None, copied, "--judge-data", str(other))


def test_conditions_of_a_sample(grid_data):
    held_out = load(str(grid_data), 8, None)
    assert choose(None, MODES, held_out) == "image_text"
    assert choose(None, ("image",), held_out) == "image"
    first, other = held_out.samples[0], held_out.samples[others(held_out.samples)[0]]
    found = losses.passes(Conditions("image_text", 2), first, other)
    assert list(found) == [
        "matched",
        "shuffled",
        "shuffled_references",
        "shuffled_words",
        "reference_1",
        "reference_2",
        "empty",
    ]
    assert found["matched"].references == first.references and found["matched"].words == first.caption
    assert found["shuffled_words"] == Given(first.references, other.caption)
    assert found["reference_2"].references == (first.references[0], other.references[1])
    assert found["empty"].empty


def test_a_run_for_real(tmp_path, run_folder, monkeypatch):
    """A small run: losses, pictures as the pipeline makes them, CLIP and DINO of tiny random networks."""
    from megaflux import runs
    from megaflux.data.writing.build import prepare
    from megaflux.data.writing.options import Options

    source, data, out = tmp_path / "pictures", tmp_path / "data", tmp_path / "out"
    source.mkdir()
    for number in range(10):
        picture(64, 64, number).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a thing of kind {number % 3}")
    options = Options(longest_side=64, aspect_ratios=("1:1",), held_out=0.4, encoding="png")
    prepare(str(source), data, options, workers=1, progress=False)
    clip, dino = tiny_clip(tmp_path / "clip"), tiny_dino(tmp_path / "dino")
    arguments = ["--checkpoint", str(run_folder), "--data", str(data), "--out", str(out), "--samples", "2"]
    arguments += ["--seeds", "1", "--steps", "1", "--judge-steps", "1", "--clip", clip, "--dino", dino]
    assert command.run(parse(arguments)) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["checkpoint"]["source"]["update"] == 8 and report["checkpoint"]["condition"] == "image"
    assert set(report["loss"]["gap"]) == {"shuffled", "empty"}
    assert len(report["loss"]["mlperf"]["matched"]) == 8
    assert -1 <= report["outside"]["made"]["clip_t"]["value"] <= 1
    assert report["outside"]["true"]["clip_i"]["value"] == pytest.approx(1.0)  # each is its own reference
    assert {"clip_i", "clip_t", "dino_i"} == set(report["outside"]["made"])

    pipeline = runs.load_pipeline(run_folder)
    sample = load(str(data), 2, None).samples[0]
    reference = Image.fromarray(sample.target.permute(1, 2, 0).numpy())
    wanted = pipeline(reference, num_inference_steps=1, seed=0, output_type="pt").images[0]
    asked = work.Asked(work.MADE, sample, 0, Given(sample.references))
    made = work.read(asked, out / "checkpoint")
    assert (made.float() - (wanted.float() * 255).round()).abs().max() <= 1
    maker = PipelineMaker(pipeline, 1, 1.0)
    trips = [maker.round_trip(sample.target[None], change) for change in (None, lambda x: x, torch.zeros_like)]
    assert torch.equal(trips[0], trips[1]) and not torch.equal(trips[0], trips[2])

    # a picture that is damaged is made anew by the same command
    file = asked.file(out / "checkpoint")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    (out / "report.json").unlink()
    with pytest.raises(UserError, match=r"\.png: damaged .*, and deleted; give the same command again"):
        command.run(parse(arguments))
    assert command.run(parse(arguments)) == 0 and file.read_bytes() == whole
    assert json.loads((out / "report.json").read_text())["checkpoint"] == report["checkpoint"]

    # a model that does not read its condition loses nothing by another
    from megaflux.evaluate import conditions

    def blind(trunk, given, kind) -> Condition:
        return trunk.empty(len(given))

    monkeypatch.setattr(losses, "encode", blind)
    held_out = load(str(data), 2, None)
    found = losses.losses(pipeline.models, held_out.samples, [0, 1], conditions.Conditions("image"), 1.0, 0)
    assert found["matched"] == found["shuffled"] == found["empty"]


def tiny_clip(folder) -> str:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from megaflux.models.scratch import TINY

    tokenizer = CLIPTokenizer.from_pretrained(TINY / "clip_tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 77}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**side).save_pretrained(folder)
    return str(folder)


def tiny_dino(folder) -> str:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)
