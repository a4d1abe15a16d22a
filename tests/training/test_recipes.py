"""Stages other than the published ones: what a dry run counts and shows, for any combination."""

import copy
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from megaflux.common.errors import UserError
from megaflux.config.parse import build_config, load_yaml, merge
from megaflux.config.presets import PRESETS
from megaflux.config.recipe import PARTS
from megaflux.config.schema import Config
from megaflux.models.pretrained import meta_models
from megaflux.training.planning import costs, memory
from megaflux.training.planning.dry_run import dry_run
from megaflux.training.planning.estimate import Estimate, estimate
from megaflux.training.planning.gpus import Assumed
from megaflux.training.planning.sizes import Sizes
from megaflux.training.stages import trainable_names
from tests.training.runs import ds_config, launch_faulty, make_dataset, small_config, write_config

ROOT = Path(__file__).parents[2]
DS_CONFIGS = {name: json.loads((ROOT / f"ds_configs/{name}.json").read_text()) for name in ("zero2", "zero3")}


@lru_cache(maxsize=1)
def dev_values() -> dict[str, Any]:
    return PRESETS["dev"]()


def with_stages(preset: str, *stages: dict[str, Any], **sections: dict[str, Any]):
    values = copy.deepcopy(PRESETS[preset]())
    values["stages"] = [{"name": f"s{i}", "share": 1} | stage for i, stage in enumerate(stages)]
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return build_config(values)


def test_stages_that_train_nothing_of_flux_count_as_published():
    both = {"blocks": "none", "vlm_layers": 2}
    table = {"flux": 0, "connector": 14_684_160}
    for stage, vlm in (({"blocks": "none", "vlm_layers": 0}, 0), (both, 466_115_584)):
        config = with_stages("dev", stage)
        module, trunk = meta_models(config)
        (row,) = costs.stage_table(config, module)
        assert row.trainable == table | {"vlm": vlm}
        assert len(module.vlm.layers) == stage["vlm_layers"] == 28 - len(trunk.language_model.layers)
        sizes = Sizes(config, DS_CONFIGS["zero2"], 8, module, trunk)
        found = memory.stage_memory(sizes, config.stages[0], sizes.buckets[0])
        assert found.optimizer == 16 * (14_684_160 + vlm) // 8
    cut = with_stages(
        "dev", {"blocks": "none", "vlm_layers": 0}, both
    )  # two layers are apart, and the first stage trains none
    assert [row.trainable["vlm"] for row in costs.stage_table(cut, meta_models(cut)[0])] == [0, 466_115_584]


def test_the_table_of_stages_stays_readable(capsys):
    stages = (
        {"name": "connector", "blocks": "none", "vlm_layers": 0, "lr": {"connector": 1e-3}},
        {"name": "a-name-that-is-long", "blocks": [0, 3], "components": ["attn.to_q", "norm1.linear"], "vlm_layers": 0},
        {"name": "c", "blocks": "all", "components": "image_branch", "weight_decay": 0, "lr": 1e-6},
    )
    optim = {"lr": {"flux": 1e-6, "connector": 1e-5, "vlm": 1e-5}}
    dry_run(with_stages("tiny", *stages, optim=optim), DS_CONFIGS["zero2"], 1)
    out = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(out) if line.startswith("stage  "))
    cut = [" ".join(line.split()) for line in out[start : start + 12]]
    assert cut[1].split()[:5] == ["connector", *cut[1].split()[1:2], "none", "0", cut[1].split()[4]]
    assert cut[2:4] == ["blocks: none", "lr: 0.001; weight decay: 0.1"]
    assert cut[4].split()[2:4] == ["a", "list"]
    assert cut[5:8] == [
        "blocks: 0 3",
        "components: attn.to_q, norm1.linear",
        "lr: flux 1e-06, connector 1e-05; weight decay: 0.1",
    ]
    assert cut[8].split()[2] == "image_branch"
    assert cut[9:11] == ["blocks: all", "lr: 1e-06; weight decay: 0"]
    assert len({len(line) for line in out[start : start + 12] if line.endswith((" T", " G", " M", "FLOP/image"))}) == 1


LISTED = ("attn.to_q", "attn.to_[kv]", r"norm1?\.linear", r"ff\..+", "proj_out", "context_embedder.bias", "nothing")


@pytest.mark.parametrize("seed", range(8))
def test_a_dry_run_of_any_stages_ends_with_an_answer(seed, tmp_path):
    draw = random.Random(seed)

    def stage() -> dict[str, Any]:
        components = ("attention", "block", "model", "image_branch", "norms", draw.sample(LISTED, draw.choice([1, 2])))
        return {
            "blocks": draw.choice(["all", "none", [0], [3], [5, 2, 0]]),
            "components": draw.choice(components),
            "connector": draw.random() < 0.5,
            "vlm_layers": draw.choice([0, 1, 2]),
            "lr": draw.choice([None, 1e-5, {"vlm": 1e-3, "connector": 1e-4}]),
        }

    answers = 0
    for _ in range(4):
        kernels, policy = draw.choice(["on", "off"]), draw.choice(["auto", "none", "mlp", "full"])
        model = {"kernels": kernels, "activation_checkpointing": policy}
        model |= {"vlm_layers": draw.choice([None, 2])}
        try:
            config = with_stages(
                "tiny", *(stage() for _ in range(draw.choice([1, 3]))), model=PRESETS["tiny"]()["model"] | model
            )
        except UserError:
            continue
        gpu = Assumed("h100", memory_gb=draw.choice([None, 3]))
        code = dry_run(config, DS_CONFIGS[draw.choice(list(DS_CONFIGS))], draw.choice([1, 2]), str(tmp_path / "j"), gpu)
        problems = json.loads((tmp_path / "j").read_text())["problems"]
        assert code == (2 if problems else 0)
        answers += 1
    assert answers


