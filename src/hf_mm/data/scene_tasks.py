"""Every task of instruction tuning on icon scenes: rows whose columns are the slots of the task's templates.

Every row is a pure function of `(task, index, seed, glyph_set, size_px, split)` and the mix of kinds. Training rows
show and name no held-out combination of glyph, colour and background; the target picture of a validation row shows no
other (for letters: of text, colour and background). Which combinations are held out is said in `icon_records.py`.

Beside its slots a row has the record of the target scene as JSON (`scene`) and, for edits, that of the input
(`input_scene`) and of what changed (`edit`), by which any answer can be scored exactly; a conversation has those of
its last turn.

This file knows slots by name; it knows no template, token or model.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from .icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS, render_glyph
from .icon_records import DEFAULT_KINDS, KINDS, SPLITS, check_choice, describe, is_held_out, sample_scene
from .icon_scenes import MIN_SIZE_PX, draw, scene_masks
from .scene_controls import ALPHABET, CONTROL_KINDS, draw_control, draw_letters
from .scene_conversations import CONVERSATION_KINDS, MESSAGES_FEATURE, sample_conversation
from .scene_edits import DEFAULT_EDIT_KINDS, EDIT_KINDS, sample_edit
from .scene_questions import (
    DEFAULT_QUESTION_KINDS,
    DEFAULT_REASONING_KINDS,
    QUESTION_KINDS,
    REASONING_KINDS,
    sample_question,
    sample_reasoning,
)
from .scene_words import checked_weights, dense_caption, long_caption


PLACED_KINDS = ("single_object", "two_object")
LETTER_KINDS = ("one_letter", "two_letters", "three_letters")
SLOTS: dict[str, tuple[str, ...]] = {
    "edit": ("input_image", "instruction", "image", "input_scene", "edit"),
    "write": ("text", "image"),
    "boxes": ("caption", "objects", "image"),
    **dict.fromkeys(CONTROL_KINDS, ("control_image", "caption", "image")),
    "caption": ("caption", "image"),
    "long_caption": ("caption", "image"),
    "dense_caption": ("caption", "image"),
    "vqa": ("question", "answer", "image"),
    "reasoning": ("question", "context", "choices", "explanation", "answer", "image"),
    "text": ("text",),
    "chat": ("messages", "input_scene", "edit"),
}
SCENE_TASKS = tuple(SLOTS)

# Lone objects anywhere in the picture, and pairs that leave a tenth of it between them.
_PLACED_SIZES = {1: (0.4, 0.85), 2: (0.28, 0.45)}
_MIN_GAP = 0.1
_ASPECT_PX = 256  # glyphs are measured at this size
_ROWS_PER_SHARD = 256

_LETTERS = dict.fromkeys(LETTER_KINDS, 1.0)
_CONVERSATIONS = dict.fromkeys(CONVERSATION_KINDS, 1.0)
_SINGLE = {"shapes": {"single_object": 1.0}, "icons": DEFAULT_KINDS["icons"]}
_PLACED = {"shapes": {"single_object": 1.0}, "icons": {"two_object": 1.0}}
# For each task the kinds that its rows may be of, and the weights of those that they are of by default.
_KINDS: dict[str, tuple[Sequence[str], Mapping[str, Mapping[str, float]]]] = {
    **dict.fromkeys(SCENE_TASKS, (KINDS, _SINGLE)),
    **dict.fromkeys(("boxes", *CONTROL_KINDS), (PLACED_KINDS, _PLACED)),
    "edit": (EDIT_KINDS, DEFAULT_EDIT_KINDS),
    "write": (LETTER_KINDS, dict.fromkeys(GLYPH_SETS, _LETTERS)),
    "vqa": (QUESTION_KINDS, DEFAULT_QUESTION_KINDS),
    "reasoning": (REASONING_KINDS, DEFAULT_REASONING_KINDS),
    "text": (KINDS, DEFAULT_KINDS),
    "chat": (CONVERSATION_KINDS, dict.fromkeys(GLYPH_SETS, _CONVERSATIONS)),
}
_TYPES: dict[str, Any] = {
    "messages": MESSAGES_FEATURE,
    "image": datasets.Image(),
    "input_image": datasets.Image(),
    "control_image": datasets.Image(),
    "objects": datasets.List(
        {"label": datasets.Value("string"), "box": datasets.List(datasets.Value("int32"), length=4)}
    ),
}


def sample_placed_scene(
    rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float]
) -> dict[str, Any]:
    """Samples a scene whose objects lie anywhere in the picture, wholly inside it.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        split (`str`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`): Weights of `"single_object"` (longer side 0.4 to 0.85 of the picture) and
            `"two_object"` (0.28 to 0.45).

    Returns:
        `dict`: scene record; size and place have no names, so that its caption leaves them open.
    """
    scene = sample_scene(rng.getrandbits(48), glyph_set=glyph_set, split=split, kinds=kinds)
    sizes = _PLACED_SIZES[len(scene["objects"])]
    while True:
        placed: list[dict[str, Any]] = []
        boxes: list[tuple[float, float, float, float]] = []
        for item in scene["objects"]:
            size = round(rng.uniform(*sizes), 4)
            height, width = (side * size / _ASPECT_PX for side in render_glyph(item["glyph"], _ASPECT_PX).shape)
            x, y = (round(rng.uniform(side / 2, 1 - side / 2), 4) for side in (width, height))
            placed.append(item | {"size_name": "", "place": "", "x": x, "y": y, "size": size})
            boxes.append((x - width / 2, y - height / 2, x + width / 2, y + height / 2))
        if len(boxes) == 1 or _gap(*boxes) >= _MIN_GAP:
            return {**scene, "objects": placed}


def _gap(first: Sequence[float], second: Sequence[float]) -> float:
    """Measures the distance of two boxes along the axis on which they lie further apart."""
    return max(max(first[axis] - second[axis + 2], second[axis] - first[axis + 2]) for axis in (0, 1))


def _mask_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _sample_letters(rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float]) -> dict[str, Any]:
    """Samples the record of a picture of letters; it has no objects."""
    number = 1 + LETTER_KINDS.index(rng.choices(tuple(kinds), weights=tuple(kinds.values()))[0])
    while True:
        text = "".join(rng.choices(ALPHABET, k=number))
        color, background = rng.choice(tuple(OBJECT_COLORS)), rng.choice(tuple(BACKGROUND_COLORS))
        if color != background and is_held_out(text, color, background) == (split == "validation"):
            break
    return {
        "kind": "write",
        "split": split,
        "glyph_set": glyph_set,
        "background": background,
        "relation": None,
        "objects": [],
        "text": text,
        "color": color,
    }


def _write_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    scene = _sample_letters(rng, **options)
    image = draw_letters(scene["text"], scene["color"], scene["background"], size_px)
    return {"text": scene["text"], "image": image, "scene": scene}


def _edit_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    sample = sample_edit(rng, **options)
    pictures = {"input_image": draw(sample["input_scene"], size_px), "image": draw(sample["scene"], size_px)}
    records = {name: json.dumps(sample[name]) for name in ("input_scene", "edit")}
    return {"instruction": sample["instruction"], "scene": sample["scene"], **pictures, **records}


def _boxes_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    scene = sample_placed_scene(rng, **options)
    objects = [
        {"label": item["glyph"], "box": _mask_box(mask)}
        for item, mask in zip(scene["objects"], scene_masks(scene, size_px), strict=True)
    ]
    return {"caption": describe(scene, rng), "objects": objects, "image": draw(scene, size_px), "scene": scene}


def _control_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    scene = sample_placed_scene(rng, **options)
    return {
        "control_image": draw_control(task, scene, size_px, rng),
        "caption": describe(scene, rng),
        "image": draw(scene, size_px),
        "scene": scene,
    }


def _caption_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    scene = sample_scene(rng.getrandbits(48), **options)
    caption = {
        "caption": lambda: describe(scene, rng),
        "long_caption": lambda: long_caption(scene, rng),
        "dense_caption": lambda: dense_caption(scene),
    }[task]()
    return {"caption": caption, "image": draw(scene, size_px), "scene": scene}


def _question_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    sample = sample_question if task == "vqa" else sample_reasoning
    row = sample(rng, **options)
    return {**row, "image": draw(row["scene"], size_px)}


def _text_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    scene = sample_scene(rng.getrandbits(48), **options)
    return {"text": describe(scene, rng), "scene": scene}


def _chat_row(task: str, rng: random.Random, size_px: int, **options: Any) -> dict[str, Any]:
    sample = sample_conversation(rng, size_px=size_px, **options)
    return sample | {name: json.dumps(sample[name]) for name in ("input_scene", "edit")}


_ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "edit": _edit_row,
    "write": _write_row,
    "boxes": _boxes_row,
    **dict.fromkeys(CONTROL_KINDS, _control_row),
    **dict.fromkeys(("caption", "long_caption", "dense_caption"), _caption_row),
    **dict.fromkeys(("vqa", "reasoning"), _question_row),
    "text": _text_row,
    "chat": _chat_row,
}


def task_kinds(task: str, glyph_set: str, kinds: Mapping[str, float] | None = None) -> dict[str, float]:
    """Gives the kinds that a task's rows are of, with their weights.

    Kinds are of edits for `edit`, of questions for `vqa` and `reasoning`, numbers of letters for `write`, of
    conversations for `chat`, and of scenes for all other tasks. By default `shapes` has lone objects only (but for
    `text`, and for counting in `vqa`).

    Args:
        task (`str`): One of `SCENE_TASKS`.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        kinds (`Mapping[str, float]`, *optional*): Weights of some of the task's kinds; `None` gives the defaults.

    Returns:
        `dict[str, float]`: weight of each kind.

    Raises:
        ValueError: If a name is unknown, a weight negative, or none above 0.

    Example:
        >>> task_kinds("write", "shapes")
        {'one_letter': 1.0, 'two_letters': 1.0, 'three_letters': 1.0}

    """
    check_choice("task", task, SCENE_TASKS)
    check_choice("glyph_set", glyph_set, tuple(GLYPH_SETS))
    known, defaults = _KINDS[task]
    return checked_weights(defaults[glyph_set] if kinds is None else kinds, known)


def draw_task_row(
    task: str,
    index: int,
    seed: int = 0,
    *,
    glyph_set: str = "shapes",
    size_px: int = 32,
    split: str = "train",
    kinds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Draws one row of a task, a pure function of its arguments.

    Args:
        task (`str`): One of `SCENE_TASKS`.
        index (`int`): Number of the row, at least 0.
        seed (`int`, defaults to 0): Another seed gives other rows with the same held-out combinations.
        glyph_set (`str`, defaults to `"shapes"`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        size_px (`int`, defaults to 32): Side of the square pictures in pixels, at least `MIN_SIZE_PX`.
        split (`str`, defaults to `"train"`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`, *optional*): Weights of the task's kinds; see `task_kinds`.

    Returns:
        `dict`: the columns of `SLOTS[task]`, and `scene`, the target's record as a JSON string. `objects` is a list of
        `{"label", "box"}` with the pixels `[x0, y0, x1, y1]` of the mask, x1 and y1 exclusive.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    weights = task_kinds(task, glyph_set, kinds)
    check_choice("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"`index`={index} must be at least 0.")
    if size_px < MIN_SIZE_PX:
        raise ValueError(f"`size_px`={size_px} is too small for the glyphs to show. Use at least {MIN_SIZE_PX}.")
    rng = random.Random(f"{task}|{glyph_set}|{split}|{seed}|{index}")
    row = _ROWS[task](task, rng, size_px, glyph_set=glyph_set, split=split, kinds=weights)
    return {**row, "scene": json.dumps(row["scene"])}


def task_features(task: str) -> datasets.Features:
    """Gives the column types of a task's rows.

    Args:
        task (`str`): One of `SCENE_TASKS`.

    Returns:
        `datasets.Features`: of the columns `SLOTS[task]` and `scene`.

    Raises:
        ValueError: If the task is unknown.
    """
    check_choice("task", task, SCENE_TASKS)
    return datasets.Features({slot: _TYPES.get(slot, datasets.Value("string")) for slot in (*SLOTS[task], "scene")})


def _generate_rows(task: str, row_ranges: list[tuple[int, int]], **options: Any) -> Iterator[dict[str, Any]]:
    for start, stop in row_ranges:
        for index in range(start, stop):
            yield draw_task_row(task, index, **options)


def _drawing_version() -> str:
    """Hashes what the rows depend on beside the arguments, so that a cached dataset is never a stale one."""
    folder = Path(__file__).parent
    sources = sorted([*folder.glob("icon_*.py"), *folder.glob("scene_*.py")])
    texts = [path.read_text(encoding="utf-8") for path in sources]
    return Hasher.hash([texts, version("fontawesomefree"), version("pillow")])


def scene_task_dataset(
    task: str,
    num_rows: int,
    *,
    glyph_set: str = "shapes",
    size_px: int = 32,
    split: str = "train",
    seed: int = 0,
    kinds: Mapping[str, float] | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset:
    """Draws a map-style dataset of a task, cached on disk by `datasets`; row `i` is `draw_task_row(task, i, ...)`.

    Args:
        task (`str`): One of `SCENE_TASKS`.
        num_rows (`int`): Number of rows, at least 1.
        glyph_set (`str`, defaults to `"shapes"`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        size_px (`int`, defaults to 32): Side of the square pictures in pixels, at least `MIN_SIZE_PX`.
        split (`str`, defaults to `"train"`): `"train"` or `"validation"`.
        seed (`int`, defaults to 0): Another seed gives other rows with the same held-out combinations.
        kinds (`Mapping[str, float]`, *optional*): Weights of the task's kinds; see `task_kinds`.
        num_proc (`int`, *optional*): Number of drawing processes. The rows do not depend on it.

    Returns:
        `datasets.Dataset`: columns as in `task_features`.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows`={num_rows} must be at least 1.")
    features = task_features(task)
    options: dict[str, Any] = {
        "glyph_set": glyph_set,
        "size_px": size_px,
        "split": split,
        "seed": seed,
        "kinds": task_kinds(task, glyph_set, kinds),
    }
    draw_task_row(task, 0, **options)  # refuses bad arguments before any file is written
    shards = -(-num_rows // _ROWS_PER_SHARD)
    edges = [shard * num_rows // shards for shard in range(shards + 1)]
    arguments = {"task": task, "row_ranges": list(zip(edges[:-1], edges[1:], strict=True)), **options}
    return datasets.Dataset.from_generator(
        _generate_rows,
        features=features,
        gen_kwargs=arguments,
        num_proc=num_proc,
        split=datasets.NamedSplit(split),
        fingerprint=Hasher.hash([arguments, _drawing_version()]),
    )
