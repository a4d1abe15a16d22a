"""The state of a run: which drawn batch a micro-batch belongs to, and what checkpoints of other versions may lack."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megaflux.common.errors import UserError
from megaflux.data.reading.position import Position
from megaflux.training.planning.saved_plan import SavedPlan
from megaflux.training.trainer import Trainer


@pytest.mark.parametrize(
    ("ranks", "micro", "together", "expected"),
    [
        (1, 4, 4, [0, 1, 2, 3]),  # as drawn
        (1, 2, 4, [0, 0, 1, 1]),  # each drawn batch cut in two
        (2, 1, 4, [0, 0, 1, 1]),  # the same on two ranks
        (4, 1, 4, [0, 1, 2, 3]),
    ],
)
def test_the_kind_of_condition_belongs_to_the_drawn_batch_however_it_is_cut(ranks, micro, together, expected):
    trainer = Trainer.__new__(Trainer)
    plan, world = SimpleNamespace(micro_batch_size=micro), SimpleNamespace(size=ranks)
    trainer.run, trainer.loader = SimpleNamespace(plan=plan, world=world), SimpleNamespace(drawn_together=together)
    assert [trainer.drawn_index(i) for i in range(len(expected))] == expected


def test_a_saved_plan_of_another_version_is_read_as_far_as_it_is_known():
    whole = SavedPlan("base", 2, ["none"], "cpu", 1).state_dict()
    assert SavedPlan.from_state(whole | {"of tomorrow": 1}) == SavedPlan.from_state(whole)
    assert SavedPlan.from_state({}) is None
    del whole["gpu"]
    assert SavedPlan.from_state(whole) is None


def test_a_position_without_its_sizes_is_refused_in_one_line():
    for lacking in ("micro_batch_size", "world_size"):
        state = {"micro_batch_size": 2, "world_size": 1}
        del state[lacking]
        with pytest.raises(UserError, match=f"no {lacking}; resume from another checkpoint"):
            Position.from_state_dict(state)
