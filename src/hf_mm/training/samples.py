"""Pictures of how far a run has come: a grid of samples with their prompts beneath.

Knows pictures and strings; who draws them is not its affair.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw


LINE_PX = 12


def captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str], *, num_columns: int = 8, side_px: int = 128
) -> Image.Image:
    """Arranges pictures in rows, each with its caption beneath.

    Args:
        images (`Sequence[PIL.Image.Image]`): The pictures, scaled to squares of `side_px`.
        captions (`Sequence[str]`): One per picture, wrapped to at most four lines.
        num_columns (`int`, defaults to 8): Pictures per row.
        side_px (`int`, defaults to 128): Pixels per picture.

    Returns:
        `PIL.Image.Image`: the grid, on white.

    Raises:
        ValueError: If there are not as many captions as pictures, or none at all.
    """
    if len(images) != len(captions) or not images:
        raise ValueError(
            f"`images` has {len(images)} entries and `captions` {len(captions)}; need as many, at least 1."
        )
    num_columns = min(num_columns, len(images))
    wrapped = [textwrap.wrap(caption, width=side_px // 6)[:4] for caption in captions]
    text_px = LINE_PX * max(len(lines) for lines in wrapped) + 4
    num_rows = -(-len(images) // num_columns)
    grid = Image.new("RGB", (num_columns * (side_px + 4) + 4, num_rows * (side_px + text_px + 4) + 4), "white")
    pen = ImageDraw.Draw(grid)
    for number, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left = 4 + number % num_columns * (side_px + 4)
        top = 4 + number // num_columns * (side_px + text_px + 4)
        scaled = image.convert("RGB").resize((side_px, side_px), Image.Resampling.NEAREST)
        grid.paste(scaled, (left, top))
        pen.rectangle((left - 1, top - 1, left + side_px, top + side_px), outline="#cccccc")
        pen.text((left, top + side_px + 2), "\n".join(lines), fill="black", spacing=1)
    return grid


def save_captioned_grid(
    images: Sequence[Image.Image], captions: Sequence[str], path: str | Path, *, num_columns: int = 8
) -> Path:
    """Saves a grid of pictures, whole or not at all; see `captioned_grid`.

    Returns:
        `Path`: where it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    captioned_grid(images, captions, num_columns=num_columns).save(partial, format="png")
    partial.replace(path)
    return path
