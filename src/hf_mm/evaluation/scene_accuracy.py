"""Scores drawn scenes exactly: which glyphs, in which colours, where, against the record that the prompt came from.

Objects are found bottom-up, without looking at the record: whatever stands out from the background is cut into
connected pieces, each piece takes the nearest named colour, and its outline is compared with every rendered glyph.
What was found is then compared with what the record asks for, by the rules of GenEval (arXiv 2310.11513, Sec. 3).

This file knows no model and no dataset: glyph masks come from a callable, colours from a mapping of names to RGB.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from .intervals import mean_interval


RGB = tuple[int, int, int]
GlyphRenderer = Callable[[str, int], np.ndarray]

MATCH_THRESHOLD = 0.75  # overlap below which an outline is no glyph; simple ones keep 0.84 when blurred at 32 px
COLOR_TOLERANCE = 70.0  # distance in RGB beyond which a piece, or a background, counts as no named colour
POSITION_THRESHOLD = 0.1  # GenEval's evaluation code: share of the joint extent that an offset must exceed

_WORK_PX = 64  # larger pictures are reduced to this side first: outlines need no more
_MIN_CONTRAST = 45.0  # distance in RGB from the background below which a pixel is background
_MIN_AREA = 0.004  # share of the picture below which a piece is noise
_SOLID = 0.8  # share of a piece's contrast above which a pixel shows its colour rather than its edge
_PALEST = 0.6  # a thin stroke on few pixels never reaches its colour: how much of it must be reached
_FEW_PX = 24  # pieces up to this side are compared with softened masks as well
_MIN_COLOR_SHARE = 0.25  # share of a piece's solid pixels that makes a second colour a second object
_RATES = ("scene_correct", "strict_correct", "glyph_correct", "color_correct", "background_correct")


def _spread(values: np.ndarray, radius: int) -> np.ndarray:
    """Takes the maximum over the square of `2 * radius + 1` pixels around each pixel."""
    for _ in range(radius):
        padded = np.pad(values, 1)
        rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
        values = np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])
    return values


def _label_pieces(mask: np.ndarray) -> np.ndarray:
    """Numbers the 8-connected pieces of a mask: equal numbers inside a piece, 0 outside."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        wider = np.where(mask, _spread(labels, 1), 0)
        if np.array_equal(wider, labels):
            return labels
        labels = wider


def _color_distances(
    pixels: np.ndarray, background: np.ndarray, colors: Mapping[str, RGB], palest: float
) -> np.ndarray:
    """Measures how far pixels (N, 3) lie from each colour, mixed with at most `1 - palest` of background: (N, K)."""
    contrast = np.array(list(colors.values()), dtype=np.float64) - background  # (K, 3)
    offsets = pixels - background
    shares = offsets @ contrast.T / np.maximum((contrast**2).sum(1), 1.0)  # (N, K)
    nearest = np.clip(shares, palest, 1.0)[:, :, None] * contrast
    return np.sqrt(((offsets[:, None, :] - nearest) ** 2).sum(2))


def _soften(stack: np.ndarray) -> np.ndarray:
    """Blurs masks (K, H, W) by about one pixel and stretches each to full coverage again."""
    for axis in (1, 2, 1, 2):
        stack = (np.roll(stack, 1, axis) + 2 * stack + np.roll(stack, -1, axis)) / 4
    return stack / stack.max((1, 2), keepdims=True)


