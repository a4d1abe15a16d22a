"""DeepSpeed's file: what is refused, in one line, and what is filled in."""

import json
from pathlib import Path

import pytest
import torch

from megaflux.config import build_config
from megaflux.errors import UserError
from megaflux.models.pretrained import meta_models
from megaflux.presets import PRESETS
from megaflux.training.ds_config import (
    BUCKET_ELEMENTS,
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
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
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
    assert resolved["zero_optimization"] == {"stage": 2, "reduce_bucket_size": BUCKET_ELEMENTS}
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}, "timers": {"throughput": {"enabled": True}}}
    resolved = resolve_ds_config(own, config, 8)
    assert resolved["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1_000_000}
    assert resolved["timers"] == own["timers"]


def test_a_bucket_holds_the_largest_parameter_that_dev_trains():
    config = build_config(PRESETS["dev"]())
    module, _ = meta_models(config)
    parameters = dict(module.named_parameters())
    for stage in config.stages:
        largest = max(parameters[name].numel() for name in trainable_names(module, stage))
        assert BUCKET_ELEMENTS / 8 < largest <= BUCKET_ELEMENTS


def test_the_given_dict_is_left_alone():
    given = {"zero_optimization": {"stage": 2}}
    resolve_ds_config(given, build_config(PRESETS["dev"]()), 4)
    assert given == {"zero_optimization": {"stage": 2}}


def test_every_suggested_batch_size_works():
    """For any sizes: the message's suggestions divide, and no message means that the sizes do."""
    for total in (1, 7, 32, 100, 128):
        for micro in (1, 2, 3, 8, 50):
            for ranks in (1, 2, 3, 8):
                problem = batch_problem(total, micro, ranks)
                assert (problem is None) == (total % (micro * ranks) == 0)
                if problem:
                    advice = problem.partition("set it to ")[2]
                    totals, _, micros = advice.partition(", or train.micro_batch_size to ")
                    assert all(batch_problem(int(t), micro, ranks) is None for t in totals.split(" or "))
                    assert all(batch_problem(total, int(m), ranks) is None for m in micros.split(" or ") if m)


def test_batch_that_does_not_divide_is_refused_with_what_would():
    config = build_config(PRESETS["dev"]())
    assert accumulation_steps(config, 4) == 4
    with pytest.raises(UserError, match=r"128 is not a multiple of 24 .*set it to 120 or 144"):
        accumulation_steps(config, 3)
