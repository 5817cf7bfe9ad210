"""Templates of the tasks of instruction tuning, filled with rows.

Templates and datasets are data, in `task_table.json`. A task row has the template's slots as columns: pictures
(`image`, `input_image`, `control_image`), texts, and `objects`, boxes that become a text. A filled template is a list
of parts in the template's order: `{"type": "text", "text", "is_answer"}` and `{"type": "image", "slot", "is_answer"}`.

This file knows rows and words, neither tokens nor models nor what a run mixes them for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .formats import ImageError, RowError, check_row, open_image
from .task_boxes import crop_boxes, format_boxes


IMAGE_SLOTS = ("image", "input_image", "control_image")
TEXT_SLOTS = (
    "answer",
    "caption",
    "choices",
    "context",
    "explanation",
    "instruction",
    "objects",
    "question",
    "text",
)
STRUCTURE_TASKS = ("canny", "hed", "segmentation", "depth", "normals", "pose", "scribble")

_BREAK = "<break>"
_SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Task:
    """What a kind of row is filled into.

    Args:
        name (`str`): Name of the task.
        templates (`tuple[str, ...]`): Texts with `{slot}`s, and `<break>` between text and pictures.
        answer (`str`): Slot that the model is to give.
        answer_from (`str`, *optional*): Text slot from which on the model's share begins, in templates that have it.
        optional (`tuple[str, ...]`): Text slots that may be empty, or have no column.
        source (`str`): Where the templates are from.

    Raises:
        ValueError: If a template has an unknown slot, or none for the answer, or a `<break>` between two texts.

    Source: CM3Leon (arXiv 2309.02591), Sec. 4 and App. E. Differs: strings around `<break>` lose their blanks.
    """

    name: str
    templates: tuple[str, ...]
    answer: str
    answer_from: str | None = None
    optional: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        """Refuses templates that cannot be filled."""
        for template in self.templates:
            _check_template(self, template)

    def slots(self, template: int = 0) -> tuple[str, ...]:
        """Names the slots of a template in its order."""
        return tuple(_SLOT.findall(self.templates[template]))

    @property
    def image_slots(self) -> tuple[str, ...]:
        """Slots with pictures, which are those of every template."""
        return tuple(slot for slot in self.slots() if slot in IMAGE_SLOTS)

    @property
    def draws_from_picture(self) -> bool:
        """Whether a picture is drawn that follows another, as edits and structure do."""
        return self.answer in IMAGE_SLOTS and len(self.image_slots) > 1


@dataclass(frozen=True)
class TaskSource:
    """A dataset that has rows of a task under columns of its own.

    Args:
        task (`str`): Name of the task.
        dataset_name (`str`): Hub id, folder or files, as in `load_rows`.
        columns (`Mapping[str, str]`): Column of each slot. Dots reach into structs and lists: `texts.0.user` is the
            first text's `user`, `answers.answer` every answer's `answer`.
        config_name (`str`, *optional*): Configuration (subset) of a Hub dataset.
        split (`str`): Split to read.
        boxes (`Mapping[str, Any]`, *optional*): Fields of the column of `objects`: `label`, `box` (one field, or four)
            and `format`, one of `xyxy`, `xywh` and `fractions`.
        num_examples (`int`, *optional*): Rows that the paper counts.
        note (`str`): What else one must know.
    """

    task: str
    dataset_name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    config_name: str | None = None
    split: str = "train"
    boxes: Mapping[str, Any] | None = None
    num_examples: int | None = None
    note: str = ""


def _check_template(task: Task, template: str) -> None:
    """Refuses a template that cannot be filled."""
    where = f"Template {template!r} of task {task.name!r}"
    slots = _SLOT.findall(template)
    if unknown := [slot for slot in slots if slot not in IMAGE_SLOTS + TEXT_SLOTS]:
        raise ValueError(f"{where} has unknown slots {unknown}. Known slots: {[*IMAGE_SLOTS, *TEXT_SLOTS]}.")
    if len(slots) != len(set(slots)):
        raise ValueError(f"{where} has a slot twice: {slots}.")
    if task.answer not in slots:
        raise ValueError(f"{where} has no slot for the answer, `{task.answer}`. Slots here: {slots}.")
    segments = _segments(template)
    for segment in segments:
        pictures = [slot for slot in _SLOT.findall(segment) if slot in IMAGE_SLOTS]
        if pictures and segment != f"{{{pictures[0]}}}":
            raise ValueError(f"{where}: the picture `{pictures[0]}` needs a {_BREAK} on either side of it.")
        if not segment:
            raise ValueError(f"{where} has nothing on one side of a {_BREAK}.")
    for before, after in zip(segments[:-1], segments[1:], strict=True):
        if not any(_picture(segment) for segment in (before, after)):
            raise ValueError(f"{where} has a {_BREAK} between two texts, {before!r} and {after!r}.")


def _segments(template: str) -> list[str]:
    """Cuts a template at its breaks."""
    return [segment.strip(" ") for segment in template.split(_BREAK)]


def _picture(segment: str) -> str | None:
    """Returns the slot of a segment that is a picture."""
    slot = segment.removeprefix("{").removesuffix("}")
    return slot if slot in IMAGE_SLOTS else None


def _read_table() -> tuple[dict[str, Task], dict[str, TaskSource]]:
    """Reads the table that ships."""
    table = json.loads(Path(__file__).with_name("task_table.json").read_text(encoding="utf-8"))
    tasks = {}
    for name, entry in table["tasks"].items():
        lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
        tasks[name] = Task(name=name, **{**entry, **lists})
    return tasks, {name: TaskSource(**entry) for name, entry in table["sources"].items()}


TASKS, SOURCES = _read_table()


def find_task(name: str | Task) -> Task:
    """Returns the task of a name, or the task itself; refuses a name that is none."""
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"`task`={name!r} is unknown. Tasks: {list(TASKS)}.")
    return TASKS[name]


def fitting_templates(task: str | Task, row: Mapping[str, Any]) -> list[int]:
    """Numbers the templates whose text slots the row has filled, such as those without an explanation if it has none.

    Args:
        task (`str` or [`Task`]): The task.
        row (`Mapping`): A task row.

    Returns:
        `list[int]`: Maybe none.
    """
    task = find_task(task)
    return [number for number in range(len(task.templates)) if not _empty_slots(task, row, number)]


def _empty_slots(task: Task, row: Mapping[str, Any], template: int) -> list[str]:
    """Names the text slots of a template that the row leaves empty and must not."""
    slots = (slot for slot in task.slots(template) if slot in TEXT_SLOTS and slot not in task.optional)
    return [slot for slot in slots if not _is_filled(row.get(slot))]


def _is_filled(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def fill_template(
    task: str | Task, row: Mapping[str, Any], template: int = 0, *, number: int | None = None
) -> list[dict[str, Any]]:
    """Fills a template with a row's texts; pictures are named, not read.

    Args:
        task (`str` or [`Task`]): The task.
        row (`Mapping`): A task row. `objects` may be a text already, or a list of `{"label", "box"}`, which needs the
            picture in `image` for its size and is moved along with the cut to the centred square.
        template (`int`): Number of the template.
        number (`int`, *optional*): Number of the row, for errors.

    Returns:
        `list[dict]`: Parts `{"type": "text", "text", "is_answer"}` and `{"type": "image", "slot", "is_answer"}` in the
        template's order. Texts of one segment stand side by side, cut where the answer begins and ends.

    Raises:
        ValueError: If the task or the template is unknown.
        RowError: If the row lacks a text or its boxes do not fit.

    Source: CM3Leon (arXiv 2309.02591), App. E.

    Example:
        >>> parts = fill_template("vqa", {"question": "What is it?", "answer": "a star"})
        >>> [(part.get("text", part.get("slot")), part["is_answer"]) for part in parts]
        [('Question: What is it? Answer: ', False), ('a star', True), ('.', False), ('image', False)]

    """
    task = find_task(task)
    if not 0 <= template < len(task.templates):
        raise ValueError(f"`template`={template}: task {task.name!r} has templates 0 to {len(task.templates) - 1}.")
    if empty := _empty_slots(task, row, template):
        raise RowError(f"{_where(number, empty[0])}: empty. Template {template} of task {task.name!r} needs it.")
    parts: list[dict[str, Any]] = []
    for segment in _segments(task.templates[template]):
        if slot := _picture(segment):
            parts.append({"type": "image", "slot": slot, "is_answer": slot == task.answer})
        else:
            parts += _text_parts(task, segment, row, number)
    return parts


def _text_parts(task: Task, segment: str, row: Mapping[str, Any], number: int | None) -> list[dict[str, Any]]:
    """Fills a segment of text, cut where the answer begins and ends."""
    pieces = _SLOT.split(segment)  # texts at even places, slots at odd ones
    first = task.answer_from if task.answer_from in pieces[1::2] else task.answer
    parts: list[dict[str, Any]] = []
    is_answer = False
    for place, piece in enumerate(pieces):
        is_slot = place % 2 == 1
        is_answer = is_answer or (is_slot and piece == first)
        text = _slot_text(piece, row, number) if is_slot else piece
        if parts and parts[-1]["is_answer"] == is_answer:
            parts[-1]["text"] += text
        elif text:
            parts.append({"type": "text", "text": text, "is_answer": is_answer})
        is_answer = is_answer and not (is_slot and piece == task.answer)
    return parts


def _slot_text(slot: str, row: Mapping[str, Any], number: int | None) -> str:
    """Returns the text of a slot; boxes are written as text."""
    value = row.get(slot)
    if value is None:
        return ""  # an optional slot, or it would have been refused
    if slot == "objects" and not isinstance(value, str):
        return objects_text(row, number)
    if not isinstance(value, str):
        raise RowError(f"{_where(number, slot)}: {type(value).__name__}, must be a string.")
    return value


def objects_text(row: Mapping[str, Any], number: int | None = None) -> str:
    """Writes as text the boxes that the centred square of a row's picture shows; refuses a row without any."""
    try:
        width, height = open_image(row.get("image")).size
        objects, side = crop_boxes(row["objects"], (height, width))
        if not objects:
            raise ValueError(f"none of the {len(row['objects'])} objects is in the centred square of the picture.")
        return format_boxes(objects, (side, side))
    except (ImageError, ValueError) as error:
        raise RowError(f"{_where(number, 'objects')}: {error}") from error


