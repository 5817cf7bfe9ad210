"""Conversations about icon scenes: pictures described, drawn and edited over several turns.

Every row is a pure function of `(index, seed, glyph_set, size_px, split)`. The last message is a picture, the result
of an edit; `input_scene`, `scene` and `edit` are the records that it can be scored by, as of a row of edits.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

import datasets
from datasets.fingerprint import Hasher
from PIL import Image

from .icon_glyphs import GLYPH_SETS
from .icon_records import SPLITS, check_choice, describe
from .icon_scenes import draw
from .scene_edits import DEFAULT_EDIT_KINDS, sample_edits
from .scene_tasks import drawing_version


CONVERSATION_KINDS = ("edits", "description", "drawing")
_DESCRIBE = ("describe the picture", "what do you see?", "write a caption")
_DRAW = ("draw {caption}", "make a picture of {caption}", "show me {caption}")
_FEATURES = datasets.Features(
    {
        "messages": datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List(
                    {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
                ),
            }
        ),
        **{name: datasets.Value("string") for name in ("input_scene", "scene", "edit")},
    }
)

Message = dict[str, Any]


def _message(role: str, *content: str | Image.Image) -> Message:
    parts = [
        {"type": "text", "text": part, "image": None}
        if isinstance(part, str)
        else {"type": "image", "text": None, "image": part}
        for part in content
    ]
    return {"role": role, "content": parts}


def draw_conversation(
    index: int, seed: int = 0, *, glyph_set: str = "shapes", size_px: int = 32, split: str = "train"
) -> dict[str, Any]:
    """Draws one conversation of two turns, a pure function of its arguments.

    One of three kinds: two edits of a given picture; a description of a given picture and an edit; a drawing and an
    edit of it.

    Args:
        index (`int`): Number of the row, at least 0.
        seed (`int`, defaults to 0): Another seed gives other rows with the same held-out combinations.
        glyph_set (`str`, defaults to `"shapes"`): `"shapes"` or `"icons"`.
        size_px (`int`, defaults to 32): Side of the square pictures in pixels.
        split (`str`, defaults to `"train"`): `"train"`, or `"validation"`, whose last picture shows held-out
            combinations.

    Returns:
        `dict`: `messages`, and `input_scene`, `scene` and `edit` of the last turn as JSON strings.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    check_choice("glyph_set", glyph_set, tuple(GLYPH_SETS))
    check_choice("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"`index`={index} must be at least 0.")
    rng = random.Random(f"conversation|{glyph_set}|{split}|{seed}|{index}")
    kind = rng.choice(CONVERSATION_KINDS)
    edits = sample_edits(
        rng,
        glyph_set=glyph_set,
        split=split,
        kinds=DEFAULT_EDIT_KINDS[glyph_set],
        num_edits=2 if kind == "edits" else 1,
    )
    last, first_picture = edits[-1], draw(edits[0]["input_scene"], size_px)
    if kind == "edits":
        messages = [_message("user", first_picture, edits[0]["instruction"])]
        messages.append(_message("assistant", draw(edits[0]["scene"], size_px)))
    elif kind == "description":
        messages = [_message("user", first_picture, rng.choice(_DESCRIBE))]
        messages.append(_message("assistant", describe(last["input_scene"], rng)))
    else:
        caption = describe(last["input_scene"], rng)
        messages = [_message("user", rng.choice(_DRAW).format(caption=caption)), _message("assistant", first_picture)]
    messages += [_message("user", last["instruction"]), _message("assistant", draw(last["scene"], size_px))]
    return {"messages": messages, **{name: json.dumps(last[name]) for name in ("input_scene", "scene", "edit")}}


def _generate(first: int, last: int, **options: Any) -> Iterator[dict[str, Any]]:
    for index in range(first, last):
        yield draw_conversation(index, **options)


def scene_conversation_dataset(
    num_rows: int, *, glyph_set: str = "shapes", size_px: int = 32, split: str = "train", seed: int = 0
) -> datasets.Dataset:
    """Draws a dataset of conversations, cached on disk by `datasets`; row `i` is `draw_conversation(i, ...)`.

    Args:
        num_rows (`int`): Number of rows, at least 1.
        glyph_set (`str`, defaults to `"shapes"`): As in `draw_conversation`, likewise the others.
        size_px (`int`, defaults to 32): Likewise.
        split (`str`, defaults to `"train"`): Likewise.
        seed (`int`, defaults to 0): Likewise.

    Returns:
        `datasets.Dataset`: columns as in `draw_conversation`.

    Raises:
        ValueError: If an argument is out of range or unknown.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows`={num_rows} must be at least 1.")
    options: dict[str, Any] = {"glyph_set": glyph_set, "size_px": size_px, "split": split, "seed": seed}
    draw_conversation(0, **options)  # refuses bad arguments before any file is written
    return datasets.Dataset.from_generator(
        _generate,
        features=_FEATURES,
        gen_kwargs={"first": 0, "last": num_rows, **options},
        split=datasets.NamedSplit(split),
        fingerprint=Hasher.hash(["conversations", num_rows, options, drawing_version()]),
    )
