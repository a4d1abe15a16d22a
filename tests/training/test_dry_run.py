"""The dry run's report and the checks before a run: each problem found, named, and nothing else reported."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import PRESETS
from megaflux.config.schema import Config
from megaflux.data.buckets import make_buckets
from megaflux.training.planning import sizes
from megaflux.training.planning.checks import find_notes, find_problems
from megaflux.training.planning.dry_run import dry_run
from megaflux.training.planning.gpus import Assumed
from tests.conftest import small_values

DS_CONFIG = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text())


def configure(preset: str = "dev", **changes) -> Config:
    """configure(data__path=...): a preset with fields changed."""
    values = PRESETS[preset]()
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section] = values[section] | {key: value} if key else value
    return build_config(values)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder that says it holds what dev trains on."""
    return write_dataset(tmp_path / "data", ("16:9", "2:1", "2.35:1", "1:1", "1:2"), 1024)


def write_dataset(folder: Path, ratios, side: int) -> Path:
    folder.mkdir()
    buckets = [vars(bucket) for bucket in make_buckets(ratios, side)]
    (folder / "dataset.json").write_text(json.dumps({"longest_side": side, "buckets": buckets}))
    return folder


# --- the report ---


def test_dev_without_a_problem(data, tmp_path, capsys):
    path = tmp_path / "report.json"
    config = configure(data__path=str(data), run__dir=str(tmp_path / "run"))
    assert dry_run(config, DS_CONFIG, 8, json_path=str(path)) == 0
    report = json.loads(path.read_text())
    assert report["problems"] == []
    assert [(s["name"], s["updates"], len(s["blocks"])) for s in report["stages"]] == [
        ("stage1", 33333, 15),
        ("stage2", 33334, 16),
        ("stage3", 33333, 16),
    ]
    assert report["stages"][0]["trainable"] == {"flux": 1334221824, "connector": 14684160, "vlm": 233057792}
    assert 80e12 < report["flops_per_image"] < 182e12  # between the narrowest bucket's and the square's
    assert 55 < report["memory_gb_per_gpu"] < 80
    pictures = (config.data.num_workers * 2 + 1) * (config.train.drawn_per_rank * 3 * 1024 * 1024 + 16384)
    assert report["shared_memory_gb_per_gpu"] * 1e9 == pytest.approx(pictures)
    assert report["days"] == pytest.approx(128 * 100_000 / report["images_per_second"] / 86400)
    # A checkpoint holds 12 bytes for each parameter that trains, and 2 for each that ever did, which stage 1 does not tell
    # apart; and a crash costs half an hour at most, at 45% MFU on 8 A100.
    assert report["checkpoint_gb"]["stage1"] == pytest.approx(14 * 1.581963776, rel=0.03)
    assert report["checkpoint_gb"]["stage3"] == pytest.approx(12 * 1.733007872 + 2 * 4.319638016, rel=0.03)
    at_45 = report["images_per_second"] * 0.45 / report["mfu"]
    assert config.train.checkpoint_every * config.train.global_batch_size / at_45 < 1800
    rows = report["micro_batches"]
    assert set(rows[0]) == {
        "gpu",
        "scope",
        "stage",
        "cache",
        "micro",
        "memory_gb",
        "policies",
        "tflop_per_image",
        "images_per_s",
        "days",
        "fits",
        "chosen",
    }
    assert {row["gpu"] for row in rows} == {"A100 80 GB", "H100 80 GB", "H200 141 GB"}
    assert len(rows) == 3 * 3 * 2 * 4 * 2  # GPUs, stages, cached or not, micro-batches, scopes
    chosen = [row for row in rows if row["chosen"]]
    assert len(chosen) == 3 * 3 * 2 * 2 and all(row["fits"] for row in chosen)
    run = [row for row in chosen if row["gpu"] == "A100 80 GB" and row["scope"] == "mean" and not row["cache"]]
    assert sum(row["days"] for row in run) == pytest.approx(report["days"])
    assert {row["stage"]: row["micro"] for row in run} == report["micro_batch_size"]
    for row in (r for r in rows if r["micro"] == 1 and r["scope"] == "mean" and not r["cache"]):
        same = {k: row[k] for k in ("gpu", "stage", "micro", "policies")}
        (cached,) = [r for r in rows if r["scope"] == "mean" and r["cache"] and same.items() <= r.items()]
        assert row["memory_gb"] - cached["memory_gb"] == pytest.approx(15.2, abs=0.1)
        assert cached["tflop_per_image"] < row["tflop_per_image"] and cached["images_per_s"] > row["images_per_s"]
        assert sum(row["policies"].values()) == 57
    largest = {
        row["stage"]: row for row in rows if row["scope"] == "largest" and row["micro"] == 1 and not row["cache"]
    }
    assert largest["stage1"]["tflop_per_image"] == pytest.approx(
        189, abs=1
    )  # gpu-audit's 190 where nothing is computed again
    assert len(report["assumptions"]) == 7
    out = capsys.readouterr().out
    for words in (
        "micro_batch_size: auto",
        "micro-batch 2: of 57 blocks: 40 none, 17 mlp",
        "Predicted, not\nmeasured",
        "assumed: A100 80 GB: no A100 was measured",
        "longest_side: 1024",
        "1,334,221,824",
        "optimizer shard",
        "in /dev/shm",
        "images/s",
        "one every 125 updates",
        "0 problems found",
    ):
        assert words in out
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_the_gpu_counts(data, tmp_path, capsys):
    def report(config: Config, **said) -> dict:
        assert dry_run(config, DS_CONFIG, 8, str(tmp_path / "r.json"), Assumed(**said)) in (0, 2)
        return json.loads((tmp_path / "r.json").read_text())

    config = configure(data__path=str(data))
    h100 = report(config, name="h100")
    assert (h100["gpu"], h100["peak_tflops"]) == ("H100 80 GB", 989)
    assert {row["gpu"] for row in h100["micro_batches"]} == {"H100 80 GB"}
    slower = report(config, name="h100", memory_gb=60, mfu=0.26)
    assert slower["images_per_second"] < 0.6 * h100["images_per_second"]
    assert 47 < slower["memory_gb_per_gpu"] < 60 * 0.92
    assert "given: FLUX at 26% of 989 TFLOP/s" in slower["assumptions"][0]
    none = report(config, memory_gb=40)  # where not even the smallest fits: the smallest, and the remedy
    assert set(none["micro_batch_size"].values()) == {1} and not any(
        row["fits"] for row in none["micro_batches"] if not row["cache"]
    )
    assert [problem for problem in none["problems"] if "is more than 40 GB; use more GPUs" in problem]
    assert "* does not fit" in capsys.readouterr().out
    capsys.readouterr()
    uneven = report(
        configure(data__path=str(data), train__micro_batch_size=3), name="h100"
    )  # 2, and what it would need
    assert [problem for problem in uneven["problems"] if "3 does not divide the 8 images" in problem]
    assert set(uneven["micro_batch_size"].values()) == {3}
    number = report(configure(data__path=str(data), train__micro_batch_size=8), name="h100")
    assert set(number["micro_batch_size"].values()) == {8}  # what a person sets stays
    assert h100["images_per_second"] > 1.15 * number["images_per_second"]