# --- the recipes that are shipped ---

RECIPES = ("published", "connector-first", "image-branch", "all-of-flux", "frozen-qwen")
SLOW = ("published", "image-branch", "all-of-flux")
"""Whose real runs cover what others' cover too."""


def recipe(name: str) -> dict[str, Any]:
    return load_yaml(str(ROOT / f"recipes/{name}.yaml"))


def configured(name: str) -> Config:
    return build_config(merge(dev_values(), recipe(name)))


@lru_cache(maxsize=1)
def estimates() -> dict[str, Estimate]:
    """Of each recipe, as `--preset dev --config recipes/NAME.yaml --dry-run --world-size 8 --gpu a100` makes them."""
    found = {}
    for name in RECIPES:
        sizes = Sizes.of(configured(name), DS_CONFIGS["zero2"], 8)
        found[name] = estimate(sizes, Assumed("a100"), True)
    return found


def recipe_row(name: str) -> str:
    """A recipe's row of docs/recipes.md."""
    found = estimates()[name]
    counts = [max(row.trainable[part] for row in found.table) for part in PARTS]
    at_one = max(line.choice.bytes for line in found.lines if line.choice.micro_batch_size == 1 and not line.cache)
    cells = [
        f"[{name}](../recipes/{name}.yaml)",
        *(f"{count:,}" for count in counts),
        f"{found.memory.total / 1e9:.1f}",
        f"{at_one / 1e9:.1f}",
        f"{found.seconds / 86400:.1f}",
        f"{max(found.checkpoints) / 1e9:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_table_in_the_docs_is_the_dry_runs():
    rows = [line for line in (ROOT / "docs/recipes.md").read_text().splitlines() if line.startswith("| [")]
    assert rows == [recipe_row(name) for name in RECIPES]
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == set(RECIPES)


def test_the_published_recipe_is_the_preset_and_the_others_name_what_differs():
    assert configured("published") == build_config(dev_values())
    for name in RECIPES:
        assert set(recipe(name)) <= {"stages", "optim", "flow"}
        assert configured(name).model.vlm_layers is None
    first, then = configured("connector-first").stages
    assert first.trained[0] == "none"
    peaks = configured("connector-first").optim.peaks
    assert (peaks(first)["connector"].lr, peaks(then)["connector"].lr, peaks(then)["flux"].lr) == (1e-3, 1e-6, 1e-6)
    assert configured("connector-first").vlm_layers == configured("frozen-qwen").vlm_layers == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_gpus_that_its_row_is_for(name):
    found = estimates()[name]
    assert found.memory_problem(True) is None
    assert all(choice.fits for choice in found.chosen)


# --- the recipes run, small ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), 12)


def mapped(name: str) -> dict[str, Any]:
    """A recipe for a FLUX of one double and one single block: the published lists overlap, and each leaves some out."""
    values = recipe(name)
    for stage, blocks in zip(values["stages"], ([0], [0, 1], [1])):
        if isinstance(stage["blocks"], list):
            stage["blocks"] = blocks
    return values


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
)
def test_a_recipe_trains_what_it_names_and_nothing_else(name, tmp_path, data, published):
    """Every parameter's bytes at the beginning and end of each stage of a real run of few updates."""
    values = small_config(data, tmp_path / "run", **mapped(name))
    updates = 2 * len(values["stages"])
    values["model"] = {"flux": str(published["flux"]), "vlm": str(published["qwen"])}
    values["train"] |= {"updates": updates, "checkpoint_every": updates}
    config = write_config(values, tmp_path / "config.yaml")
    done = launch_faulty(
        "--deepspeed",
        ds_config(tmp_path, "fp32"),
        "--config",
        config,
        fault="none:0",
        ranks=1,
        DIGESTS=tmp_path / "digests",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "digests").read_text().splitlines()]
    assert [(line["when"], line["stage"]) for line in lines] == [
        (when, stage) for stage in range(len(values["stages"])) for when in ("begin", "end")
    ]
    resolved = build_config(merge(PRESETS["tiny"](), values))
    module = meta_models(resolved)[0]
    assert len(module.vlm.layers) == resolved.vlm_layers
    for begun, ended in zip(lines[::2], lines[1::2], strict=True):
        named = set(trainable_names(module, resolved.stages[begun["stage"]]))
        changed = {name for name, digest in begun["sha256"].items() if ended["sha256"][name] != digest}
        assert set(begun["trains"]) == named and set(begun["sha256"]) == {n for n, _ in module.named_parameters()}
        assert changed == named
    if len(lines) > 2:  # between stages nothing moves
        assert lines[1]["sha256"] == lines[2]["sha256"]
