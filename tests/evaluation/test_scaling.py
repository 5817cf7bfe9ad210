import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mm.evaluation.comparison import compare_paired, join_verdicts
from hf_mm.evaluation.scaling import (
    PAPER_BOUNDS,
    count_flops,
    fit_power_law,
    parity_flop_ratio,
    theoretical_training_flops,
    within_bounds,
)
from hf_mm.evaluation.scaling_plot import COLORS, draw_scaling_plot


FLOPS = np.array([2e11, 9e11, 3e12, 4e13, 5e14])


def noisy(exponent: float, seed: int, noise: float = 0.05, coefficient: float = 700.0) -> np.ndarray:
    errors = np.random.default_rng(seed).normal(size=len(FLOPS)) * noise
    return coefficient * FLOPS**exponent * np.exp(errors)


def test_a_law_without_noise_is_found_exactly():
    law = fit_power_law(FLOPS, 700 * FLOPS**-0.17)
    assert law.exponent == pytest.approx(-0.17) and law.coefficient == pytest.approx(700)
    assert law.predict(7e15) == pytest.approx(700 * 7e15**-0.17)
    assert law.flops_for(700 * 3e10**-0.17) == pytest.approx(3e10)
    assert law.exponent_interval() == pytest.approx((-0.17, -0.17))


def test_line_and_errors_are_those_of_ordinary_least_squares():
    from scipy.stats import linregress

    values = noisy(-0.1, seed=3)
    law, known = fit_power_law(FLOPS, values), linregress(np.log(FLOPS), np.log(values))
    assert law.exponent == pytest.approx(known.slope)
    assert math.sqrt(law.exponent_variance) == pytest.approx(known.stderr)
    assert math.log(law.coefficient) == pytest.approx(known.intercept)


def test_intervals_hold_the_truth_as_often_as_they_say():
    true_flops = 6e12
    value = 700 * true_flops**-0.2
    laws = [fit_power_law(FLOPS, noisy(-0.2, seed)) for seed in range(600)]
    slopes = np.mean([low <= -0.2 <= high for low, high in (law.exponent_interval(0.9) for law in laws)])
    reached = [law.flops_interval(value, confidence=0.9) for law in laws]
    assert slopes == pytest.approx(0.9, abs=0.04)
    assert np.mean([low <= true_flops <= high for low, high in reached]) == pytest.approx(0.9, abs=0.04)


def test_an_uncertain_value_widens_the_interval():
    law = fit_power_law(FLOPS, noisy(-0.2, seed=1))
    narrow = law.flops_interval(3.0)
    wide = law.flops_interval(3.0, value_log_variance=0.04)
    assert wide[0] < narrow[0] < law.flops_for(3.0) < narrow[1] < wide[1]


def test_a_slope_that_may_be_none_tells_nothing_about_compute():
    law = fit_power_law(FLOPS, [700, 650, 720, 660, 710])
    low, high = law.exponent_interval()
    assert low < 0 < high and law.flops_interval(680.0) == (0, math.inf)


def test_parity_ratio_is_the_horizontal_distance_of_parallel_lines():
    ours, theirs = fit_power_law(FLOPS, 700 * FLOPS**-0.2), 700 * 1.5 * FLOPS**-0.2
    parity = parity_flop_ratio(ours, theirs[-1], FLOPS[-1])
    assert parity.ratio == pytest.approx(1.5 ** (-1 / 0.2))  # of the metric's offset, by the common slope
    assert parity.low == pytest.approx(parity.ratio) == parity.high
    assert not parity.is_extrapolated
    assert parity_flop_ratio(ours, theirs[0], FLOPS[0]).is_extrapolated


@pytest.mark.parametrize("sign", [1, -1])
def test_less_compute_means_a_ratio_below_one_whether_the_metric_rises_or_falls(sign):
    law = fit_power_law(FLOPS, noisy(0.2 * sign, seed=2))
    better = law.predict(FLOPS[2]) * math.exp(-0.1 * sign)  # a baseline that is worse than the line at its compute
    parity = parity_flop_ratio(law, float(better), FLOPS[2])
    assert parity.low < parity.ratio < 1 and parity.ratio < parity.high


