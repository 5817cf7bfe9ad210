"""Trains sizes and budgets of one or several families, and fits how a metric goes with training FLOPs.

python recipes/scaling.py --config recipes/configs/reproductions/scaling.yaml
python recipes/scaling.py --config recipes/configs/reproductions/scaling.yaml --quick  # that all runs

A variant `family.size` belongs to the line of its family. The same command goes on where it was stopped. Raw results,
tables and the plot (metric against FLOPs, as figure 5 of Transfusion) are in `results_dir`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from grid import GridArguments, read_rows, results_path, run_grid
from hf_mm.evaluation.scaling import (
    PAPER_BOUNDS,
    ParityRatio,
    PowerLaw,
    fit_power_law,
    parity_flop_ratio,
    within_bounds,
)
from hf_mm.evaluation.scaling_plot import draw_scaling_plot
from hf_mm.training.recipe import parse_recipe
from reproduce import read_metric, spell_page


Points = dict[str, list[tuple[float, float]]]
PAPER_BOUNDS_AS_TEXT = [
    f"{metric} {sign} {bound:g}"
    for metric, pair in PAPER_BOUNDS.items()
    for sign, bound in zip((">=", "<="), pair, strict=True)
    if bound is not None
]


@dataclass
class ScalingArguments(GridArguments):
    """What is fitted to a grid."""

    metrics: list[str] = field(
        default_factory=lambda: ["drawn.overall.scene_correct"],
        metadata={"help": "Scores of the evaluations, a line each; `1 - score` is the share that is wrong."},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Family whose largest run the others are to reach; none: no parity ratio."}
    )
    flops: Literal["theoretical_flops", "counted_flops"] = field(
        default="theoretical_flops", metadata={"help": "The axis: 6ND, as in Transfusion, or what was counted."}
    )
    bounds: list[str] = field(
        default_factory=lambda: [*PAPER_BOUNDS_AS_TEXT],
        metadata={
            "help": "Each `metric >= number` or `metric <= number`: runs beyond are left out of the lines of the "
            "metrics that have this name, or end with it. Those of the paper unless given."
        },
    )


def find_bounds(metric: str, bounds: Sequence[str]) -> dict[str, float]:
    """Reads the bounds of a metric.

    Raises:
        ValueError: If a bound is not of the form `metric >= number`.
    """
    found: dict[str, float] = {}
    for text in bounds:
        parts = re.fullmatch(r"(?P<name>.+) (?P<sign>[<>]=) (?P<number>[\d.eE+-]+)", text)
        if parts is None:
            raise ValueError(f"`bounds` has {text!r}. Write `metric >= number` or `metric <= number`.")
        if parts["name"] in (metric, metric.rpartition(".")[2]):
            found["at_least" if parts["sign"] == ">=" else "at_most"] = float(parts["number"])
    return found


def collect_points(rows: Sequence[Mapping[str, Any]], metric: str, scaling: ScalingArguments) -> tuple[Points, int]:
    """Takes FLOPs and metric of every run, by family, within the bounds and above 0.

    Returns:
        `tuple[dict, int]`: the points, and how many runs were left out.
    """
    points: Points = {}
    num_left_out, bounds = 0, find_bounds(metric, scaling.bounds)
    for row in rows:
        if metric.removeprefix("1 - ") not in row["scores"]:
            continue
        value = read_metric(row, metric)
        of_family = points.setdefault(row["variant"].partition(".")[0], [])
        inside = bool(within_bounds([value], **bounds)[0])
        if inside and value > 0:
            of_family.append((row[scaling.flops], value))
        else:
            num_left_out += 1
    return points, num_left_out


def fit_families(points: Points) -> dict[str, PowerLaw]:
    """Fits a line to each family that has three runs or more, not all of the same compute."""
    return {
        family: fit_power_law(*map(list, zip(*found, strict=True)))
        for family, found in points.items()
        if len(found) >= 3 and len({flops for flops, _ in found}) > 1
    }


def relate(law: PowerLaw, baseline: Sequence[tuple[float, float]]) -> ParityRatio:
    """Compares a line with the mean of the baseline's runs of most compute."""
    most = max(flops for flops, _ in baseline)
    logs = np.log([value for flops, value in baseline if flops == most])
    variance = float(logs.var(ddof=1)) / len(logs) if len(logs) > 1 else 0.0
    return parity_flop_ratio(law, float(np.exp(logs.mean())), most, value_log_variance=variance)


def tabulate_laws(metric: str, points: Points, laws: Mapping[str, PowerLaw], baseline: str | None) -> str:
    """Spells the lines of a metric as a Markdown table."""
    lines = [
        f"| {metric} of | runs | exponent (95%) | parity FLOP ratio (95%) |",
        "|---|---|---|---|",
    ]
    for family, found in points.items():
        if family not in laws:
            lines.append(f"| {family} | {len(found)} | too few runs for a line | |")
            continue
        law = laws[family]
        low, high = law.exponent_interval()
        ratio = ""
        if baseline not in (None, family) and points.get(str(baseline)):
            parity = relate(law, points[str(baseline)])
            beyond = ", beyond the runs" if parity.is_extrapolated else ""
            ratio = f"{parity.ratio:.3g} ({parity.low:.3g} to {parity.high:.3g}){beyond}"
        lines.append(f"| {family} | {len(found)} | {law.exponent:.3f} ({low:.3f} to {high:.3f}) | {ratio} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, PowerLaw]]:
    """Runs what is missing, fits, and writes tables and plots; returns the lines by metric and family."""
    (scaling,) = parse_recipe(ScalingArguments, argv=argv)
    families = {text.partition(".")[0] for text in scaling.variants}
    if scaling.baseline is not None and scaling.baseline not in families:
        raise ValueError(f"`baseline`={scaling.baseline!r} is none of the families {sorted(families)} of `variants`.")
    run_grid(scaling)
    path = results_path(scaling)
    rows = read_rows(path)
    page = [spell_page(scaling, rows, f"scaling.py --config recipes/configs/reproductions/{scaling.name}.yaml")]
    laws: dict[str, dict[str, PowerLaw]] = {}
    for number, metric in enumerate(scaling.metrics):
        points, num_left_out = collect_points(rows, metric, scaling)
        laws[metric] = fit_families(points)
        page.append(tabulate_laws(metric, points, laws[metric], scaling.baseline))
        page.append(f"{num_left_out} runs left out; FLOPs: {scaling.flops.replace('_', ' ')}.")
        if any(points.values()):
            plot = path.with_name(f"{scaling.name}-{number}.png")
            draw_scaling_plot(points, laws[metric], plot, metric=metric)
            page.append(f"![{metric} against training FLOPs]({plot.name})")
    text = "\n\n".join(page) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return laws


if __name__ == "__main__":
    main()
