"""Validation: the loss of held-out pictures under their own condition and under another picture's, and their gap."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from megaflux.common.errors import UserError
from megaflux.common.ranks import World
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.data.buckets import Bucket
from megaflux.data.storage.shards import read_split
from megaflux.data.tensors import from_image
from megaflux.models import latents as latent_ops
from megaflux.models.pretrained import load_models
from megaflux.training import validation
from megaflux.training.distributed import generator_for
from megaflux.training.prepare_data import prepare_data
from megaflux.training.validation import References, validation_loss
from tests.conftest import picture
from tests.stand_in_gpu import GPU, StandInGpu
from tests.training.runs import make_dataset, small_config

CPU = torch.device("cpu")
WIDE = Bucket("2:1", 64, 32)
TRAINED_AT = 1.5
TIMES = [0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("validation"), images=32)


@pytest.fixture(scope="module")
def config(data):
    values = small_config(data, data.parent / "run", run__seed=11, validation__samples=3, flow__guidance=[1.0, 2.0])
    return build_config(merge(tiny(), values)).for_world(1)


@pytest.fixture(scope="module")
def models(config):
    """Read only."""
    return load_models(config)


def references(models, count: int = 5) -> References:
    """Pictures whose condition is their number, everywhere."""
    latents = torch.randn(count, 8, 4, 8, generator=torch.Generator().manual_seed(0))
    tokens = models.trunk.encode(torch.zeros(1, 3, 32, 64, dtype=torch.uint8)).hidden_states
    hidden_states = torch.arange(float(count))[:, None, None].expand(count, *tokens.shape[1:])
    pixel_values = torch.zeros(count, 3, 32, 64, dtype=torch.uint8)
    conditions = models.trunk.from_cache(hidden_states, 32, 64)
    return References([f"picture {i}" for i in range(count)], pixel_values, latents, conditions, WIDE, [""] * count)


class Reader:
    """A model whose velocity is x_t t + the number of the picture that its condition shows + what guidance is above training's.
    It notes which picture was given with which condition: {(picture, t): conditions}."""

    def __init__(self, shown: References, seed: int):
        self.latents = latent_ops.pack(shown.latents)
        draws = [torch.randn(8, 4, 8, generator=generator_for(seed, "validation", key)) for key in shown.keys]
        self.noise = latent_ops.pack(torch.stack(draws))  # a function of seed and picture, of no update
        self.calls = 0
        self.conditions: dict[tuple[int, float], list[int]] = {}

    def __call__(self, condition, x, t, ids, pooled, guidance):
        self.calls += 1
        above = guidance - TRAINED_AT
        assert set(guidance.tolist()) in ({TRAINED_AT}, {3.5})
        sources = condition.hidden_states[:, 0, 0]
        for x_t, time, source in zip(x, t, sources, strict=True):
            path = (1 - time) * self.latents + time * self.noise
            distances = (path - x_t).abs().amax((1, 2))
            picture = int(distances.argmin())
            assert distances[picture] < 1e-5  # each picture goes with its own noise, at the time that the model is told
            self.conditions.setdefault((picture, time.item()), []).append(int(source))
        return x * t[:, None, None] + (sources + above)[:, None, None]

    def losses(self, sources: list[float]) -> list[float]:
        """By time: the mean over all pictures, in float64, if picture i is shown sources[i]."""
        x, n = self.latents.double(), self.noise.double()
        number = torch.tensor(sources)[:, None, None]
        return [(((1 - t) * x + t * n) * t + number - (n - x)).square().mean().item() for t in TIMES]


@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (1, 5), (2, 5), (4, 5)])
def test_the_gap_compares_a_pictures_own_condition_with_another_pictures(config, models, monkeypatch, ranks, count):
    shown = references(models, count)
    model, total, calls, batches = Reader(shown, config.run.seed), 0.0, [], []

    def add(sums, world):
        """The sum over the ranks, complete at the last of them."""
        nonlocal total
        total = total + sums
        return total

    if ranks > 1:
        monkeypatch.setattr(validation, "sum_over_ranks", add)
    for rank in range(ranks):
        before, moved = model.calls, []
        world = World(rank, ranks, CPU)
        found = validation_loss(model, config, models, shown, world, lambda moved=moved: moved.append(1))
        calls.append(model.calls - before)
        batches.append(len(moved))
    share = -(-count // ranks)  # the last ranks repeat a picture
    assert calls == [24 * -(-share // 2)] * ranks  # under ZeRO-3 they must call the model equally often
    assert batches == [-(-share // 2)] * ranks  # signs of life, at most a micro-batch of two apart

    assert sorted(model.conditions) == [(picture, t) for picture in range(count) for t in TIMES]
    assert all(picture in sources for (picture, _), sources in model.conditions.items())
    others = [set(model.conditions[picture, TIMES[0]]) - {picture} for picture in range(count)]
    assert all(set(sources) - {picture} == others[picture] for (picture, _), sources in model.conditions.items())
    assert [len(other) for other in others] == [1] * count  # one other picture's
    shuffled = [other for (other,) in others]
    assert sorted(shuffled) == list(range(count))  # and a different one's for each

    expected = {"loss": model.losses(list(range(count))), "shuffled": model.losses(shuffled)}
    for name, by_time in expected.items():
        assert [found[f"{name}_t{j}"] for j in range(8)] == pytest.approx(by_time, rel=1e-5)
        assert found[name] == pytest.approx(sum(by_time) / 8, rel=1e-5)
    assert found["gap"] == pytest.approx(sum(expected["shuffled"]) / sum(expected["loss"]) - 1, rel=1e-4)
    assert len(found) == 4 + 16
    # A model's guidance value is no matter of the data: its own loss at generation's.
    at_generations = model.losses([picture + 3.5 - TRAINED_AT for picture in range(count)])
    assert found["loss_guidance_3.5"] == pytest.approx(sum(at_generations) / 8, rel=1e-5)


def test_one_reference_has_no_gap(config, models):
    """There is no other picture's condition: 0.0 would say that the reference is not used."""
    shown = references(models, 1)
    model = Reader(shown, config.run.seed)
    found = validation_loss(model, config, models, shown, World(0, 1, CPU))
    assert sorted(found) == ["loss", "loss_guidance_3.5", *(f"loss_t{j}" for j in range(8))]
    assert found["loss"] == pytest.approx(sum(model.losses([0])) / 8, rel=1e-5)
    assert model.calls == 16


