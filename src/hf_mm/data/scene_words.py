"""Words for icon scenes beyond their captions: places, sizes, long and dense captions.

Everything is lower case, in the words of the captions of `icon_records.py`. This file knows scene records, neither
pixels nor datasets.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from .icon_records import check_choice, is_held_out


# Centres of the nine places as fractions of the picture; the centre has no name in captions.
PLACES = {
    "": (0.5, 0.5),
    "at the top": (0.5, 0.24),
    "at the bottom": (0.5, 0.76),
    "on the left": (0.24, 0.5),
    "on the right": (0.76, 0.5),
    "in the top left corner": (0.24, 0.24),
    "in the top right corner": (0.76, 0.24),
    "in the bottom left corner": (0.24, 0.76),
    "in the bottom right corner": (0.76, 0.76),
}
NUMBERS = ("no", "one", "two", "three", "four")
_CENTER = "in the center"
_SMALL_BELOW, _LARGE_FROM = 0.44, 0.69  # halfway between the sizes that captions call small, medium and large


def checked_weights(kinds: Mapping[str, float], known: Sequence[str]) -> dict[str, float]:
    """Checks weights of kinds and puts them in the order of the known ones.

    Args:
        kinds (`Mapping[str, float]`): Weight of each kind.
        known (`Sequence[str]`): Names of all kinds.

    Returns:
        `dict[str, float]`: the same weights.

    Raises:
        ValueError: If a kind is unknown, a weight negative, or none above 0.
    """
    for kind, weight in kinds.items():
        check_choice("kinds", kind, tuple(known))
        if not weight >= 0:
            raise ValueError(f"`kinds[{kind!r}]`={weight} must be at least 0.")
    if not sum(kinds.values()) > 0:
        raise ValueError(f"`kinds`={dict(kinds)} must give some kind a weight above 0. Kinds: {list(known)}.")
    return {kind: float(kinds[kind]) for kind in known if kind in kinds}


def is_training_look(glyph: str, color: str, background: str) -> bool:
    """Says whether a combination can be seen and belongs to the training split."""
    return color != background and not is_held_out(glyph, color, background)


def may_be_named(glyph: str, color: str, background: str, split: str) -> bool:
    """Says whether words of a split may speak of a combination that its picture does not show."""
    return split == "validation" or not is_held_out(glyph, color, background)


def with_article(words: str) -> str:
    """Puts "a" or "an" before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def look_of(item: Mapping[str, Any]) -> str:
    """Names an object by colour and glyph, with an article: "a red star"."""
    return with_article(f"{item['color']} {item['glyph']}")


def place_of(item: Mapping[str, Any]) -> str:
    """Names the place nearest to an object's centre; the centre too: "in the center"."""
    name = min(PLACES, key=lambda place: (item["x"] - PLACES[place][0]) ** 2 + (item["y"] - PLACES[place][1]) ** 2)
    return name or _CENTER


def size_of(item: Mapping[str, Any]) -> str:
    """Names an object's size, also where the record leaves it unnamed."""
    return "small" if item["size"] < _SMALL_BELOW else "large" if item["size"] >= _LARGE_FROM else "medium"


def _full_name(item: Mapping[str, Any]) -> str:
    return f"{with_article(' '.join((size_of(item), item['color'], item['glyph'])))} {place_of(item)}"


def long_caption(scene: Mapping[str, Any], rng: random.Random) -> str:
    """Words size, colour, glyph and place of all objects and the background in two or three sentences.

    Args:
        scene (`Mapping`): Scene record.
        rng (`random.Random`): Picks the wording.

    Returns:
        `str`: ends with a full stop, e.g. `"a large red star in the center. the background is white."`.
    """
    objects = " and ".join(_full_name(item) for item in scene["objects"])
    wording = rng.choice(
        (
            "{objects}. the background is {background}.",
            "the picture shows {objects}. the background is {background}.",
            "{objects}. there is nothing else on the {background} background.",
        )
    )
    return wording.format(objects=objects, background=scene["background"])


def dense_caption(scene: Mapping[str, Any]) -> str:
    """Lists every object with its size and place, one clause each, after their number.

    Args:
        scene (`Mapping`): Scene record.

    Returns:
        `str`: e.g. `"one object on a white background: a large red star in the center."`.
    """
    number = len(scene["objects"])
    names = "; ".join(_full_name(item) for item in scene["objects"])
    return f"{NUMBERS[number]} object{'s' if number > 1 else ''} on a {scene['background']} background: {names}."
