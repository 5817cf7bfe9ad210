"""Intervals that hold what they say: as wide as theory has it, about the score, the same for the same seed."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from hf_mm.evaluation.intervals import bootstrap_interval, mean_interval


def test_the_interval_of_a_share_is_as_wide_as_theory_has_it():
    verdicts = np.arange(400) < 100
    low, high = mean_interval(verdicts, num_resamples=2000)
    assert (low, high) == pytest.approx((0.25 - 1.96 * np.sqrt(0.25 * 0.75 / 400), 0.25 + 0.042), abs=0.006)


def test_a_mean_has_the_interval_of_scipy():
    values = np.random.default_rng(0).exponential(size=83)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1))
    ends = tuple(theirs.confidence_interval)
    assert mean_interval(values, num_resamples=4000) == pytest.approx(ends, abs=0.02)
    general = bootstrap_interval(lambda index: values[index].mean(), len(values), num_resamples=4000)
    assert general == pytest.approx(ends, abs=0.02)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    held = [
        low <= 0.3 <= high
        for low, high in (mean_interval(rng.random(97) < 0.3, num_resamples=300) for _ in range(200))
    ]
    assert 0.90 <= np.mean(held) <= 0.99


def test_a_statistic_that_repetition_shifts_stays_inside_its_interval():
    values = np.random.default_rng(0).normal(size=(41, 3))

    def num_different(index):
        return float(len(np.unique(index)))

    low, high = bootstrap_interval(num_different, len(values), num_resamples=200)
    assert low < 41 < high and high - low < 12  # resamples hold about 26 different ones


def test_the_seed_decides():
    values = np.random.default_rng(0).random(53)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="no samples"):
        mean_interval([])
    with pytest.raises(ValueError, match="`confidence`=95 "):
        mean_interval([0.0, 1.0], confidence=95)
    with pytest.raises(ValueError, match="`num_resamples`=0 "):
        bootstrap_interval(lambda index: 0.0, 3, num_resamples=0)
