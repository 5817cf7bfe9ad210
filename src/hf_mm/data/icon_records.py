"""Scene records of coloured icons, their held-out split and their captions.

A scene is a plain record: up to four objects, each a glyph in a named colour at a place and size given as fractions of
the picture, on a named background. Objects never overlap.

Held-out prompts: about 10% of the combinations (glyph, colour, background), chosen by a hash that depends on neither
seed nor size, belong to the validation split. Every object of a validation scene is such a combination and no object
of a training scene is, so no validation prompt, however worded, occurs in training, while each glyph, each colour and
each background does.

In `shapes` a lone object is medium or large and stands in the centre; `icons` has small ones too, at nine places.

The caption fixes the picture up to small shifts: an unnamed size is medium (or, with several objects, what fits), an
unnamed place is the centre, two objects joined by "and" stand in that order from left to right, and an unnamed
background is white.

This file knows nothing of pixels or datasets.
"""

import functools
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from .icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS, plural


# The six tasks of GenEval (arXiv 2310.11513, Table 1), by its tags. Differs: our prompts always name the colours.
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "validation")
DEFAULT_KINDS: dict[str, dict[str, float]] = {
    "shapes": {"single_object": 0.75, "two_object": 0.25},
    "icons": {
        "single_object": 0.35,
        "two_object": 0.15,
        "counting": 0.15,
        "colors": 0.1,
        "position": 0.15,
        "color_attr": 0.1,
    },
}
RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_ONE_IN = 10
# Among the first 6000 salts, the one whose held-out part of `shapes` is spread most evenly over glyphs and colours.
_HELD_OUT_SALT = 2439

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_SIZES = {"small": (0.30, 0.36), "medium": (0.52, 0.60), "large": (0.78, 0.86)}
# Small objects, and places other than the centre, belong to `icons`: at 32 px, where models learn `shapes` in minutes,
# an object of 10 pixels shows too little of its outline.
_SIZE_WEIGHTS = {"shapes": (0.0, 0.7, 0.3), "icons": (0.2, 0.65, 0.15)}
_SHARED_SIZE = (0.32, 0.36)  # several objects to a picture: leaves a tenth of the picture between neighbours
_NEAR, _FAR = 0.26, 0.74  # centres of the two columns and of the two rows
_PLACES = {
    "at the top": (0.5, 0.24),
    "at the bottom": (0.5, 0.76),
    "on the left": (0.24, 0.5),
    "on the right": (0.76, 0.5),
    "in the top left corner": (0.24, 0.24),
    "in the top right corner": (0.76, 0.24),
    "in the bottom left corner": (0.24, 0.76),
    "in the bottom right corner": (0.76, 0.76),
}
_LAYOUTS = {
    2: ((_NEAR, 0.5), (_FAR, 0.5)),
    3: ((0.5, _NEAR), (_NEAR, _FAR), (_FAR, _FAR)),
    4: ((_NEAR, _NEAR), (_FAR, _NEAR), (_NEAR, _FAR), (_FAR, _FAR)),
}
_RELATION_LAYOUTS = {
    "left of": ((_NEAR, 0.5), (_FAR, 0.5)),
    "right of": ((_FAR, 0.5), (_NEAR, 0.5)),
    "above": ((0.5, _NEAR), (0.5, _FAR)),
    "below": ((0.5, _FAR), (0.5, _NEAR)),
}
# Weight of each wording; the plain one is the most common. On white the background may also go unsaid.
_WORDINGS = {
    "{subject} on a {background} background": 0.6,
    "{subject} against a {background} background": 0.08,
    "an icon of {subject} on a {background} background": 0.08,
    "a picture of {subject} on a {background} background": 0.08,
    "on a {background} background, {subject}": 0.08,
}
_BARE_WORDING_WEIGHT = 0.15
_COLOR_WORDINGS = ("a {color} {glyph}", "a {glyph} that is {color}", "a {glyph} colored {color}")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuses a name that is not among the choices."""
    if value not in choices:
        raise ValueError(f"`{field}`={value!r} is unknown. Choose one of {list(choices)}.")


def check_exact_share(exact_share: float) -> None:
    """Refuses what is no share."""
    if not 0 <= exact_share <= 1:
        raise ValueError(f"`exact_share`={exact_share} must be between 0 and 1.")


def kind_weights(kinds: Mapping[str, float] | None, glyph_set: str) -> dict[str, float]:
    """Checks a mix of kinds and puts it in the order of `KINDS`."""
    check_choice("glyph_set", glyph_set, tuple(GLYPH_SETS))
    weights = DEFAULT_KINDS[glyph_set] if kinds is None else kinds
    for kind, weight in weights.items():
        check_choice("kinds", kind, KINDS)
        if not weight >= 0:
            raise ValueError(f"`kinds[{kind!r}]`={weight} must be at least 0.")
    if not sum(weights.values()) > 0:
        raise ValueError(f"`kinds`={dict(weights)} must give some kind a weight above 0. Kinds: {list(KINDS)}.")
    return {kind: float(weights[kind]) for kind in KINDS if kind in weights}


def is_held_out(glyph: str, color: str, background: str) -> bool:
    """Says whether a combination belongs to the validation split, whatever the seed and the glyph set.

    Args:
        glyph (`str`): Glyph name.
        color (`str`): Name of the object's colour.
        background (`str`): Name of the background colour.

    Returns:
        `bool`: True for about one combination in `HELD_OUT_ONE_IN`.

    """
    digest = hashlib.sha256(f"{_HELD_OUT_SALT}|{glyph}|{color}|{background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@functools.cache
def _allowed_looks(glyph_set: str, split: str, background: str) -> tuple[tuple[str, str], ...]:
    """Lists the (glyph, colour) pairs of a split that show on a background."""
    return tuple(
        (glyph, color)
        for glyph in GLYPH_SETS[glyph_set]
        for color in OBJECT_COLORS
        if color != background and is_held_out(glyph, color, background) == (split == "validation")
    )


def _pick_looks(kind: str, glyph_set: str, split: str, background: str, rng: random.Random) -> list[tuple[str, str]]:
    """Picks the glyph and colour of each object, in the order the caption names them."""
    looks = _allowed_looks(glyph_set, split, background)
    first = rng.choice(looks)
    if kind == "counting":
        return [first] * rng.choice(tuple(_NUMBERS))
    if kind in ("single_object", "colors"):
        return [first]
    others = [look for look in looks if look[0] != first[0] and (kind != "color_attr" or look[1] != first[1])]
    return [first, rng.choice(others)]


def _place_single(kind: str, glyph_set: str, rng: random.Random) -> tuple[str, str, tuple[float, float]]:
    """Picks size name, place name (empty for the centre) and centre of a lone object."""
    if kind == "colors":
        return "medium", "", (0.5, 0.5)
    size_name = rng.choices(tuple(_SIZES), weights=_SIZE_WEIGHTS[glyph_set])[0]
    if size_name == "small" and rng.random() < 0.5:
        place = rng.choice(tuple(_PLACES))
        return size_name, place, _PLACES[place]
    return size_name, "", (0.5, 0.5)


def _lay_out(
    kind: str, glyph_set: str, num_objects: int, relation: str | None, rng: random.Random
) -> tuple[str, str, Sequence[tuple[float, float]], tuple[float, float], float]:
    """Gives size name, place name, centres, range of sizes and largest shift of a scene's objects."""
    if num_objects == 1:
        size_name, place, centre = _place_single(kind, glyph_set, rng)
        return size_name, place, (centre,), _SIZES[size_name], 0.02
    centres = _RELATION_LAYOUTS[relation] if relation else _LAYOUTS[num_objects]
    return "", "", centres, _SHARED_SIZE, 0.01


