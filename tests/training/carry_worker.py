"""Three stages whose gradients are known, against optimizers that nothing interrupts: what the change of engine carries, with the
average of the weights, and the share of large gradient values. One update is dropped.

torchrun --nproc_per_node N tests/training/carry_worker.py DS_CONFIG [by_part]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megaflux.common.ranks import gathered
from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.config.schema import Config
from megaflux.training import distributed
from megaflux.training.average import WeightAverage
from megaflux.training.engine import StageEngine
from megaflux.training.survival.guard import NOT_FINITE, Drop
from tests.training.runs import small_config


class Toy(nn.Module):
    """Parameters under Qwen2VLFlux's names, with a gradient that we choose: loss = sum over parameters of <p, g>."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vlm, self.transformer = nn.Module(), nn.Module()
        self.vlm.layers = nn.ModuleList([nn.Linear(3, 5)])
        self.vlm.norm = nn.LayerNorm(3, bias=False)
        self.connector = nn.Linear(3, 4)
        t = self.transformer
        t.context_embedder, t.x_embedder = nn.Linear(4, 3), nn.Linear(2, 3)
        t.transformer_blocks, t.single_transformer_blocks = nn.ModuleList(), nn.ModuleList()
        for blocks, count in ((t.transformer_blocks, 1), (t.single_transformer_blocks, 2)):
            for _ in range(count):
                block = nn.Module()
                block.attn = nn.Module()
                block.attn.to_q = nn.Linear(3, 7)
                blocks.append(block)

    def forward(self, update: int) -> torch.Tensor:
        return sum((p * gradient(name, p, update)).sum() for name, p in self.named_parameters() if p.requires_grad)


def gradient(name: str, p: torch.Tensor, update: int) -> torch.Tensor:
    return torch.randn(p.shape, generator=distributed.generator_for(name, update))


def in_dtype(name: str, p: torch.Tensor, update: int, dtype: torch.dtype) -> np.ndarray:
    """The gradient as the module has it: rounded to its dtype."""
    return gradient(name, p, update).to(dtype).float().numpy()


def toy_config(**optim) -> Config:
    values = small_config(
        None,
        None,
        run__dir="unused",
        data__path="unused",
        stages=[
            {"name": "one", "share": 1, "blocks": [0, 1]},
            {"name": "two", "share": 1, "blocks": [1, 2]},
            {"name": "three", "share": 1, "blocks": [0, 2]},
        ],
    )
    values["train"] |= {"updates": 12, "global_batch_size": 2, "micro_batch_size": None}
    values["optim"] = {"lr": 0.01, "max_grad_norm": 0, "large_gradient": 0.5, **optim}
    return build_config(merge(tiny(), values))


DECAY = 0.4  # which (1 + n) / (10 + n) reaches after the first update of the second stage
DROPPED = 5  # an update of the second stage
BY_PART = {
    "lr": {"flux": 0.01, "connector": 0.03, "vlm": 0.002},
    "weight_decay": {"flux": 0.1, "connector": 0.0, "vlm": 0.2},
}
STAGES: list[dict[str, Any]] = [
    {},
    {"lr": {"connector": 0.05}, "weight_decay": 0.3, "vlm_layers": 0},  # the Qwen layer starts afresh after it
    {"lr": 0.004, "weight_decay": {"vlm": 0.0}},
]


def values_of(stage: int, part: str) -> tuple[float, float]:
    """(peak rate, weight decay) of a part in a stage with BY_PART and STAGES, by hand."""
    found = []
    for key, whole in BY_PART.items():
        own = STAGES[stage].get(key, {})
        found.append(own.get(part, whole[part]) if isinstance(own, dict) else own)
    return found[0], found[1]


