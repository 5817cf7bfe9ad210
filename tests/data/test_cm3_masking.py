import itertools
from collections import Counter
from math import exp

import numpy as np
import pytest
import torch

from hf_mm.data.cm3_masking import CM3Masking, SpanArguments, mask_document, unmask_document


BREAK, EOS, EOSS, SENTINEL = 3, 5, 7, 11
NUM_SENTINELS = 17
IDS = {
    "break_token_id": BREAK,
    "eos_token_id": EOS,
    "eoss_token_id": EOSS,
    "first_sentinel_token_id": SENTINEL,
    "num_sentinel_tokens": NUM_SENTINELS,
}
NUM_DOCUMENTS = 100_000


def settings_of(**fields):
    return CM3Masking(**IDS, **fields)


def document_of(*lengths):
    """A document whose tokens are all different, with parts of these lengths."""
    tokens = itertools.count(100)
    parts = [[next(tokens) for _ in range(length)] for length in lengths]
    return [EOS, *itertools.chain(*(part + [BREAK] for part in parts))][:-1] + [EOS]


def is_sentinel(token):
    return SENTINEL <= token < SENTINEL + NUM_SENTINELS


def maskings(document, count, **fields):
    generator, settings = torch.Generator().manual_seed(3), settings_of(**fields)
    return [mask_document(document, generator, settings).tolist() for _ in range(count)]


SHAPES = [(5, 31), (2, 0, 7), (13,), (3, 11, 5, 17), (1, 1), (0,)]


@pytest.mark.parametrize("lengths", SHAPES)
@pytest.mark.parametrize("fields", [{}, {"mean_spans": 7.0, "whole_segment_share": 0.3}, {"whole_segment_share": 1}])
def test_masked_documents_keep_their_tokens_and_their_boundaries_and_can_be_undone(lengths, fields):
    document = document_of(*lengths)
    boundaries = [token for token in document if token in (BREAK, EOS)]
    seen = set()
    for masked in maskings(document, 300, **fields):
        assert unmask_document(masked, settings_of()).tolist() == document
        assert Counter(token for token in masked if token != EOSS and not is_sentinel(token)) == Counter(document)
        num_spans = masked.count(EOSS)
        assert len(masked) == len(document) + 3 * num_spans
        assert [token - SENTINEL for token in masked if is_sentinel(token)] == [*range(num_spans)] * 2
        tail = masked[masked.index(EOS, 1) + 1 :]
        assert not {BREAK, EOS} & set(tail) and masked[0] == EOS
        assert [token for token in masked if token in (BREAK, EOS)] == boundaries
        for span in " ".join(map(str, tail)).split(f" {EOSS}")[:-1]:
            sentinel, *tokens = map(int, span.split())
            assert is_sentinel(sentinel) and len(tokens) > 0
        seen.add(num_spans)
    assert 0 in seen or fields.get("mean_spans") == 7.0
    assert len(seen) > 1 or max(lengths) == 0


def test_a_masked_document_looks_as_written():
    document = [EOS, 101, 102, 103, BREAK, 201, 202, 203, 204, EOS]
    wanted = {
        (EOS, SENTINEL, BREAK, 201, 202, 203, 204, EOS, SENTINEL, 101, 102, 103, EOSS),
        (EOS, 101, 102, 103, BREAK, SENTINEL, EOS, SENTINEL, 201, 202, 203, 204, EOSS),
        tuple(document),
    }
    assert {tuple(masked) for masked in maskings(document, 200, whole_segment_share=1)} == wanted
    two = (EOS, 101, SENTINEL, BREAK, 201, SENTINEL + 1, 204, EOS, SENTINEL, 102, 103, EOSS, SENTINEL + 1, 202, 203, EOSS)  # fmt: skip
    assert two in {tuple(masked) for masked in maskings(document, 3000, whole_segment_share=0, mean_spans=3.0)}


