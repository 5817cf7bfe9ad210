"""Rearranges documents for the CM3 objective: spans of a document move behind its end, sentinels stand in their place.

Plain next-token prediction on such a document teaches to infill: whatever a sentinel hides is predicted from both
sides. A pure function of token ids and a generator; knows the ids of the tokens it places and of those it never
moves, and neither text nor images.
"""

# Axes: L tokens of a document, S segments, n spans.

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from math import exp, factorial
from typing import Any

import numpy as np
import torch


Span = tuple[int, int]
TOKENS_PER_SPAN = 3  # a sentinel in the span's place, another before it at the end, and the token that closes it


@dataclass(frozen=True, kw_only=True)
class SpanArguments:
    r"""How often a document that holds codes is rearranged, and how.

    A document has `min(Poisson(mean_spans), max_spans)` spans; with none it stays as it is, a causal document. With
    probability `whole_segment_share` the spans are whole segments (what stands between two boundaries, such as a
    caption or an image), each as likely as another, and never all of them. Else they are random spans.

    At the defaults a pair of caption and image stays causal in 36.8% of documents, has its whole caption masked in
    22.1% (`(1 - exp(-1)) * 0.7 / 2`), its whole image in another 22.1%, and random spans in 19.0%. The first 22.1%
    begin with `<eos> <sentinel:0> <break> CODES <eos> <sentinel:0>`, which is at once the prompt of captioning and
    that of the unconditional stream of guidance, so captions need not be dropped besides.

    Source: CM3Leon (arXiv 2309.02591), section 2.2 (no span crosses a `<break>`); CM3 (arXiv 2201.07520) for the
    Poisson law and the 16. Differs: CM3 has at least one span, which leaves no document in the form of a prompt; the
    rate of whole segments is not published and ours, as is that one segment always stays.
    """

    mean_spans: float | None = field(
        default=None,
        metadata={
            "help": "Models of codes: mean number of masked spans of a document; none: 1 (CM3), in causal models 0."
        },
    )
    max_spans: int = field(default=16, metadata={"help": "Models of codes: most masked spans of a document. CM3: 16."})
    whole_segment_share: float = field(
        default=0.7,
        metadata={
            "help": "Models of codes: share of masked documents that lose whole parts, a caption or an image, instead "
            "of random spans. Ours: the whole caption in 22% of pairs."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if self.mean_spans is not None and self.mean_spans < 0:
            raise ValueError(f"`mean_spans`={self.mean_spans} is below 0. Use 0 for causal documents alone.")
        if self.max_spans < 1:
            raise ValueError(f"`max_spans`={self.max_spans} must be at least 1.")
        if not 0 <= self.whole_segment_share <= 1:
            raise ValueError(f"`whole_segment_share`={self.whole_segment_share} must be in [0, 1].")

    def for_objective(self, objective: str | None) -> "SpanArguments":
        """Returns a copy with the mean that an objective has where none is given.

        Args:
            objective (`str`, *optional*): `"cm3"` or `"causal"`; none for models that read no codes.

        Raises:
            ValueError: If spans are asked of, or described for, documents that have none.
        """
        names = ("max_spans", "whole_segment_share")
        unread = {"mean_spans": 0.0, **{name: getattr(SpanArguments, name) for name in names}}
        refuse_unread(self, unread, objective)
        default = 0.0 if objective == "causal" else 1.0
        return replace(self, mean_spans=default if self.mean_spans is None else self.mean_spans)


def refuse_unread(arguments: Any, unread: Mapping[str, Any], objective: str | None) -> None:
    """Refuses fields about spans where documents have none.

    Args:
        arguments (`SpanArguments` or `TaskArguments`): Of the recipe.
        unread (`Mapping[str, Any]`): Names of those fields, and the values that ask for nothing, as None does.
        objective (`str`, *optional*): Of the model, as for `SpanArguments.for_objective`.

    Raises:
        ValueError: If one of them has another value and the objective is not `"cm3"`.
    """
    for name, default in unread.items():
        if objective != "cm3" and getattr(arguments, name) not in (default, None):
            raise ValueError(
                f"`{name}`={getattr(arguments, name)}, but the model has `objective`={objective!r}, documents without "
                "spans. Leave it out, or train a model with `objective`='cm3'."
            )


@dataclass(frozen=True, kw_only=True)
class CM3Masking(SpanArguments):
    """Which tokens the rearrangement places, and how often it does what: see [`SpanArguments`].

    Args:
        break_token_id (`int`): Boundary between the parts of a document.
        eos_token_id (`int`): First and last token of a document, a boundary too.
        eoss_token_id (`int`): Closes a span at the end of the document.
        first_sentinel_token_id (`int`): Sentinel 0; the others follow it.
        num_sentinel_tokens (`int`): How many there are.
        mean_spans (`float`, defaults to 1.0): Mean of the Poisson law, at least 0.
        max_spans (`int`, defaults to 16): Most spans of a document, between 1 and the number of sentinels.
        whole_segment_share (`float`, defaults to 0.7): Share of the masked documents whose spans are whole segments.

    Raises:
        ValueError: If a number is out of its range.
    """

    break_token_id: int
    eos_token_id: int
    eoss_token_id: int
    first_sentinel_token_id: int
    num_sentinel_tokens: int
    mean_spans: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        super().__post_init__()
        if self.max_spans > self.num_sentinel_tokens:
            raise ValueError(
                f"`max_spans`={self.max_spans} is more than `num_sentinel_tokens`={self.num_sentinel_tokens}, but "
                "every span needs a sentinel of its own. Lower it."
            )

    @property
    def max_added_tokens(self) -> int:
        """Tokens by which a document grows at most: the room to leave in a window."""
        return TOKENS_PER_SPAN * self.max_spans


def mask_document(
    input_ids: Sequence[int] | np.ndarray,
    generator: torch.Generator,
    settings: CM3Masking,
    *,
    max_length: int | None = None,
) -> np.ndarray:
    r"""Draws spans of a document and moves them to its end.

    `<eos> a red kite <break> CODES <eos>` may become `<eos> a <sentinel:0> <break> CODES <eos> <sentinel:0> red kite
    <eoss>`. Sentinels count from 0 in the order of their places. Tokens are neither lost nor added but for the three
    of each span, and [`unmask_document`] undoes it. No span holds a boundary or the first token.

    Args:
        input_ids (`Sequence[int]` or `np.ndarray` of shape `(length,)`): One document.
        generator (`torch.Generator`): Of the document.
        settings (`CM3Masking`): Token ids, rates and limits.
        max_length (`int`, *optional*): Longest result. A document that would be longer with its spans loses the end of
            its source, before the spans are drawn: no sentinel is orphaned and no tail is cut. Images are not spared,
            so leave documents that hold some `settings.max_added_tokens` of room.

    Returns:
        `np.ndarray` of type int64: the source, and for each span `<sentinel:i> SPAN <eoss>`.

    Raises:
        ValueError: If `max_length` has no room for the tails of the largest number of spans.

    Source: CM3Leon, section 2.2, and CM3, section 2. Differs: see [`SpanArguments`] and [`draw_random_spans`].
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if max_length is not None and max_length <= settings.max_added_tokens:
        raise ValueError(
            f"`max_length`={max_length} has no room for the {settings.max_added_tokens} tokens that "
            f"`max_spans`={settings.max_spans} adds. Raise it, or lower `max_spans`."
        )
    count_draw, kind_draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    num_spans = bisect_right(poisson_cumulative(settings.mean_spans, settings.max_spans), count_draw)
    if max_length is not None:
        ids = ids[: max_length - TOKENS_PER_SPAN * num_spans]
    if num_spans == 0:
        return ids
    segments = find_segments(ids, settings)
    if kind_draw < settings.whole_segment_share and len(segments) > 1:
        chosen = torch.randperm(len(segments), generator=generator).tolist()[: min(num_spans, len(segments) - 1)]
        return move_spans(ids, [segments[number] for number in sorted(chosen)], settings)
    return move_spans(ids, draw_random_spans(len(ids), segments, num_spans, generator), settings)


@lru_cache
def poisson_cumulative(mean: float, max_count: int) -> tuple[float, ...]:
    """Chances of at most 0, 1, ... `max_count - 1` events; a uniform draw passes as many of them as there are events.

    Example:
        >>> [round(chance, 3) for chance in poisson_cumulative(1.0, 3)]
        [0.368, 0.736, 0.92]

    """
    return tuple(accumulate(exp(-mean) * mean**count / factorial(count) for count in range(max_count)))


def find_segments(ids: np.ndarray, settings: CM3Masking) -> list[Span]:
    """Finds the stretches between boundaries, from the second token on, as (start, end) with the end excluded."""
    is_boundary = (ids == settings.break_token_id) | (ids == settings.eos_token_id)
    is_boundary[:1] = True
    edges = [*np.flatnonzero(is_boundary).tolist(), len(ids)]
    return [(left + 1, right) for left, right in zip(edges, edges[1:], strict=False) if right - left > 1]


def draw_random_spans(length: int, segments: Sequence[Span], num_spans: int, generator: torch.Generator) -> list[Span]:
    """Draws disjoint spans, each within one segment; often fewer than asked for.

    `num_spans ** 2` candidates have uniform ends over the document, the start rounded down and the end to the nearest
    token. Of those that hold a token, the first `num_spans` that do not meet one another are kept, and each is cut to
    the segment that it shares most tokens with, the first of those where several do. A span that held nothing but
    boundaries falls away.

    Args:
        length (`int`): Tokens of the document.
        segments (`Sequence[tuple[int, int]]`): From [`find_segments`].
        num_spans (`int`): Spans asked for, at least 1.
        generator (`torch.Generator`): Of the document.

    Returns:
        `list[tuple[int, int]]`: starts and ends in order of position.

    Source: The paper's lineage code, as CM3Leon (section 2.2) prints no more than that no span crosses a `<break>`.
    Differs: there the rounding of a single span is another than that of several.
    """
    ends = torch.rand(num_spans**2, 2, generator=generator, dtype=torch.float64).mul_(length).tolist()
    kept: list[Span] = []
    for first, second in ends:
        start, end = int(min(first, second)), round(max(first, second))
        if start < end and all(end <= left or right <= start for left, right in kept):
            kept.append((start, end))
            if len(kept) == num_spans:
                break
    spans = [
        max(((max(start, left), min(end, right)) for left, right in segments), key=lambda span: span[1] - span[0])
        for start, end in (kept if segments else [])
    ]
    return sorted(span for span in spans if span[1] > span[0])


def move_spans(ids: np.ndarray, spans: Sequence[Span], settings: CM3Masking) -> np.ndarray:
    """Moves spans, in order of position and disjoint, to the end of a document."""
    masked = np.empty(len(ids) + TOKENS_PER_SPAN * len(spans), dtype=np.int64)
    written, position, tail = 0, 0, len(ids) + sum(start - end + 1 for start, end in spans)
    for number, (start, end) in enumerate(spans):
        sentinel, place = settings.first_sentinel_token_id + number, written + start - position
        closing = tail + 1 + end - start
        masked[written:place] = ids[position:start]
        masked[place] = masked[tail] = sentinel
        masked[tail + 1 : closing] = ids[start:end]
        masked[closing] = settings.eoss_token_id
        written, position, tail = place + 1, end, closing + 1
    masked[written : written + len(ids) - position] = ids[position:]
    return masked


def mask_answer(input_ids: np.ndarray, is_answer: np.ndarray, settings: CM3Masking) -> tuple[np.ndarray, np.ndarray]:
    """Moves the answers of a document to its end, whole, as the prompts that ask for them have it.

    Args:
        input_ids (`np.ndarray` of shape `(length,)`): One document.
        is_answer (`np.ndarray` of shape `(length,)`): Marks answers. Boundaries stay, also where they are marked.
        settings (`CM3Masking`): Token ids, and the most spans.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the document, and marks on its answers and on the tokens that close them.

    Raises:
        ValueError: If there are more answers than sentinels.

    Source: Ours: chance alone masks just the answer too rarely for a short run of tuning. The form is the paper's.
    """
    spans = [
        (left + start, left + end)
        for left, right in find_segments(input_ids, settings)
        for start, end in _find_runs(is_answer[left:right])
    ]
    if len(spans) > settings.num_sentinel_tokens:
        raise ValueError(
            f"A document has {len(spans)} answers; there are `num_sentinel_tokens`={settings.num_sentinel_tokens}."
        )
    masked = move_spans(input_ids, spans, settings)
    tail = len(input_ids) + sum(start - end + 1 for start, end in spans)
    marks = np.arange(len(masked)) >= tail
    first, last = settings.first_sentinel_token_id, settings.first_sentinel_token_id + settings.num_sentinel_tokens
    return masked, marks & ~((masked >= first) & (masked < last))


def _find_runs(marks: np.ndarray) -> list[Span]:
    """Finds the stretches of True, as (start, end) with the end excluded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def unmask_document(input_ids: Sequence[int] | np.ndarray, settings: CM3Masking) -> np.ndarray:
    """Puts the spans at the end of a document back into their places, as one does with what a model filled in.

    Args:
        input_ids (`Sequence[int]` or `np.ndarray` of shape `(length,)`): From [`mask_document`], or generated.
        settings (`CM3Masking`): Token ids.

    Returns:
        `np.ndarray` of type int64: the document as it was before.

    Raises:
        ValueError: If sentinels and ends of spans do not fit each other, as in a document whose tail was cut.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    last_sentinel = settings.first_sentinel_token_id + settings.num_sentinel_tokens - 1
    places = np.flatnonzero((ids >= settings.first_sentinel_token_id) & (ids <= last_sentinel))
    num_spans = len(places) // 2
    expected = np.tile(np.arange(num_spans), 2) + settings.first_sentinel_token_id
    closings = np.flatnonzero(ids == settings.eoss_token_id)
    is_whole = len(expected) == len(places) and (ids[places] == expected).all() and len(closings) == num_spans
    if not is_whole or (closings + 1 != [*places[num_spans + 1 :], len(ids)][: len(closings)]).any():
        raise ValueError(
            f"`input_ids` has the sentinels {(ids[places] - settings.first_sentinel_token_id).tolist()} and "
            f"{len(closings)} ends of spans: each sentinel must stand once in the document and once, in the same "
            "order, before its span at the end, which the end of a span closes."
        )
    if num_spans == 0:
        return ids
    pieces, position = [], 0
    for place, start, end in zip(places.tolist(), places[num_spans:].tolist(), closings.tolist(), strict=False):
        pieces += [ids[position:place], ids[start + 1 : end]]
        position = place + 1
    return np.concatenate([*pieces, ids[position : places[num_spans]]])