@functools.lru_cache(maxsize=1024)
def _glyph_stack(
    render_glyph: GlyphRenderer, glyphs: tuple[str, ...], size_px: int, canvas_px: int, soft: bool
) -> np.ndarray:
    """Centres every glyph at one size on a canvas: (glyphs, canvas, canvas), coverage in 0..1."""
    stack = np.zeros((len(glyphs), canvas_px, canvas_px), dtype=np.float32)
    for layer, glyph in zip(stack, glyphs, strict=True):
        mask = render_glyph(glyph, size_px)
        top, left = ((canvas_px - side) // 2 for side in mask.shape)
        layer[top : top + mask.shape[0], left : left + mask.shape[1]] = mask / np.float32(255)
    return _soften(stack) if soft else stack


def _match_glyph(alpha: np.ndarray, glyphs: tuple[str, ...], render_glyph: GlyphRenderer) -> tuple[str, float]:
    """Finds the glyph whose mask overlaps a coverage map best, over neighbouring sizes and shifts of one pixel.

    The overlap is the sum of the pixelwise minimum over the sum of the pixelwise maximum. Few pixels lose thin tips
    to the slightest blur, so small outlines are compared with softened masks too.
    """
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    size = int(max(bottom - top, right - left))
    canvas_px = size + 8
    padded = np.pad(alpha, canvas_px).astype(np.float32)
    first_row = canvas_px + top - (canvas_px - (bottom - top)) // 2
    first_column = canvas_px + left - (canvas_px - (right - left)) // 2
    best = np.zeros(len(glyphs), dtype=np.float32)
    variants = [(size + growth, False) for growth in (-1, 0, 1)]
    if size <= _FEW_PX:
        variants += [(size + growth, True) for growth in (0, 1, 2)]
    for candidate, soft in variants:
        stack = _glyph_stack(render_glyph, glyphs, max(candidate, 1), canvas_px, soft)
        ink = stack.sum((1, 2))
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                row, column = first_row + down, first_column + across
                window = padded[row : row + canvas_px, column : column + canvas_px]
                shared = np.minimum(stack, window).sum((1, 2))
                best = np.maximum(best, shared / (ink + window.sum() - shared))
    winner = int(best.argmax())
    return glyphs[winner], float(best[winner])


def _split_by_color(
    pixels: np.ndarray, solid: np.ndarray, background: np.ndarray, colors: Mapping[str, RGB]
) -> np.ndarray:
    """Gives each pixel (N, 3) of a piece the number of its colour: one number, unless two colours are well present."""
    solid_distances = _color_distances(pixels[solid], background, colors, _PALEST)
    votes = np.bincount(solid_distances.argmin(1), minlength=len(colors))
    present = np.flatnonzero(votes >= _MIN_COLOR_SHARE * votes.sum())
    if len(present) < 2:
        return np.full(len(pixels), votes.argmax())
    return present[_color_distances(pixels, background, colors, 0.0)[:, present].argmin(1)]


def _describe_piece(
    picture: np.ndarray,
    piece: np.ndarray,
    free: np.ndarray,
    background: np.ndarray,
    glyphs: tuple[str, ...],
    colors: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, Any]:
    """Names one piece (mask); `free` marks the pixels that belong to no other piece, where its soft edge may lie."""
    offsets = picture - background
    contrast = np.sqrt((offsets**2).sum(2))
    solid = piece & (contrast >= _SOLID * np.percentile(contrast[piece], 90))
    distances = np.median(_color_distances(picture[solid], background, colors, _PALEST), axis=0)
    own = offsets[solid].mean(0)
    alpha = np.clip(offsets @ own / (own @ own), 0, 1) * (_spread(piece, 1) & free)
    if not (alpha > 0.5).any():
        alpha = piece.astype(np.float64)
    glyph, match = _match_glyph(alpha, glyphs, render_glyph)
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    return {
        "glyph": glyph if match >= MATCH_THRESHOLD else None,
        "color": list(colors)[int(distances.argmin())] if distances.min() <= COLOR_TOLERANCE else None,
        "box": [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1],
        "match": match,
    }


def _cut_pieces(picture: np.ndarray, background: np.ndarray, colors: Mapping[str, RGB]) -> list[np.ndarray]:
    """Cuts what stands out from the background into masks of one object each."""
    side = max(picture.shape[:2])
    contrast = np.sqrt(((picture - background) ** 2).sum(2))
    nearby = _spread(contrast, max(2, round(side / 20)))
    standing_out = contrast > np.maximum(_MIN_CONTRAST, 0.5 * nearby)  # half the contrast is the edge, blurred or not
    # Parts of one glyph may lie a little apart; objects of a scene lie a tenth of the picture apart.
    labels = np.where(standing_out, _label_pieces(_spread(standing_out, max(1, side // 32))), 0)
    pieces = []
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        if mask.sum() < max(4, _MIN_AREA * mask.size):
            continue
        solid = contrast[mask] >= _SOLID * nearby[mask]
        numbers = _split_by_color(picture[mask], solid, background, colors)
        for number in np.unique(numbers):
            piece = np.zeros_like(mask)
            piece[mask] = numbers == number
            pieces.append(piece)
    return pieces


def _as_picture(image: np.ndarray) -> np.ndarray:
    """Checks a picture and reduces it to at most `_WORK_PX`."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"`image` has shape {image.shape} and dtype {image.dtype}. Give uint8 of (height, width, 3).")
    side = max(image.shape[:2])
    if side > _WORK_PX:
        height, width = (max(1, round(length * _WORK_PX / side)) for length in image.shape[:2])
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))
    return image.astype(np.float64)


def _border_color(picture: np.ndarray) -> np.ndarray:
    border = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
    return np.median(np.concatenate(border), axis=0)


def _nearest_color(value: np.ndarray, colors: Mapping[str, RGB]) -> str | None:
    distances = {name: float(np.linalg.norm(value - np.array(color))) for name, color in colors.items()}
    name = min(distances, key=lambda color: distances[color])
    return name if distances[name] <= COLOR_TOLERANCE else None


def find_objects(
    image: np.ndarray, *, glyphs: Sequence[str], colors: Mapping[str, RGB], render_glyph: GlyphRenderer
) -> list[dict[str, Any]]:
    """Finds the glyphs in a picture of plain background, knowing nothing of what was asked for.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8 RGB.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Names of the colours an object may have, with their RGB.
        render_glyph (`Callable`):
            `render_glyph(glyph, size_px)` gives a glyph's uint8 coverage mask, cropped to its ink, `size_px` long on
            its longer side.

    Returns:
        `list[dict]`: for each object, largest first, `glyph` and `color` (`None` where nothing matches), `box`
        `[x0, y0, x1, y1]` in pixels with x1 and y1 exclusive, and `match`, the overlap with the best glyph in 0..1.

    Raises:
        ValueError: If the image is not uint8 of `(height, width, 3)`.

    """
    picture = _as_picture(image)
    background = _border_color(picture)
    # The background's own colour is no colour an object can be seen in.
    visible = {name: rgb for name, rgb in colors.items() if np.linalg.norm(background - rgb) > _MIN_CONTRAST}
    pieces = _cut_pieces(picture, background, visible)
    taken = np.sum(pieces, axis=0) if pieces else None
    minimum = max(4, _MIN_AREA * picture.shape[0] * picture.shape[1])
    scale = max(image.shape[:2]) / max(picture.shape[:2])
    found = []
    for piece in sorted(pieces, key=lambda mask: -int(mask.sum())):
        if piece.sum() >= minimum:
            item = _describe_piece(
                picture, piece, taken - piece == 0, background, tuple(glyphs), visible, render_glyph
            )
            found.append(item | {"box": [round(edge * scale) for edge in item["box"]]})
    return found


def relations_between(first: Sequence[float], second: Sequence[float]) -> set[str]:
    """Names where one box lies as seen from another.

    Args:
        first (`Sequence[float]`): Box `[x0, y0, x1, y1]`.
        second (`Sequence[float]`): Box it is compared with.

    Returns:
        `set[str]`: a subset of `{"left of", "right of", "above", "below"}`; empty when the centres nearly coincide.

    Source: GenEval (arXiv 2310.11513), `relative_position` of its evaluation code.

    """
    boxes = np.array([first, second], dtype=np.float64).reshape(2, 2, 2)  # (box, corner, axis)
    offset = np.subtract(*boxes.mean(1))
    extent = np.abs(np.diff(boxes, axis=1))[:, 0].sum(0)
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * extent, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    across, down = beyond / np.linalg.norm(offset)
    names = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in names.items() if holds}


def _relation_holds(found: Sequence[Mapping[str, Any]], scene: Mapping[str, Any]) -> bool:
    if scene["relation"] is None:
        return True
    subject, target = (
        [item["box"] for item in found if (item["glyph"], item["color"]) == (asked["glyph"], asked["color"])]
        for asked in scene["objects"]
    )
    return any(scene["relation"] in relations_between(one, other) for one in subject for other in target)


def compare_with_scene(
    found: Sequence[Mapping[str, Any]], background: str | None, scene: Mapping[str, Any]
) -> dict[str, bool]:
    """Compares found objects with a scene record.

    Args:
        found (`Sequence[Mapping]`): Objects with `glyph`, `color` and `box`, as from `find_objects`.
        background (`str`, *optional*): Name of the background's colour; `None` where it is like no named one.
        scene (`Mapping`): Record with `kind`, `background`, `relation` and `objects` (each with `glyph` and `color`).

    Returns:
        `dict[str, bool]`: `glyph_correct` and `color_correct` (all asked glyphs, all asked colours are there, in
        whatever pairing), `background_correct`, `scene_correct` (GenEval's rule: all asked objects are there in their
        colours, in the asked relation, and for `counting` in exactly that number) and `strict_correct` (the same, and
        nothing else is there, on the asked background).

    Source: GenEval (arXiv 2310.11513), Sec. 3.

    """
    asked = Counter((item["glyph"], item["color"]) for item in scene["objects"])
    seen = Counter((item["glyph"], item["color"]) for item in found)
    numbers_hold = all(
        seen[look] == count if scene["kind"] == "counting" else seen[look] >= count for look, count in asked.items()
    )
    scene_correct = numbers_hold and _relation_holds(found, scene)
    return {
        "scene_correct": scene_correct,
        "strict_correct": scene_correct and seen == asked and background == scene["background"],
        "glyph_correct": _project(asked, 0) <= _project(seen, 0),
        "color_correct": _project(asked, 1) <= _project(seen, 1),
        "background_correct": background == scene["background"],
    }


def _project(looks: Counter[tuple[str, str]], part: int) -> Counter[str]:
    """Counts glyphs (part 0) or colours (part 1) alone."""
    return Counter(look[part] for look in looks.elements())


def score_scene(
    image: np.ndarray,
    scene: Mapping[str, Any] | str,
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, Any]:
    """Scores one picture against the scene its prompt came from.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8 RGB.
        scene (`Mapping` or `str`): Scene record, or the JSON string of it.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict`: `kind`, `objects` as from `find_objects`, `background` (the nearest name, or `None`), and the verdicts
        of `compare_with_scene`.

    Raises:
        ValueError: If the image is not uint8 of `(height, width, 3)`.

    """
    record = json.loads(scene) if isinstance(scene, str) else scene
    found = find_objects(image, glyphs=glyphs, colors=colors, render_glyph=render_glyph)
    background = _nearest_color(_border_color(_as_picture(image)), backgrounds)
    verdicts = compare_with_scene(found, background, record)
    return {"kind": record["kind"], "objects": found, "background": background, **verdicts}


def summarize_scores(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Averages the verdicts of `score_scene` over all pictures and over each kind of scene.

    Args:
        scores (`Sequence[Mapping]`): One per picture.

    Returns:
        `dict[str, dict]`: under `"overall"` and under each kind that occurs, `num_images`, the share of pictures for
        which each verdict holds, and under `intervals` both ends of the bootstrap interval of each share.

    Raises:
        ValueError: If there are no scores.

    """
    if not scores:
        raise ValueError("`scores` is empty. Give the score of at least one picture.")
    groups: dict[str, list[Mapping[str, Any]]] = {"overall": list(scores)}
    for score in scores:
        groups.setdefault(score["kind"], []).append(score)
    return {
        name: {
            "num_images": len(group),
            **{rate: sum(score[rate] for score in group) / len(group) for rate in _RATES},
            "intervals": {rate: list(mean_interval([score[rate] for score in group])) for rate in _RATES},
        }
        for name, group in groups.items()
    }


def scene_accuracy(
    images: Sequence[np.ndarray] | np.ndarray,
    scenes: Sequence[Mapping[str, Any] | str],
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, dict[str, Any]]:
    """Scores pictures against the scenes their prompts came from and averages the verdicts.

    Args:
        images (`Sequence[np.ndarray]`): uint8 RGB pictures of shape `(height, width, 3)`.
        scenes (`Sequence`): As many scene records, or JSON strings of them.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, dict]`: as from `summarize_scores`.

    Raises:
        ValueError: If there is no picture, the numbers differ, or a picture is not uint8 of `(height, width, 3)`.

    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} `images` do not go with {len(scenes)} `scenes`. Give one scene per image.")
    score = functools.partial(
        score_scene, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph
    )
    return summarize_scores([score(image, scene) for image, scene in zip(images, scenes, strict=True)])


def chance_accuracy(scenes: Sequence[Mapping[str, Any] | str]) -> float:
    """Computes the share of `scene_correct` that perfect pictures of these scenes get with shuffled prompts.

    Each scene is held against every other, so this is the level that a drawer blind to its prompt would reach.

    Args:
        scenes (`Sequence`): At least two scene records, or JSON strings of them.

    Returns:
        `float`: mean over all ordered pairs of different rows.

    Raises:
        ValueError: If there are fewer than two scenes.

    """
    if len(scenes) < 2:
        raise ValueError(f"{len(scenes)} `scenes` cannot be shuffled. Give at least two.")
    records = [json.loads(scene) if isinstance(scene, str) else scene for scene in scenes]
    drawn = [[item | {"box": _box_of(item)} for item in record["objects"]] for record in records]
    hits = sum(
        compare_with_scene(drawn[other], records[other]["background"], record)["scene_correct"]
        for row, record in enumerate(records)
        for other in range(len(records))
        if other != row
    )
    return hits / (len(records) * (len(records) - 1))


def _box_of(item: Mapping[str, float]) -> list[float]:
    half = item["size"] / 2
    return [item["x"] - half, item["y"] - half, item["x"] + half, item["y"] + half]
