"""Whether a difference between two ways of training or drawing holds over seeds: a paired interval and a verdict.

Takes numbers, one pair to a seed. Knows nothing of what was measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


HOLDS, DOES_NOT_HOLD, UNDECIDED = "holds", "does not hold", "undecided"


class Comparison(NamedTuple):
    """What a comparison over seeds says.

    Args:
        difference (`float`): Mean of first minus second.
        low (`float`): Lower end of its interval.
        high (`float`): Upper end.
        verdict (`str`): `"holds"`, `"does not hold"` or `"undecided"`.
    """

    difference: float
    low: float
    high: float
    verdict: str


def student_t(confidence: float, degrees_of_freedom: int) -> float:
    """Returns how many standard errors an interval of this confidence reaches to either side.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        ValueError: If the confidence is out of range.
    """
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Intervals need scipy: pip install 'hf_mm[eval]'.", name=error.name) from error
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence`={confidence} must be above 0 and below 1.")
    return float(t.ppf((1 + confidence) / 2, degrees_of_freedom))


def compare_paired(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Comparison:
    """Tests the claim that the first is larger, seed by seed.

    The claim holds if the interval of the mean difference lies above 0, does not hold if it lies below 0, and is
    undecided otherwise, as it always is with one seed. The interval is that of the paired t-test: a bootstrap of three
    values never leaves their range, which is too narrow.

    Args:
        first (`Sequence[float]` of length `(seeds,)`): What is claimed to be larger.
        second (`Sequence[float]` of length `(seeds,)`): What it is compared with, by the same seeds.
        confidence (`float`, defaults to 0.95): Of the interval.

    Returns:
        [`Comparison`]

    Raises:
        ValueError: If the lengths differ, there is no pair, or a value is no finite number.

    Example:
        >>> result = compare_paired([0.9, 0.8, 0.85], [0.5, 0.45, 0.4])
        >>> round(result.difference, 2), result.verdict
        (0.4, 'holds')

    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"`first` has {len(first)} entries and `second` {len(second)}; give one pair to a seed, at least one."
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError(f"`first`={list(first)} and `second`={list(second)} must be finite numbers.")
    mean = float(differences.mean())
    if len(differences) == 1:
        return Comparison(mean, -math.inf, math.inf, UNDECIDED)
    standard_error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    reach = student_t(confidence, len(differences) - 1) * standard_error
    low, high = mean - reach, mean + reach
    return Comparison(mean, low, high, HOLDS if low > 0 else DOES_NOT_HOLD if high < 0 else UNDECIDED)


def join_verdicts(verdicts: Sequence[str]) -> str:
    """Joins comparisons: one that does not hold refutes them all, one that is undecided leaves them so."""
    if DOES_NOT_HOLD in verdicts:
        return DOES_NOT_HOLD
    return UNDECIDED if UNDECIDED in verdicts or not verdicts else HOLDS
