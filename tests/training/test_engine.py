"""Engines: what several ranks compute, and what one stage hands to the next."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from megaflux.config import build_config, merge
from megaflux.presets import tiny
from megaflux.training import distributed
from megaflux.training.engine import StageEngine
from megaflux.training.optim import learning_rate
from tests.training.runs import ROOT, ds_config, environment, free_port, small_config

WORKER = str(ROOT / "tests" / "training" / "parity_worker.py")


def run_worker(out: Path, ds: Path, *nodes: list[str]) -> dict:
    env = environment() | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(["torchrun", *options, WORKER, str(out), str(ds)], env=env, cwd=ROOT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for options in nodes
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    port = ["--master_port", str(free_port())]
    return run_worker(folder / "out.pt", ds_config(folder, "fp32"), ["--nproc_per_node", "1", *port])


@pytest.mark.parametrize("layout", ["two ranks", "two nodes of one rank"])
def test_two_ranks_compute_what_one_does(tmp_path, one_process, layout):
    port = str(free_port())
    if layout == "two ranks":
        nodes = [["--nproc_per_node", "2", "--master_port", port]]
    else:
        nodes = [["--nnodes", "2", "--node_rank", str(n), "--nproc_per_node", "1", "--master_addr", "127.0.0.1",
                  "--master_port", port] for n in (0, 1)]  # fmt: skip
    two = run_worker(tmp_path / "out.pt", ds_config(tmp_path, "fp32"), *nodes)
    assert (one_process["size"], two["size"]) == (1, 2)
    assert two["gradients"].keys() == one_process["gradients"].keys()
    for name, expected in one_process["gradients"].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(two["gradients"][name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert two["norm"] == pytest.approx(one_process["norm"], rel=1e-4)
    # Adam's first step is lr * sign(gradient). Where a gradient is zero but for rounding (a key's bias: softmax does
    # not see it) that sign is chance, so those entries are left out.
    largest = max(g.abs().max() for g in one_process["gradients"].values())
    for name, gradient_ in one_process["gradients"].items():
        counts = gradient_.abs() > 1e-6 * largest
        torch.testing.assert_close(two["weights"][name][counts], one_process["weights"][name][counts])


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


@pytest.fixture(scope="module", autouse=True)
def process_group():
    import os

    found = dict(os.environ)
    distributed.start()
    yield
    distributed.stop()
    os.environ.clear()
    os.environ.update(found)


def toy_config(**optim):
    values = small_config(None, None, run__dir="unused", data__path="unused", stages=[
        {"name": "one", "share": 1, "blocks": [0, 1]},
        {"name": "two", "share": 1, "blocks": [1, 2]},
        {"name": "three", "share": 1, "blocks": [0, 2]},
    ])  # fmt: skip
    values["train"] |= {"updates": 12, "global_batch_size": 1, "micro_batch_size": 1}
    values["optim"] = {"lr": 0.01, "max_grad_norm": 0, **optim}
    return build_config(merge(tiny(), values))


def test_survivors_of_a_stage_change_go_on_as_if_nothing_had_happened(tmp_path):
    config = toy_config(weight_decay=0.1)
    ds = json.loads(ds_config(tmp_path, "fp32").read_text())
    module, reference = Toy(), Toy()
    # The reference never changes its optimizer: one AdamW per parameter, stepped while its stage lists it; a parameter
    # that a stage leaves out starts afresh when it comes back.
    expected = dict(reference.named_parameters())
    optimizers: dict[str, torch.optim.AdamW] = {}
    carried, update = None, 0
    for stage in range(3):
        engine = StageEngine(module, config, ds, stage, 1, carried)
        names = set(engine.first_stage)
        optimizers = {n: o for n, o in optimizers.items() if n in names}
        for name in names:
            if name not in optimizers:
                optimizers[name] = torch.optim.AdamW([expected[name]], betas=config.optim.betas, eps=config.optim.eps,
                                                     weight_decay=0.1, fused=True)  # fmt: skip
        for _ in range(4):
            rate = engine.set_learning_rate(update)
            engine.backward(engine(update))
            engine.step()
            for name, optimizer in optimizers.items():
                expected[name].grad = gradient(name, expected[name], update)
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            update += 1
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-6, atol=1e-7, msg=name)
        if stage < 2:
            following = {n for n in names if n.startswith(("vlm.layers", "connector", "transformer.context"))}
            following |= {n for n in names if f"blocks.{0 if stage == 0 else 1}." in n and "single" in n}
            carried = engine.carry(following)
            assert set(carried.tensors) == following
        engine.close()
    never = {n for n in expected if "x_embedder" in n or "vlm.norm" in n}
    fresh = dict(Toy().named_parameters())
    assert never and all(torch.equal(dict(module.named_parameters())[n], fresh[n]) for n in never)
    assert all(p.requires_grad for p in module.parameters())  # the hooks left nothing behind


def test_an_overflow_is_counted_and_changes_nothing(tmp_path):
    config = toy_config()
    module = Toy()
    engine = StageEngine(module, config, json.loads(ds_config(tmp_path, "bf16").read_text()), 0, 1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    engine.set_learning_rate(0)
    engine.backward(engine(0) * float("inf"))
    engine.step()
    assert engine.skipped_steps == 1
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    engine.set_learning_rate(1)
    engine.backward(engine(1))
    engine.step()
    assert engine.skipped_steps == 1
    assert not torch.equal(module.connector.weight, before["connector.weight"])
    engine.close()


def test_learning_rate_is_a_trapezoid_over_all_stages():
    optim = toy_config(warmup_fraction=0.1, plateau_fraction=0.2, lr=1.0).optim
    rates = [learning_rate(update, 100, optim) for update in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])  # linear, and not 0 at first
    assert rates[10:31] == pytest.approx([1.0] * 21)
    steps = [a - b for a, b in zip(rates[30:], rates[31:])]
    assert steps == pytest.approx([1 / 70] * len(steps))
    assert rates[-1] == pytest.approx(1 / 70)  # 0 is what the update after the last would have
