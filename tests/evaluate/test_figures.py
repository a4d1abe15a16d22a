"""What the figures say of models whose behaviour is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megaflux.evaluate import figures

REFERENCES = torch.rand(8, 30, generator=torch.Generator().manual_seed(0))


def test_a_model_that_copies():
    made = REFERENCES[:, None].repeat(1, 3, 1)
    assert figures.nearest_is_own(made[:, 0], REFERENCES).tolist() == [1.0] * 8
    assert figures.copying(made[:, 0], REFERENCES).tolist() == [1.0] * 8
    assert figures.between_seeds(made).tolist() == [0.0] * 8
    assert figures.nearer_to_reference(made, REFERENCES).tolist() == [1.0] * 8


def test_a_model_that_ignores_its_condition():
    """The same few pictures, whatever is asked: no nearer to the own reference than to others, on average and by chance."""
    by_seed = torch.rand(1, 3, 30, generator=torch.Generator().manual_seed(1)).repeat(8, 1, 1)
    assert figures.nearest_is_own(by_seed[:, 0], REFERENCES).sum() == 1.0  # chance: one of 8
    assert abs(figures.copying(by_seed[:, 0], REFERENCES).mean()) < 0.03
    assert figures.between_conditions(by_seed).max() == pytest.approx(0.0, abs=1e-6)


def test_pictures_that_are_all_alike_are_right_by_chance():
    same = torch.ones(8, 30)
    assert figures.nearest_is_own(same, same).tolist() == [1 / 8] * 8


def test_pixels_compare_pictures_of_any_shape():
    wide, square = torch.full((3, 32, 64), 255, dtype=torch.uint8), torch.full((3, 64, 64), 255, dtype=torch.uint8)
    features = figures.pixels([wide, square])
    assert features.shape == (2, 3 * 64 * 64)
    assert torch.equal(features[0], features[1])


def test_what_is_judged_may_be_one_of_several():
    assert np.array_equal(figures.is_in(["a", "b"], [["a", "c"], ["c"]]), [1.0, 0.0])
