"""Prepares the rows that are no pairs: documents of text and pictures, pictures alone, and texts alone.

What could not be laid out later, in a worker, is dropped here and counted. Knows rows, and a tokenizer as a callable
that counts; no models.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from .caption_report import CaptionReport
from .captions import Tokenizer
from .formats import ImageError, RowError, check_columns, check_row, open_image, open_source


REASONS = {
    "malformed": "no list of parts of the types text and image, each with its value",
    "too_long": "more tokens than a window of training holds",
    "special_token": "text that spells a special token of the tokenizer",
    "unreadable_image": "an image missing, damaged, zero-sized or too large to be safe",
}


@dataclass(frozen=True)
class DocumentLimit:
    """How long a document may be that is trained on whole.

    Args:
        max_tokens (`int`): Tokens of a window.
        tokens_per_image (`int`): Tokens of a picture, with what sets it off.
        tokenizer (`Callable`): Counts, see [`prepare_pairs`].
    """

    max_tokens: int
    tokens_per_image: int
    tokenizer: Tokenizer

    @property
    def caption_room(self) -> int:
        """Tokens of a caption beside one picture and the ends of its document."""
        return self.max_tokens - self.tokens_per_image - 2

    def count(self, content: Sequence[dict[str, Any]]) -> int:
        """Counts the tokens of a document, its ends and one token between its texts included."""
        texts = [part["text"] for part in content if part["type"] == "text"]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        num_images = len(content) - len(texts)
        return sum(map(len, ids)) + max(len(texts) - 1, 0) + num_images * self.tokens_per_image + 2


def prepare_documents(
    rows: Dataset,
    *,
    reserved: Sequence[str] = (),
    max_unreadable_share: float = 0.01,
    limit: DocumentLimit | None = None,
) -> tuple[Dataset, CaptionReport]:
    """Drops documents that cannot be trained on. Every image is decoded once, to know that it can be.

    Args:
        rows (`Dataset`): Document rows.
        reserved (`Sequence[str]`): Strings that no text may contain, such as the tokenizer's special tokens.
        max_unreadable_share (`float`): Stop if a larger share of the documents has an image that cannot be read.
        limit ([`DocumentLimit`], *optional*): Longer documents are dropped, for one with pictures is never cut.

    Returns:
        `tuple[Dataset, CaptionReport]`: the rows left, and what was dropped and why.

    Raises:
        ValueError: If too many images are unreadable, or no row is left.
    """
    return _sieve(check_columns(rows, "document"), "content", _Judge(tuple(reserved), limit), max_unreadable_share)


def prepare_pictures(rows: Dataset, *, max_unreadable_share: float = 0.01) -> tuple[Dataset, CaptionReport]:
    """Drops pictures that cannot be read, as `prepare_documents` does.

    Args:
        rows (`Dataset`): With a column `image`.
        max_unreadable_share (`float`): Stop if a larger share cannot be read.

    Returns:
        `tuple[Dataset, CaptionReport]`: the rows left, and what was dropped and why.

    Raises:
        ValueError: If too many images are unreadable, or no row is left.
    """
    return _sieve(rows, "image", _judge_picture, max_unreadable_share)


def _sieve(
    rows: Dataset, column: str, judge: Callable[[Any, int], dict[str, str | None]], max_unreadable_share: float
) -> tuple[Dataset, CaptionReport]:
    """Keeps the rows that a judge has no verdict on."""
    judged = rows.map(
        judge,
        input_columns=column,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({"verdict": Value("string"), "example": Value("string")}),
        desc="Preparing rows",
    )
    report = CaptionReport(dict(REASONS), num_rows_in=len(rows))
    for verdict, example in zip(judged["verdict"], judged["example"], strict=True):
        if verdict is not None:
            report.drop(verdict, example)
    report.check_unreadable(max_unreadable_share)
    kept = np.flatnonzero([verdict is None for verdict in judged["verdict"]])
    if len(kept) == 0:
        raise ValueError(f"No row is left:\n{report.to_markdown()}")
    return rows.select(kept), report


def _judge_picture(image: Any, number: int) -> dict[str, str | None]:
    """Returns the step that drops a picture, if any."""
    return _Judge()([{"type": "image", "image": image}], number)


@dataclass
class _Judge:
    """Returns the step that drops a document, if any."""

    reserved: tuple[str, ...] = ()
    limit: DocumentLimit | None = None

    def __call__(self, content: Any, number: int) -> dict[str, str | None]:
        try:
            check_row({"content": content}, number, "document")
            if self.limit is not None and (length := self.limit.count(content)) > self.limit.max_tokens:
                return {"verdict": "too_long", "example": f"{number} ({length} tokens)"}
            for part in content:
                if part["type"] == "image":
                    open_image(part["image"])
                elif any(token in part["text"] for token in self.reserved):
                    return {"verdict": "special_token", "example": str(number)}
        except RowError as error:
            return {"verdict": "malformed", "example": str(error)[:120]}
        except ImageError as error:
            return {"verdict": "unreadable_image", "example": f"{number} ({str(error)[:120]})"}
        return {"verdict": None, "example": str(number)}


def load_texts(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    column: str = "text",
    reserved: Sequence[str] = (),
) -> tuple[Dataset, int]:
    """Loads text-only rows without those that are empty or spell a special token.

    Args:
        source (`str` or `os.PathLike`): As in [`load_rows`].
        split (`str`): Split to load.
        config_name (`str`, *optional*): Configuration (subset) of a Hub dataset.
        column (`str`): Column with the texts; it is given the name `text`, and the others are left out.
        reserved (`Sequence[str]`): Strings that no text may contain, such as the tokenizer's special tokens.

    Returns:
        `tuple[Dataset, int]`: the rows left, and how many were dropped.

    Raises:
        ValueError: If the source or the column is missing, the column holds no strings, or no row is left.
    """
    rows = open_source(source, split=split, config_name=config_name)
    if column not in rows.column_names:
        raise ValueError(f"`text_dataset_column`={column!r} is not there. Columns here: {rows.column_names}.")
    if rows.features[column] not in (Value("string"), Value("large_string")):
        raise ValueError(f"`text_dataset_column`={column!r} holds {rows.features[column]}; it must hold strings.")
    rows = rows.select_columns(column)
    rows = rows if column == "text" else rows.rename_column(column, "text")
    return keep_usable_texts(rows, reserved, f"`text_dataset_name`={str(source)!r}")


def keep_usable_texts(rows: Dataset, reserved: Sequence[str], told: str) -> tuple[Dataset, int]:
    """Drops texts that are empty or spell a special token.

    Args:
        rows (`datasets.Dataset`): With a column `text`.
        reserved (`Sequence[str]`): Strings that no text may contain.
        told (`str`): What an error calls the rows.

    Returns:
        `tuple[Dataset, int]`: the rows left, and how many were dropped.

    Raises:
        ValueError: If no row is left.
    """
    kept = rows.filter(_IsUsable(tuple(reserved)), input_columns="text", desc="Preparing texts")
    if len(kept) == 0:
        raise ValueError(f"{told}: no text is left of {len(rows)}.")
    return kept, len(rows) - len(kept)


@dataclass
class _IsUsable:
    """Tells texts that can be trained on."""

    reserved: tuple[str, ...]

    def __call__(self, text: str | None) -> bool:
        return bool(text and text.strip()) and not any(token in text for token in self.reserved)  # type: ignore[operator]
