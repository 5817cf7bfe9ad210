"""How far scores may lie from what endless samples would give: bootstrap intervals. Knows numbers, no metric."""

from collections.abc import Callable, Sequence

import numpy as np


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    num_samples: int,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Computes the interval in which a statistic lies when samples are drawn again from those there are.

    Resamples repeat samples, which shifts statistics like the Fréchet distance that depend on how many different ones
    there are. The mean shift is taken out, so that the interval lies about the statistic of the samples themselves.

    Args:
        statistic (`Callable`): `statistic(index)` gives the score of the samples of these numbers, `(num_samples,)`.
        num_samples (`int`): How many samples there are.
        confidence (`float`, defaults to 0.95): Share of the resamples inside the interval.
        num_resamples (`int`, defaults to 1000): How often samples are drawn, with replacement.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Raises:
        ValueError: If there is no sample, or `confidence` or `num_resamples` is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 10.2 and 13.3.
    """
    _check_interval(num_samples, confidence, num_resamples)
    draws = _resample(statistic, num_samples, num_resamples, seed)
    shift = statistic(np.arange(num_samples)) - draws.mean()
    low, high = np.quantile(draws + shift, _tails(confidence))
    return float(low), float(high)


def mean_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Computes the bootstrap interval of a mean, of scores or of verdicts.

    Values that are all alike, as of a share of 0 or 1, have an interval without width: resamples cannot tell what was
    never seen. With `n` verdicts such a share may still be `3 / n` off.

    Args:
        values (`Sequence[float]` of length `num_samples`): Scores, or verdicts as 0 and 1.
        confidence (`float`, defaults to 0.95): Share of the resamples inside the interval.
        num_resamples (`int`, defaults to 1000): How often samples are drawn, with replacement.
        seed (`int`, defaults to 0): Of the draws.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Raises:
        ValueError: If there is no value, or `confidence` or `num_resamples` is out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Example:
        >>> mean_interval([1, 1, 1, 1])
        (1.0, 1.0)

    """
    scores = np.asarray(values, dtype=np.float64)
    _check_interval(len(scores), confidence, num_resamples)
    means = _resample(lambda index: scores[index].mean(), len(scores), num_resamples, seed)
    low, high = np.quantile(means, _tails(confidence))
    return float(low), float(high)


def _resample(statistic: Callable[[np.ndarray], float], num_samples: int, num_resamples: int, seed: int) -> np.ndarray:
    """Computes a statistic of samples drawn with replacement, `(num_resamples,)`."""
    rng = np.random.default_rng(seed)
    return np.array([statistic(rng.integers(num_samples, size=num_samples)) for _ in range(num_resamples)])


def _check_interval(num_samples: int, confidence: float, num_resamples: int) -> None:
    """Refuses what no interval can be made of."""
    if num_samples < 1:
        raise ValueError("There are no samples to draw from. Give at least one value.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence`={confidence} must lie between 0 and 1.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples`={num_resamples} must be at least 1.")


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
