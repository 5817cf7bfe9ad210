"""How a metric falls or rises with training compute: power laws, their uncertainty, and the parity FLOP ratio.

Takes arrays of FLOPs and of metric values, and a callable whose FLOPs are counted. Knows no model and no data.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from .comparison import student_t


# Smallest and largest value of a metric that enters a fit. Source: Transfusion (arXiv 2408.11039), section 4.2, which
# leaves out small Chameleon models; it prints CIDEr times 100.
PAPER_BOUNDS: Mapping[str, tuple[float | None, float | None]] = {
    "fid": (None, 100.0),
    "clip_score": (17.0, None),
    "cider": (0.04, None),
}


class PowerLaw(NamedTuple):
    r"""A straight line in log-log: `ln(metric) = level + exponent * (ln(FLOPs) - center)`.

    Written around the mean of `ln(FLOPs)`, so that the errors of its two numbers do not depend on each other.

    Args:
        level (`float`): Natural logarithm of the metric at the centre.
        exponent (`float`): Slope.
        center (`float`): Mean of the natural logarithms of the FLOPs.
        level_variance (`float`): Squared standard error of the level.
        exponent_variance (`float`): Squared standard error of the exponent.
        degrees_of_freedom (`int`): Points beyond two.
        flops_range (`tuple[float, float]`): Least and most FLOPs of a point.
    """

    level: float
    exponent: float
    center: float
    level_variance: float
    exponent_variance: float
    degrees_of_freedom: int
    flops_range: tuple[float, float]

    @property
    def coefficient(self) -> float:
        """The `a` of `metric = a * FLOPs ** exponent`."""
        return math.exp(self.level - self.exponent * self.center)

    def predict(self, flops: float | np.ndarray) -> Any:
        """Returns the metric at these FLOPs."""
        return np.exp(self.level + self.exponent * (np.log(flops) - self.center))

    def exponent_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Returns the interval of the exponent by Student's t."""
        reach = student_t(confidence, self.degrees_of_freedom) * math.sqrt(self.exponent_variance)
        return self.exponent - reach, self.exponent + reach

    def flops_for(self, value: float) -> float:
        """Returns the FLOPs at which the line reaches a value.

        Raises:
            ValueError: If the line is level, so that no compute reaches another value.
        """
        if self.exponent == 0:
            raise ValueError("The line is level (`exponent`=0): no FLOPs reach another value.")
        return math.exp(self.center + (math.log(value) - self.level) / self.exponent)

    def flops_interval(
        self, value: float, *, confidence: float = 0.95, value_log_variance: float = 0.0
    ) -> tuple[float, float]:
        r"""Returns the interval of the FLOPs at which the line reaches a value, which may itself be uncertain.

        All FLOPs are in it at which line and value do not differ by more than Student's t allows: inverse regression
        by Fieller's theorem. Where the exponent may be 0 as well, this says nothing, and the interval is `(0, inf)`.

        Args:
            value (`float`): The metric to reach.
            confidence (`float`, defaults to 0.95): Of the interval.
            value_log_variance (`float`, defaults to 0.0): Squared standard error of `ln(value)`.

        Returns:
            `tuple[float, float]`: from and to.
        """
        t_squared = student_t(confidence, self.degrees_of_freedom) ** 2
        gap = self.level - math.log(value)
        square = self.exponent**2 - t_squared * self.exponent_variance
        if square <= 0:
            return 0.0, math.inf
        half = self.exponent * gap
        rest = gap**2 - t_squared * (self.level_variance + value_log_variance)
        reach = math.sqrt(
            max(half**2 - square * rest, 0.0)
        )  # below 0 by rounding alone: the line's own root is inside
        low, high = (self.center + (-half + sign * reach) / square for sign in (-1, 1))
        return math.exp(low), math.exp(high)


class ParityRatio(NamedTuple):
    """FLOPs that reach a baseline's value, divided by the baseline's own; below 1 less compute suffices.

    Args:
        ratio (`float`): By the line.
        low (`float`): Lower end of its interval.
        high (`float`): Upper end.
        is_extrapolated (`bool`): Whether the line had to be drawn beyond its points.
    """

    ratio: float
    low: float
    high: float
    is_extrapolated: bool


