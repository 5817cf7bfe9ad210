"""Tasks of instruction tuning: loads their rows from any dataset, checks every one, and weighs datasets in a mixture.

Columns get the names of the slots of the task's templates, see `task_templates.py`. Knows datasets, not what the rows
are trained into.
"""

import base64
import binascii
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, List, Value, concatenate_datasets

from .formats import ImageError, RowError, check_columns, open_image, open_source
from .task_boxes import BOX_FORMATS, convert_boxes, format_boxes, parse_boxes
from .task_templates import (
    IMAGE_SLOTS,
    SOURCES,
    STRUCTURE_TASKS,
    TASKS,
    TEXT_SLOTS,
    Task,
    TaskSource,
    answer_last,
    check_task_row,
    conversation_parts,
    fill_template,
    find_task,
    fitting_templates,
    objects_text,
)


__all__ = [
    "SOURCES",
    "STRUCTURE_TASKS",
    "TASKS",
    "Task",
    "TaskSource",
    "answer_last",
    "check_task_row",
    "conversation_parts",
    "fill_template",
    "find_task",
    "fitting_templates",
    "format_boxes",
    "load_messages",
    "load_task_rows",
    "mixture_weights",
    "parse_boxes",
    "write_objects",
]

OBJECTS_AS_TEXT = Features({"objects": Value("string")})
OBJECT_FEATURES = List({"label": Value("string"), "box": List(Value("float64"))})
_LONGEST_PATH = 4096
# Sec. 4 of CM3Leon: no dataset counts less than 0.3 times, or more than 3 times, what its rows would make it count.
WEIGHT_CLIP = (0.3, 3.0)
_BISECTIONS = 200
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def load_task_rows(
    source: str | TaskSource,
    *,
    dataset_name: str | os.PathLike | None = None,
    split: str | None = None,
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    control_model_name: str | None = None,
    max_misfit_share: float = 0.0,
    num_proc: int | None = None,
) -> Dataset:
    """Loads a dataset as rows of a task: under the names of the slots, checked, pictures undecoded.

    Where a column has several texts, such as the answers of ten people or five captions, the most frequent is taken,
    of equally frequent ones the first. A number as the answer counts the choices from 0. Choices become one text,
    "(A) red (B) blue". A structure task without a column for its control pictures gets them computed, see
    `add_control_images`. Other columns stay, but for other pictures.

    Args:
        source (`str` or [`TaskSource`]): Name of one of the `SOURCES`, a source of your own, or the name of a task
            together with `dataset_name`.
        dataset_name (`str` or `os.PathLike`, *optional*): Hub id, folder or files to read instead of the source's own.
        split (`str`, *optional*): Split instead of the source's own (`"train"`), such as `"train[:1000]"`.
        config_name (`str`, *optional*): Configuration instead of the source's own.
        columns (`Mapping[str, str]`, *optional*): Columns of slots, over the source's own. A slot without one is
            looked for under its own name.
        control_model_name (`str`, *optional*): Model that computes control pictures, where there are none.
        max_misfit_share (`float`): Rows that do not fit the task are refused; with a share above 0 up to so many are
            left out, and their number printed.
        num_proc (`int`, *optional*): Processes that read and check.

    Returns:
        `datasets.Dataset`: The rows.

    Raises:
        ValueError: If the source, the task or a column is not there.
        RowError: If too many rows do not fit the task: a text is empty, a picture missing or unreadable, two pictures
            differ in size, boxes are inverted or outside the picture. The first such row and its column are named.
    """
    source = _find_source(source, dataset_name)
    is_here = Path(source.dataset_name).exists()  # a copy of the Hub's, of the one configuration
    source = replace(
        source,
        split=split or source.split,
        config_name=config_name or (None if is_here else source.config_name),
        columns={**source.columns, **(columns or {})},
    )
    rows = open_source(source.dataset_name, split=source.split, config_name=source.config_name)
    rows = _name_slots(rows, find_task(source.task), source, num_proc)
    if source.task in STRUCTURE_TASKS and "control_image" not in rows.column_names:
        from .control_images import add_control_images  # scikit-image, which it needs, is an extra

        rows = add_control_images(rows, source.task, model_name=control_model_name, num_proc=num_proc)
    names = [name for name in rows.column_names if name in IMAGE_SLOTS + TEXT_SLOTS]
    judge = _Judge(source.task)
    rows = _leave_out_misfits(rows, names, judge, source.dataset_name, max_misfit_share, num_proc)
    return write_objects(rows, num_proc=num_proc)


