"""Cleans the words of one row and joins description, keywords and categories into captions.

Everything here works on one row's strings. It knows neither images nor datasets nor tokenizers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch


_PICTURES = r"(?:photos?|photograph(?:s|y)?|images?|pictures?|vectors?|illustrations?|footage|clip\s?art)"
_ARTICLE = r"(?:\b(?:an?|the)\s+)?"
# Ours: phrases that say how a picture is sold, not what it shows. Matched without regard to case.
BOILERPLATE_PATTERNS = (
    rf"{_ARTICLE}\b(?:royalty[- ]free|rights[- ]managed)\b(?:\s+(?:stock\s+)?{_PICTURES}\b(?:\s+of\b)?)?",
    rf"{_ARTICLE}\bstock\s+{_PICTURES}\b(?:\s+of\b)?",
    r"(?:\b(?:flat|simple|realistic|cartoon|3d|hand[- ]drawn)\s+)*(?:\bvector\s+)?"
    r"(?:\b(?:illustration|icon|image|drawing|design)s?\s+)?\bisolated\s+(?:on|over|against)\s+(?:an?\s+|the\s+)?"
    r"(?:(?:pure|plain|clean)\s+)?(?:white|black|gr[ae]y|transparent|blank)\b(?:\s+(?:background|backdrop)\b)?",
    rf"{_ARTICLE}\bvector\s+(?:illustration|graphic|image|icon|design|clip\s?art)s?\b(?:\s+of\b)?",
    rf"{_ARTICLE}\bhigh[- ](?:resolution|quality)\s+{_PICTURES}\b(?:\s+of\b)?",
    r"\beps\s?(?:8|10)\b",
    r"\b(?:with\s+)?copy\s?space\b(?:\s+for\s+(?:your\s+)?text\b)?",
)

# Ours: the probability of each form of caption, see `sample_caption`.
FORM_WEIGHTS = {
    "description": 0.40,
    "description_keywords": 0.15,
    "description_subset": 0.20,
    "keywords": 0.10,
    "category_description": 0.15,
}


def collapse_whitespace(text: str) -> str:
    """Turns every run of white space, line ends included, into one blank, and strips both ends."""
    return " ".join(text.split())


def remove_boilerplate(text: str, patterns: Sequence[re.Pattern[str]]) -> str:
    """Removes phrases, then the punctuation that they leave behind. A text without them stays as it is.

    Example:
        >>> patterns = [re.compile(pattern, re.IGNORECASE) for pattern in BOILERPLATE_PATTERNS]
        >>> remove_boilerplate("Red apple, vector illustration isolated on a white background - stock photo", patterns)
        'Red apple'

    """
    cleaned = text
    for pattern in patterns:
        cleaned = pattern.sub(" ", cleaned)
    if cleaned == text:
        return text
    cleaned = re.sub(r"\(\s*\)|\[\s*\]", " ", cleaned)
    cleaned = re.sub(r"\s+([,.;:!?])", r"\1", collapse_whitespace(cleaned))
    cleaned = re.sub(r"(?:[,.;:|]\s*)+([,.;:|])", r"\1", cleaned)
    return re.sub(r"(?:\s[-–—|]|[,;:|\s])+$|^(?:[-–—]\s|[,.;:|\s])+", "", cleaned)


def lower_shouting(text: str) -> str:
    """Lowers a text that is all capitals, unless it is one word of at most five letters, which may be an acronym.

    Example:
        >>> lower_shouting("NEW YORK SKYLINE"), lower_shouting("SOS"), lower_shouting("A SOS button")
        ('new york skyline', 'SOS', 'A SOS button')

    """
    words = re.findall(r"[^\W\d_]+", text)
    return text.lower() if text.isupper() and (len(words) > 1 or len(words[0]) > 5) else text


def clean_text(text: str, patterns: Sequence[re.Pattern[str]]) -> tuple[str, set[str]]:
    """Applies the three clean-ups to one text and says which of them changed it.

    Args:
        text (`str`): A description, keyword, category or finished caption.
        patterns (`Sequence[re.Pattern]`): Boilerplate.

    Returns:
        `tuple[str, set[str]]`: the text, and a subset of `{"whitespace", "boilerplate", "casing"}`.
    """
    collapsed = collapse_whitespace(text)
    without = remove_boilerplate(collapsed, patterns)
    lowered = lower_shouting(without)
    before_after = {"whitespace": (text, collapsed), "boilerplate": (collapsed, without), "casing": (without, lowered)}
    return lowered, {name for name, (before, after) in before_after.items() if before != after}


def clean_words(words: Sequence[str] | str | None, patterns: Sequence[re.Pattern[str]]) -> tuple[list[str], set[str]]:
    """Cleans keywords or categories and removes those that are empty or come again, whatever their case.

    Args:
        words (`Sequence[str]` or `str`, *optional*): The words; a string is split at commas, semicolons and bars.
        patterns (`Sequence[re.Pattern]`): Boilerplate.

    Returns:
        `tuple[list[str], set[str]]`: the words in their order, and what changed (also `"repeated_words"`).
    """
    if isinstance(words, str):
        words = re.split(r"[,;|]", words.strip())
        words = [word.strip() for word in words]  # the blank after a comma is no fault
    kept, changes = {}, set()
    for word in () if words is None else words:
        cleaned, changed = clean_text(word or "", patterns)
        changes |= changed
        if cleaned.casefold() in kept:
            changes.add("repeated_words")
        elif cleaned:
            kept[cleaned.casefold()] = cleaned
    return list(kept.values()), changes


def clean_parts(row: Mapping[str, Any], patterns: Sequence[re.Pattern[str]]) -> tuple[dict[str, Any], set[str]]:
    """Cleans the text columns that a row has; missing values become an empty string or list."""
    parts: dict[str, Any] = {}
    changes: set[str] = set()
    for column in ("text", "description"):
        if column in row:
            parts[column], changed = clean_text(row[column] or "", patterns)
            changes |= changed
    for column in ("keywords", "categories"):
        if column in row:
            parts[column], changed = clean_words(row[column], patterns)
            changes |= changed
    return parts, changes


def main_text(row: Mapping[str, Any]) -> str:
    """Returns the finished text of a row, else its description, else an empty string."""
    return row.get("text") or row.get("description") or ""


def caption_words(row: Mapping[str, Any]) -> list[str]:
    """Returns the sorted distinct words of a row's text or description and keywords, without regard to case."""
    text = " ".join([main_text(row), *_list(row, "keywords")])
    return sorted(set(re.findall(r"\w+", text.casefold())))


