"""Odd values, texts and changes of nested values, all drawn from one generator. Knows nothing of the package."""

import copy
import math
from collections.abc import Sequence
from random import Random
from typing import Any


NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, -0.5, 1.0, 1.5, 1e-9,
    1e9, 1e308, math.nan, math.inf, -math.inf, True, False,
)  # fmt: skip
MARKERS = (
    "<image>", "<s>", "</s>", "<pad>", "<boi>", "<eoi>", "<break>", "<eoss>", "<eos>", "<code:0>", "<code:22>",
    "<sentinel:0>", "<sentinel:6>", "<code:", "<image", "image>", "<|endoftext|>", "{prompt}", "{}", "{0}", "%s", "%",
    "{{ message }}", "{slot}", "___", "|", ",", ";", "\\", '"', "'", "`", "../", "/dev/null", "none", "null", "~",
    " at location (", " and with ",
)  # fmt: skip
ALPHABETS = (
    "abc xyz ", "ABC XYZ", "äöüß éñ ", "中文字符圖像", "русский ", "עברית", "العربية", "👩‍👩‍👧‍👦🏳️‍🌈🎉",
    "e\u0301\u0323\u20dd", "\u202e\u202d\u200f\u200b\ufeff", "\x00\x01\x1b\x7f",
    "\t\n\r\x0b\x0c \u00a0\u2028\u3000", "\ud800\udfff\udc80", "\uffff\U0010ffff\ue000", "0123456789", "ﬁǆİı",
    "()[]{}<>/\\|!?.:",
)  # fmt: skip
WORDS = ("a red star", "two blue boxes left of a green moon", "an orange kite", "on a white background", "What is it?")


def odd_text(rng: Random, longest: int = 4000) -> str:
    """Draws a text: plain words, markers, any script, control characters, lone surrogates; empty or very long."""
    pieces = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5))):
        kind = rng.random()
        if kind < 0.35:
            pieces.append(rng.choice(WORDS))
        elif kind < 0.6:
            pieces.append(rng.choice(MARKERS))
        else:
            alphabet = rng.choice(ALPHABETS)
            pieces.append("".join(rng.choice(alphabet) for _ in range(rng.choice((1, 2, 5, 17)))))
    text = rng.choice(("", " ", "", "\n")).join(pieces)
    return (text * longest)[: rng.choice((129, longest))] if text and rng.random() < 0.03 else text


def odd_value(rng: Random, depth: int = 2) -> Any:
    """Draws any value: a number, text, bytes, None, or a list or mapping of such."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return odd_text(rng, 300)
    if kind < 0.75:
        return None
    if kind < 0.8:
        return rng.randbytes(rng.choice((0, 1, 9)))
    if depth == 0:
        return rng.choice(([], {}))
    members = [odd_value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 4)))]
    if kind < 0.92:
        return members
    return {rng.choice(("type", "text", "image", "role", "content", "bytes", "box", "x")): value for value in members}


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the paths of all values inside mappings and lists."""
    keys: Sequence[Any] = ()
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    return [place for key in keys for place in [(*path, key), *places_of(value[key], (*path, key))]]


def mutate(value: Any, rng: Random, times: int | None = None) -> Any:
    """Copies a nested value and changes it in a few places: replaced, left out, doubled, wrapped, moved.

    Args:
        value (`Any`): Of mappings and lists.
        rng (`Random`): Draws the changes.
        times (`int`, *optional*): How many; one or a few, and now and then none.
    """
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4)) if times is None else times):
        places = places_of(changed)
        if not places:
            return odd_value(rng)
        *path, key = rng.choice(places)
        holder = changed
        for step in path:
            holder = holder[step]
        kind = rng.random()
        if kind < 0.45:
            holder[key] = odd_value(rng)
        elif kind < 0.6:
            del holder[key]
        elif kind < 0.7:
            holder[key] = [holder[key]]
        elif kind < 0.8 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif kind < 0.9:
            holder[key] = str(holder[key]) if rng.random() < 0.5 else odd_text(rng, 300)
        elif isinstance(holder, dict):
            holder[odd_text(rng, 20)] = holder.pop(key)
        else:
            rng.shuffle(holder)
    return changed


def damage(data: bytes, rng: Random) -> bytes:
    """Damages bytes: cut off, a bit flipped, a stretch replaced, doubled, or left out; or something else entirely."""
    kind, place = rng.random(), rng.randrange(len(data) + 1)
    if kind < 0.3:
        return data[:place]
    if kind < 0.6 and data:
        place = min(place, len(data) - 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    stretch = rng.choice((1, 4, 8, 64))
    if kind < 0.75:
        return data[:place] + rng.randbytes(stretch) + data[place + stretch :]
    if kind < 0.85:
        return data[: place + stretch] + data[place:]
    if kind < 0.95:
        return data[:place] + data[place + stretch :]
    return rng.choice((b"", b"\x00" * 16, rng.randbytes(64), b"{}", b"[]", b"null", b"\xff\xfe{}"))
