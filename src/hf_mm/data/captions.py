"""Prepares captioned pictures for training: clean-up, filters, duplicates, weights, and a report of all that.

The preparation of a stock-photo feed, as in CM3Leon (arXiv 2309.02591): captions from description, keywords and
categories, filters on pictures and text, people and aesthetics. The front door is [`prepare_pairs`]; captions are
drawn at training time by [`sample_caption`]. This file decides about rows. It does not know models, and a tokenizer
only as a callable.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from PIL import Image as PILImage

from .caption_arguments import CaptionArguments
from .caption_report import CaptionReport
from .caption_text import caption_words, clean_parts, main_text, sample_caption
from .duplicates import difference_hash, first_occurrences, pixel_hash, text_hash, without_near_duplicates
from .formats import (
    FACT_COLUMNS,
    TEXT_COLUMNS,
    ImageError,
    Rows,
    center_crop_resize,
    check_columns,
    check_texts,
    open_image,
)


__all__ = [
    "CaptionArguments",
    "CaptionReport",
    "center_crop_resize",
    "prepare_encoded",
    "prepare_pairs",
    "row_weights",
    "sample_caption",
    "weights_at",
]

Tokenizer = Callable[..., Mapping[str, list[list[int]]]]
# Early in a stream, one bad image is a large share: the share counts as of at least this many rows.
MIN_ROWS_FOR_SHARE = 1000
STREAM_BATCH_SIZE = 32
HASH_COLUMNS = ("pixel_hash", "words_hash", "difference_hash")


def prepare_pairs(
    rows: Rows,
    args: CaptionArguments,
    *,
    tokenizer: Tokenizer | None = None,
    reserved: Sequence[str] = (),
    num_proc: int | None = None,
) -> tuple[Rows, CaptionReport]:
    """Cleans, filters and deduplicates pair rows.

    Every image is decoded once, to know that it can be; it stays stored as it was. Of a stream, exact duplicates are
    found among the rows that one process reads, and near-duplicates cannot be.

    Args:
        rows (`Dataset` or `IterableDataset`): Pair rows, from [`load_rows`].
        args ([`CaptionArguments`]): What to do.
        tokenizer (`Callable`, *optional*): Turns a list of strings into `{"input_ids": list of lists}`, as tokenizers
            of transformers do; for `max_caption_tokens`.
        reserved (`Sequence[str]`): Strings that no text may contain, such as the tokenizer's special tokens.
        num_proc (`int`, *optional*): Processes to work in. Streams are prepared where they are read.

    Returns:
        `tuple[Rows, CaptionReport]`: the rows left, and what was dropped and why.

    Raises:
        ValueError: If a column that a filter needs is missing, too many images are unreadable, or no row is left.
    """
    rows = check_columns(rows, "pair")
    _check_needs(rows, args, tokenizer)
    judge = _Judge(args, args.compile_boilerplate(), tokenizer, tuple(reserved))
    report = CaptionReport(args.reasons())
    if isinstance(rows, IterableDataset):
        return _prepare_stream(rows, judge, report), report
    return _prepare_all(rows, rows, judge, report, num_proc), report


def prepare_encoded(
    rows: Rows, args: CaptionArguments, *, tokenizer: Tokenizer | None = None, reserved: Sequence[str] = ()
) -> tuple[Rows, CaptionReport]:
    """Cleans and filters rows whose pictures are encoded already: all that [`prepare_pairs`] does with their text.

    Pictures are not looked at, so neither their size nor duplicates count; that was for the encoding to do.

    Args:
        rows (`Dataset` or `IterableDataset`): Pair rows with encoded pictures.
        args ([`CaptionArguments`]): What to do.
        tokenizer (`Callable`, *optional*): As for [`prepare_pairs`].
        reserved (`Sequence[str]`): Likewise.

    Returns:
        `tuple[Rows, CaptionReport]`: the rows left, and what was dropped and why.

    Raises:
        ValueError: If a column that a filter needs is missing, or no row is left.
    """
    args = replace(args, drop_duplicates=False, near_duplicate_distance=None)
    _check_needs(rows, args, tokenizer)
    judge = _Judge(args, args.compile_boilerplate(), tokenizer, tuple(reserved))
    report = CaptionReport(args.reasons())
    if isinstance(rows, IterableDataset):
        return _prepare_stream(rows, judge, report), report
    read = [column for column in (*TEXT_COLUMNS, *FACT_COLUMNS, "id") if column in rows.column_names]
    prepared = _prepare_all(rows, rows.select_columns(read).with_format(None), judge, report)
    given = rows.format  # which joining columns forgets
    prepared.set_format(given["type"], given["columns"], given["output_all_columns"], **given["format_kwargs"])
    return prepared, report


def _prepare_all(
    rows: Dataset, facts: Dataset, judge: "_Judge", report: CaptionReport, num_proc: int | None = None
) -> Dataset:
    """Judges rows by their facts, and returns those that stay with their text as it was cleaned."""
    judged = facts.map(
        judge,
        batched=True,
        batch_size=256,
        with_indices=True,
        remove_columns=facts.column_names,
        features=_judged_features(facts),
        num_proc=num_proc,
        desc="Preparing captions",
    )
    kept = _select(judged, judge.args, report)
    report.check_unreadable(judge.args.max_unreadable_share)
    if len(kept) == 0:
        raise ValueError(f"No row is left:\n{report.to_markdown()}")
    if len(kept) == len(rows) and not report.changed:
        return rows
    text_columns = [column for column in TEXT_COLUMNS if column in rows.column_names]
    rest = rows.remove_columns(text_columns)
    return concatenate_datasets([rest, judged.select_columns(text_columns)], axis=1).select(kept)


def row_weights(rows: Dataset, args: CaptionArguments) -> tuple[np.ndarray, np.ndarray]:
    """Computes how often each row is drawn in most of training, and in its last `final_share`.

    Args:
        rows (`Dataset`): Prepared rows.
        args ([`CaptionArguments`]): Oversampling factors.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: two arrays of shape `(rows,)` and type float64, each with sum 1.

    Raises:
        ValueError: If a factor is set whose column, or whose score, is missing.
    """
    base = np.ones(len(rows))
    if args.people_oversampling != 1:
        _need_column(rows, "has_people", "people_oversampling")
        base[np.array([bool(value) for value in rows["has_people"]], dtype=bool)] *= args.people_oversampling
    final = base.copy()
    if args.high_aesthetic_oversampling != 1:
        _need_column(rows, "aesthetic_score", "high_aesthetic_oversampling")
        if args.high_aesthetic_score is None:
            raise ValueError(
                "`high_aesthetic_oversampling` needs `high_aesthetic_score`: which rows are to be raised?"
            )
        scores = np.array([-np.inf if value is None else value for value in rows["aesthetic_score"]])
        final[scores >= args.high_aesthetic_score] *= args.high_aesthetic_oversampling
    return base / base.sum(), final / final.sum()


def weights_at(progress: float, base_weights: np.ndarray, final_weights: np.ndarray, final_share: float) -> np.ndarray:
    """Returns the row weights that hold at a progress of training in [0, 1]: final in the last `final_share`."""
    return final_weights if progress >= 1 - final_share and final_share > 0 else base_weights


@dataclass
class _Judge:
    """Cleans and judges a batch of rows: text first, since it is cheap, then the image.

    `version` is part of what cached results are found by: raise it when the result changes.
    """

    args: CaptionArguments
    patterns: list[re.Pattern[str]]
    tokenizer: Tokenizer | None
    reserved: tuple[str, ...] = ()
    version: int = 3

    def __call__(self, batch: Mapping[str, list], numbers: list[int]) -> dict[str, Any]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        judged = [self.clean(row, number) for row, number in zip(rows, numbers, strict=True)]
        if self.tokenizer is not None and self.args.max_caption_tokens is not None:
            fitting = [parts for parts in judged if parts["verdict"] is None]
            self.fit_captions(fitting, self.tokenizer, self.args.max_caption_tokens)
        for row, parts in zip(rows, judged, strict=True):
            if parts["verdict"] is None and "image" in row:
                self.look(row["image"], parts)
        columns = {column: [parts[column] for parts in judged] for column in (judged[0] if judged else ())}
        return columns | {name: np.array(columns[name], dtype=np.uint64) for name in HASH_COLUMNS if columns}

    def clean(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Cleans a row's text and judges what needs no image and no tokenizer."""
        given = {column: row.get(column) for column in TEXT_COLUMNS}
        words = {column: [word for word in value if word is not None]
                 for column, value in given.items() if isinstance(value, list)}  # fmt: skip
        check_texts(given | words, f"Row {number}")
        parts, changes = clean_parts(row, self.patterns)
        row_id = str(number if row.get("id") is None else row["id"])
        hashes = dict.fromkeys(HASH_COLUMNS, 0)
        verdict = self.judge_text(row, parts)
        return parts | {"verdict": verdict, "example": row_id, "changes": sorted(changes)} | hashes

    def judge_text(self, row: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
        """Returns the first step that drops the row for its facts or its text."""
        has_people = row.get("has_people")
        if self.args.people != "keep" and has_people is not (self.args.people == "only"):
            return "people"
        minimum, score = self.args.min_aesthetic_score, row.get("aesthetic_score")
        if minimum is not None and (score is None or score < minimum):
            return "low_aesthetic_score"
        text = main_text(parts) or " ".join(parts.get("keywords", ()))
        if not text:
            return "empty_caption"
        if any(token in piece for piece in caption_pieces(parts) for token in self.reserved):
            return "special_token"
        if self.args.require_letters and not any(letter.isalpha() for letter in text):
            return "no_letters"
        return None

    def fit_captions(self, rows: list[dict[str, Any]], tokenizer: Tokenizer, max_tokens: int) -> None:
        """Drops rows whose text is too long, and cuts categories and keywords so that every form of caption fits.

        Tokens are counted piece by piece and with and without a blank before, and the larger number counts.
        """
        pieces = [piece for parts in rows for piece in _pieces(parts)]
        if not pieces:
            return
        counts = iter(len(ids) for ids in tokenizer(pieces, add_special_tokens=False)["input_ids"])
        for parts in rows:
            lengths = [max(next(counts), next(counts)) for _ in range(len(_pieces(parts)) // 2)]
            num_keywords = 0 if parts.get("text") else len(parts.get("keywords", ()))
            categories, keywords = lengths[1 : len(lengths) - num_keywords], lengths[len(lengths) - num_keywords :]
            room = max_tokens - lengths[0]
            num_fitting = int(np.sum(np.cumsum(keywords) <= room))
            if room < 0 or (num_keywords and not num_fitting and not main_text(parts)):
                parts["verdict"] = "too_long"
                parts["example"] += f" ({max(lengths[:1] + keywords[:1])} tokens)"
                continue
            if num_fitting < num_keywords:
                parts["keywords"] = parts["keywords"][:num_fitting]
                parts["changes"].append("keywords_cut")
            if any(length > room for length in categories):
                fits = [length <= room for length in categories]
                parts["categories"] = list(itertools.compress(parts["categories"], fits))
                parts["changes"].append("categories_cut")

    def look(self, image: Any, parts: dict[str, Any]) -> None:  # noqa: ANN401
        """Opens the image, judges it and hashes it."""
        try:
            picture = open_image(image)
        except ImageError as error:
            parts["verdict"] = "unreadable_image"
            parts["example"] += f" ({str(error)[:120]})"
            return
        parts["verdict"] = self.judge_size(picture)
        if parts["verdict"] is not None:
            parts["example"] += f" ({picture.width} x {picture.height} px)"
        elif self.args.drop_duplicates or self.args.near_duplicate_distance is not None:
            parts["pixel_hash"], parts["words_hash"] = pixel_hash(picture), text_hash(caption_words(parts))
            parts["difference_hash"] = difference_hash(picture)

    def judge_size(self, picture: PILImage.Image) -> str | None:
        """Returns the step that drops a picture for its size or shape."""
        shorter, longer = sorted(picture.size)
        if shorter < self.args.min_image_px:
            return "too_small"
        limit = self.args.max_aspect_ratio
        return "aspect_ratio" if limit is not None and longer > limit * shorter else None


def caption_pieces(parts: Mapping[str, Any]) -> list[str]:
    """Lists all text of a row that may come into a caption."""
    return [main_text(parts), *parts.get("keywords", ()), *parts.get("categories", ())]


def _pieces(parts: Mapping[str, Any]) -> list[str]:
    """Lists what captions are joined from, each piece as it begins a caption and as it follows another."""
    text = main_text(parts)
    pairs = [(text, text and f" {text}")]
    if not parts.get("text"):
        pairs += [(f"{category}:", f" {category}:") for category in parts.get("categories", ()) if text]
        pairs += [(word, f", {word}") for word in parts.get("keywords", ())]
    return [piece for pair in pairs for piece in pair]


def _check_needs(rows: Rows, args: CaptionArguments, tokenizer: Tokenizer | None) -> None:
    """Refuses settings that need something that is not there."""
    if args.max_caption_tokens is not None and tokenizer is None:
        raise ValueError(f"`max_caption_tokens`={args.max_caption_tokens} needs `tokenizer`.")
    if args.people != "keep":
        _need_column(rows, "has_people", "people")
    if args.min_aesthetic_score is not None:
        _need_column(rows, "aesthetic_score", "min_aesthetic_score")
    if args.near_duplicate_distance is not None and isinstance(rows, IterableDataset):
        raise ValueError("`near_duplicate_distance` needs all rows at once; leave it None for a stream.")


def _need_column(rows: Rows, column: str, argument: str) -> None:
    if column not in rows.column_names:
        raise ValueError(
            f"`{argument}` needs the column `{column}`; name yours with `{column}_column`. "
            f"Columns here: {rows.column_names}."
        )


def _judged_features(rows: Rows) -> Features:
    """Returns the columns that judging gives: cleaned text, verdict and hashes."""
    types = {column: List(Value("string")) for column in ("keywords", "categories")}
    types |= {column: Value("string") for column in ("text", "description")}
    text = {column: types[column] for column in TEXT_COLUMNS if column in rows.column_names}
    facts = {"verdict": Value("string"), "example": Value("string"), "changes": List(Value("string"))}
    return Features(text | facts | {name: Value("uint64") for name in HASH_COLUMNS})


def _select(judged: Dataset, args: CaptionArguments, report: CaptionReport) -> np.ndarray:
    """Returns the numbers of the rows that stay, and writes the report."""
    facts = judged.select_columns(["verdict", "example", "changes", *HASH_COLUMNS])[:]
    report.num_rows_in = len(judged)
    for verdict, example, changes in zip(facts["verdict"], facts["example"], facts["changes"], strict=True):
        if verdict is not None:
            report.drop(verdict, example)
        else:
            report.change(changes)
    kept = np.flatnonzero([verdict is None for verdict in facts["verdict"]])
    pixels, words, differences = (np.array(facts[name], dtype=np.uint64) for name in HASH_COLUMNS)
    if args.drop_duplicates and len(kept):
        kept = _drop(kept, first_occurrences(pixels[kept], words[kept]), "duplicate", facts["example"], report)
    if args.near_duplicate_distance is not None and len(kept):
        groups = words[kept] if args.near_duplicate_captions == "same" else np.zeros(len(kept), dtype=np.uint64)
        keep = without_near_duplicates(differences[kept], groups, args.near_duplicate_distance)
        kept = _drop(kept, keep, "near_duplicate", facts["example"], report)
    return kept


def _drop(kept: np.ndarray, keep: np.ndarray, step: str, examples: list[str], report: CaptionReport) -> np.ndarray:
    for number in kept[~keep]:
        report.drop(step, examples[number])
    return kept[keep]


def _prepare_stream(rows: IterableDataset, judge: _Judge, report: CaptionReport) -> IterableDataset:
    """Judges rows as they pass."""
    text = {name: type_ for name, type_ in _judged_features(rows).items() if name in TEXT_COLUMNS}
    return rows.map(
        _StreamSieve(judge, report),
        batched=True,
        batch_size=STREAM_BATCH_SIZE,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features({**rows.features, **text}),
    )


@dataclass
class _StreamSieve:
    """Lets the good rows of a stream through, cleaned, and counts the others."""

    judge: _Judge
    report: CaptionReport
    seen: set[tuple[int, int]] = field(default_factory=set)

    def __call__(self, batch: Mapping[str, list], numbers: list[int]) -> dict[str, list]:
        judged = self.judge(batch, numbers)
        keep = [self.passes(place, judged) for place in range(len(numbers))]
        self.report.check_unreadable(self.judge.args.max_unreadable_share, MIN_ROWS_FOR_SHARE)
        cleaned = {name: judged.get(name, values) for name, values in batch.items()}
        return {name: list(itertools.compress(values, keep)) for name, values in cleaned.items()}

    def passes(self, place: int, judged: Mapping[str, list]) -> bool:
        """Counts one row and says whether it stays."""
        self.report.num_rows_in += 1
        verdict, key = judged["verdict"][place], (judged["pixel_hash"][place], judged["words_hash"][place])
        if verdict is None and self.judge.args.drop_duplicates:
            verdict = "duplicate" if key in self.seen else None
            self.seen.add(key)
        if verdict is not None:
            self.report.drop(verdict, judged["example"][place])
        else:
            self.report.change(judged["changes"][place])
        return verdict is None