def write_objects(rows: Dataset, *, num_proc: int | None = None) -> Dataset:
    """Writes boxes as text, in the grid of the centred square of each picture; other rows are returned as they are.

    To be done before the pictures are encoded, for their size is needed.

    Args:
        rows (`datasets.Dataset`): Task rows.
        num_proc (`int`, *optional*): Processes that do it.

    Returns:
        `datasets.Dataset`: The rows, `objects` being strings.
    """
    if "objects" not in rows.column_names or rows.features["objects"] == Value("string"):
        return rows
    needed = ["image", "objects"]
    texts = rows.select_columns(needed).map(
        _ObjectsText(), with_indices=True, remove_columns=needed, features=OBJECTS_AS_TEXT, num_proc=num_proc
    )
    return concatenate_datasets([rows.remove_columns("objects"), texts], axis=1)


@dataclass(frozen=True)
class _ObjectsText:
    """Writes a row's boxes as text."""

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, str]:
        return {"objects": objects_text(row, number)}


def load_messages(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    column: str = "messages",
    max_misfit_share: float = 0.0,
    num_proc: int | None = None,
) -> Dataset:
    """Loads conversations, `{"messages": [{"role", "content"}]}`, checked, pictures undecoded.

    Args:
        source (`str` or `os.PathLike`): As in `load_rows`.
        split (`str`): Split to read.
        config_name (`str`, *optional*): Configuration (subset) of a Hub dataset.
        column (`str`): Column with the messages.
        max_misfit_share (`float`): As in `load_task_rows`.
        num_proc (`int`, *optional*): Processes that check.

    Returns:
        `datasets.Dataset`: The rows.

    Raises:
        ValueError: If the source or the column is not there.
        RowError: If too many rows have not the format, an empty text, an unreadable picture, or do not end with the
            assistant's message.
    """
    rows = open_source(source, split=split, config_name=config_name)
    if column not in rows.column_names:
        raise ValueError(f"`column`={column!r} is not there. Columns here: {rows.column_names}.")
    rows = rows if column == "messages" else rows.rename_column(column, "messages")
    undecoded = _undecoded(rows.features["messages"])
    rows = rows if undecoded == rows.features["messages"] else rows.cast_column("messages", undecoded)
    rows = check_columns(rows, "conversation")
    return _leave_out_misfits(rows, ["messages"], _judge_messages, os.fspath(source), max_misfit_share, num_proc)


def _judge_messages(row: Mapping[str, Any], number: int) -> dict[str, str | None]:
    """Says what is wrong with a conversation, if anything is."""
    try:
        for part in conversation_parts(row["messages"], number=number):
            if part["type"] == "image":
                open_image(part["image"])
    except RowError as error:
        return {"misfit": str(error)}
    except ImageError as error:
        return {"misfit": f"Row {number}, column `messages`: {error}."}
    return {"misfit": None}


def _find_source(source: str | TaskSource, dataset_name: str | os.PathLike | None) -> TaskSource:
    """Returns a source that is named, given, or a task with a dataset."""
    if isinstance(source, TaskSource):
        find_task(source.task)
    elif source in SOURCES:
        source = SOURCES[source]
    elif source in TASKS and dataset_name is not None:
        return TaskSource(source, os.fspath(dataset_name))
    elif source in TASKS:
        known = [name for name, entry in SOURCES.items() if entry.task == source]
        raise ValueError(f"`source`={source!r} is a task: give a `dataset_name`, or one of its sources, {known}.")
    else:
        raise ValueError(f"`source`={source!r} is unknown. Sources: {list(SOURCES)}. Tasks: {list(TASKS)}.")
    return source if dataset_name is None else replace(source, dataset_name=os.fspath(dataset_name))


def _name_slots(rows: Dataset, task: Task, source: TaskSource, num_proc: int | None) -> Dataset:
    """Puts each slot's column under the name of the slot, in its standard form."""
    columns = _find_columns(rows, task, source)
    pictures = {slot: path for slot, path in columns.items() if slot in IMAGE_SLOTS}
    texts = {slot: path for slot, path in columns.items() if slot in TEXT_SLOTS}
    used = {_top(rows, path) for path in columns.values()}
    slots = {*IMAGE_SLOTS, *TEXT_SLOTS}
    others = [name for name, kind in rows.features.items() if not isinstance(kind, Image)]
    parts = [rows.select_columns([name for name in others if name not in used | slots])]
    for slot, path in pictures.items():
        parts.append(_picture_column(rows, slot, path, num_proc))
    if texts:
        parts.append(_text_columns(rows, texts, pictures.get("image"), source, num_proc))
    return concatenate_datasets([part for part in parts if part.column_names], axis=1)


