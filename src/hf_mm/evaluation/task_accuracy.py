"""Scores drawn answers of the tasks of instruction tuning exactly: edits, layouts, structure, writing.

Pictures are read bottom-up, as in `scene_accuracy.py`, and compared with the record of the scene asked for. Places and
sizes count as kept within about a tenth of the picture: finer than the difference between two named places or sizes,
coarser than what words leave open.

This file knows arrays and scene records; it knows no model and no dataset. Glyph masks come from a callable, names of
glyphs and colours as arguments. How answers and captions are scored is in `text_accuracy.py`.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .scene_accuracy import RGB, GlyphRenderer, score_scene
from .text_accuracy import answer_accuracy, caption_accuracy, check_columns


__all__ = [
    "answer_accuracy",
    "box_accuracy",
    "box_iou",
    "caption_accuracy",
    "edit_success",
    "expected_masks",
    "score_edit",
    "score_structure",
    "structure_adherence",
    "writing_accuracy",
]


TextRenderer = Callable[[str, int], np.ndarray]

PLACE_TOLERANCE = 0.1  # of the picture's side, along each axis; named places lie 0.24 or more apart
SIZE_TOLERANCE = 0.12  # of the picture's side; named sizes lie 0.16 or more apart, and span 0.08
BOX_IOU = 0.5  # usual in detection
STRUCTURE_IOU = 0.7  # looser than pixel for pixel, tighter than the right place and size of another outline
WRITING_MATCH = 0.6  # overlap below which ink is no text; strokes are one or two pixels wide at 32 px

_ASPECTS = ("glyph", "color", "place", "size")
_FEW_PIXELS_OFF = 1 / 32  # of the side: how far edges may lie outside a found box

Record = Mapping[str, Any]
Box = Sequence[float]


def _load(record: Record | str) -> Record:
    return json.loads(record) if isinstance(record, str) else record


def _side_of(image: np.ndarray) -> int:
    if image.ndim != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(f"`images` has one of shape {image.shape}. Scenes are square: give (side, side, 3).")
    return image.shape[0]


def _mean_of(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def expected_masks(scene: Record | str, size_px: int, render_glyph: GlyphRenderer) -> np.ndarray:
    """Gives the pixels that the objects of a scene cover by at least half.

    Args:
        scene (`Mapping` or `str`): Scene record, or the JSON string of it.
        size_px (`int`): Side of the picture in pixels.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `np.ndarray` of shape `(objects, size_px, size_px)`, bool.
    """
    objects = _load(scene)["objects"]
    masks = np.zeros((len(objects), size_px, size_px), dtype=bool)
    for mask, item in zip(masks, objects, strict=True):
        glyph = render_glyph(item["glyph"], max(1, int(item["size"] * size_px)))
        top, left = (
            min(max(int(item[axis] * size_px - side / 2 + 0.5), 0), size_px - side)
            for axis, side in zip("yx", glyph.shape, strict=True)
        )
        mask[top : top + glyph.shape[0], left : left + glyph.shape[1]] = glyph > 127
    return masks


def _box_of(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _centre(box: Box) -> np.ndarray:
    return np.array([box[0] + box[2], box[1] + box[3]]) / 2


def _pair_by_place(asked: Sequence[Box], found: Sequence[Record]) -> dict[int, int]:
    """Gives each asked box the found object nearest to it, the nearest pairs first, none twice."""
    distances = sorted(
        (float(np.linalg.norm(_centre(box) - _centre(item["box"]))), number, other)
        for number, box in enumerate(asked)
        for other, item in enumerate(found)
    )
    pairs: dict[int, int] = {}
    for _, number, other in distances:
        if number not in pairs and other not in pairs.values():
            pairs[number] = other
    return pairs


def _compare(item: Record | None, asked: Record, box: Box, side: int) -> dict[str, bool]:
    """Says which aspects of an asked object a found one has; of none it has none."""
    if item is None:
        return dict.fromkeys(_ASPECTS, False)
    longer = [max(edges[2] - edges[0], edges[3] - edges[1]) for edges in (item["box"], box)]
    return {
        "glyph": item["glyph"] == asked["glyph"],
        "color": item["color"] == asked["color"],
        "place": bool(np.abs(_centre(item["box"]) - _centre(box)).max() <= PLACE_TOLERANCE * side),
        "size": abs(longer[0] - longer[1]) <= SIZE_TOLERANCE * side,
    }


def _named_facts(edit: Record) -> set[tuple[int | None, str]]:
    """Lists what an edit names: pairs of an object's number and an aspect."""
    number = edit["object"]
    named = {
        "background": [(None, "background")],
        "add": [(number, aspect) for aspect in _ASPECTS],
        "remove": [],
        "move": [(number, "place")],
    }
    return set(named.get(edit["kind"], [(number, edit["kind"])]))