@pytest.mark.parametrize(("squares", "wide", "ranks", "noted"), [(32, 1, 8, 1), (32, 32, 8, 0), (500, 15, 4, 1)])
def test_a_bucket_that_is_mostly_repeats_is_noted(tmp_path, squares, wide, ranks, noted):
    data = write_dataset(tmp_path / "data", ("1:1", "2:1"), 1024)
    info = json.loads((data / "dataset.json").read_text())
    counts = {"train": {"1:1": squares, "2:1": wide}}
    (data / "dataset.json").write_text(json.dumps(info | {"format_version": 1, "counts": counts, "columns": {}}))
    config = configure(data__path=str(data), train__drawn_per_rank=4 if ranks == 8 else 8, train__micro_batch_size=4)
    notes = [note for note in find_notes(config, ranks) if note.startswith("data.path")]
    assert len(notes) == noted
    if noted:
        own = "one sample fills" if wide == 1 else f"{wide} samples fill"
        assert notes[0].startswith(f"data.path: bucket 2:1 (1024x512): its {own} 32 places of an epoch")
        assert notes[0].endswith("fewer --aspect-ratios, or start the run with a smaller train.drawn_per_rank")


def test_nothing_is_allocated(data, monkeypatch):
    made = []
    build = sizes.meta_models
    monkeypatch.setattr(sizes, "meta_models", lambda config: made.extend(build(config)) or tuple(made))
    dry_run(configure(data__path=str(data)), DS_CONFIG, 8)
    assert {p.device.type for part in made for p in part.parameters()} == {"meta"}