def _top(rows: Dataset, path: str) -> str:
    """Returns the column that a path begins in."""
    return path if path in rows.column_names else path.split(".")[0]


def _find_columns(rows: Dataset, task: Task, source: TaskSource) -> dict[str, str]:
    """Finds the column of each slot; refuses a dataset in which no template of the task can be filled."""
    here = f"{source.dataset_name!r} (split {source.split!r})"
    slots = list(dict.fromkeys(slot for number in range(len(task.templates)) for slot in task.slots(number)))
    if unknown := sorted(source.columns.keys() - set(slots)):
        raise ValueError(f"`columns` names {unknown}, which task {task.name!r} has not. Its slots: {slots}.")
    found = {slot: slot for slot in slots if slot in rows.column_names} | dict(source.columns)
    for slot, path in source.columns.items():
        if _top(rows, path) not in rows.column_names:
            raise ValueError(
                f"`columns`: the slot `{slot}` is to be column {path!r}, which {here} has not. "
                f"Columns there: {rows.column_names}."
            )
    given = {*found, *task.optional, *(["control_image"] if task.name in STRUCTURE_TASKS else [])}
    missing = [sorted(set(task.slots(number)) - given) for number in range(len(task.templates))]
    if all(missing):
        raise ValueError(
            f"{here} lacks columns for the slots {missing[0]} of task {task.name!r}; name them in `columns`. "
            f"Columns there: {rows.column_names}."
        )
    return found


def _picture_column(rows: Dataset, slot: str, path: str, num_proc: int | None) -> Dataset:
    """Returns one column of undecoded pictures; one of the type of pictures is not rewritten."""
    top = _top(rows, path)
    column = rows.select_columns(top)
    if top == path and column.features[top] in (Image(), Image(decode=False)):
        column = column if top == slot else column.rename_column(top, slot)
        return (
            column if column.features[slot] == Image(decode=False) else column.cast_column(slot, Image(decode=False))
        )
    column = column.cast(Features({top: _undecoded(column.features[top])}))
    return column.map(
        _PictureCell(slot, _keys(top, path)),
        input_columns=top,
        with_indices=True,
        remove_columns=top,
        features=Features({slot: Image(decode=False)}),
        num_proc=num_proc,
        desc=f"Reading {slot}",
    )


