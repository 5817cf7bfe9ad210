"""The record of a run: one line of numbers per log entry, and the loss curves drawn from it.

Knows names and numbers. Does not know where they come from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw


CURVE_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Reads the log entries of a run.

    Args:
        path (`str` or `Path`): A `history.jsonl`; a file that does not exist has no entries.

    Returns:
        `list[dict[str, float]]`: One dictionary per entry, with `step` and the logged values. A last line that was
        cut off by a crash is left out.

    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # what follows the last line end was cut off


def truncate_history(path: str | Path, last_step: int) -> None:
    """Drops the entries after a step, as a run does that resumes from there.

    Args:
        path (`str` or `Path`): A `history.jsonl`.
        last_step (`int`): The last step whose entry stays.

    """
    path = Path(path)
    if path.exists():
        kept = [entry for entry in read_history(path) if entry["step"] <= last_step]
        replacement = path.with_suffix(".tmp")
        replacement.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        replacement.replace(path)


def append_history(path: str | Path, entry: Mapping[str, float]) -> None:
    """Adds one log entry at the end.

    Args:
        path (`str` or `Path`): A `history.jsonl`, created if absent.
        entry (`Mapping[str, float]`): `step` and the logged values.

    """
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(entry)) + "\n")


def draw_loss_curves(
    entries: Sequence[Mapping[str, float]], path: str | Path, *, size_px: tuple[int, int] = (960, 540)
) -> None:
    """Draws every logged value whose name contains `loss` over the steps, on a logarithmic axis, into a picture file.

    Values that are not above 0 have no place on the axis and are left out.

    Args:
        entries (`Sequence[Mapping[str, float]]`): From `read_history`.
        path (`str` or `Path`): The picture to write, e.g. `loss_curves.png`. Nothing is written without two points.
        size_px (`tuple[int, int]`): Width and height.

    """
    names = sorted({name for entry in entries for name in entry if "loss" in name})
    curves = {
        name: [(entry["step"], math.log10(entry[name])) for entry in entries if entry.get(name, 0) > 0]
        for name in names
    }
    points = [point for curve in curves.values() for point in curve]
    if len(points) < 2:
        return
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    left, top, right, bottom = 70, 20, size_px[0] - 20, size_px[1] - 40

    def place(step: float, log_value: float) -> tuple[float, float]:
        across = (step - first) / max(last - first, 1)
        up = (log_value - low) / max(high - low, 1e-9)
        return left + across * (right - left), bottom - up * (bottom - top)

    picture = Image.new("RGB", size_px, "white")
    draw = ImageDraw.Draw(picture)
    for tick in range(5):
        step, log_value = first + (last - first) * tick / 4, low + (high - low) * tick / 4
        x, y = place(step, log_value)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((5, y - 6), f"{10**log_value:.4g}", fill="black")
        draw.text((x - 15, bottom + 10), f"{step:.0f}", fill="black")
    for number, (name, curve) in enumerate(curves.items()):
        color = CURVE_COLORS[number % len(CURVE_COLORS)]
        if len(curve) > 1:
            draw.line([place(*point) for point in curve], fill=color, width=2)
        draw.text((right - 220, top + 16 * number), name, fill=color)
    picture.save(path)