def sample_scene(
    index: int,
    seed: int = 0,
    *,
    glyph_set: str = "shapes",
    split: str = "train",
    kinds: Mapping[str, float] | None = None,
    exact_share: float = 0.0,
) -> dict[str, Any]:
    """Samples the record of one scene; the same arguments always give the same record.

    Args:
        index (`int`): Number of the row, at least 0.
        seed (`int`): Another seed gives another dataset with the same held-out combinations.
        glyph_set (`str`): `"shapes"` (8 glyphs) or `"icons"` (about 60).
        split (`str`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`, *optional*):
            Weight of each kind of scene, a subset of `KINDS`. Defaults to `DEFAULT_KINDS[glyph_set]`.
        exact_share (`float`, defaults to 0.0):
            Share of the scenes, 0 to 1, whose objects stand exactly at their places and in the middle of their range
            of sizes. Else the same scenes as without: each object a little off, a little larger or smaller.

    Returns:
        `dict`: `kind`, `split`, `glyph_set`, `background`, `relation` (of the first object to the second, or `None`)
        and `objects`, each with `glyph`, `color`, `size_name`, `place`, centre `x`, `y` and `size` (longer side),
        the last three as fractions of the picture's side.

    Raises:
        ValueError: If the index is negative, the share is not one, or a name is unknown.

    """
    check_exact_share(exact_share)
    weights = kind_weights(kinds, glyph_set)
    check_choice("split", split, SPLITS)
    if index < 0:
        raise ValueError(f"`index`={index} must be at least 0.")
    # Seeding by a string goes through SHA-512: neighbouring indices and seeds share nothing.
    rng = random.Random(f"{glyph_set}|{split}|{seed}|{index}")
    kind = rng.choices(tuple(weights), weights=tuple(weights.values()))[0]
    background = rng.choice(tuple(BACKGROUND_COLORS))
    looks = _pick_looks(kind, glyph_set, split, background, rng)
    relation = rng.choice(RELATIONS) if kind == "position" else None
    size_name, place, centres, sizes, shift = _lay_out(kind, glyph_set, len(looks), relation, rng)
    is_exact = random.Random(f"exact|{glyph_set}|{split}|{seed}|{index}").random() < exact_share
    if is_exact:
        shift, sizes = 0.0, (sum(sizes) / 2,) * 2
    objects = [
        {
            "glyph": glyph,
            "color": color,
            "size_name": size_name,
            "place": place,
            "x": round(x + rng.uniform(-shift, shift), 4),
            "y": round(y + rng.uniform(-shift, shift), 4),
            "size": round(rng.uniform(*sizes), 4),
        }
        for (glyph, color), (x, y) in zip(looks, centres, strict=True)
    ]
    return {
        "kind": kind,
        "split": split,
        "glyph_set": glyph_set,
        "background": background,
        "relation": relation,
        "objects": objects,
    }


