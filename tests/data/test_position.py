"""A position in the data as checkpoints hold it: read back, restated for other ranks, and told from another order's."""

import dataclasses
import json

import pytest

from megaflux.common.errors import UserError
from megaflux.data.reading.position import Position

PLACE = Position("abc", "train", 3, True, 6, 4, 2, 17)


@pytest.mark.parametrize("place", [PLACE, dataclasses.replace(PLACE, order={"1:1": [[14, 2], [3, 1]]})])
def test_a_position_is_what_was_saved(place):
    state = json.loads(json.dumps(place.state_dict()))
    assert Position.from_state_dict(state) == place
    assert Position.from_state_dict(state | {"of a later version": 1}) == place
    assert ("order" in state) == (place.order is not None)


def test_what_was_never_saved_is_no_position():
    assert Position.from_state_dict(PLACE.state_dict() | {"order": None}).order == {}  # no dataset's
    for name in ("micro_batch_size", "world_size"):
        for value in ("6", None, 6.0, True):
            with pytest.raises(UserError, match=f"no {name}; resume from another"):
                Position.from_state_dict(PLACE.state_dict() | {name: value})
        with pytest.raises(UserError, match=f"no {name}"):
            Position.from_state_dict({key: value for key, value in PLACE.state_dict().items() if key != name})


def test_other_ranks_share_the_same_global_micro_batch():
    assert PLACE.global_micro_batch == 24
    for ranks, each in ((1, 24), (3, 8), (8, 3), (24, 1)):
        there = PLACE.for_world(ranks)
        assert there == dataclasses.replace(PLACE, micro_batch_size=each, world_size=ranks)
        assert there.for_world(4) == PLACE
        assert Position.from_state_dict(json.loads(json.dumps(there.state_dict()))) == there


def test_every_setting_that_makes_another_order_is_named():
    assert PLACE.difference(PLACE) is None
    for name, value in (
        ("split", "held_out"),
        ("seed", 4),
        ("shuffle", False),
        ("micro_batch_size", 3),
        ("world_size", 2),
    ):
        assert PLACE.difference(dataclasses.replace(PLACE, **{name: value})) == name
    for name, value in (("dataset", "x"), ("epoch", 3), ("batches", 1)):  # the dataset is compared elsewhere
        assert PLACE.difference(dataclasses.replace(PLACE, **{name: value})) is None
    assert PLACE.difference(dataclasses.replace(PLACE, world_size=2, seed=4)) == "seed"  # the first
    fresh = Position("abc", "train", 3, True, 6, 4)
    assert (fresh.epoch, fresh.batches, fresh.order) == (0, 0, None)
