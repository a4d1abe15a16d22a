"""Three stages whose gradients are known, against optimizers that nothing interrupts: what the change of engine carries.

torchrun --nproc_per_node N tests/training/carry_worker.py DS_CONFIG [by_part]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megaflux.config.parse import build_config, merge
from megaflux.config.presets import tiny
from megaflux.config.schema import Config
from megaflux.training import distributed
from megaflux.training.engine import StageEngine
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
    values["optim"] = {"lr": 0.01, "max_grad_norm": 0, **optim}
    return build_config(merge(tiny(), values))


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
    module, reference = Toy(), Toy().to(dtype).float()
    # The reference never changes its optimizer: one AdamW per parameter, stepped while its stage lists it; a parameter
    # that a stage leaves out starts afresh, from the weight it was left with, when it comes back.
    expected = dict(reference.named_parameters())
    optimizers: dict[str, torch.optim.AdamW] = {}
    carried, update = None, 0
    for stage in range(3):
        engine = StageEngine(module, config, ds_config, stage, world.size, carried)
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
            update += 1
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

            carried = engine.carry(set(trainable_names(module, config.stages[stage + 1])))
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
