"""DeepSpeed's file: what is refused, in one line, and what is filled in."""

import json
from pathlib import Path

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config
from megaflux.config.presets import PRESETS
from megaflux.models.pretrained import meta_models
from megaflux.training.ds_config import (
    FILLED,
    accumulation_steps,
    batch_problem,
    compute_dtype,
    load_ds_config,
    resolve_ds_config,
)
from megaflux.training.stages import trainable_names

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def write(path: Path, values) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_resolve_for_the_published_recipe(path):
    resolved = resolve_ds_config(load_ds_config(path), build_config(PRESETS["dev"]()), 8)
    assert resolved["train_batch_size"] == 128
    assert resolved["train_micro_batch_size_per_gpu"] == 8
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["gradient_clipping"] == 1.0
    assert compute_dtype(resolved) is torch.bfloat16


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not JSON"),
        ("[]", "want an object"),
        ('{"a": 1, "a": 2}', "'a' twice"),
        ({"train_batch_size": 8}, "train.global_batch_size): remove it"),
        ({"train_micro_batch_size_per_gpu": 8}, "train.micro_batch_size): remove it"),
        ({"gradient_accumulation_steps": 2}, "comes from the run's configuration"),
        ({"gradient_clipping": 1}, "optim.max_grad_norm): remove it"),
        ({"optimizer": {"type": "Adam"}}, "optimizer comes from"),
        ({"scheduler": {}}, "scheduler comes from"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'zero_optimization.reduce_bucket_size is "auto"'),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"zero_optimization": {"stage": 4}}, "must be 2 or 3"),
        ({"timers": True}, "timers must be an object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "1e8"}}, "must be a number from 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0.5}}, "must be a number from 1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": True}}, "must be a number from 1"),
    ],
)
def test_refused_in_one_line(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        load_ds_config(write(tmp_path / "ds.json", content))
    assert words in str(error.value)
    assert "ds.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            load_ds_config(path)


def test_without_bf16_all_is_float32(tmp_path):
    zero = {"zero_optimization": {"stage": 2}}
    assert compute_dtype(load_ds_config(write(tmp_path / "a.json", zero))) is torch.float32
    off = write(tmp_path / "b.json", zero | {"bf16": {"enabled": False}, "fp16": {"enabled": False}})
    assert compute_dtype(load_ds_config(off)) is torch.float32


def test_what_the_file_does_not_name_is_filled_in_and_what_it_names_is_kept():
    config = build_config(PRESETS["dev"]())
    resolved = resolve_ds_config({"zero_optimization": {"stage": 2}}, config, 8)
    assert resolved["zero_optimization"] == {"stage": 2} | {key: new for key, (new, _) in FILLED.items()}
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}, "timers": {"throughput": {"enabled": True}}}
    resolved = resolve_ds_config(own, config, 8)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert resolved["timers"] == own["timers"]


def test_a_bucket_holds_the_largest_parameter_that_dev_trains():
    config = build_config(PRESETS["dev"]())
    module, _ = meta_models(config)
    parameters = dict(module.named_parameters())
    for stage in config.stages:
        largest = max(parameters[name].numel() for name in trainable_names(module, stage))
        assert FILLED["reduce_bucket_size"][0] / 8 < largest <= FILLED["reduce_bucket_size"][0]


def test_the_given_dict_is_left_alone():
    given = {"zero_optimization": {"stage": 2}}
    resolve_ds_config(given, build_config(PRESETS["dev"]()), 4)
    assert given == {"zero_optimization": {"stage": 2}}


def batches(total: int, drawn: int | None, micro: int | None):
    values = PRESETS["dev"]()
    values["train"] |= {"global_batch_size": total, "drawn_per_rank": drawn, "micro_batch_size": micro}
    return build_config(values)


@pytest.mark.parametrize("named", ["drawn_per_rank", "micro_batch_size"])
def test_every_suggested_batch_size_works(named):
    """For any sizes: the message's suggestions divide, and no message means that the sizes do."""
    for total in (1, 7, 32, 100, 128):
        for drawn in (1, 2, 3, 8, 50):
            for ranks in (1, 2, 3, 8, 64):

                def sizes(total, drawn):
                    return batches(total, drawn, None) if named == "drawn_per_rank" else batches(total, None, drawn)

                problem = batch_problem(sizes(total, drawn), ranks)
                lowered = min(drawn, max(1, total // ranks))
                assert (problem is None) == (total % (lowered * ranks) == 0)
                if problem:
                    advice = problem.partition("set it to ")[2]
                    totals, _, others = advice.partition(f", or train.{named} to ")
                    assert all(batch_problem(sizes(int(t), drawn), ranks) is None for t in totals.split(" or "))
                    assert all(batch_problem(sizes(total, int(n)), ranks) is None for n in others.split(" or ") if n)


def test_drawn_images_are_cut_by_what_divides_them():
    for micro in (1, 2, 4, 8, 16):
        assert batch_problem(batches(128, 8, micro), 8) is None  # 16: lowered to the 8 drawn
    assert "train.micro_batch_size: 3 does not divide the 8 images" in batch_problem(batches(128, 8, 3), 8)
    assert "set it to 2 or 4 or 8" in batch_problem(batches(128, 8, 5), 8)


@pytest.mark.parametrize(
    ("ranks", "drawn", "steps"), [(1, 8, 16), (2, 8, 8), (8, 8, 2), (16, 8, 1), (32, 4, 1), (64, 2, 1), (128, 1, 1)]
)
def test_dev_draws_what_is_published_on_8_ranks_and_less_on_more(ranks, drawn, steps):
    config = build_config(PRESETS["dev"]())
    train = config.for_world(ranks).train
    assert (train.drawn_per_rank, train.micro_batch_size) == (drawn, drawn)
    assert accumulation_steps(config, ranks) == steps
    cut = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": 2})})
    assert cut.for_world(ranks).train.drawn_per_rank == drawn  # whatever the micro-batch
    assert accumulation_steps(cut, ranks) == 128 // ranks // min(2, drawn)


def test_batch_that_does_not_divide_is_refused_with_what_would():
    config = build_config(PRESETS["dev"]())
    assert accumulation_steps(config, 4) == 4
    with pytest.raises(UserError, match=r"128 is not a multiple of 24 .*set it to 120 or 144"):
        accumulation_steps(config, 3)
