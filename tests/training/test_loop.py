"""One update, put together: each part is given the update's number, the sample's key and the drawn batch's index."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.config.parse import build_config
from megaflux.data.batches import Batch
from megaflux.data.buckets import Bucket
from megaflux.models.pretrained import load_models
from megaflux.training import loop, objective
from megaflux.training.average import WeightAverage
from megaflux.training.engine import StageEngine
from megaflux.training.schedule import learning_rate
from megaflux.training.trainer import Trainer
from tests.conftest import small_values
from tests.training.runs import ds_config

SQUARE = Bucket("1:1", 32, 32)
UPDATES = 3


@pytest.mark.usefixtures("process_group")
def test_an_update_trains_on_what_is_drawn_for_it_alone(tmp_path, monkeypatch):
    """The same two pictures in every micro-batch of every update. A fresh model answers 0, and at this learning rate it goes
    on to, so a loss tells the noise and latents that went in: the mean of (noise - latents)^2."""
    values = small_values()
    values["run"] = {"dir": str(tmp_path), "seed": 3}
    values["data"] |= {"sample_posterior": True, "condition": {"image": 0.5, "text": 0.5}}
    values["train"] |= {"global_batch_size": 4, "micro_batch_size": 2}
    values["optim"] = {"lr": 1e-30}
    config = build_config(values).for_world(1)
    models = load_models(config)
    kinds, encode = [], models.trunk.encode
    monkeypatch.setattr(models.trunk, "encode", lambda *given: kinds.append(given[2]) or encode(*given))
    picture = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = Batch(["a", "b"], ["one", "two"], SQUARE, picture.expand(2, -1, -1, -1), None, None)

    trainer = Trainer.__new__(Trainer)
    trainer.run = SimpleNamespace(
        config=config, world=World(0, 1, torch.device("cpu")), plan=SimpleNamespace(micro_batch_size=2)
    )
    trainer.loader, trainer.batches = SimpleNamespace(drawn_together=2), iter([batch] * (2 * UPDATES))
    trainer.models, trainer.average = models, WeightAverage(0.0, trainer.run.world)
    trainer.engine = StageEngine(models.trainable, config, json.loads(ds_config(tmp_path, "fp32").read_text()), 0, 1)
    found = []
    for trainer.updates_done in range(UPDATES):
        found.append(loop.update(trainer))
    trainer.engine.close()

    times, losses = [], []
    for update, result in enumerate(found):
        assert result.learning_rate == learning_rate(config.optim.lr, update, config.train.updates, config.optim)
        assert result.keys == ["a", "b"] * 2 and result.drop is None and result.grad_norm > 0
        latents, seen = objective.encode_latents(config, models, batch, update), Counter()
        for micro in result.micro_batches:  # the second one meets the same pictures again, and draws anew
            t, noise = objective.draw_time_and_noise(
                config.flow, 3, update, objective.count_up(batch.keys, seen), latents
            )
            assert torch.equal(micro.t, t)
            torch.testing.assert_close(micro.losses, (noise - latents).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
            times += micro.t.tolist()
            losses += micro.losses.tolist()
    assert len(set(times)) == len(set(losses)) == 4 * UPDATES
    drawn = [objective.draw_kind(config.data.condition, 3, u, index) for u in range(UPDATES) for index in range(2)]
    assert kinds == drawn and len(set(drawn)) == 2