def scene_key(scene: Mapping[str, Any]) -> tuple[Any, ...]:
    """Gives what a scene shows, up to small shifts: equal for pictures that the caption of either describes.

    Args:
        scene (`Mapping`): Record from `sample_scene`.

    Returns:
        `tuple`: the background, and each object's glyph, colour, size name, column and row, in order of place.

    """
    objects = [
        (int(item["y"] * 3), int(item["x"] * 3), item["glyph"], item["color"], item["size_name"])
        for item in scene["objects"]
    ]
    return scene["background"], *sorted(objects)


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _subject(scene: Mapping[str, Any], rng: random.Random) -> str:
    """Words the objects of a scene, without the background."""
    objects = scene["objects"]
    first = objects[0]
    if scene["kind"] == "counting":
        return f"{_NUMBERS[len(objects)]} {first['color']} {plural(first['glyph'])}"
    if scene["kind"] == "colors":
        words = rng.choice(_COLOR_WORDINGS).format(**first)
        return _with_article(words.removeprefix("a "))
    if len(objects) == 1:
        size = "" if first["size_name"] == "medium" else first["size_name"]
        words = " ".join(filter(None, (size, first["color"], first["glyph"])))
        return f"{_with_article(words)} {first['place']}".rstrip()
    names = [_with_article(f"{item['color']} {item['glyph']}") for item in objects]
    return f" {scene['relation'] or 'and'} ".join(names)


def describe(scene: Mapping[str, Any], rng: random.Random) -> str:
    """Words a scene so that the caption determines objects, colours, sizes, places and background.

    Args:
        scene (`Mapping`): Record from `sample_scene`.
        rng (`random.Random`): Picks the wording; the plain one is the most common.

    Returns:
        `str`: lower case, without a full stop, e.g. `"a red star on a white background"`.

    """
    wordings = dict(_WORDINGS)
    if scene["background"] == "white":
        wordings["{subject}"] = _BARE_WORDING_WEIGHT
    wording = rng.choices(tuple(wordings), weights=tuple(wordings.values()))[0]
    return wording.format(subject=_subject(scene, rng), background=scene["background"])
