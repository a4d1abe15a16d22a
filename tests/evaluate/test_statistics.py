"""Figures and their intervals, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from megaflux.evaluate.statistics import difference, gap, measured, summary


def test_intervals_hold_the_truth_as_often_as_they_say():
    random, held = np.random.default_rng(1), 0
    for trial in range(200):
        low, high = summary(measured(random.normal(0.5, 2.0, 60)), trial)["interval"]
        held += low <= 0.5 <= high
    assert 0.90 <= held / 200 <= 0.99


def test_samples_of_one_cluster_are_drawn_together():
    """Five copies of each value say no more than one of each, and the interval knows it."""
    values = np.random.default_rng(2).normal(size=40)
    alone = summary(measured(values))
    copied = summary(measured(np.repeat(values, 5), np.repeat(np.arange(40), 5)))
    unaware = summary(measured(np.repeat(values, 5)))

    def width(figure):
        return figure["interval"][1] - figure["interval"][0]

    assert copied["clusters"] == 40 and copied["n"] == 200
    assert width(copied) == pytest.approx(width(alone), rel=0.1)
    assert width(unaware) < 0.6 * width(alone)


def test_a_gap_is_the_growth_of_the_mean_loss():
    figure = gap([1.0, 3.0], [2.0, 6.0])
    assert figure.figure() == 1.0
    assert summary(figure)["interval"] == [1.0, 1.0]  # in every draw


def test_paired_differences_are_of_the_samples_that_both_have():
    keys = tuple("abcdefgh")
    first = measured(np.arange(8.0), keys=keys)
    second = measured(np.arange(1.0, 7.0), keys=keys[:6])
    found = difference(first, second)
    assert found["n"] == 6
    assert [found["value"], *found["interval"]] == pytest.approx([1.0] * 3)
    assert difference(first, first)["interval"] == [0.0, 0.0]
    assert difference(first, measured([1.0], keys=("z",))) is None


def test_one_sample_has_no_interval():
    assert summary(measured([0.25])) == {"value": 0.25, "interval": None, "n": 1}
