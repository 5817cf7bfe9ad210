"""Times the drawing of icon scenes on one core, bare and through the stream.

python benchmarks/scene_drawing.py --size_px 64 --output scene_drawing.json
"""

import argparse
import functools
from typing import Any

import datasets
import numpy as np
import PIL

from hf_mm.data.icon_scenes import GLYPH_SETS, draw_scene, icon_scenes_stream
from timing import benchmark_parser, describe, take_turns, tell


def draw_rows(num_rows: int, size_px: int, glyph_set: str) -> int:
    """Draws rows and drops them."""
    for index in range(num_rows):
        draw_scene(index, 0, size_px, glyph_set)
    return num_rows


def read_stream(num_rows: int, size_px: int, glyph_set: str) -> int:
    """Reads rows through the stream, which encodes and decodes each picture."""
    return sum(1 for _ in icon_scenes_stream(num_rows, size_px=size_px, glyph_set=glyph_set))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures bare drawing and the stream for both glyph sets in turn, and says on what."""
    result = describe(arguments, (np, PIL, datasets))
    deeds = {
        f"{glyph_set} {read_rows.__name__}": functools.partial(
            read_rows, arguments.num_rows, arguments.size_px, glyph_set
        )
        for glyph_set in GLYPH_SETS
        for read_rows in (draw_rows, read_stream)
    }
    for name, clock in take_turns(deeds, arguments.num_repeats).items():  # the first round fills the cache of glyphs
        result[name] = {"rows_per_second": {deed: round(arguments.num_rows / clock.median(deed)) for deed in deeds}}
    return result


def main() -> None:
    """Reads the arguments, measures, prints and writes."""
    parser = benchmark_parser(__doc__, num_threads=None, num_repeats=5)
    parser.add_argument("--size_px", type=int, default=64)
    parser.add_argument("--num_rows", type=int, default=1000)
    arguments = parser.parse_args()
    tell(measure(arguments), arguments.output)


if __name__ == "__main__":
    main()