def _as_positive(numbers: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(numbers, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"`{name}` has shape {array.shape}; give one number to a point.")
    if bad := [number for number in array.tolist() if not (math.isfinite(number) and number > 0)]:
        raise ValueError(f"`{name}` holds {bad}: a logarithm needs numbers above 0. Leave such points out.")
    return array


def fit_power_law(flops: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> PowerLaw:
    """Fits a straight line to the logarithms by least squares.

    Args:
        flops (`Sequence[float]` of length `(points,)`): Training FLOPs of each run.
        values (`Sequence[float]` of length `(points,)`): Its metric, above 0.

    Returns:
        [`PowerLaw`]: with the standard errors of level and exponent.

    Raises:
        ValueError: If there are fewer than 3 points or all have the same FLOPs, lengths differ, or a number is not
            above 0.

    Source: Transfusion (arXiv 2408.11039), section 4.2. Differs: the paper prints no uncertainty.

    Example:
        >>> law = fit_power_law([1e12, 1e13, 1e14], [64.0, 32.0, 16.0])
        >>> round(law.exponent, 4), round(law.flops_for(8.0) / 1e15, 4)
        (-0.301, 1.0)

    """
    x, y = np.log(_as_positive(flops, "flops")), np.log(_as_positive(values, "values"))
    if len(x) != len(y):
        raise ValueError(f"`flops` has {len(x)} entries and `values` {len(y)}; give one value to each run.")
    if len(x) < 3:
        raise ValueError(f"`flops` has {len(x)} entries; a line with an uncertainty needs at least 3.")
    center = x.mean()
    spread = float(((x - center) ** 2).sum())
    if spread == 0:
        raise ValueError(f"`flops` are all {math.exp(center):g}; a line needs runs of different compute.")
    level, exponent = y.mean(), float(((x - center) * y).sum()) / spread
    residuals = y - level - exponent * (x - center)
    variance = float((residuals**2).sum()) / (len(x) - 2)
    reach = float(np.exp(x.min())), float(np.exp(x.max()))
    return PowerLaw(float(level), exponent, float(center), variance / len(x), variance / spread, len(x) - 2, reach)


def parity_flop_ratio(
    law: PowerLaw, value: float, flops: float, *, confidence: float = 0.95, value_log_variance: float = 0.0
) -> ParityRatio:
    """Relates the compute that reaches a baseline's result to the baseline's own.

    Args:
        law ([`PowerLaw`]): Of the model that is compared.
        value (`float`): What the baseline's largest run reaches.
        flops (`float`): FLOPs of that run.
        confidence (`float`, defaults to 0.95): Of the interval.
        value_log_variance (`float`, defaults to 0.0): Squared standard error of `ln(value)`.

    Returns:
        [`ParityRatio`]: 0.029 for Transfusion's FID against Chameleon 7B, which is 34 times less compute.

    Raises:
        ValueError: If a number is not above 0, or the line is level.

    Source: Transfusion (arXiv 2408.11039), section 4.2 and table 3.
    """
    _as_positive([value], "value")
    _as_positive([flops], "flops")
    needed = law.flops_for(value)
    low, high = law.flops_interval(value, confidence=confidence, value_log_variance=value_log_variance)
    least, most = law.flops_range
    return ParityRatio(needed / flops, low / flops, high / flops, not least <= needed <= most)


def within_bounds(
    values: Sequence[float] | np.ndarray, *, at_least: float | None = None, at_most: float | None = None
) -> np.ndarray:
    """Marks the points that a fit takes; what is no number is not among them.

    Args:
        values (`Sequence[float]`): The metric of each run.
        at_least (`float`, *optional*): Least value; see [`PAPER_BOUNDS`] for the paper's.
        at_most (`float`, *optional*): Largest value.

    Returns:
        `np.ndarray` of bool: True where the value is within the bounds.
    """
    array = np.asarray(values, dtype=np.float64)
    low, high = (-math.inf if at_least is None else at_least), (math.inf if at_most is None else at_most)
    return np.isfinite(array) & (array >= low) & (array <= high)


def theoretical_training_flops(num_parameters: float, num_tokens: float) -> float:
    """Returns `6 * parameters * tokens`, forward and backward, without attention's products of activations.

    Args:
        num_parameters (`float`): Trained parameters, embeddings included.
        num_tokens (`float`): Tokens and patches that were trained on.

    Source: Transfusion (arXiv 2408.11039), section 4.2.
    """
    return 6.0 * num_parameters * num_tokens


def count_flops(step: Callable[[], Any]) -> int:
    """Counts the FLOPs of the matrix products, convolutions and attentions that a call runs.

    Two to each multiplication and addition. PyTorch's counter knows its fused attention on GPUs and not that on CPUs,
    so the call should use attention of matrix products (`attn_implementation="eager"`). What a mask hides counts too.

    Args:
        step (`Callable`): Such as one forward and backward.

    Returns:
        `int`: FLOPs.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())