def _undecoded(feature: Any) -> Any:
    """Puts off the decoding of pictures anywhere inside a column's type."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_undecoded(feature.feature), length=feature.length)
    if isinstance(feature, Mapping):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    return feature


def _text_columns(
    rows: Dataset, texts: Mapping[str, str], image_path: str | None, source: TaskSource, num_proc: int | None
) -> Dataset:
    """Returns the columns of texts, and of boxes, in their standard form."""
    tops = {slot: _top(rows, path) for slot, path in texts.items()}
    needed = set(tops.values())
    cells = _TextCells({slot: (tops[slot], _keys(tops[slot], path)) for slot, path in texts.items()})
    if "objects" in texts:
        boxes = {"label": "label", "box": "box", "format": "xyxy", **(source.boxes or {})}
        if boxes["format"] not in BOX_FORMATS:
            raise ValueError(f"`boxes`: the format {boxes['format']!r} must be one of {BOX_FORMATS}.")
        if image_path is None or image_path not in rows.column_names:
            raise ValueError("`objects` needs its pictures in a column of their own, for their size.")
        names = _class_names(rows.features[tops["objects"]], boxes["label"])
        cells = replace(cells, boxes=boxes, image=image_path, label_names=names)
        needed.add(image_path)
    cells = replace(cells, class_names={top: names for top in needed if (names := _names(rows.features[top]))})
    column = rows.select_columns(sorted(needed))
    if cells.image is not None and column.features[cells.image] == Image():
        column = column.cast_column(cells.image, Image(decode=False))
    return column.map(
        cells,
        with_indices=True,
        remove_columns=column.column_names,
        features=Features({slot: OBJECT_FEATURES if slot == "objects" else Value("string") for slot in texts}),
        num_proc=num_proc,
        desc="Reading texts",
    )


def _names(feature: Any) -> list[str] | None:
    """Returns the names of a column of classes, or of lists of them."""
    feature = feature.feature if isinstance(feature, List) else feature
    return feature.names if isinstance(feature, ClassLabel) else None


def _class_names(feature: Any, key: str) -> list[str] | None:
    """Returns the names of the classes in a field of a column of objects."""
    feature = feature.feature if isinstance(feature, List) else feature
    return _names(feature[key]) if isinstance(feature, Mapping) and key in feature else None


def _keys(top: str, path: str) -> tuple[str, ...]:
    """Returns what a path names behind its column."""
    return tuple(path.removeprefix(top).split(".")[1:])


def _reach(value: Any, keys: Iterable[str], where: str) -> Any:
    """Follows keys into structs and lists; a name behind a list is taken of every element."""
    for place, key in enumerate(keys := tuple(keys)):
        if value is None:
            return None
        if isinstance(value, list) and not key.isdigit():
            return [_reach(item, keys[place:], where) for item in value]
        if isinstance(value, list):
            value = value[int(key)] if int(key) < len(value) else None
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            inside = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise RowError(f"{where}: no {key!r} in it, but {inside}.")
    return value


@dataclass(frozen=True)
class _PictureCell:
    """Reaches for a picture in a row."""

    slot: str
    keys: tuple[str, ...]

    def __call__(self, value: Any, number: int) -> dict[str, Any]:
        where = f"Row {number}, column `{self.slot}`"
        picture = _reach(value, self.keys, where)
        if isinstance(picture, str) and len(picture) > _LONGEST_PATH:  # no path, but the file itself as text
            try:
                picture = base64.b64decode(picture, validate=True)
            except binascii.Error as error:
                raise RowError(f"{where}: a text that is neither a path nor a picture in base64.") from error
        if isinstance(picture, bytes):
            picture = {"bytes": picture, "path": None}
        if isinstance(picture, str):
            picture = {"bytes": None, "path": picture}
        if picture is not None and not (isinstance(picture, Mapping) and {"bytes", "path"} & picture.keys()):
            raise RowError(f"{where}: {type(picture).__name__}, must be a picture, its bytes or its path.")
        return {self.slot: picture}


@dataclass(frozen=True)
class _TextCells:
    """Turns a row's columns into its texts."""

    paths: Mapping[str, tuple[str, tuple[str, ...]]]
    class_names: Mapping[str, Sequence[str]] | None = None
    boxes: Mapping[str, Any] | None = None
    image: str | None = None
    label_names: Sequence[str] | None = None

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        values = {}
        for slot, (top, keys) in self.paths.items():
            value = _reach(row[top], keys, f"Row {number}, column `{slot}`")
            values[slot] = _with_names(value, (self.class_names or {}).get(top))
        if "objects" in values:
            objects = self.objects(values["objects"], row, number)
            if self.paths["objects"] == self.paths.get("caption"):
                values["caption"] = ", ".join(dict.fromkeys(str(item["label"]) for item in objects))
            values["objects"] = objects
        choices = values.get("choices")
        if isinstance(choices, list):
            values["choices"] = " ".join(f"({letter}) {text}" for letter, text in zip(_LETTERS, choices, strict=False))
        for slot, value in values.items():
            where = f"Row {number}, column `{slot}`"
            if slot == "answer" and isinstance(value, int) and isinstance(choices, list):
                if not 0 <= value < len(choices):
                    raise RowError(f"{where}: {value} is no number of one of the {len(choices)} choices.")
                value = choices[value]
            values[slot] = value if slot == "objects" else _text(value, where)
        return values

    def objects(self, value: Any, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """Gives boxes their standard form."""
        where = f"Row {number}, column `objects`"
        try:
            width, height = open_image(row[self.image or "image"]).size
        except ImageError:
            return []  # the picture itself is what is wrong, and the check of the row says so
        boxes = self.boxes or {}
        try:
            objects = convert_boxes(
                value, (height, width), label_key=boxes["label"], box_key=boxes["box"], box_format=boxes["format"]
            )
        except ValueError as error:
            raise RowError(f"{where}: {error}") from error
        return [{**item, "label": _with_names(item["label"], self.label_names)} for item in objects]


def _with_names(value: Any, names: Sequence[str] | None) -> Any:
    """Replaces numbers of classes by their names."""
    if names is None or value is None:
        return value
    return [names[item] for item in value] if isinstance(value, list) else names[value]


def _text(value: Any, where: str) -> str:
    """Returns a text without blanks around it, of several the most frequent one."""
    if isinstance(value, list):
        texts = [text for text in value if isinstance(text, str) and text.strip()]
        if value and not texts and any(item is not None and not isinstance(item, str) for item in value):
            raise RowError(f"{where}: a list of {type(value[0]).__name__}, must be of strings.")
        value = Counter(texts).most_common(1)[0][0] if texts else ""
    if value is not None and not isinstance(value, str):
        raise RowError(f"{where}: {type(value).__name__}, must be a string or a list of strings.")
    return (value or "").strip()


def _leave_out_misfits(
    rows: Dataset, names: list[str], judge: Callable, dataset_name: str, max_share: float, num_proc: int | None
) -> Dataset:
    """Checks every row, and leaves out those that do not fit if they are few enough."""
    if not 0 <= max_share < 1:
        raise ValueError(f"`max_misfit_share`={max_share} must be at least 0 and below 1.")
    if len(rows) == 0:
        raise ValueError(f"{dataset_name!r} has no rows.")
    misfits = rows.select_columns(names).map(
        judge,
        with_indices=True,
        remove_columns=names,
        features=Features({"misfit": Value("string")}),
        num_proc=num_proc,
        desc="Checking rows",
    )["misfit"][:]
    fitting = [number for number, misfit in enumerate(misfits) if misfit is None]
    num_misfits = len(rows) - len(fitting)
    if num_misfits == 0:
        return rows
    first = next(misfit for misfit in misfits if misfit is not None)
    if num_misfits > max_share * len(rows) or not fitting:
        raise RowError(
            f"{first} In all {num_misfits} of {len(rows)} rows of {dataset_name!r} do not fit; "
            f"`max_misfit_share`={max_share} allows {int(max_share * len(rows))} to be left out."
        )
    print(f"{Path(dataset_name).name}: {num_misfits} of {len(rows)} rows do not fit and are left out. {first}")
    return rows.select(fitting)


@dataclass(frozen=True)
class _Judge:
    """Says what is wrong with a row, if anything is."""

    task: str

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, str | None]:
        try:
            check_task_row(self.task, row, number)
        except RowError as error:
            return {"misfit": str(error)}
        return {"misfit": None}