def simulate(lengths, share, rng):
    """The recorded reading told token by token: labels of spans over all documents at once; -1 where nothing is."""
    segments = np.repeat(np.arange(2 * len(lengths) + 1), [1, *[n for length in lengths for n in (length, 1)]])
    segment_of = np.where(segments % 2 == 1, segments // 2, -1)  # boundaries have none
    size, num_segments = len(segment_of), len(lengths)
    counts = np.minimum(rng.poisson(1.0, NUM_DOCUMENTS), 16)
    labels = np.full((NUM_DOCUMENTS, size), -1)
    for count in range(1, counts.max() + 1):
        rows = np.flatnonzero(counts == count)
        ends = np.sort(rng.random((len(rows), count**2, 2)) * size, axis=2)
        marks, kept = np.full((len(rows), size), -1), np.zeros(len(rows), dtype=int)
        for start, end in ends.transpose(1, 2, 0):
            covers = (np.arange(size) >= np.floor(start)[:, None]) & (np.arange(size) < np.rint(end)[:, None])
            fits = covers.any(1) & ~(covers & (marks >= 0)).any(1) & (kept < count)
            marks[covers & fits[:, None]] = np.broadcast_to(kept[:, None], covers.shape)[covers & fits[:, None]]
            kept += fits
        for label in range(count):
            shared = np.stack([((marks == label) & (segment_of == s)).sum(1) for s in range(num_segments)], 1)
            stays = segment_of == shared.argmax(1)[:, None]
            marks[(marks == label) & ~stays] = -1
        whole = np.argsort(np.argsort(rng.random((len(rows), num_segments)))) < min(count, num_segments - 1)
        whole = np.where(segment_of >= 0, np.take(np.c_[whole, np.zeros(len(rows), bool)], segment_of, axis=1), False)
        use_whole = (rng.random(len(rows)) < share) & (num_segments > 1)
        labels[rows] = np.where(use_whole[:, None], np.where(whole, segment_of, -1), marks)
    return [kind_of_spans(spans_of_labels(row)) for row in labels]


def spans_of_labels(row):
    """(start, length) of each run of one label."""
    edges = np.flatnonzero(np.diff(row, prepend=-1, append=-1))
    return [(start, end - start) for start, end in itertools.pairwise(edges.tolist()) if row[start] >= 0]


def spans_of_masked(masked, length):
    """(start, length) of each span, from places of sentinels and lengths of the tail's parts."""
    places = [place for place, token in enumerate(masked) if is_sentinel(token)]
    closings = [place for place, token in enumerate(masked) if token == EOSS]
    widths = [end - start - 1 for start, end in zip(places[len(closings) :], closings, strict=True)]
    moved = itertools.accumulate(widths, initial=0)
    return [(p + m - n, w) for n, (p, w, m) in enumerate(zip(places, widths, moved, strict=False))]


def kind_of_spans(spans):
    """Number of spans, and where the first begins and how long it is, in bins."""
    start, width = spans[0] if spans else (0, 0)
    return min(len(spans), 4), start // 5, min(width, 20) // 4


@pytest.mark.parametrize(("lengths", "share"), [((7, 29), 0.0), pytest.param((5, 13, 3), 0.7, marks=pytest.mark.slow)])
def test_spans_are_distributed_as_in_an_independent_simulation(lengths, share):
    document = document_of(*lengths)
    generator, settings = torch.Generator().manual_seed(5), settings_of(whole_segment_share=share)
    found = Counter()
    for _ in range(NUM_DOCUMENTS):
        masked = mask_document(document, generator, settings).tolist()
        found[kind_of_spans(spans_of_masked(masked, len(document)))] += 1
    expected = Counter(simulate(lengths, share, np.random.default_rng(7)))
    common = [kind for kind in found | expected if found[kind] + expected[kind] >= 20]
    pairs = [(found[kind], expected[kind]) for kind in common]
    pairs.append(tuple(NUM_DOCUMENTS - sum(column) for column in zip(*pairs, strict=True)))
    chi_square = sum((one - two) ** 2 / (one + two) for one, two in pairs if one + two)
    freedom = torch.tensor(len(pairs) - 1, dtype=torch.float64)
    chance = float(torch.special.gammaincc(freedom / 2, torch.tensor(chi_square / 2, dtype=torch.float64)))
    assert len(pairs) > 30 and chance > 0.001, (chi_square, len(pairs))


def test_a_document_stays_causal_as_often_as_poisson_has_no_span():
    count = sum(masked.count(EOSS) == 0 for masked in maskings(document_of(5, 31), 20_000, whole_segment_share=1))
    assert abs(count / 20_000 - exp(-1)) < 4 * 0.0035
    assert all(masked == document_of(5, 31) for masked in maskings(document_of(5, 31), 50, mean_spans=0.0))


@pytest.mark.parametrize("lengths", [(9, 1024), (12, 64), (60, 256)])
def test_the_whole_caption_of_a_pair_is_masked_in_20_to_25_percent(lengths):
    document = document_of(*lengths)
    caption, codes = document[1 : 1 + lengths[0]], document[2 + lengths[0] : -1]
    prompt = [EOS, SENTINEL, BREAK, *codes, EOS, SENTINEL, *caption, EOSS]
    share = sum(masked == prompt for masked in maskings(document, 4000)) / 4000
    assert 0.2 < share < 0.25


def test_a_document_of_one_part_is_never_masked_whole_by_rule():
    masked = maskings(document_of(97), 500, whole_segment_share=1)
    assert sum(len(spans_of_masked(m, 99)) == 1 and spans_of_masked(m, 99)[0][1] > 95 for m in masked) < 10


def test_a_document_is_a_function_of_its_generator():
    document, settings = document_of(5, 31), settings_of(whole_segment_share=0)
    one, two = (
        [mask_document(document, torch.Generator().manual_seed(seed), settings).tolist() for seed in range(50)]
        for _ in range(2)
    )
    assert one == two and len({tuple(masked) for masked in one}) > 10


@pytest.mark.parametrize("max_length", [37, 20, 13])
def test_a_document_without_room_loses_the_end_of_its_source_and_never_of_its_tail(max_length):
    settings = settings_of(max_spans=4, mean_spans=3.0)
    document, generator = document_of(5, 31), torch.Generator().manual_seed(3)
    lengths = set()
    for _ in range(300):
        masked = mask_document(document, generator, settings, max_length=max_length).tolist()
        assert len(masked) <= max_length
        kept = unmask_document(masked, settings).tolist()
        assert kept == document[: len(kept)]
        lengths.add(len(kept))
    assert len(lengths) > 3


def test_a_window_that_the_tail_alone_would_fill_is_refused():
    settings = settings_of(max_spans=4)
    with pytest.raises(ValueError, match="`max_length`=12 has no room for the 12 tokens that `max_spans`=4 adds"):
        mask_document(document_of(5, 31), torch.Generator(), settings, max_length=12)


def test_reserved_room_is_enough():
    settings = settings_of(max_spans=2, mean_spans=9.0)
    document, generator = document_of(5, 31), torch.Generator().manual_seed(3)
    longest = max(len(mask_document(document, generator, settings)) for _ in range(200))
    assert longest == len(document) + settings.max_added_tokens == len(document) + 6


def test_documents_that_are_cut_or_ill_numbered_cannot_be_undone():
    settings = settings_of()
    whole = [EOS, SENTINEL, BREAK, 201, EOS, SENTINEL, 101, EOSS]
    assert unmask_document(whole, settings).tolist() == [EOS, 101, BREAK, 201, EOS]
    for broken in (
        whole[:-1],
        whole[:5],
        [*whole, 102],
        [EOS, SENTINEL + 1, *whole[2:]],
        [*whole[:5], SENTINEL + 1, 101, EOSS],
        [*whole[:5], SENTINEL, EOSS, 101, EOSS],
    ):
        with pytest.raises(ValueError, match="each sentinel must stand once in the document"):
            unmask_document(broken, settings)


def test_causal_documents_have_no_spans_and_others_the_mean_of_cm3():
    assert [SpanArguments().for_objective(name).mean_spans for name in ("cm3", None, "causal")] == [1, 1, 0]
    given = SpanArguments(mean_spans=0.7, max_spans=5).for_objective("cm3")
    assert (given.mean_spans, given.max_spans) == (0.7, 5)
    assert SpanArguments(mean_spans=0).for_objective("causal").mean_spans == 0


@pytest.mark.parametrize("objective", ["causal", None])
@pytest.mark.parametrize(("field", "value"), [("mean_spans", 0.7), ("max_spans", 5), ("whole_segment_share", 0.2)])
def test_spans_that_documents_do_not_have_are_refused(field, value, objective):
    with pytest.raises(ValueError, match=f"`{field}`={value}, but the model has `objective`={objective!r}"):
        SpanArguments(**{field: value}).for_objective(objective)


@pytest.mark.parametrize(
    ("field", "value"), [("mean_spans", -0.5), ("max_spans", 0), ("max_spans", 18), ("whole_segment_share", 1.5)]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}`={value}"):
        settings_of(**{field: value})