def test_every_problem_is_reported_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    config = configure(
        data__path=str(tmp_path / "none"),
        run__dir=str(tmp_path / "file"),
        train__micro_batch_size=16,
        model__activation_checkpointing=False,
    )
    assert dry_run(config, DS_CONFIG, 3, json_path=str(tmp_path / "r.json")) == 2
    problems = json.loads((tmp_path / "r.json").read_text())["problems"]
    fields = [problem.partition(":")[0] for problem in problems]
    assert fields == ["train.global_batch_size", "run.dir", "data.path", "memory"]
    out = capsys.readouterr().out
    assert "4 problems found" in out
    assert all(f"problem: {problem}" in out for problem in problems)


def test_sizes_that_no_network_has_are_a_problem_not_a_crash(data, capsys):
    flux = PRESETS["dev"]()["model"]["flux_config"] | {"num_attention_heads": "many"}
    assert dry_run(configure(data__path=str(data), model__flux_config=flux), DS_CONFIG, 8) == 2
    assert "problem: model" in capsys.readouterr().out


def test_a_report_that_cannot_be_written(data, tmp_path):
    with pytest.raises(UserError, match="--json"):
        dry_run(configure(data__path=str(data)), DS_CONFIG, 8, json_path=str(tmp_path / "none" / "r.json"))


def test_offloading_and_more_gpus_make_dev_fit(data, capsys):
    config = configure(data__path=str(data), train__micro_batch_size=8)
    offload = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2_offload.json").read_text())
    assert dry_run(config, DS_CONFIG, 1) == 2
    assert dry_run(config, offload, 1) == 0
    assert "on the host" in capsys.readouterr().out


# --- the checks ---


def only_problem(config: Config, ranks: int = 8, ds_config=DS_CONFIG) -> str:
    (problem,) = find_problems(config, ds_config, ranks)
    assert "\n" not in problem
    return problem


def describe(folder: Path, **fields) -> None:
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 1, "columns": {}} | fields))


def data_notes(config: Config) -> list[str]:
    return [note for note in find_notes(config, 8) if note.startswith("data.") and "bucket" not in note]


FULL = {"train": {"1:1": 900, "2:1": 60}, "held_out": {"1:1": 30, "2:1": 10}}
MIXED = {"image": 0.7, "image_text": 0.1, "text": 0.2}


@pytest.mark.parametrize(
    ("captioned", "condition", "problems", "notes"),
    [
        (0, {"image": 1}, 0, 0),
        (0, MIXED, 1, 0),
        (1, MIXED, 0, 1),
        (899, MIXED, 0, 1),
        (900, MIXED, 0, 0),
        (None, MIXED, 0, 0),  # an earlier version's dataset
    ],
)
def test_captions_that_the_data_do_not_have(data, captioned, condition, problems, notes):
    describe(data, counts=FULL, notes={} if captioned is None else {"captioned": captioned})
    config = configure(data__path=str(data), data__condition=condition)
    found = find_problems(config, DS_CONFIG, 8)
    assert len(found) == problems and all("draws captions for 30% of the batches, but no image" in p for p in found)
    found = data_notes(config)
    assert len(found) == notes and all(f"only {captioned} of the 1000 images" in note for note in found)


