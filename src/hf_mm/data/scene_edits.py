"""Edits of icon scenes: a scene before, an instruction, the same scene after it.

The scene after the edit is drawn from the split; the one before is made from it by undoing the edit, and shows
training combinations. Where an edit changes no combination (size, move, what an add or a remove leaves alone), the
untouched objects of a validation edit are held out before and after.

Both records share everything that the edit does not name, to the last digit of place and size. This file knows scene
records, neither pixels nor datasets.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from .icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS
from .icon_records import sample_scene
from .scene_words import PLACES, is_training_look, look_of, place_of, size_of, with_article


EDIT_KINDS = ("color", "glyph", "background", "size", "add", "remove", "move")
DEFAULT_EDIT_KINDS: dict[str, dict[str, float]] = {
    # At 32 px, where models learn `shapes` in minutes, one object is what they can do.
    "shapes": {"color": 0.3, "glyph": 0.3, "background": 0.25, "size": 0.15},
    "icons": dict.fromkeys(EDIT_KINDS, 1.0),
}
CHAINED_KINDS = ("color", "glyph", "background")  # undone without a change to the picture after
_SCENE_KINDS = {
    "color": {"single_object": 0.6, "two_object": 0.4},
    "glyph": {"single_object": 0.6, "two_object": 0.4},
    "background": {"single_object": 0.6, "two_object": 0.4},
    "size": {"single_object": 1.0},
    "move": {"single_object": 1.0},
    "add": {"position": 1.0},
    "remove": {"position": 0.5, "two_object": 0.5},
}
_WORDINGS = {
    "color": (
        "make the {glyph} {value}",
        "change the color of the {glyph} to {value}",
        "paint the {glyph} {value}",
        "turn the {glyph} {value}",
    ),
    "glyph": (
        "turn the {glyph} into {a_value}",
        "replace the {glyph} with {a_value}",
        "change the {glyph} to {a_value}",
    ),
    "background": ("change the background to {value}", "make the background {value}", "use a {value} background"),
    "size": ("make the {glyph} {value}", "change the size of the {glyph} to {value}"),
    "add": ("add {a_look} {relation} the {other}", "put {a_look} {relation} the {other}"),
    "remove": ("remove the {glyph}", "take the {glyph} away", "delete the {color} {glyph}", "keep only the {other}"),
    "move": ("move the {glyph} {to_place}", "put the {glyph} {place}"),
}
# For a lone object only: which one is meant needs no saying.
_LONE_WORDINGS = {
    "color": ("make it {value}", "change the color to {value}"),
    "glyph": ("make it {a_value}", "change it to {a_value}"),
    "background": ("put it on a {value} background", "put the {glyph} on a {value} background"),
    "size": ("make it {value}", "change the size to {value}"),
    "move": ("move it {to_place}",),
}
_BIGGER = ("make the {glyph} bigger", "make it bigger")
_SMALLER = ("make the {glyph} smaller", "make it smaller")
_SIZE_NAMES = {"shapes": ("medium", "large"), "icons": ("small", "medium", "large")}

Scene = dict[str, Any]
Undo = Callable[[Scene, int, random.Random], tuple[Scene, Scene] | None]


def _change(scene: Scene, number: int, **fields: Any) -> Scene:
    """Copies a scene with other fields of one object."""
    objects = [item | fields if place == number else item for place, item in enumerate(scene["objects"])]
    return {**scene, "objects": objects}


def _draw_size(name: str, rng: random.Random) -> float:
    """Draws a size that captions call by this name."""
    while True:
        item = sample_scene(rng.getrandbits(48), glyph_set="icons", kinds={"single_object": 1})["objects"][0]
        if item["size_name"] == name:
            return item["size"]


def _undo_color(after: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    item = after["objects"][number]
    colors = [
        color
        for color in OBJECT_COLORS
        if color != item["color"] and is_training_look(item["glyph"], color, after["background"])
    ]
    return (_change(after, number, color=rng.choice(colors)), after) if colors else None


def _undo_glyph(after: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    taken = {item["glyph"] for item in after["objects"]}
    color = after["objects"][number]["color"]
    glyphs = [
        glyph
        for glyph in GLYPH_SETS[after["glyph_set"]]
        if glyph not in taken and is_training_look(glyph, color, after["background"])
    ]
    return (_change(after, number, glyph=rng.choice(glyphs)), after) if glyphs else None


def _undo_background(after: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    backgrounds = [
        name
        for name in BACKGROUND_COLORS
        if name != after["background"]
        and all(is_training_look(item["glyph"], item["color"], name) for item in after["objects"])
    ]
    return ({**after, "background": rng.choice(backgrounds)}, after) if backgrounds else None


def _undo_size(scene: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    if scene["objects"][number]["place"]:
        return None  # off the centre there is no room to grow
    old, new = rng.sample(_SIZE_NAMES[scene["glyph_set"]], 2)
    before, after = (_change(scene, number, size_name=name, size=_draw_size(name, rng)) for name in (old, new))
    return before, after


def _undo_move(scene: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    small = _change(scene, number, size_name="small", size=_draw_size("small", rng))
    pair = []
    for place in rng.sample(tuple(PLACES), 2):
        x, y = (round(centre + rng.uniform(-0.02, 0.02), 4) for centre in PLACES[place])
        pair.append(_change(small, number, place=place, x=x, y=y))
    return pair[0], pair[1]


def _without(scene: Scene, number: int) -> Scene:
    """Takes one of two objects out; what stays is named by place and size, as a lone object is."""
    item = scene["objects"][1 - number]
    kept = item | {"size_name": size_of(item), "place": place_of(item)}
    return {**scene, "kind": "single_object", "relation": None, "objects": [kept]}


def _undo_add(after: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    return _without(after, 0), after  # the relation of a record is that of its first object


def _undo_remove(before: Scene, number: int, rng: random.Random) -> tuple[Scene, Scene] | None:
    return before, _without(before, number)


_UNDO: dict[str, Undo] = {
    "color": _undo_color,
    "glyph": _undo_glyph,
    "background": _undo_background,
    "size": _undo_size,
    "add": _undo_add,
    "remove": _undo_remove,
    "move": _undo_move,
}


def _describe_change(kind: str, before: Scene, after: Scene, number: int) -> dict[str, Any]:
    """Gives the record of an edit; the number counts the input's objects, for an added one the target's."""
    if kind == "background":
        return {"kind": kind, "object": None, "value": after["background"]}
    if kind == "remove":
        return {"kind": kind, "object": number, "value": None}
    if kind == "add":
        added = after["objects"][0]
        return {"kind": kind, "object": 0, "value": {"glyph": added["glyph"], "color": added["color"]}}
    field = {"size": "size_name", "move": "place"}.get(kind, kind)
    return {"kind": kind, "object": number, "value": after["objects"][number][field]}


def _word(edit: Mapping[str, Any], before: Scene, after: Scene, rng: random.Random) -> str:
    """Words an instruction so that before and instruction fix the picture after, up to shifts and sizes."""
    kind = edit["kind"]
    fullest = after if kind == "add" else before
    item = fullest["objects"][edit["object"] or 0]
    wordings = _WORDINGS[kind]
    if len(fullest["objects"]) == 1:
        wordings += _LONE_WORDINGS[kind]
    if kind == "size" and len(_SIZE_NAMES[before["glyph_set"]]) == 2:  # with a third size, bigger could mean two
        wordings += _BIGGER if edit["value"] == "large" else _SMALLER
    words = {"glyph": item["glyph"], "color": item["color"], "value": edit["value"], "relation": after["relation"]}
    if kind == "glyph":
        words["a_value"] = with_article(edit["value"])
    if kind in ("add", "remove"):
        words |= {"a_look": look_of(item), "other": fullest["objects"][1 - edit["object"]]["glyph"]}
    if kind == "move":
        place = place_of(after["objects"][edit["object"]])
        words |= {"place": place, "to_place": f"to {place.split(maxsplit=1)[1]}"}
    return rng.choice(wordings).format(**words)


def sample_edit(rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float]) -> dict[str, Any]:
    """Samples an edit: two scene records, what differs between them, and an instruction that says so.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        split (`str`): `"train"`: neither picture shows a held-out combination. `"validation"`: every object of the
            picture after the edit is one.
        kinds (`Mapping[str, float]`): Weight of each kind, a subset of `EDIT_KINDS`.

    Returns:
        `dict`: `input_scene` and `scene` (records), `edit` (`kind`, `object`: number of the object in the input's
        record, in the target's for `"add"`, `None` for `"background"`, and `value`: the new colour, glyph, background,
        size name or place, the look of what is added, or `None`), and `instruction`.
    """
    kind = rng.choices(tuple(kinds), weights=tuple(kinds.values()))[0]
    scene_kinds = {"single_object": 1.0} if glyph_set == "shapes" and kind in _LONE_WORDINGS else _SCENE_KINDS[kind]
    while True:
        scene = sample_scene(rng.getrandbits(48), glyph_set=glyph_set, split=split, kinds=scene_kinds)
        if sample := _edit_into(scene, kind, rng):
            return sample


def _edit_into(scene: Scene, kind: str, rng: random.Random) -> dict[str, Any] | None:
    """Samples an edit of a kind that ends in a scene, or in one like it, if there is any."""
    number = rng.randrange(len(scene["objects"]))
    pair = _UNDO[kind](scene, number, rng)
    if pair is None:
        return None
    before, after = pair
    edit = _describe_change(kind, before, after, number)
    return {"input_scene": before, "scene": after, "edit": edit, "instruction": _word(edit, before, after, rng)}


def sample_edits(
    rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float], num_edits: int
) -> list[dict[str, Any]]:
    """Samples edits of one picture, each of what the one before left; the last one is as `sample_edit` has it.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        split (`str`): Of the last picture; all others show training combinations.
        kinds (`Mapping[str, float]`): Weight of each kind; those before the last are of `CHAINED_KINDS`.
        num_edits (`int`): At least 1.

    Returns:
        `list[dict]`: edits in order, the `scene` of each the `input_scene` of the next.

    Raises:
        ValueError: If there are several edits and none of `kinds` may come before another.
    """
    chained = {kind: weight for kind, weight in kinds.items() if kind in CHAINED_KINDS and weight > 0}
    if num_edits > 1 and not chained:
        raise ValueError(f"`kinds`={dict(kinds)} has none of {CHAINED_KINDS}, of which edits before another are.")
    while True:
        edits = [sample_edit(rng, glyph_set=glyph_set, split=split, kinds=kinds)]
        for kind in rng.choices(tuple(chained), weights=tuple(chained.values()), k=num_edits - 1) if chained else ():
            if earlier := _edit_into(edits[0]["input_scene"], kind, rng):
                edits.insert(0, earlier)
        if len(edits) == num_edits:
            return edits