def score_edit(
    image: np.ndarray,
    input_scene: Record | str,
    scene: Record | str,
    edit: Record | str,
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, bool]:
    """Scores one edited picture.

    Glyph, colour, place and size of every object of the target and its background are compared with what is found.
    Those that the edit names make the change, all others are the rest, and so is that nothing else is there. A removal
    is made when nothing is left at the place of what was to go.

    Args:
        image (`np.ndarray` of shape `(side, side, 3)`): uint8 RGB, the picture after the edit.
        input_scene (`Mapping` or `str`): Record of the picture before it.
        scene (`Mapping` or `str`): Record of the picture asked for.
        edit (`Mapping` or `str`): What changes: `kind` (`"color"`, `"glyph"`, `"background"`, `"size"`, `"add"`,
            `"remove"` or `"move"`) and `object`, its number in the target, for a removal in the input.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, bool]`: `change_made`, `rest_kept`, and `edit_success`, both.

    Raises:
        ValueError: If the image is not uint8 of `(side, side, 3)`.
    """
    side, target, change = _side_of(image), _load(scene), _load(edit)
    seen = score_scene(image, target, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph)
    found = seen["objects"]
    boxes = [_box_of(mask) for mask in expected_masks(target, side, render_glyph)]
    pairs = _pair_by_place(boxes, found)
    facts: dict[tuple[int | None, str], bool] = {(None, "background"): seen["background_correct"]}
    for number, (asked, box) in enumerate(zip(target["objects"], boxes, strict=True)):
        item = found[pairs[number]] if number in pairs else None
        facts |= {(number, aspect): holds for aspect, holds in _compare(item, asked, box, side).items()}
    extra = [item for number, item in enumerate(found) if number not in pairs.values()]
    named = _named_facts(change)
    change_made = all(facts[fact] for fact in named)
    if change["kind"] == "remove":
        gone = _box_of(expected_masks(input_scene, side, render_glyph)[change["object"]])
        left = [item for item in found if np.abs(_centre(item["box"]) - _centre(gone)).max() <= PLACE_TOLERANCE * side]
        change_made, extra = not left, [item for item in extra if item not in left]
    rest_kept = not extra and all(holds for fact, holds in facts.items() if fact not in named)
    return {"edit_success": change_made and rest_kept, "change_made": change_made, "rest_kept": rest_kept}


def edit_success(
    images: Sequence[np.ndarray] | np.ndarray,
    input_scenes: Sequence[Record | str],
    scenes: Sequence[Record | str],
    edits: Sequence[Record | str],
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, float]:
    """Computes the share of edits that make the named change and keep everything else; see `score_edit`.

    Args:
        images (`Sequence[np.ndarray]`): uint8 RGB pictures of shape `(side, side, 3)`, after the edit.
        input_scenes (`Sequence`): As many records of the pictures before.
        scenes (`Sequence`): As many records of the pictures asked for.
        edits (`Sequence`): As many records of what changes.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, float]`: shares of `edit_success` (both others), `change_made` and `rest_kept`. Pictures left as
        they were have `rest_kept` near 1 and the others at 0.

    Raises:
        ValueError: If there is no row, the numbers differ, or a picture is not uint8 of `(side, side, 3)`.
    """
    check_columns(images=images, input_scenes=input_scenes, scenes=scenes, edits=edits)
    score = functools.partial(
        score_edit, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph
    )
    rows = zip(images, input_scenes, scenes, edits, strict=True)
    return _mean_of([score(*row) for row in rows])


def box_iou(first: Box, second: Box) -> float:
    """Computes the intersection over union of two boxes.

    Args:
        first (`Sequence[float]`): Box `[x0, y0, x1, y1]`.
        second (`Sequence[float]`): Box it is compared with.

    Returns:
        `float`: in 0..1.

    Example:
        >>> box_iou([0, 0, 2, 2], [1, 0, 3, 2])
        0.3333333333333333

    """
    corners = np.array([first, second], dtype=np.float64).reshape(2, 2, 2)  # (box, corner, axis)
    shared = np.maximum(corners[:, 1].min(0) - corners[:, 0].max(0), 0).prod()
    areas = (corners[:, 1] - corners[:, 0]).prod(1)
    return float(shared / (areas.sum() - shared)) if shared else 0.0


