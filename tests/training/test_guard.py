"""Which updates are dropped, and that a dropped one changes nothing: neither weights nor masters nor moments."""

from __future__ import annotations

import json
import random
import statistics

import pytest
import torch

from megaflux.training.engine import StageEngine
from megaflux.training.survival.guard import FEWEST, NOT_FINITE, Drop, DropReason, Guard
from tests.training.carry_worker import Toy, toy_config
from tests.training.runs import ds_config


def norms(count: int, seed: int = 0, spread: float = 0.15) -> list[float]:
    rng = random.Random(seed)
    return [1 + rng.gauss(0, spread) for _ in range(count)]


def test_six_deviations_over_the_last_128_norms():
    guard, taken = Guard(6, 128, 10), norms(300)
    assert all(guard.judge(norm) is None for norm in taken)
    window = taken[-128:]
    limit = statistics.fmean(window) + 6 * statistics.pstdev(window)
    spike = f"its gradient norm {limit * 1.001:.3g} is a spike: the last 128 allow {limit:.3g}"
    assert guard.judge(limit * 1.001) == Drop(DropReason.SPIKE, spike)
    assert list(guard.norms) == [*window[1:], pytest.approx(limit)]  # remembered as no more than that
    assert guard.judge(limit) is None


def drops_until_let_on(times: float) -> int | None:
    """How often norms that have risen for good are dropped; None: as often as a run puts up with."""
    guard = Guard(6, 128, 10)
    for norm in norms(128, spread=0.05):
        guard.judge(norm)
    for drops in range(11):
        if guard.judge(times) is None:
            return drops
        if guard.exhausted:
            return None


def test_a_rise_for_good_is_let_on_and_divergence_is_not():
    assert drops_until_let_on(1.5) == 0
    assert 0 < drops_until_let_on(1.8) < 10
    assert drops_until_let_on(3.0) is None


def test_it_is_silent_while_it_knows_too_little_and_after_a_stage():
    guard = Guard(6, 128, 10)
    assert all(guard.judge(norm) is None for norm in [*norms(FEWEST - 1), 1e6])
    guard.new_stage()
    assert guard.judge(1e9) is None
    assert Guard(0, 128, 10).judge(1e30) is None and Guard(6, 4, 10).judge(5.0) is None


@pytest.mark.parametrize("window, known", [(128, 64), (16, 16), (1, 1)])
def test_it_speaks_from_the_64th_norm_on_or_once_a_smaller_window_is_full(window, known):
    for norms_before in (known - 1, known):
        guard = Guard(6, window, 10)
        for _ in range(norms_before):
            guard.judge(1.0)
        assert (guard.judge(1e6) is None) == (norms_before < known)


def test_without_a_sigma_no_finite_norm_is_dropped():
    guard = Guard(0, 16, 10)
    assert [guard.judge(norm) for norm in [*norms(40), 1e30, 0.0]] == [None] * 42


def test_a_gradient_of_zero_is_taken():
    guard = Guard(6, 16, 10)
    assert [guard.judge(0.0) for _ in range(20)] == [None] * 20 and (guard.in_a_row, guard.dropped) == (0, 0)


@pytest.mark.parametrize("size", [1.0, 4.0, 0.25])
def test_norms_all_but_equal_allow_more_than_half_again(size):
    guard = Guard(6, 128, 10)
    for _ in range(64):
        guard.judge(size)
    assert guard.judge(1.6 * size) is None  # the limit itself
    assert guard.judge(1.8 * size).reason is DropReason.SPIKE


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0])
def test_what_is_not_finite_is_dropped_from_the_first_update_on(norm):
    guard = Guard(0, 128, 3)
    assert guard.judge(norm) == Drop(DropReason.NOT_FINITE, "its gradient is not finite")
    assert (guard.dropped, guard.in_a_row, guard.exhausted) == (1, 1, False)
    assert guard.judge(norm) and guard.judge(1.0) is None
    assert (guard.dropped, guard.in_a_row) == (2, 0)
    assert [bool(guard.judge(norm)) for _ in range(3)] == [True] * 3 and guard.exhausted


def test_its_state_survives_a_checkpoint():
    one, other = Guard(6, 16, 10), Guard(6, 16, 10)
    for norm in [*norms(60), float("nan")]:
        one.judge(norm)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    assert [one.judge(n) for n in (1.0, 1.3, 9.0)] == [other.judge(n) for n in (1.0, 1.3, 9.0)]
    fresh = Guard(6, 16, 10)
    fresh.load_state_dict({})  # of an older checkpoint
    assert fresh.state_dict() == Guard(6, 16, 10).state_dict() and fresh.judge(1.0) is None


def test_too_many_large_gradient_values_are_a_reason_to_drop():
    guard = Guard(6, 128, 10, most_large=0.25)
    assert guard.judge(1.0, 0.25) is None  # the limit itself
    drop = guard.judge(1.0, 0.26)
    assert drop.reason is DropReason.LARGE_VALUES
    assert drop.text == "0.26 of its gradient's values are large, more than 0.25 (optim.large_gradient_share)"
    assert (guard.in_a_row, guard.dropped, list(guard.norms)) == (1, 1, [1.0])  # its norm is not kept
    assert guard.judge(float("nan"), float("nan")) == NOT_FINITE
    assert Guard(6, 128, 10).judge(1.0, 1.0) is None  # without a limit the share is only logged


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("base", ["zero2.json", "zero2_offload.json", "zero3.json"])
def test_a_refused_step_changes_not_a_byte(tmp_path, base):
    heard: list[float] = []

    def judge(norm: float, large_share: float) -> Drop | None:
        heard.append(norm)
        return NOT_FINITE if len(heard) == 2 else None

    import deepspeed

    module = Toy()
    if "zero3" in base:  # the toy reads its layers' weights without calling them
        for parameter in module.parameters():
            deepspeed.zero.register_external_parameter(module, parameter)
    ds = json.loads(ds_config(tmp_path, "bf16", base).read_text())
    engine = StageEngine(module, toy_config(weight_decay=0.5, max_grad_norm=1.0).for_world(1), ds, 0, 1, judge=judge)

    def state() -> dict[str, torch.Tensor]:
        carried = engine.carry(set(engine.first_stage))
        found = {f"{n}.{k}": t.clone() for n, of in carried.tensors.items() for k, t in of.items()}
        return found | {f"step {group}": step.clone() for group, step in carried.steps.items()}

    seen = []
    for update in range(3):
        engine.set_learning_rates(update)
        engine.backward(engine(update))
        engine.step()
        seen.append(state())
        assert engine.dropped == (NOT_FINITE if update == 1 else None)
        shown = float("nan") if update == 1 else heard[update]  # no point in the curve
        assert engine.grad_norm() == pytest.approx(shown, rel=1e-3, nan_ok=True)
    assert engine.deepspeed.skipped_steps == 1 and len(seen[0]) > 20
    assert all(torch.equal(seen[1][name], seen[0][name]) for name in seen[0])
    moved = [name for name in seen[0] if not torch.equal(seen[2][name], seen[1][name])]
    assert len(moved) > len(seen[0]) / 2
    engine.close()