def sample_caption(
    row: Mapping[str, Any], generator: torch.Generator, weights: Mapping[str, float] = FORM_WEIGHTS
) -> str:
    """Draws one caption of a row.

    A row with a finished `text` gives that. Otherwise one of these forms is drawn, among those the row has parts for:

    - `description`: the description alone;
    - `description_keywords`: the description, then all keywords in their order;
    - `description_subset`: the description, then a shuffled random subset of the keywords;
    - `keywords`: a shuffled random subset of the keywords alone;
    - `category_description`: one random category, a colon, the description.

    A subset's size is uniform from one keyword to all. A row without any form of positive weight gives its
    description, or all its keywords if it has none.

    Args:
        row (`Mapping`): A pair row, cleaned or not.
        generator (`torch.Generator`): Source of randomness.
        weights (`Mapping[str, float]`): Relative probability of each form, at least 0; absent means 0.

    Returns:
        `str`: The caption; empty only if the row has no text at all.

    Raises:
        ValueError: If `weights` names an unknown form.
    """
    if unknown := sorted(weights.keys() - FORM_WEIGHTS.keys()):
        raise ValueError(f"`weights` names unknown caption forms {unknown}. Known: {sorted(FORM_WEIGHTS)}.")
    if row.get("text"):
        return row["text"]
    description, keywords, categories = row.get("description") or "", _list(row, "keywords"), _list(row, "categories")
    has_parts = {
        "description": bool(description),
        "description_keywords": bool(description and keywords),
        "description_subset": bool(description and keywords),
        "keywords": bool(keywords),
        "category_description": bool(description and categories),
    }
    forms = [form for form, present in has_parts.items() if present and weights.get(form, 0.0) > 0]
    if not forms:
        return description or ", ".join(keywords)
    chances = torch.tensor([weights[form] for form in forms], dtype=torch.float64)
    form = forms[int(torch.multinomial(chances, 1, generator=generator))]
    return _join(form, description, keywords, categories, generator)


def _join(form: str, description: str, keywords: list[str], categories: list[str], generator: torch.Generator) -> str:
    """Builds one form of caption."""
    if form == "description":
        return description
    if form == "category_description":
        category = categories[int(torch.randint(len(categories), (1,), generator=generator))]
        return f"{category}: {description}"
    if form != "description_keywords":
        size = int(torch.randint(1, len(keywords) + 1, (1,), generator=generator))
        keywords = [keywords[place] for place in torch.randperm(len(keywords), generator=generator)[:size].tolist()]
    parts = keywords if form == "keywords" else [description.rstrip("."), *keywords]
    return ", ".join(parts)


def _list(row: Mapping[str, Any], column: str) -> list[str]:
    """Returns a list column that may be missing or empty."""
    value = row.get(column)
    return [] if value is None else list(value)
