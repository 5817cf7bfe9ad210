"""Scores what a model says of scenes: short answers, and captions against the record of the scene.

This file knows texts and scene records; it knows no model and no dataset.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}


def check_columns(**columns: Any) -> None:
    """Refuses columns that are empty or of different lengths.

    Args:
        columns: Sequences or arrays, under the names that errors call them by.

    Raises:
        ValueError: If there is no row, or the numbers differ.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Numbers of rows differ: {lengths}. Give one of each per row.")
    if not min(lengths.values()):
        raise ValueError(f"{list(lengths)} are empty. Give at least one row.")


def normalize_answer(answer: str) -> str:
    """Brings an answer to the form in which answers are compared.

    Lower case, number words as digits, no articles (unless there is nothing else), no punctuation but a point inside a
    number.

    Args:
        answer (`str`): Any text.

    Returns:
        `str`: words separated by single spaces.

    Source: VQA (arXiv 1505.00468), evaluation code. Differs: no table of contractions.

    Example:
        >>> normalize_answer("Two red stars, on the left.")
        '2 red stars on left'

    """
    text = re.sub(r"'|(?<=\d),(?=\d)", "", answer.lower())
    words = [_DIGITS.get(word, word) for word in re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", " ", text).split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def answer_accuracy(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Computes the share of answers that are the true one, as `normalize_answer` compares them.

    Args:
        answers (`Sequence[str]`): What was answered.
        truths (`Sequence[str]`): As many true answers.

    Returns:
        `dict[str, float]`: `answer_accuracy`.

    Raises:
        ValueError: If there is no answer, or the numbers differ.

    Example:
        >>> answer_accuracy(["A star.", "blue"], ["star", "red"])
        {'answer_accuracy': 0.5}

    """
    check_columns(answers=answers, truths=truths)
    hits = [normalize_answer(one) == normalize_answer(two) for one, two in zip(answers, truths, strict=True)]
    return {"answer_accuracy": sum(hits) / len(hits)}


def _singulars(glyphs: Iterable[str]) -> dict[str, str]:
    """Maps the singular and the plural of each glyph to the glyph."""
    forms: dict[str, str] = {}
    for glyph in glyphs:
        forms |= dict.fromkeys((f"{glyph}s", f"{glyph}es", f"{glyph[:-1]}ves"), glyph)
    return forms | {glyph: glyph for glyph in glyphs}


def _read_background(text: str, backgrounds: Iterable[str], unsaid: str) -> tuple[str | None, str]:
    """Gives the one background a text names, or `None` if it names several, and the text without it."""
    names = "|".join(sorted(map(re.escape, backgrounds), key=len, reverse=True))
    pattern = rf"\b(?:background (?:is|in) ({names})|({names}) background)\b"
    named = {one or other for one, other in re.findall(pattern, text)}
    rest = re.sub(pattern, " ", text)
    if not named:
        return (None if "background" in rest else unsaid), rest  # one of another name is not unsaid
    return (named.pop() if len(named) == 1 else None), rest


def read_caption(
    caption: str,
    *,
    glyphs: Iterable[str],
    colors: Iterable[str],
    backgrounds: Iterable[str],
    unsaid_background: str = "white",
) -> tuple[Counter[tuple[str | None, str | None]], str | None]:
    """Reads which objects and which background a caption names.

    A colour belongs to the glyph it stands before ("a red star") or, where none follows a glyph, behind ("a star that
    is red"). A number word counts the glyph that follows it.

    Args:
        caption (`str`): Any text.
        glyphs (`Iterable[str]`): Words for glyphs.
        colors (`Iterable[str]`): Words for colours of objects.
        backgrounds (`Iterable[str]`): Words for colours of backgrounds.
        unsaid_background (`str`, defaults to `"white"`): What captions mean that name none.

    Returns:
        `tuple`: the number of each (glyph, colour), `None` for what is not said, and the background, `None` if the
        caption names one of another name, or several.

    Example:
        >>> objects, background = read_caption(
        ...     "two red stars on a cream background", glyphs=["star"], colors=["red"], backgrounds=["cream"]
        ... )
        >>> dict(objects), background
        ({('star', 'red'): 2}, 'cream')

    """
    background, text = _read_background(caption.lower(), backgrounds, unsaid_background)
    singulars, shades = _singulars(list(glyphs)), set(colors)
    objects: Counter[tuple[str | None, str | None]] = Counter()
    color: str | None = None
    bare: str | None = None  # a glyph whose colour has not come yet
    count = 1
    for word in re.findall(r"[a-z]+", text):
        if word in shades and bare is not None:
            objects[bare, word] += count
            bare, count = None, 1
        elif word in shades:
            color = word
        elif word in singulars:
            if bare is not None:
                objects[bare, None] += 1
            if color is None:
                bare = singulars[word]
            else:
                objects[singulars[word], color] += count
                color, bare, count = None, None, 1
        elif word in _DIGITS or word in ("a", "an"):
            count = int(_DIGITS.get(word, 1))
    if bare is not None or color is not None:
        objects[bare, color] += count
    return objects, background


def caption_accuracy(
    captions: Sequence[str],
    scenes: Sequence[Mapping[str, Any] | str],
    *,
    glyphs: Iterable[str],
    colors: Iterable[str],
    backgrounds: Iterable[str],
    unsaid_background: str = "white",
) -> dict[str, float]:
    """Computes the share of captions that name exactly what a scene shows: glyphs, colours, numbers, background.

    Sizes and places are not read, so that a longer caption is judged by the same rule as a plain one.

    Args:
        captions (`Sequence[str]`): What was said.
        scenes (`Sequence`): As many scene records, or JSON strings of them.
        glyphs (`Iterable[str]`): Names of the glyphs that may occur.
        colors (`Iterable[str]`): Names of the colours of objects.
        backgrounds (`Iterable[str]`): Names of the colours of backgrounds.
        unsaid_background (`str`, defaults to `"white"`): What captions mean that name none.

    Returns:
        `dict[str, float]`: `caption_accuracy`, the share that is right in all, and of those that are right in the
        glyphs (`glyph_correct`), the colours (`color_correct`) and the background (`background_correct`).

    Raises:
        ValueError: If there is no caption, or the numbers differ.
    """
    check_columns(captions=captions, scenes=scenes)
    glyphs, colors, backgrounds = list(glyphs), list(colors), list(backgrounds)
    totals: Counter[str] = Counter()
    for caption, scene in zip(captions, scenes, strict=True):
        record = json.loads(scene) if isinstance(scene, str) else scene
        asked = Counter((item["glyph"], item["color"]) for item in record["objects"])
        named, background = read_caption(
            caption, glyphs=glyphs, colors=colors, backgrounds=backgrounds, unsaid_background=unsaid_background
        )
        verdicts = {
            "caption_accuracy": named == asked and background == record["background"],
            "glyph_correct": Counter(look[0] for look in named.elements()) == _project(asked, 0),
            "color_correct": Counter(look[1] for look in named.elements()) == _project(asked, 1),
            "background_correct": background == record["background"],
        }
        totals.update({name: int(holds) for name, holds in verdicts.items()})
    return {name: total / len(captions) for name, total in totals.items()}


def _project(looks: Counter[tuple[str, str]], part: int) -> Counter[str]:
    """Counts glyphs (part 0) or colours (part 1) alone."""
    return Counter(look[part] for look in looks.elements())