def _where(number: int | None, column: str) -> str:
    """Names a row and a column."""
    return f"Column `{column}`" if number is None else f"Row {number}, column `{column}`"


def check_task_row(task: str | Task, row: Mapping[str, Any], number: int | None = None) -> None:
    """Checks that a row fits its task; its pictures are read.

    Args:
        task (`str` or [`Task`]): The task.
        row (`Mapping`): A task row.
        number (`int`, *optional*): Its number, for the message.

    Raises:
        RowError: If a picture is missing or unreadable, two pictures differ in size, a text is missing or is none, or
            boxes are inverted or outside the picture.
    """
    task = find_task(task)
    if not isinstance(row, Mapping):
        raise RowError(f"Row {number}: {type(row).__name__}, must be a mapping with the slots of {task.name!r}.")
    sizes = {}
    for slot in task.image_slots:
        try:
            sizes[slot] = open_image(row.get(slot), slot).size
        except ImageError as error:
            raise RowError(f"{_where(number, slot)}: {error}. Task {task.name!r} needs the picture.") from error
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"`{slot}` {width} x {height} px" for slot, (width, height) in sizes.items())
        raise RowError(f"{_where(number, task.answer)}: the pictures differ in size (width x height): {named}.")
    templates = fitting_templates(task, row)
    for template in templates or [0]:
        fill_template(task, row, template, number=number)


