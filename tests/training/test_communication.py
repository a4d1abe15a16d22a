"""What ranks send one another: how much, and that the result is what one process computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megaflux.common.ranks import World
from megaflux.training.ds_config import FILLED, load_ds_config
from megaflux.training.engine import StageEngine
from tests import forked
from tests.training.carry_worker import Toy, toy_config
from tests.training.parity_worker import MICROS, update
from tests.training.runs import ROOT, ds_config, rank_environments

WORKER = str(ROOT / "tests" / "training" / "parity_worker.py")


def variant(folder: Path, name: str, precision: str, **zero) -> Path:
    """ds_configs/zero2.json with other values of its zero_optimization."""
    values = json.loads(ds_config(folder, precision).read_text())
    values["zero_optimization"] |= zero
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


def run_worker(out: Path, configs: list[Path], ranks: int, nodes: int = 1) -> dict[str, dict]:
    """What each of DeepSpeed's files computes, by the file's name; see parity_worker."""
    done = forked.run_ranks([WORKER, str(out), *map(str, configs)], rank_environments(ranks, nodes))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(process_group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    world = World(0, 1, torch.device("cpu"))
    return update(world, str(folder), load_ds_config(ds_config(folder, "fp32")))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    """As shipped, and with buckets that hold few parameters and less than the largest."""
    folder = tmp_path_factory.mktemp("four")
    configs = [variant(folder, "fp32", "fp32"), variant(folder, "small buckets", "fp32", reduce_bucket_size=3000)]
    return run_worker(folder / "out.pt", configs, ranks=4)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """Two nodes of one rank: as shipped, and with all gradients summed on all ranks, which is DeepSpeed's default."""
    folder = tmp_path_factory.mktemp("two")
    configs = [
        variant(folder, "fp32", "fp32"),
        variant(folder, "bf16", "bf16"),
        variant(folder, "to all", "bf16", use_multi_rank_bucket_allreduce=True),
    ]
    return run_worker(folder / "out.pt", configs, ranks=2, nodes=2)


@pytest.mark.parametrize(
    ("ranks", "launch", "config"),
    [(2, "two_nodes", "fp32"), (4, "four_ranks", "fp32"), (4, "four_ranks", "small buckets")],
)
def test_several_ranks_compute_what_one_does(request, one_process, ranks, launch, config):
    several = request.getfixturevalue(launch)[config]
    assert (one_process["size"], several["size"]) == (1, ranks)
    assert several["gradients"].keys() == one_process["gradients"].keys()
    for name, expected in one_process["gradients"].items():
        assert expected.abs().max() > 0, name
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(several["gradients"][name], expected, rtol=1e-4, atol=atol)
    assert several["norm"] == pytest.approx(one_process["norm"], rel=1e-4)
    # Adam's first step is lr * sign(gradient). Where a gradient is zero but for rounding (a key's bias: softmax does
    # not see it) that sign is chance, so those entries are left out.
    largest = max(g.abs().max() for g in one_process["gradients"].values())
    for name, gradient in one_process["gradients"].items():
        counts = gradient.abs() > 1e-6 * largest
        torch.testing.assert_close(several["weights"][name][counts], one_process["weights"][name][counts])


def test_small_buckets_were_smaller_than_a_parameter(four_ranks):
    small = four_ranks["small buckets"]
    assert max(gradient.numel() for gradient in small["gradients"].values()) > 3000
    assert small["calls"]["reduce", "float32"] > 10 * four_ranks["fp32"]["calls"]["reduce", "float32"]


def test_each_gradient_goes_to_its_owner_alone(two_nodes, four_ranks):
    """Per micro-batch every gradient is reduced once, in fp32, to the rank that steps it; per update every weight is
    gathered once. All else is a few numbers: norms and flags."""
    for result, width in ((two_nodes["bf16"], 2), (four_ranks["fp32"], 4)):
        large = {key: size for key, size in result["sent"].items() if size > 1000}
        gathered = {2: "bfloat16", 4: "float32"}[width]
        assert large == {
            ("reduce", "float32"): MICROS * 4 * result["trained"],
            ("allgather_base", gathered): width * result["trained"],
        }


def test_two_ranks_compute_the_same_bits_as_with_sums_on_all_ranks(two_nodes):
    """A run that began with DeepSpeed's default goes on bit for bit. (From three ranks on, sums have another order.)"""
    shipped, to_all = two_nodes["bf16"], two_nodes["to all"]
    assert to_all["calls"]["allreduce", "float32"] >= MICROS  # it was another way
    for key in ("gradients", "weights"):
        assert shipped[key].keys() == to_all[key].keys()
        for name, value in to_all[key].items():
            assert torch.equal(shipped[key][name], value), name
    assert shipped["norm"] == to_all["norm"]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("base", ["zero2.json", "zero2_offload.json"])
def test_no_timer_waits_for_the_device_and_buckets_fit_what_trains(tmp_path, monkeypatch, base):
    from deepspeed.accelerator import get_accelerator

    waits = []
    engine = StageEngine(Toy(), toy_config().for_world(1), json.loads(ds_config(tmp_path, base=base).read_text()), 0, 1)
    assert engine.deepspeed.optimizer.reduce_bucket_size == FILLED["reduce_bucket_size"][0]
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *device: waits.append(device))
    for number in range(4):  # the timer lets two updates pass before its first wait
        engine.set_learning_rates(number)
        engine.backward(engine(number))
        engine.step()
    monkeypatch.undo()
    assert engine.deepspeed.global_steps == 4
    assert waits == []
    engine.close()