def test_an_optimizer_on_nvme_is_refused(data):
    config = configure(data__path=str(data))
    zero = DS_CONFIG["zero_optimization"] | {"offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"}}
    found = find_problems(config, DS_CONFIG | {"zero_optimization": zero}, 8)
    assert [line for line in found if "nvme" in line] == [
        "--deepspeed: offload_optimizer.device nvme keeps Adam's state where a change of stage cannot read it; use cpu"
    ]


@pytest.mark.parametrize(
    ("weights", "images", "condition", "note"),
    [
        (None, {"1": 700, "5": 300}, MIXED, None),
        ("3,2,1", {"1": 700, "3": 300}, MIXED, None),
        (
            "3,2,1",
            {"1": 700, "4": 200, "6": 100},
            MIXED,
            "300 images in {} have more than 3 captions (up to 6), of which",
        ),
        (
            "0,0,1",
            {"0": 1, "1": 699, "2": 300},
            MIXED,
            "300 images have only captions of weight 0, which are drawn alike",
        ),
        ("3,2,1", {"1": 1000}, MIXED, "no image in {} has several captions, so the weights change nothing"),
        ("3,2,1", {"6": 1000}, {"image": 1}, "has no effect, because data.condition draws no captions"),
        ("3,2,1", None, MIXED, None),  # an earlier version's dataset
    ],
)
def test_weights_that_do_not_fit_the_captions(data, weights, images, condition, note):
    settings = {} if images is None else {"caption_stats": {"images": images, "lengths": None}}
    several = any(int(number) > 1 for number in images or {})
    describe(data, counts=FULL, settings=settings, format_version=1 + several)
    config = configure(data__path=str(data), data__condition=condition, data__caption_weights=weights)
    assert find_problems(config, DS_CONFIG, 8) == []
    found = data_notes(config)
    if note is None:
        assert found == []
    else:
        (line,) = found
        assert line.startswith(f"data.caption_weights: {note.format(data)}")


@pytest.mark.parametrize(
    ("held_out", "chosen", "note"),
    [
        ({}, "1:1", None),
        ({"1:1": 0, "2:1": 0}, None, None),
        ({"2:1": 1}, "1:1", "1 held-out pictures of the shape that validation uses: no gap can be measured"),
        ({"1:1": 2, "2:1": 9}, None, "2 held-out pictures of the shape that validation uses; its figures"),
        ({"1:1": 2, "2:1": 9}, "2:1", ""),
        ({"1:1": 8}, "1:1", ""),
    ],
)
def test_too_few_held_out_pictures(data, held_out, chosen, note):
    """Prepared from 30 pictures, say: training used to stop after it had loaded everything."""
    settings = {"held_out": 0.01} | ({"validation_bucket": chosen} if chosen else {})
    describe(data, counts={"train": {"1:1": 30}, "held_out": held_out}, settings=settings)
    config = configure(data__path=str(data))
    if note is None:
        assert "has no held-out pictures (--held-out 0.01), which validation needs" in only_problem(config)
    else:
        assert find_problems(config, DS_CONFIG, 8) == []
        assert [note in found for found in data_notes(config)] == [True] * bool(note)


def test_presets_pass_where_their_data_is(data, tmp_path):
    assert find_problems(configure(data__path=str(data)), DS_CONFIG, 8) == []
    tiny = configure("tiny", data__path=str(tmp_path / "later"))
    assert find_problems(tiny, DS_CONFIG, 1) == []
    assert "prepared from openmoji" in find_notes(tiny, 1)[0]


def test_batch(data):
    assert "set it to 96 or 144" in only_problem(configure(data__path=str(data)), ranks=6)