def answer_last(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Orders a filled template for a model that reads causally: the answer comes last.

    First come the parts without the answer, pictures before the text of the answer's own segment, then the answer;
    what follows the answer in its segment is dropped.

    Args:
        parts (`Sequence[dict]`): From `fill_template`, with one answer.

    Returns:
        `list[dict]`: The parts reordered.

    Raises:
        ValueError: If there is not one answer.

    Source: ours; the authors' code has the same order as a variant. The paper's templates have the answer before the
    picture, which suits models that fill in.
    """
    answers = [place for place, part in enumerate(parts) if part["is_answer"]]
    if len(answers) != 1:
        raise ValueError(f"{len(answers)} of {len(parts)} parts are answers; there must be one.")
    place = answers[0]
    if parts[place]["type"] == "image":
        return [*parts[:place], *parts[place + 1 :], parts[place]]
    start, stop = place, place + 1
    while start > 0 and parts[start - 1]["type"] == "text":
        start -= 1
    while stop < len(parts) and parts[stop]["type"] == "text":
        stop += 1
    return [*parts[:start], *parts[stop:], *parts[start : place + 1]]


def conversation_parts(messages: Sequence[Mapping[str, Any]], *, number: int = 0) -> list[dict[str, Any]]:
    """Lays out a conversation; what the assistant says are the answers.

    Args:
        messages (`Sequence[Mapping]`): `{"role", "content"}`, content a string or a list of parts
            `{"type": "text", "text"}` and `{"type": "image", "image"}`. The last is the assistant's.
        number (`int`): Number of the row, for errors.

    Returns:
        `list[dict]`: The parts with `is_answer`, and `{"type": "end_of_turn"}` after each message of the assistant
        but the last. Parts `{"type": "image"}` keep their `image`.

    Raises:
        RowError: If a message has not its format, is empty, or the last is not the assistant's.
    """
    messages = list(messages) if isinstance(messages, Sequence) else messages
    check_row({"messages": messages}, number, "conversation")
    if messages[-1]["role"] != "assistant":
        raise RowError(
            f"{_where(number, f'messages[{len(messages) - 1}]')}: the last message is of the role "
            f"{messages[-1]['role']!r}; it must be the assistant's, which is what is learnt."
        )
    parts: list[dict[str, Any]] = []
    for place, message in enumerate(messages):
        is_answer = message["role"] == "assistant"
        for part in _content(message["content"]):
            if part["type"] == "text" and not part["text"].strip():
                raise RowError(f"{_where(number, f'messages[{place}].content')}: an empty text.")
            value = {"text": part["text"]} if part["type"] == "text" else {"image": part["image"]}
            parts.append({"type": part["type"], **value, "is_answer": is_answer})
        if is_answer and place < len(messages) - 1:
            parts.append({"type": "end_of_turn"})
    return parts


def _content(content: str | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