def test_a_run_that_trains_at_generations_guidance_computes_its_loss_once(config, models):
    shown = references(models, 2)
    model = Reader(shown, config.run.seed)
    at = config.model_copy(
        update={"flow": config.flow.model_copy(update={"guidance": (2.0, 5.0)})}
    )  # 3.5 is the middle
    found = validation_loss(model, at, models, shown, World(0, 1, CPU))
    assert found["loss_guidance_3.5"] == found["loss"] and model.calls == 16


def test_on_a_gpu_all_that_a_model_is_given_lies_there_and_what_ranks_sum(config, monkeypatch):
    models, summed = load_models(config), []
    monkeypatch.setattr(validation, "sum_over_ranks", lambda x, world: summed.append((x.device, x.dtype)) or x)

    def model(condition, x, t, *rest):
        return x * t[:, None, None] + condition.hidden_states.mean((1, 2))[:, None, None]

    def run(device):
        return validation_loss(model, config, models, validation.load_references(config, models), World(0, 1, device))

    expected = run(CPU)
    with StandInGpu() as gpu:
        for module in (models.trainable, models.trunk.vlm, models.vae):
            gpu.put(module)
        models.pooled_projections = gpu.on_gpu(models.pooled_projections)
        found = run(GPU)
    assert gpu.mixed == []
    assert summed == [(CPU, torch.float64), (GPU, torch.float64)]  # NCCL sums nothing on a host
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_references_are_the_first_by_hash_of_the_validation_bucket(config, models, data):
    """The same pictures in every run over the data, each with what belongs to it."""
    square = Bucket("1:1", 64, 64)
    found = validation.load_references(config, models)
    stored = {row["key"]: from_image(row["image"]) for row in read_split(data, "held_out", square)}
    in_order = sorted(stored, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert len(in_order) > 3 and found.keys == in_order[:3] and found.bucket == square
    for i, key in enumerate(found.keys):
        picture = stored[key][None]
        assert torch.equal(found.pixel_values[i], picture[0])
        torch.testing.assert_close(found.latents[i], latent_ops.encode(models.vae, picture)[0], rtol=1e-4, atol=1e-5)
        hidden_states = models.trunk.encode(picture).hidden_states[0]
        torch.testing.assert_close(found.conditions.hidden_states[i], hidden_states, rtol=1e-4, atol=1e-5)
    condition = found.condition(models, [2, 0])
    assert torch.equal(condition.hidden_states, found.conditions.hidden_states[[2, 0]])
    encoded = models.trunk.encode(found.pixel_values[[2, 0]])
    assert torch.equal(condition.select, encoded.select)


def test_data_without_held_out_pictures_are_refused_with_the_remedy(config, models, data, tmp_path):
    info = json.loads((data / "dataset.json").read_text())
    del info["counts"]["held_out"]
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    without = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(UserError, match="no held-out pictures; prepare the data again with a larger --held-out"):
        validation.load_references(without, models)


def test_data_that_a_run_prepares_itself_are_judged_before_any_network_is_loaded(config, tmp_path, caplog):
    """The dry run cannot see them: they are not there yet."""
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        picture(64, 64, number).save(tmp_path / "pictures" / f"{number}.png")
    changes = {"path": str(tmp_path / "data"), "source": str(tmp_path / "pictures")}
    config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    with pytest.raises(UserError, match=r"has no held-out pictures \(--held-out 0.01\), which validation needs"):
        prepare_data(config, World(0, 1, CPU))
    info = json.loads((tmp_path / "data/dataset.json").read_text())
    info["counts"]["held_out"] = info["counts"]["train"] | {"1:1": 2}
    (tmp_path / "data/dataset.json").write_text(json.dumps(info))
    prepare_data(config, World(0, 1, CPU))
    assert "2 held-out pictures of the shape that validation uses; its figures depend on them" in caplog.text
