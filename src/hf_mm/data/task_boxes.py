"""Boxes as plain text in a fixed grid, as CM3Leon writes them, and back. Knows numbers and labels, no pictures.

An object is `{"label": str, "box": [x1, y1, x2, y2]}`, in pixels from the top left corner, x2 and y2 exclusive.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any


BOX_FORMATS = ("xyxy", "xywh", "fractions")
GRID = 256  # Fig. 15 of CM3Leon: pictures have 256 px, and so have the boxes
MAX_OBJECTS = 8  # ours: eight take about 150 tokens of text
MIN_VISIBLE_SHARE = 0.5  # ours

_JOINT = " and with "
_PLACE = re.compile(r"(.+) at location \((-?\d+), (-?\d+)\) -> \((-?\d+), (-?\d+)\)", re.DOTALL)
_TOLERANCE_PX = 1.0  # public datasets round their boxes past the edge
_UNSAYABLE = (_JOINT, " at location (")


def format_boxes(objects: Sequence[Mapping[str, Any]], image_size: tuple[int, int], grid: int = GRID) -> str:
    """Writes objects as "bottle at location (12, 30) -> (64, 210) and with sink at location (..) -> (..)".

    Args:
        objects (`Sequence[Mapping]`): Labels and boxes in pixels, at least one.
        image_size (`tuple[int, int]`): Height and width of the picture in pixels.
        grid (`int`): Steps of the picture's width, and of its height.

    Returns:
        `str`: Whole numbers in `[0, grid]`, x before y, first the top left corner, then the bottom right one.

    Raises:
        ValueError: If there is no object, a box is inverted or outside the picture, or a label could not be read back.

    Source: CM3Leon (arXiv 2309.02591), Fig. 15. Differs: that x comes before y is our reading of the figure.

    Example:
        >>> format_boxes([{"label": "sink", "box": [0, 16, 32, 32]}], (32, 64))
        'sink at location (0, 128) -> (128, 256)'

    """
    if not objects:
        raise ValueError("`objects` is empty; there must be at least one.")
    check_objects(objects)
    height, width = image_size
    steps = (grid / width, grid / height) * 2
    texts = []
    for number, item in enumerate(objects):
        box = check_box(item["box"], image_size, f"objects[{number}].box")
        label = check_label(item["label"], f"objects[{number}].label")
        left, top, right, bottom = (round(value * step) for value, step in zip(box, steps, strict=True))
        texts.append(f"{label} at location ({left}, {top}) -> ({right}, {bottom})")
    return _JOINT.join(texts)


def parse_boxes(text: str) -> list[dict[str, Any]]:
    """Reads back what `format_boxes` writes.

    Args:
        text (`str`): Objects; nothing before the first and nothing behind the last.

    Returns:
        `list[dict]`: `{"label", "box"}` in order, boxes in steps of the grid.

    Raises:
        ValueError: If a part of the text is no object.

    Example:
        >>> parse_boxes("sink at location (0, 128) -> (128, 256)")
        [{'label': 'sink', 'box': [0, 128, 128, 256]}]

    """
    objects = []
    for part in text.split(_JOINT):
        match = _PLACE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no object. It must read 'NAME at location (x1, y1) -> (x2, y2)'.")
        objects.append({"label": match[1], "box": [int(value) for value in match.groups()[1:]]})
    return objects


def check_objects(objects: Any) -> None:
    """Refuses what is no list of objects with a label and a box.

    Raises:
        ValueError: Naming the first that is none.
    """
    if not isinstance(objects, Sequence) or isinstance(objects, str | bytes):
        raise ValueError(f"`objects`={objects!r} must be a list of {{'label', 'box'}}.")
    for number, item in enumerate(objects):
        if not isinstance(item, Mapping) or not {"label", "box"} <= item.keys():
            raise ValueError(f"`objects[{number}]`={item!r} must have a `label` and a `box`.")


def check_box(box: Any, image_size: tuple[int, int], field: str = "box") -> list[float]:
    """Checks one box against the picture.

    Args:
        box (`Sequence[float]`): x1, y1, x2, y2 in pixels.
        image_size (`tuple[int, int]`): Height and width of the picture in pixels.
        field (`str`): What to call it in an error.

    Returns:
        `list[float]`: The box, without what rounding put up to a pixel outside.

    Raises:
        ValueError: If it has not four numbers, is inverted, or lies outside the picture.
    """
    height, width = image_size
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise ValueError(f"`{field}`={box!r} must be four numbers: x1, y1, x2, y2 in pixels.")
    left, top, right, bottom = box
    if not (left < right and top < bottom):
        raise ValueError(f"`{field}`={list(box)} is inverted or empty: x1 must be below x2, and y1 below y2.")
    if min(left, top) < -_TOLERANCE_PX or right > width + _TOLERANCE_PX or bottom > height + _TOLERANCE_PX:
        raise ValueError(f"`{field}`={list(box)} lies outside its picture of {width} x {height} px (width x height).")
    inside = [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        raise ValueError(f"`{field}`={list(box)} lies outside its picture of {width} x {height} px (width x height).")
    return inside


def check_label(label: Any, field: str = "label") -> str:
    """Returns a label without blanks around it, or refuses one that could not be read back from a text."""
    if not isinstance(label, str) or not label.strip() or any(words in label for words in _UNSAYABLE):
        raise ValueError(f"`{field}`={label!r} must be a name: a string, not empty, without {list(_UNSAYABLE)}.")
    return label.strip()


def crop_boxes(
    objects: Sequence[Mapping[str, Any]], image_size: tuple[int, int], max_objects: int = MAX_OBJECTS
) -> tuple[list[dict[str, Any]], int]:
    """Moves boxes along with the cut of a picture to its centred square, which is what training shows.

    Args:
        objects (`Sequence[Mapping]`): Labels and boxes in pixels.
        image_size (`tuple[int, int]`): Height and width of the picture in pixels.
        max_objects (`int`): Of more objects the largest stay.

    Returns:
        `tuple[list[dict], int]`: in their order, the objects of which at least half is in the square, cut at its
        edges; and the side of the square in pixels.

    Raises:
        ValueError: If an object has no label or box, or a box is inverted or outside the picture.
    """
    check_objects(objects)
    height, width = image_size
    side = min(height, width)
    shifts = ((width - side) / 2, (height - side) / 2) * 2
    visible: list[tuple[float, dict[str, Any]]] = []
    for number, item in enumerate(objects):
        box = check_box(item["box"], image_size, f"objects[{number}].box")
        cut = [min(max(value - shift, 0), side) for value, shift in zip(box, shifts, strict=True)]
        area = (cut[2] - cut[0]) * (cut[3] - cut[1])
        if area >= MIN_VISIBLE_SHARE * (box[2] - box[0]) * (box[3] - box[1]):
            visible.append((area, {"label": item["label"], "box": cut}))
    smallest = sorted((area for area, _ in visible), reverse=True)[:max_objects][-1:]
    kept = [item for area, item in visible if area >= smallest[0]][:max_objects] if smallest else []
    return kept, side


def convert_boxes(
    objects: Any, image_size: tuple[int, int], *, label_key: str, box_key: str | Sequence[str], box_format: str
) -> list[dict[str, Any]]:
    """Gives the objects of a detection dataset their standard form.

    Args:
        objects (`list[Mapping]` or `Mapping`): Objects with their fields, or each field with its list.
        image_size (`tuple[int, int]`): Height and width of the picture in pixels.
        label_key (`str`): Field with the label.
        box_key (`str` or `Sequence[str]`): Field with the box, or the four fields with its numbers.
        box_format (`str`): `"xyxy"` (corners), `"xywh"` (corner and size), both in pixels, or `"fractions"` (corners
            in parts of the picture's width and height).

    Returns:
        `list[dict]`: `{"label", "box"}` in pixels. Whether boxes are in the picture is not checked here.

    Raises:
        ValueError: If a field is not there, or a box is no list of numbers.
    """
    if isinstance(objects, Mapping):
        lists = [value for value in objects.values() if isinstance(value, Sequence) and not isinstance(value, str)]
        if len(lists) < len(objects) or len(set(map(len, lists))) > 1:
            raise ValueError(f"`objects`={objects!r}: each field must be a list, all of one length.")
        objects = [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]
    keys = [box_key] if isinstance(box_key, str) else list(box_key)
    height, width = image_size
    converted = []
    if objects is not None and not (
        isinstance(objects, Sequence) and all(isinstance(item, Mapping) for item in objects)
    ):
        raise ValueError(f"`objects`={objects!r} must be a list of objects with the fields {[label_key, *keys]}.")
    for item in objects or []:
        if missing := [key for key in (label_key, *keys) if key not in item]:
            raise ValueError(f"`objects`: the fields {missing} are not there. Fields here: {list(item)}.")
        box = item[keys[0]] if isinstance(box_key, str) else [item[key] for key in keys]
        if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(value, int | float) for value in box):
            raise ValueError(f"`{label_key}`={item[label_key]!r} has the box {box!r}; it must be four numbers.")
        box = list(box)
        if box_format == "xywh":
            box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
        if box_format == "fractions":
            box = [value * side for value, side in zip(box, (width, height) * 2, strict=True)]
        converted.append({"label": item[label_key], "box": box})
    return converted