def _score_boxes(
    found: Sequence[Record], asked: Sequence[Record], colors_of: Mapping[str, str]
) -> list[dict[str, float]]:
    """Gives each asked box the best found object of its label, none twice."""
    unused = list(found)
    scores = []
    for entry in asked:
        if entry["label"] not in colors_of:
            raise ValueError(f"`boxes` has the label {entry['label']!r}, but the scene has only {sorted(colors_of)}.")
        same = [item for item in unused if item["glyph"] == entry["label"]]
        best = max(same, key=lambda item: box_iou(item["box"], entry["box"]), default=None)
        overlap = 0.0 if best is None else box_iou(best["box"], entry["box"])
        hit = overlap >= BOX_IOU
        is_colored = best is not None and best["color"] == colors_of[entry["label"]]
        is_placed = any(box_iou(item["box"], entry["box"]) >= BOX_IOU for item in found)
        scores.append(
            {
                "box_accuracy": hit,
                "mean_iou": overlap,
                "color_and_box_accuracy": hit and is_colored,
                "placement_accuracy": is_placed,
            }
        )
        unused = [item for item in unused if item is not best]
    return scores


def box_accuracy(
    images: Sequence[np.ndarray] | np.ndarray,
    scenes: Sequence[Record | str],
    boxes: Sequence[Sequence[Record]],
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, float]:
    """Computes how often an object is drawn where its box asks for it.

    Args:
        images (`Sequence[np.ndarray]`): uint8 RGB pictures of shape `(side, side, 3)`.
        scenes (`Sequence`): As many records of the scenes asked for; they say which colour a label is to have.
        boxes (`Sequence[Sequence[Mapping]]`): For each picture its asked boxes, each with `label`, a glyph of the
            scene, and `box`, the pixels `[x0, y0, x1, y1]` in a picture of that size.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, float]`: over all asked boxes, `box_accuracy`, the share for which an object of that label is found
        at an intersection over union of `BOX_IOU` or more, `mean_iou`, 0 where none of that label is found, and
        `color_and_box_accuracy`, the share that has the asked colour too, and `placement_accuracy`, the share whose
        box holds something at that intersection over union, whatever its outline.

    Raises:
        ValueError: If there is no row or no box, the numbers differ, a label is no glyph of the scene, or a picture is
            not uint8 of `(side, side, 3)`.
    """
    check_columns(images=images, scenes=scenes, boxes=boxes)
    scores: list[dict[str, float]] = []
    for image, scene, asked in zip(images, scenes, boxes, strict=True):
        _side_of(image)
        seen = score_scene(
            image, scene, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph
        )
        scores += _score_boxes(
            seen["objects"], asked, {item["glyph"]: item["color"] for item in _load(scene)["objects"]}
        )
    if not scores:
        raise ValueError("`boxes` has no box in any row. Give at least one.")
    return _mean_of(scores)