def test_data(data, tmp_path):
    missing = str(tmp_path / "none")
    assert "megaflux.data.prepare" in only_problem(configure(data__path=missing))
    assert find_problems(configure(data__path=missing, data__remote="s3://bucket/data"), DS_CONFIG, 8) == []
    assert find_problems(configure(data__path=missing, data__source="pictures"), DS_CONFIG, 8) == []
    assert "set it to 1024" in only_problem(configure(data__path=str(data), data__longest_side=512))
    fewer = configure(data__path=str(data), data__aspect_ratios=["1:1", "2:1"])
    assert "data.aspect_ratios: 1:1,2:1" in only_problem(fewer)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "not a prepared dataset" in only_problem(configure(data__path=str(empty)))
    for text in ("{", "[" * 100_000, "[]", '{"longest_side": 1024, "buckets": 5}'):
        (empty / "dataset.json").write_text(text)
        assert "cannot be read" in only_problem(configure(data__path=str(empty)))
    (empty / "dataset.json").write_text('{"longest_side": 1024, "buckets": [{"name": 5, "width": 1, "height": 1}]}')
    assert "data.aspect_ratios" in only_problem(configure(data__path=str(empty)))
    assert "is a file" in only_problem(configure(data__path=str(empty / "dataset.json")))
    assert "data.longest_side" in only_problem(configure(data__path=str(data), data__longest_side=64))
    assert "multiple of 16" in only_problem(configure(data__path=str(data), data__longest_side=1000))
    remote = configure(data__path=missing, data__remote="s3://b/d", data__cache=["latents"], data__cache_limit="much")
    assert [p.partition(":")[0] for p in find_problems(remote, DS_CONFIG, 8)] == ["data.cache", "data.cache_limit"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_run_folder_that_cannot_be_written(data, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in only_problem(configure(data__path=str(data), run__dir=str(tmp_path / "a" / "b")))
    finally:
        tmp_path.chmod(0o700)


def test_run_folder_is_a_file(data, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for place in (file, file / "below"):
        assert f"run.dir: {file} is a file" in only_problem(configure(data__path=str(data), run__dir=str(place)))


def test_names_that_are_too_long_for_a_file_system(data):
    long, path = "x" * 300, str(data)
    assert "File name too long; give another folder" in only_problem(configure(data__path=path, run__dir=long))
    assert "does not exist" in only_problem(configure(data__path=long))
    assert "does not exist" in only_problem(configure(data__path=path, model__flux=long))


def test_model_folders(data, tmp_path, published):
    def config(**changes):
        return configure(data__path=str(data), **changes)

    assert "does not exist" in only_problem(config(model__flux=str(tmp_path / "flux")))
    assert "does not exist" in only_problem(config(model__vlm="./none"))
    folder, qwen = tmp_path / "flux", str(published["qwen"])
    folder.mkdir()
    assert "lacks transformer/config.json" in only_problem(config(model__flux=str(folder)))
    shutil.copytree(published["flux"], folder, dirs_exist_ok=True)
    small = [{"name": "a", "share": 1.0, "blocks": [0, 1]}]
    assert find_problems(config(model__vlm=qwen, model__flux=str(folder), stages=small), DS_CONFIG, 8) == []
    assert "is a file" in only_problem(config(model__vae=str(folder / "vae/config.json")))
    assert "blocks 0 to 1" in find_problems(config(model__flux=str(folder)), DS_CONFIG, 8)[0]
    for text in ('["a"]', '{"num_layers": "many"}', "5"):
        (folder / "transformer/config.json").write_text(text)
        problem, *_ = find_problems(config(model__vlm=qwen, model__flux=str(folder)), DS_CONFIG, 8)
        assert "gives no number of blocks" in problem
    assert "is fetched from the hub (no folder black-forest-labs is here)" in find_notes(config(), 1)[0]
    asked = config(model__flux="hub:black-forest-labs/FLUX.1-dev")
    assert "is fetched from the hub (hub: asks for it)" in find_notes(asked, 1)[0]


def test_all_that_is_wrong_with_weights_is_said_at_once_and_before_a_run(
    data, tmp_path, published, monkeypatch, capsys
):
    """As `--dry-run` prints it, and a start refuses it."""
    flux, qwen = tmp_path / "flux", tmp_path / "qwen"
    shutil.copytree(published["flux"], flux)
    shutil.copytree(published["qwen"], qwen)
    (flux / "transformer/diffusion_pytorch_model.safetensors").unlink()
    (qwen / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "weights/vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    stages = [{"name": "a", "share": 1.0, "blocks": [0, 1]}]
    config = configure(
        data__path=str(data), model__flux=str(flux), model__vlm=str(qwen), model__vae="weights/vaee", stages=stages
    )
    assert dry_run(config, DS_CONFIG, 8) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    assert problems == [
        f"problem: model.flux: {flux} lacks transformer/diffusion_pytorch_model.safetensors.index.json or "
        "diffusion_pytorch_model.safetensors; give a complete folder",
        f"problem: model.vlm: {qwen} holds git-lfs pointers in the place of model.safetensors; fetch the files with "
        "`git lfs pull`",
        "problem: model.vae: weights/vaee does not exist in the folder weights that is here; correct the path, or give "
        "hub:weights/vaee for the hub's",
    ]


def test_sizes_that_do_not_fit_each_other():
    flux = PRESETS["tiny"]()["model"]["flux_config"]
    tiny = configure("tiny", model__flux_config=flux | {"axes_dims_rope": [8, 8, 8], "in_channels": 64})
    problems = find_problems(tiny, DS_CONFIG, 1)
    assert [p.split(":")[0].rpartition(".")[2] for p in problems] == ["axes_dims_rope", "in_channels"]
    assert "model.vae" in only_problem(configure("tiny", model__vae=None), 1)
    for axes in (5, ["a"], "abc"):
        tiny = configure("tiny", model__flux_config=flux | {"axes_dims_rope": axes})
        assert "axes_dims_rope: must be a list" in only_problem(tiny, 1)


def test_panel_larger_than_the_held_out_set(data):
    config = configure(data__path=str(data), validation__panel_samples=100)
    assert "validation.panel_samples: 100" in only_problem(config)


def problems_of(values, capsys) -> list[str]:
    dry_run(build_config(values), DS_CONFIG, 1)
    out = capsys.readouterr().out
    return [line for line in out.splitlines() if line.startswith(("problem: ", "note: "))]


@pytest.fixture
def small(tmp_path) -> dict:
    """The models of tests/conftest.py."""
    folder = write_dataset(tmp_path / "small", ("16:9", "1:1", "1:2"), 64)
    return merge(small_values(), {"data": {"path": str(folder)}, "run": {"dir": str(tmp_path / "new"), "seed": 3}})


def test_what_a_run_is_to_begin_with_is_compared_by_names_and_shapes(small, run_folder, export_folder, capsys):
    """Before any weight is read, from the headers of the source's files."""
    for source in (run_folder, export_folder):
        values = merge(small, {"model": {"init": str(source)}})
        assert not [line for line in problems_of(values, capsys) if line.startswith("problem")]
        values = merge(values, {"model": {"flux_config": {"joint_attention_dim": 40}}})
        (line,) = [line for line in problems_of(values, capsys) if line.startswith("problem")]
        assert re.search(r"model.init: .*safetensors: wrong shape .*24.*, the run's models have .*40", line)
        values = merge(small, {"model": {"init": str(source), "flux_config": {"num_single_layers": 0}}})
        values["stages"] = values["stages"][:1]
        (line,) = [line for line in problems_of(values, capsys) if line.startswith("problem")]
        assert "unexpected key" in line and "single_transformer_blocks.0" in line


def test_one_mistake_is_one_problem_and_a_rate_without_effect_is_noted(small, tmp_path, capsys):
    values = merge(small, {"model": {"vlm": str(tmp_path / "none")}})
    assert len([line for line in problems_of(values, capsys) if "/none" in line]) == 1
    stages = [small["stages"][0], small["stages"][1] | {"components": ["attn.to_q", r"attn\.to_[qk]"]}]
    assert len([line for line in problems_of(small | {"stages": stages}, capsys) if "components" in line]) == 1
    stages[1] = {"name": "one", "share": 1, "blocks": [1], "connector": False, "lr": {"connector": 5, "vlm": 1}}
    noted = [line for line in problems_of(small | {"stages": stages}, capsys) if ".lr." in line]
    assert noted == ["note: stages.1.lr.connector: has no effect, because this stage trains nothing of connector"]