def main(path: str, by_part: str = "") -> None:
    world = distributed.start()
    ds_config = json.loads(Path(path).read_text())
    dtype = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32
    config = toy_config(weight_decay=0.1).for_world(world.size)
    if by_part:
        values = toy_config(**BY_PART).model_dump()
        values["stages"] = [stage | own for stage, own in zip(values["stages"], STAGES, strict=True)]
        config = build_config(values).for_world(world.size)
    module, reference, ever = Toy(), Toy().to(dtype).float(), set()
    # The reference never changes its optimizer: one AdamW per parameter, stepped while its stage lists it; a parameter
    # that a stage leaves out starts afresh, from the weight it was left with, when it comes back.
    expected = dict(reference.named_parameters())
    optimizers: dict[str, torch.optim.AdamW] = {}
    carried, update, taken = None, 0, 0
    average, averages = WeightAverage(DECAY, world), {name: p.detach().double() for name, p in expected.items()}

    def judge(norm: float, large_share: float) -> Drop | None:
        return NOT_FINITE if update == DROPPED else None

    for stage in range(3):
        engine = StageEngine(module, config, ds_config, stage, world.size, carried, judge)
        average.begin_stage(engine)
        names = set(engine.first_stage)
        optimizers = {name: optimizer for name, optimizer in optimizers.items() if name in names}
        for name in names - set(optimizers):
            expected[name].data = expected[name].data.to(dtype).float()
            optimizers[name] = torch.optim.AdamW(
                [expected[name]], betas=config.optim.betas, eps=config.optim.eps, weight_decay=0.1, fused=True
            )
        for _ in range(4):
            rates = engine.set_learning_rates(update)
            engine.backward(engine(update))
            engine.step()
            average.follow(engine)
            values = np.concatenate(
                [in_dtype(name, p, update, dtype).flatten() for name, p in expected.items() if name in names]
            )
            assert engine.large_gradient_share == np.mean(np.abs(values) > np.float32(config.optim.large_gradient))
            assert 0.1 < engine.large_gradient_share < 0.9
            assert bool(engine.dropped) == (update == DROPPED)
            if update == DROPPED:
                update += 1
                continue
            taken += 1
            for name, optimizer in optimizers.items():
                expected[name].grad = gradient(name, expected[name], update).to(dtype).float()
                part = {"c": "connector", "v": "vlm"}.get(name[0], "flux")
                peak, decay = values_of(stage, part) if by_part else (0.01, 0.1)
                rate = peak * min(
                    1, (12 - update) / 6
                )  # tiny's: no warm-up, as round(12 x 0.03) is 0, and a plateau of half
                assert abs(rates[part] - rate) < 1e-12
                optimizer.param_groups[0] |= {"lr": rate, "weight_decay": decay}
                optimizer.step()
                d = min(DECAY, (1 + taken) / (10 + taken))
                averages[name] = d * averages[name] + (1 - d) * expected[name].detach().double()
            update += 1
        assert average.updates == taken
        found = average.gather_share(engine)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), averages[name], rtol=1e-4, atol=1e-5, msg=f"average {name}")
        shares = [name for of_rank in gathered(list(found), world) for name in of_rank]
        ever |= names
        assert sorted(shares) == sorted(ever)  # each on one rank
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        with average.in_place_of_weights(engine):
            for name, p in module.named_parameters():
                wanted = averages[name].to(dtype) if name in ever else before[name]
                tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.008, "atol": 1e-5}
                torch.testing.assert_close(p.detach(), wanted, **tolerance, msg=f"in place {name}")
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
        everything = engine.carry(names)
        assert set(everything.tensors) == names
        for name in names:
            state = optimizers[name].state[expected[name]]
            wanted = {"master": expected[name].detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            for key, tensor in wanted.items():
                torch.testing.assert_close(
                    everything.tensors[name][key], tensor, rtol=1e-5, atol=1e-7, msg=f"{name} {key}"
                )
        if stage < 2:
            from megaflux.training.stages import trainable_names

            going_on = set(trainable_names(module, config.stages[stage + 1]))
            carried = engine.carry(going_on)
            average.leave_stage(engine)
            assert carried.tensors.keys() == names & set(trainable_names(module, config.stages[stage + 1]))
        engine.close()
    fresh = dict(Toy().to(dtype).named_parameters())
    never = [name for name in fresh if "x_embedder" in name or "vlm.norm" in name]
    assert never
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad  # the hooks left nothing behind
        assert name not in never or torch.equal(parameter, fresh[name])
    print("carried as expected", flush=True)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
