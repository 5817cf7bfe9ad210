"""Conversations about icon scenes: pictures described, drawn and edited over two turns.

The last message is a picture, the result of an edit. Rows and their columns are made in `scene_tasks.py`.
"""

import random
from collections.abc import Mapping
from typing import Any

import datasets
from PIL import Image

from .icon_records import describe
from .icon_scenes import draw
from .scene_edits import DEFAULT_EDIT_KINDS, sample_edits


CONVERSATION_KINDS = ("edits", "description", "drawing")
_DESCRIBE = ("describe the picture", "what do you see?", "write a caption")
_DRAW = ("draw {caption}", "make a picture of {caption}", "show me {caption}")
MESSAGES_FEATURE = datasets.List(
    {
        "role": datasets.Value("string"),
        "content": datasets.List(
            {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
        ),
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


def sample_conversation(
    rng: random.Random, *, glyph_set: str, size_px: int, split: str, kinds: Mapping[str, float]
) -> dict[str, Any]:
    """Samples a conversation of two turns.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        size_px (`int`): Side of the square pictures in pixels.
        split (`str`): `"train"`, or `"validation"`, whose last picture shows held-out combinations.
        kinds (`Mapping[str, float]`): Weights of `"edits"` (two, of a given picture), `"description"` (of a given
            picture, and an edit of it) and `"drawing"` (from words, and an edit of it).

    Returns:
        `dict`: `messages`, and `input_scene`, `scene` (records) and `edit` of the last turn, as of `sample_edit`.
    """
    kind = rng.choices(tuple(kinds), weights=tuple(kinds.values()))[0]
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
    return {"messages": messages, **{name: last[name] for name in ("input_scene", "scene", "edit")}}