def _ink_of(image: np.ndarray, box: Box | None = None) -> np.ndarray:
    """Gives the coverage (side, side) in 0..1 of what differs from the background, inside a box and just around it."""
    picture = image.astype(np.float64)
    border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
    offsets = picture - np.median(border, axis=0)
    inside = np.zeros(image.shape[:2], dtype=bool)
    margin = max(1, round(image.shape[0] * _FEW_PIXELS_OFF))
    x0, y0, x1, y1 = (0, 0, *image.shape[1::-1]) if box is None else (round(edge) for edge in box)
    inside[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin] = True
    contrast = np.linalg.norm(offsets, axis=2) * inside
    solid = contrast >= 0.8 * np.percentile(contrast[contrast > 0], 90) if contrast.any() else inside & False
    if not solid.any():
        return np.zeros(image.shape[:2])
    own = np.median(offsets[solid], axis=0)
    return np.clip(offsets @ own / max(own @ own, 1.0), 0, 1) * inside


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Computes the sum of the pixelwise minimum over the sum of the pixelwise maximum."""
    return float(np.minimum(first, second).sum() / max(np.maximum(first, second).sum(), 1e-6))


def score_structure(
    image: np.ndarray,
    scene: Record | str,
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, float]:
    """Compares the outlines of a picture's objects with those of the scene it was to have the structure of.

    Args:
        image (`np.ndarray` of shape `(side, side, 3)`): uint8 RGB.
        scene (`Mapping` or `str`): Record of the scene asked for.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, float]`: `mask_iou`, the mean over the objects of the intersection over union of drawn and asked
        pixels, and `structure_adherence`, whether it reaches `STRUCTURE_IOU` for each and each is the right glyph.

    Raises:
        ValueError: If the image is not uint8 of `(side, side, 3)`.
    """
    side, target = _side_of(image), _load(scene)
    seen = score_scene(image, target, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph)
    masks = expected_masks(target, side, render_glyph)
    pairs = _pair_by_place([_box_of(mask) for mask in masks], seen["objects"])
    overlaps, hits = [], []
    for number, (mask, asked) in enumerate(zip(masks, target["objects"], strict=True)):
        item = seen["objects"][pairs[number]] if number in pairs else None
        overlaps.append(0.0 if item is None else _overlap(_ink_of(image, item["box"]) > 0.5, mask))
        hits.append(item is not None and item["glyph"] == asked["glyph"] and overlaps[-1] >= STRUCTURE_IOU)
    return {"structure_adherence": all(hits), "mask_iou": sum(overlaps) / len(overlaps)}


def structure_adherence(
    images: Sequence[np.ndarray] | np.ndarray,
    scenes: Sequence[Record | str],
    *,
    glyphs: Sequence[str],
    colors: Mapping[str, RGB],
    backgrounds: Mapping[str, RGB],
    render_glyph: GlyphRenderer,
) -> dict[str, float]:
    """Computes the share of pictures that have the structure they were asked to have; see `score_structure`.

    Args:
        images (`Sequence[np.ndarray]`): uint8 RGB pictures of shape `(side, side, 3)`.
        scenes (`Sequence`): As many records of the scenes asked for.
        glyphs (`Sequence[str]`): Names of the glyphs that may occur.
        colors (`Mapping[str, tuple[int, int, int]]`): Named colours of objects.
        backgrounds (`Mapping[str, tuple[int, int, int]]`): Named colours of backgrounds.
        render_glyph (`Callable`): Renders a glyph's mask; see `find_objects`.

    Returns:
        `dict[str, float]`: `structure_adherence` and the mean `mask_iou`.

    Raises:
        ValueError: If there is no row, the numbers differ, or a picture is not uint8 of `(side, side, 3)`.
    """
    check_columns(images=images, scenes=scenes)
    score = functools.partial(
        score_structure, glyphs=glyphs, colors=colors, backgrounds=backgrounds, render_glyph=render_glyph
    )
    return _mean_of([score(image, scene) for image, scene in zip(images, scenes, strict=True)])


def writing_accuracy(
    images: Sequence[np.ndarray] | np.ndarray, texts: Sequence[str], *, render_text: TextRenderer, alphabet: str
) -> dict[str, float]:
    """Computes the share of pictures that show their text, in whatever colours.

    A text is shown when the ink overlaps its letters by `WRITING_MATCH` or more, and more than it overlaps any text
    that has another letter at one place.

    Args:
        images (`Sequence[np.ndarray]`): uint8 RGB pictures of shape `(side, side, 3)`.
        texts (`Sequence[str]`): As many texts.
        render_text (`Callable`): `render_text(text, size_px)` gives the uint8 coverage of the whole picture.
        alphabet (`str`): Letters that may occur.

    Returns:
        `dict[str, float]`: `writing_accuracy`.

    Raises:
        ValueError: If there is no row, the numbers differ, or a picture is not square.
    """
    check_columns(images=images, texts=texts)
    hits = []
    for image, text in zip(images, texts, strict=True):
        side = _side_of(image)
        ink = _ink_of(image)
        others = [
            text[:place] + letter + text[place + 1 :]
            for place in range(len(text))
            for letter in alphabet
            if letter != text[place]
        ]
        match = _overlap(ink, render_text(text, side) / 255)
        hits.append(
            match >= WRITING_MATCH and all(_overlap(ink, render_text(other, side) / 255) < match for other in others)
        )
    return {"writing_accuracy": sum(hits) / len(hits)}