def mixture_weights(
    num_rows: Mapping[str, int],
    targets: Mapping[str, float] | None = None,
    clip: tuple[float, float] | None = WEIGHT_CLIP,
) -> dict[str, float]:
    """Weighs datasets as wished, but none by less than 0.3 or more than 3 times its share of the rows.

    Each weight is its share of the rows times `clip(c * wished share / share of the rows)`, with the one factor `c`
    for which the weights add up to 1. Clipping first and normalising after would push weights past the bounds again:
    of a million and ten thousand rows wished for alike, the smaller would end at 5.7 times its share.

    Args:
        num_rows (`Mapping[str, int]`): Rows of each dataset.
        targets (`Mapping[str, float]`, *optional*): What each should weigh, positive; only ratios count. None: alike.
        clip (`tuple[float, float]`, *optional*): Smallest and largest ratio of weight to share of the rows; None: any.

    Returns:
        `dict[str, float]`: Chance of drawing from each dataset; they add up to 1.

    Raises:
        ValueError: If numbers are not positive, names differ, or the bounds do not enclose 1.

    Source: CM3Leon (arXiv 2309.02591), Sec. 4: "at most 3x up / 0.3x down". Differs: what is wished is not printed.

    Example:
        >>> mixture_weights({"edit": 800, "vqa": 200})
        {'edit': 0.5, 'vqa': 0.5}
        >>> {name: round(weight, 3) for name, weight in mixture_weights({"edit": 990, "vqa": 10}).items()}
        {'edit': 0.97, 'vqa': 0.03}

    """
    targets = dict.fromkeys(num_rows, 1.0) if targets is None else targets
    if clip is not None and not 0 < clip[0] <= 1 <= clip[1]:
        raise ValueError(f"`clip`={clip} must be positive and enclose 1.")
    if not num_rows or targets.keys() != num_rows.keys():
        raise ValueError(f"`targets` names {sorted(targets)}, but `num_rows` names {sorted(num_rows)}.")
    for name in num_rows:
        if num_rows[name] <= 0 or targets[name] <= 0:
            raise ValueError(
                f"{name!r} has `num_rows`={num_rows[name]} and `targets`={targets[name]}; both must be above 0. "
                "Leave out a dataset that is not to be drawn from."
            )
    if clip is None:
        return {name: targets[name] / sum(targets.values()) for name in num_rows}
    low, high = clip
    shares = {name: count / sum(num_rows.values()) for name, count in num_rows.items()}
    ratios = {name: targets[name] / sum(targets.values()) / shares[name] for name in num_rows}

    def weigh(factor: float) -> dict[str, float]:
        return {name: shares[name] * min(max(factor * ratios[name], low), high) for name in shares}

    # The sum of the weights grows with the factor, from `low` to `high`: the factor is found by halving.
    smallest, largest = low / max(ratios.values()), high / min(ratios.values())
    for _ in range(_BISECTIONS):
        middle = (smallest + largest) / 2
        smallest, largest = (middle, largest) if sum(weigh(middle).values()) < 1 else (smallest, middle)
    weights = weigh(largest)
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
