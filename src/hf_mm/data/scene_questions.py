"""Questions about icon scenes with their answers, and multiple-choice questions with an explanation.

Answers are drawn first and scenes to fit, so that no question has a likely answer to those who do not look: yes and
no, sizes and numbers are equally frequent. In the validation split that holds for yes and no, sizes and numbers only,
as few combinations are held out.

Words of the training split never speak of a held-out combination of the picture's objects and background. This file
knows scene records, neither pixels nor datasets.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from .icon_glyphs import BACKGROUND_COLORS, GLYPH_SETS, OBJECT_COLORS
from .icon_records import sample_scene
from .scene_words import NUMBERS, may_be_named, size_of, with_article


QUESTION_KINDS = ("color", "glyph", "background", "size", "count", "relation", "yes_no")
REASONING_KINDS = ("same_color", "contrast", "extent", "first_letter")
DEFAULT_QUESTION_KINDS: dict[str, dict[str, float]] = {
    "shapes": {"color": 0.25, "glyph": 0.2, "background": 0.15, "size": 0.1, "count": 0.1, "yes_no": 0.2},
    "icons": dict.fromkeys(QUESTION_KINDS, 1.0),
}
DEFAULT_REASONING_KINDS: dict[str, dict[str, float]] = {
    name: dict.fromkeys(REASONING_KINDS, 1.0) for name in GLYPH_SETS
}
CONTEXT = "the picture shows one icon on a plain background."

_QUESTIONS = {
    "color": ("what color is the {glyph}?", "what is the color of the {glyph}?"),
    "glyph": ("what is in the picture?", "what is this?", "what is shown?"),
    "background": ("what color is the background?", "what is the color of the background?"),
    "size": ("how large is the {glyph}?", "what size is the {glyph}?"),
    "count": ("how many objects are there?", "how many icons are in the picture?"),
    "relation": ("what is {relation} the {other}?",),
}
_LONE_QUESTIONS = {"color": ("what color is it?",), "size": ("how large is it?",)}
_YES_NO = {"color": "is the {glyph} {value}?", "glyph": "is it {value}?", "background": "is the background {value}?"}
_SIZE_NAMES = {"shapes": ("medium", "large"), "icons": ("small", "medium", "large")}
_MAX_COUNT = {"shapes": 2, "icons": 4}  # what the captions of either set count up to
_OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_THINGS = {
    "red": "a strawberry",
    "orange": "a pumpkin",
    "yellow": "a banana",
    "green": "grass",
    "blue": "the sky",
    "purple": "an eggplant",
    "pink": "a flamingo",
    "black": "coal",
}
_NUM_CHOICES = 3
_CLEAR_CONTRAST = 25  # in luma of 0..255: yellow on light gray is neither lighter nor darker to the eye

Scene = dict[str, Any]
Answered = tuple[Scene, str, str]


def _sample(rng: random.Random, kind: str, glyph_set: str, split: str) -> Scene:
    return sample_scene(rng.getrandbits(48), glyph_set=glyph_set, split=split, kinds={kind: 1.0})


def _sample_scene_of(rng: random.Random, glyph_set: str, split: str) -> Scene:
    """Samples a scene to ask about one object of: alone, or in `icons` sometimes beside another."""
    pairs = glyph_set == "icons" and rng.random() < 0.3
    return _sample(rng, "two_object" if pairs else "single_object", glyph_set, split)


def _sample_sized(rng: random.Random, glyph_set: str, split: str) -> Scene:
    """Samples a lone object, each size as often as the others."""
    wanted = rng.choice(_SIZE_NAMES[glyph_set])
    while True:
        scene = _sample(rng, "single_object", glyph_set, split)
        if scene["objects"][0]["size_name"] == wanted:
            return scene


def _sample_counted(rng: random.Random, glyph_set: str, split: str) -> Scene:
    """Samples one to so many objects, each number as often as the others."""
    number = rng.randint(1, _MAX_COUNT[glyph_set])
    if number <= 2:
        return _sample(rng, ("single_object", "two_object")[number - 1], glyph_set, split)
    while True:
        scene = _sample(rng, "counting", glyph_set, split)
        if len(scene["objects"]) == number:
            return scene


def _ask_plainly(kind: str, scene: Scene, answer: str, rng: random.Random, number: int = 0, **words: str) -> Answered:
    wordings = _QUESTIONS[kind]
    if len(scene["objects"]) == 1:
        wordings += _LONE_QUESTIONS.get(kind, ())
    return scene, rng.choice(wordings).format(glyph=scene["objects"][number]["glyph"], **words), answer


def _ask_color(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample_scene_of(rng, glyph_set, split)
    number = rng.randrange(len(scene["objects"]))
    return _ask_plainly("color", scene, scene["objects"][number]["color"], rng, number)


def _ask_glyph(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample(rng, "single_object", glyph_set, split)
    return _ask_plainly("glyph", scene, scene["objects"][0]["glyph"], rng)


def _ask_background(rng: random.Random, glyph_set: str, split: str) -> Answered:
    wanted = rng.choice(tuple(BACKGROUND_COLORS))
    while True:
        scene = _sample_scene_of(rng, glyph_set, split)
        if scene["background"] == wanted:
            return _ask_plainly("background", scene, wanted, rng)


def _ask_size(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample_sized(rng, glyph_set, split)
    return _ask_plainly("size", scene, size_of(scene["objects"][0]), rng)


def _ask_count(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample_counted(rng, glyph_set, split)
    return _ask_plainly("count", scene, NUMBERS[len(scene["objects"])], rng)


def _ask_relation(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample(rng, "position", glyph_set, split)
    first, second = scene["objects"]
    relation = scene["relation"]
    if rng.random() < 0.5:
        first, second, relation = second, first, _OPPOSITES[relation]
    return _ask_plainly("relation", scene, first["glyph"], rng, relation=relation, other=second["glyph"])


def _alternatives(scene: Scene, aspect: str, split: str) -> list[str]:
    """Lists what a lone object or its background is not, but could be spoken of as, in a split."""
    item = scene["objects"][0]
    look = {"glyph": item["glyph"], "color": item["color"], "background": scene["background"]}
    names = {"glyph": GLYPH_SETS[scene["glyph_set"]], "color": OBJECT_COLORS, "background": BACKGROUND_COLORS}[aspect]
    return [name for name in names if name != look[aspect] and may_be_named(**(look | {aspect: name}), split=split)]


def _ask_yes_no(rng: random.Random, glyph_set: str, split: str) -> Answered:
    scene = _sample(rng, "single_object", glyph_set, split)
    item = scene["objects"][0]
    aspect = rng.choice(tuple(_YES_NO))
    value = scene["background"] if aspect == "background" else item[aspect]
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        value = rng.choice(_alternatives(scene, aspect, split))
    value = with_article(value) if aspect == "glyph" else value
    return scene, _YES_NO[aspect].format(glyph=item["glyph"], value=value), answer


_ASK: dict[str, Callable[[random.Random, str, str], Answered]] = {
    "color": _ask_color,
    "glyph": _ask_glyph,
    "background": _ask_background,
    "size": _ask_size,
    "count": _ask_count,
    "relation": _ask_relation,
    "yes_no": _ask_yes_no,
}


def sample_question(rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float]) -> dict[str, Any]:
    """Samples a scene, a question about it and the answer.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        split (`str`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`): Weight of each kind, a subset of `QUESTION_KINDS`.

    Returns:
        `dict`: `scene` (record), `question` and `answer`, one or two words without a full stop.
    """
    kind = rng.choices(tuple(kinds), weights=tuple(kinds.values()))[0]
    scene, question, answer = _ASK[kind](rng, glyph_set, split)
    return {"scene": scene, "question": question, "answer": answer}


def _luma(color: tuple[int, int, int]) -> float:
    """Weighs the channels as ITU-R BT.601 does."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _list_choices(right: str, wrong: list[str], rng: random.Random) -> str:
    """Lists the right choice among one or two wrong ones, in any order: "(A) coal (B) grass (C) the sky"."""
    options = [right, *rng.sample(wrong, min(len(wrong), _NUM_CHOICES - 1))]
    shuffled = rng.sample(options, len(options))
    return " ".join(f"({letter}) {option}" for letter, option in zip("ABC", shuffled, strict=False))


def _reason_same_color(rng: random.Random, glyph_set: str, split: str) -> dict[str, Any]:
    scene = _sample(rng, "single_object", glyph_set, split)
    glyph, color = (scene["objects"][0][field] for field in ("glyph", "color"))
    thing = _THINGS[color]
    return {
        "scene": scene,
        "question": f"which of these has the color of the {glyph}?",
        "choices": _list_choices(thing, [_THINGS[other] for other in _alternatives(scene, "color", split)], rng),
        "explanation": f"the {glyph} is {color} and so is {thing}.",
        "answer": thing,
    }


def _reason_contrast(rng: random.Random, glyph_set: str, split: str) -> dict[str, Any]:
    wanted = rng.choice(("lighter", "darker"))
    while True:
        scene = _sample(rng, "single_object", glyph_set, split)
        glyph, color = (scene["objects"][0][field] for field in ("glyph", "color"))
        background = scene["background"]
        difference = _luma(OBJECT_COLORS[color]) - _luma(BACKGROUND_COLORS[background])
        if abs(difference) >= _CLEAR_CONTRAST and wanted == ("lighter" if difference > 0 else "darker"):
            break
    return {
        "scene": scene,
        "question": f"is the {glyph} lighter or darker than the background?",
        "choices": _list_choices(wanted, ["darker" if wanted == "lighter" else "lighter"], rng),
        "explanation": f"the {glyph} is {color}, the background is {background}, and {color} is {wanted}.",
        "answer": wanted,
    }


def _reason_extent(rng: random.Random, glyph_set: str, split: str) -> dict[str, Any]:
    wanted = rng.choice(("yes", "no"))
    while True:
        scene = _sample_sized(rng, glyph_set, split)
        size = size_of(scene["objects"][0])
        if wanted == ("yes" if size == "large" else "no"):
            break
    glyph = scene["objects"][0]["glyph"]
    verb = "reaches" if size == "large" else "does not reach"
    return {
        "scene": scene,
        "question": f"does the {glyph} reach over two thirds of the picture?",
        "choices": _list_choices(wanted, ["no" if wanted == "yes" else "yes"], rng),
        "explanation": f"the {glyph} is {size} and {verb} over two thirds of the picture.",
        "answer": wanted,
    }


def _reason_first_letter(rng: random.Random, glyph_set: str, split: str) -> dict[str, Any]:
    scene = _sample(rng, "single_object", glyph_set, split)
    glyph = scene["objects"][0]["glyph"]
    others = sorted({name[0] for name in GLYPH_SETS[glyph_set]} - {glyph[0]})
    return {
        "scene": scene,
        "question": "with which letter does the name of the object begin?",
        "choices": _list_choices(glyph[0], others, rng),
        "explanation": f"the picture shows {with_article(glyph)}, and {glyph} begins with {glyph[0]}.",
        "answer": glyph[0],
    }


_REASON: dict[str, Callable[[random.Random, str, str], dict[str, Any]]] = {
    "same_color": _reason_same_color,
    "contrast": _reason_contrast,
    "extent": _reason_extent,
    "first_letter": _reason_first_letter,
}


def sample_reasoning(rng: random.Random, *, glyph_set: str, split: str, kinds: Mapping[str, float]) -> dict[str, Any]:
    """Samples a scene and a multiple-choice question that takes one step beyond what is seen.

    Args:
        rng (`random.Random`): Source of all chance.
        glyph_set (`str`): `"shapes"` or `"icons"`.
        split (`str`): `"train"` or `"validation"`.
        kinds (`Mapping[str, float]`): Weight of each kind, a subset of `REASONING_KINDS`.

    Returns:
        `dict`: `scene` (record), `question`, `context`, `choices` ("(A) red (B) blue"), `explanation` (one sentence
        with a full stop) and `answer`, one of the choices.
    """
    kind = rng.choices(tuple(kinds), weights=tuple(kinds.values()))[0]
    return {"context": CONTEXT, **_REASON[kind](rng, glyph_set, split)}
