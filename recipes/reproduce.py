"""Tests a finding of a paper in miniature: trains and scores its variants, and says whether the finding holds.

python recipes/reproduce.py --config recipes/configs/reproductions/attention.yaml
python recipes/reproduce.py --config recipes/configs/reproductions/attention.yaml --quick  # that all runs; no verdict

The same command goes on where it was stopped, and shares models with the other experiments. Raw results and a table
are in docs/reproductions; docs/reproductions.md says what each experiment is and by which rule it is decided.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grid import GridArguments, read_rows, results_path, run_grid, split_name
from hf_mm.evaluation.comparison import Comparison, compare_paired, join_verdicts
from hf_mm.training.recipe import parse_recipe


Rows = Sequence[Mapping[str, Any]]
OPERAND = re.compile(r"(?P<variant>[^@/:]+)(?:@(?P<budget>[^/:]+))?(?:/(?P<evaluation>[^:]+))?(?::(?P<metric>.+))?")


class Finding(NamedTuple):
    """A comparison that was asked for, and what came of it; nothing where rows are missing."""

    asked: str
    first: float
    second: float
    seeds: list[int]
    result: Comparison


def read_metric(row: Mapping[str, Any], metric: str) -> float:
    """Reads a score of a row; `1 - name` is the share that is wrong."""
    score = row["scores"][metric.removeprefix("1 - ")]
    return 1 - score if metric.startswith("1 - ") else score


def values_by_seed(rows: Rows, operand: str, metric: str) -> dict[int, float]:
    """Reads the scores of `variant@budget/evaluation:metric` for each seed; no more of it than tells rows apart.

    Raises:
        ValueError: If the rows of several budgets or evaluations fit, or none of the variant has the metric.
    """
    found = OPERAND.fullmatch(operand.strip())
    if found is None:
        raise ValueError(f"`comparisons`: {operand!r} is no `variant@budget/evaluation:metric`.")
    wanted = {name: value for name, value in found.groupdict().items() if value is not None}
    metric = wanted.pop("metric", metric)
    of_operand = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    fitting = [row for row in of_operand if metric.removeprefix("1 - ") in row["scores"]]
    if of_operand and not fitting:
        known = sorted({name for row in of_operand for name in row["scores"]})
        raise ValueError(f"`comparisons`: {operand!r} has no score {metric!r}. There are {known}.")
    for name in ("budget", "evaluation"):
        if len(several := {row[name] for row in fitting}) > 1:
            raise ValueError(f"`comparisons`: {operand!r} may be any {name} of {sorted(several)}. Name one.")
    return {row["seed"]: read_metric(row, metric) for row in fitting}


def weigh(rows: Rows, comparison: str) -> Finding | None:
    """Decides one comparison by the seeds that all its operands have; None while there are none.

    Raises:
        ValueError: If it is not of the form `metric: A > B`.
    """
    metric, claim = split_name(comparison, "comparisons")
    sides = re.split(r" ([<>]) ", claim)
    if len(sides) != 3:
        raise ValueError(f"`comparisons` has {comparison!r}. Write `metric: A > B` or `metric: A < B`.")
    terms = [[values_by_seed(rows, term, metric) for term in side.split(" - ")] for side in (sides[0], sides[2])]
    seeds = sorted(set.intersection(*(set(term) for side in terms for term in side)))
    if not seeds:
        return None
    first, second = ([side[0][seed] - sum(term[seed] for term in side[1:]) for seed in seeds] for side in terms)
    larger, smaller = (first, second) if sides[1] == ">" else (second, first)
    return Finding(
        comparison, sum(first) / len(seeds), sum(second) / len(seeds), seeds, compare_paired(larger, smaller)
    )


def named_metrics(comparison: str) -> list[str]:
    """The metrics that a comparison names, once for all or behind an operand."""
    metric, claim = split_name(comparison, "comparisons")
    operands = [OPERAND.fullmatch(term.strip()) for term in re.split(r" [<>-] ", claim)]
    return [metric, *(found["metric"] for found in operands if found is not None and found["metric"])]


def tabulate_findings(rows: Rows, comparisons: Sequence[str]) -> tuple[str, str]:
    """Spells comparisons as a Markdown table.

    Returns:
        `tuple[str, str]`: the table and what all say together; both say so where nothing was run.
    """
    findings = [weigh(rows, comparison) for comparison in comparisons]
    lines = ["| claim | left | right | margin (95%) | seeds | verdict |", "|---|---|---|---|---|---|"]
    for asked, found in zip(comparisons, findings, strict=True):
        if found is None:
            lines.append(f"| {asked} | | | | 0 | not run |")
            continue
        result = found.result
        interval = f"{result.low:.3f} to {result.high:.3f}" if math.isfinite(result.low) else "none"
        lines.append(
            f"| {asked} | {found.first:.3f} | {found.second:.3f} | {result.difference:.3f} ({interval}) "
            f"| {len(found.seeds)} | {result.verdict} |"
        )
    decided = [found.result.verdict for found in findings if found is not None]
    if not decided:
        return "\n".join(lines), "not run"
    return "\n".join(lines), join_verdicts(decided) if len(decided) == len(findings) else "undecided"


def tabulate_runs(rows: Rows, metrics: Sequence[str]) -> str:
    """Spells the means over seeds as a Markdown table, a row to each variant, budget and evaluation."""
    head = ["variant", "evaluation", "seeds", "steps", "images", "tokens", "FLOPs counted", "6ND", *metrics]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key in dict.fromkeys((row["variant"], row["budget"], row["evaluation"]) for row in rows):
        group = [row for row in rows if (row["variant"], row["budget"], row["evaluation"]) == key]
        first = group[0]
        facts = [
            "" if (value := first.get(name)) is None else f"{value:.3g}" if value > 1e5 else f"{value:.0f}"
            for name in ("max_steps", "num_images", "num_tokens", "counted_flops", "theoretical_flops")
        ]
        means = [mean_of(group, metric) for metric in metrics]
        variant = first["variant"] + (f"@{first['budget']}" if first["budget"] else "")
        lines.append(f"| {' | '.join([variant, first['evaluation'], str(len(group)), *facts, *means])} |")
    return "\n".join(lines)


def mean_of(rows: Rows, metric: str) -> str:
    """The mean of a score and its standard deviation over seeds; nothing where an evaluation does not measure it."""
    values = [read_metric(row, metric) for row in rows if metric.removeprefix("1 - ") in row["scores"]]
    if not values:
        return ""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.3f}"


def spell_page(grid: GridArguments, rows: Rows, config: str) -> str:
    """Writes the page of an experiment: the claim, its verdict, the comparisons, the runs, the command."""
    table, verdict = tabulate_findings(rows, grid.comparisons)
    metrics = list(dict.fromkeys(metric for text in grid.comparisons for metric in named_metrics(text)))
    return "\n\n".join(
        [
            f"# {grid.name}",
            grid.claim,
            f"**{verdict}**",
            table,
            tabulate_runs(rows, metrics),
            f"From `{grid.name}.jsonl` by `python recipes/{config}`.\n",
        ]
    )


def main(argv: Sequence[str] | None = None) -> str:
    """Runs what is missing, and writes the table; returns the verdict."""
    (grid,) = parse_recipe(GridArguments, argv=argv)
    run_grid(grid)
    path = results_path(grid)
    rows = read_rows(path)
    page = spell_page(grid, rows, f"reproduce.py --config recipes/configs/reproductions/{grid.name}.yaml")
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)
    print(f"Raw results and table are in {path} and {path.with_suffix('.md')}.")
    return tabulate_findings(rows, grid.comparisons)[1]


if __name__ == "__main__":
    main()
