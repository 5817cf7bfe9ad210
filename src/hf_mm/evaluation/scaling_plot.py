"""Draws a metric against training FLOPs, both on logarithmic axes: points of every run, and a line for each family.

Knows numbers and names, and no metric.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .scaling import PowerLaw


COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
Point = tuple[float, float]


def draw_scaling_plot(
    points: Mapping[str, Sequence[Point]],
    laws: Mapping[str, PowerLaw],
    path: str | Path,
    *,
    metric: str,
    size_px: tuple[int, int] = (720, 480),
) -> Path:
    """Draws the runs of each family, and the line that was fitted to them.

    Args:
        points (`Mapping[str, Sequence[tuple[float, float]]]`): FLOPs and metric of each family's runs, above 0.
        laws (`Mapping[str, PowerLaw]`): Lines, of the families that have one.
        path (`str` or `Path`): Picture file to write.
        metric (`str`): What stands beside the axis.
        size_px (`tuple[int, int]`): Width and height.

    Returns:
        `Path`: where it is.

    Raises:
        ValueError: If there is no point.

    Source: Transfusion (arXiv 2408.11039), figure 5.
    """
    everything = [(math.log10(x), math.log10(y)) for family in points.values() for x, y in family]
    if not everything:
        raise ValueError("`points` holds no run to draw.")
    (first, last), (low, high) = (_widen([point[axis] for point in everything]) for axis in (0, 1))
    left, top, right, bottom = 70, 30, size_px[0] - 20, size_px[1] - 50

    def place(x: float, y: float) -> Point:
        across, up = (math.log10(x) - first) / (last - first), (math.log10(y) - low) / (high - low)
        return left + across * (right - left), bottom - up * (bottom - top)

    picture = Image.new("RGB", size_px, "white")
    pen = ImageDraw.Draw(picture)
    for share in np.linspace(0, 1, 5):
        flops, value = 10 ** (first + share * (last - first)), 10 ** (low + share * (high - low))
        across, up = place(flops, value)
        pen.line([(left, up), (right, up)], fill="#dddddd")
        pen.line([(across, top), (across, bottom)], fill="#dddddd")
        pen.text((5, up - 6), f"{value:.3g}", fill="black")
        pen.text((across - 20, bottom + 8), f"{flops:.1e}", fill="black")
    pen.text((5, 8), metric, fill="black")
    pen.text(((left + right) / 2 - 40, bottom + 26), "training FLOPs", fill="black")
    for number, (name, family) in enumerate(points.items()):
        color = COLORS[number % len(COLORS)]
        for x, y in family:
            across, up = place(x, y)
            pen.ellipse((across - 4, up - 4, across + 4, up + 4), outline=color, fill=color)
        if name in laws:
            ends = laws[name].flops_range
            pen.line([place(flops, float(laws[name].predict(flops))) for flops in ends], fill=color, width=2)
        pen.text((right - 160, top + 4 + 14 * number), name, fill=color)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def _widen(values: Sequence[float]) -> tuple[float, float]:
    """Range of an axis, with a margin."""
    margin = 0.08 * (max(values) - min(values)) or 0.1
    return min(values) - margin, max(values) + margin