def test_points_beyond_the_papers_bounds_are_left_out():
    low, high = PAPER_BOUNDS["fid"]
    assert within_bounds([99, 101, math.nan, 100], at_least=low, at_most=high).tolist() == [True, False, False, True]
    low, high = PAPER_BOUNDS["cider"]
    assert within_bounds([0.039, 0.041], at_least=low, at_most=high).tolist() == [False, True]


@pytest.mark.parametrize(
    ("flops", "values", "match"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 3], [1, 2], "`flops` has 3 entries and `values` 2"),
        ([1, 2, 3], [1, 0, 2], r"`values` holds \[0.0\]"),
        ([1, 2, 3], [1, math.nan, 2], "`values` holds"),
        ([7, 7, 7], [1, 2, 3], "`flops` are all 7"),
        ([[1, 2, 3]], [1, 2, 3], r"shape \(1, 3\)"),
    ],
)
def test_what_no_line_fits_is_refused(flops, values, match):
    with pytest.raises(ValueError, match=match):
        fit_power_law(flops, values)


def test_counted_flops_of_a_linear_layer_are_six_per_weight_and_token():
    layer, inputs = torch.nn.Linear(13, 7, bias=False), torch.randn(5, 13, requires_grad=True)
    counted = count_flops(lambda: layer(inputs).sum().backward())
    assert counted == theoretical_training_flops(7 * 13, 5)


def test_a_claim_needs_its_interval_on_one_side_of_zero():
    assert compare_paired([3, 3.1, 2.9], [1, 1.2, 0.9]).verdict == "holds"
    assert compare_paired([1, 1.2, 0.9], [3, 3.1, 2.9]).verdict == "does not hold"
    assert compare_paired([3, 1, 2], [2, 2, 1.5]).verdict == "undecided"
    assert compare_paired([3], [1]) == (2, -math.inf, math.inf, "undecided")
    assert compare_paired([1, 1, 1], [1, 1, 1]).verdict == "undecided"


def test_the_interval_is_that_of_the_paired_t_test():
    from scipy.stats import ttest_rel

    first, second = [0.8, 0.7, 0.95, 0.6], [0.5, 0.55, 0.4, 0.45]
    known = ttest_rel(first, second).confidence_interval(0.9)
    found = compare_paired(first, second, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((known.low, known.high))


def test_comparisons_of_unlike_seeds_are_refused():
    with pytest.raises(ValueError, match="`first` has 2 entries and `second` 1"):
        compare_paired([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        compare_paired([1, math.nan], [1, 2])


@pytest.mark.parametrize(
    ("verdicts", "joined"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "undecided"], "undecided"),
        (["undecided", "does not hold"], "does not hold"),
        ([], "undecided"),
    ],
)
def test_verdicts_are_joined_by_the_worst(verdicts, joined):
    assert join_verdicts(verdicts) == joined


def test_plot_shows_each_family_in_its_colour(tmp_path):
    values = {"ours": noisy(-0.2, 0), "theirs": noisy(-0.2, 1, coefficient=1400)}
    points = {name: list(zip(FLOPS, found, strict=True)) for name, found in values.items()}
    laws = {"ours": fit_power_law(FLOPS, values["ours"])}
    path = draw_scaling_plot(points, laws, tmp_path / "new" / "plot.png", metric="loss")
    counts = dict((color, count) for count, color in Image.open(path).getcolors(1 << 20))
    ours, theirs = (counts[tuple(bytes.fromhex(color[1:]))] for color in COLORS[:2])
    assert ours > theirs + 300  # a line besides the points
    with pytest.raises(ValueError, match="no run"):
        draw_scaling_plot({"ours": []}, {}, path, metric="loss")
