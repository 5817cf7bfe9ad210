"""Measures how many icon scenes one core draws each second.

python benchmarks/scene_drawing.py --size_px 64 --output scene_drawing.json
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import PIL

from hf_mm.data.icon_scenes import GLYPH_SETS, draw_scene, icon_scenes_stream


def rows_per_second(read_rows: Callable[[], int], rounds: int) -> float:
    """Gives the median over rounds; processor time, so that other programs on the machine do not count."""
    rates = []
    for _ in range(rounds):
        start = time.process_time()
        num_rows = read_rows()
        rates.append(num_rows / (time.process_time() - start))
    return statistics.median(rates)


def draw_rows(num_rows: int, size_px: int, glyph_set: str) -> int:
    """Draws rows and drops them."""
    for index in range(num_rows):
        draw_scene(index, 0, size_px, glyph_set)
    return num_rows


def read_stream(num_rows: int, size_px: int, glyph_set: str) -> int:
    """Reads rows through the stream, which encodes and decodes each picture."""
    return sum(1 for _ in icon_scenes_stream(num_rows, size_px=size_px, glyph_set=glyph_set))


def measure(size_px: int, num_rows: int, rounds: int) -> dict[str, float]:
    """Measures bare drawing and the stream for both glyph sets."""
    rates = {}
    for glyph_set in GLYPH_SETS:
        draw_rows(num_rows, size_px, glyph_set)  # fills the cache of glyph masks
        for read_rows in (draw_rows, read_stream):
            partial = functools.partial(read_rows, num_rows, size_px, glyph_set)
            rates[f"{glyph_set} {read_rows.__name__}"] = rows_per_second(partial, rounds)
    return rates


def main() -> None:
    """Prints machine, versions and medians, and writes them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size_px", type=int, default=64)
    parser.add_argument("--num_rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "numpy": np.__version__, "pillow": PIL.__version__}
    result = {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "versions": versions | {"datasets": datasets.__version__},
        "size_px": args.size_px,
        "median_rows_per_cpu_second": measure(args.size_px, args.num_rows, args.rounds),
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
