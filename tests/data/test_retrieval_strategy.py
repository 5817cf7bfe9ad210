from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_mm.data import retrieval_strategy
from hf_mm.data.retrieval_strategy import (
    Candidates,
    Neighbors,
    Queries,
    RetrievalStrategy,
    choose_neighbors,
    sample_neighbors,
)


NUM_QUERIES, NUM_ROWS, DEPTH, DIMENSION = 10_000, 997, 23, 7
STRATEGY = RetrievalStrategy(num_candidates=DEPTH)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def search(queries: np.ndarray, memory: np.ndarray, asks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best rows by inner product, none for those who do not ask."""
    products = queries @ memory.T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :DEPTH]
    scores = np.take_along_axis(products, rows, axis=1)
    return np.where(asks[:, None], rows, -1), np.where(asks[:, None], scores, -np.inf).astype(np.float32)


@pytest.fixture(scope="module")
def asked() -> tuple[Queries, Candidates]:
    """Random queries, most of them rows of a memory bank with many near-duplicates, some without image or text."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(61, DIMENSION))
    memory = unit(topics[rng.integers(61, size=NUM_ROWS)] + 0.25 * rng.normal(size=(NUM_ROWS, DIMENSION)))
    own = rng.integers(-1, NUM_ROWS, NUM_QUERIES)
    fresh = unit(topics[rng.integers(61, size=NUM_QUERIES)] + 0.3 * rng.normal(size=(NUM_QUERIES, DIMENSION)))
    vectors = np.where(own[:, None] >= 0, memory[own], fresh)
    asks_by_image, asks_by_text = rng.random(NUM_QUERIES) < 0.9, rng.random(NUM_QUERIES) < 0.9
    asks_by_text |= ~asks_by_image
    parts = [unit(vectors + 0.3 * rng.normal(size=vectors.shape)) for _ in range(2)]
    found = [search(part, memory, asks) for part, asks in zip(parts, (asks_by_image, asks_by_text), strict=True)]
    rows, scores = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    has_both = rng.random(NUM_ROWS) < 0.8
    candidates = Candidates(rows, scores, np.arange(2 * DEPTH) < DEPTH, has_both[rows] & (rows >= 0), memory[rows])
    queries = Queries(own, vectors, parts[0] * asks_by_image[:, None], parts[1] * asks_by_text[:, None])
    return queries, candidates


def choose_slowly(number: int, queries: Queries, candidates: Candidates, strategy: RetrievalStrategy) -> set[int]:
    """The same rules, one query and one candidate at a time."""
    order = sorted(
        range(2 * DEPTH),
        key=lambda c: (not candidates.has_both[number, c], -candidates.scores[number, c], candidates.rows[number, c]),
    )
    own, chosen = queries.vectors[number], []
    for by_image in (True, False, True, False, None, None, None, None):
        for c in order:
            row, vector = candidates.rows[number, c], candidates.vectors[number, c]
            if (
                len(chosen) < 4
                and (by_image is None or by_image == (c < DEPTH))
                and row >= 0
                and row != queries.rows[number]
                and own @ vector <= strategy.max_relevance
                and all(candidates.vectors[number, d] @ vector <= strategy.max_similarity for d in chosen)
                and row not in candidates.rows[number, chosen]
            ):
                chosen.append(c)
                break
    return set(candidates.rows[number, chosen].tolist())


def check_rules(queries: Queries, candidates: Candidates, pool: Neighbors, strategy: RetrievalStrategy) -> None:
    """Every rule for every query, from the numbers of the chosen rows alone."""
    known = {
        int(row): vector
        for row, vector in zip(candidates.rows.ravel(), candidates.vectors.reshape(-1, DIMENSION), strict=True)
    }
    is_there = pool.rows >= 0
    assert not (is_there & (pool.rows == queries.rows[:, None])).any(), "a row found itself"
    vectors = np.stack([known[row] for row in np.where(is_there, pool.rows, next(iter(known))).ravel().tolist()])
    vectors = vectors.reshape(*pool.rows.shape, DIMENSION)
    relevances = np.einsum("qd,qpd->qp", queries.vectors, vectors)
    assert np.allclose(relevances[is_there], pool.relevances[is_there], atol=1e-6)
    assert relevances[is_there].max() <= strategy.max_relevance + 1e-6, "a neighbour exceeds the cap"
    likeness = np.einsum("qpd,qrd->qpr", vectors, vectors)
    pairs = is_there[:, :, None] & is_there[:, None, :] & ~np.eye(pool.rows.shape[1], dtype=bool)
    assert likeness[pairs].max() <= strategy.max_similarity + 1e-6, "two neighbours are too alike"
    ordered = np.sort(pool.rows, axis=1)
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(), "a neighbour comes twice"
    assert not (is_there[:, 1:] & ~is_there[:, :-1]).any(), "a free place comes before a neighbour"


@pytest.mark.parametrize("cap", [0.9, 0.6, 1.0])
def test_rules_hold_for_ten_thousand_random_queries(asked: tuple[Queries, Candidates], cap: float) -> None:
    queries, candidates = asked
    strategy = replace(STRATEGY, max_relevance=cap)
    check_rules(queries, candidates, choose_neighbors(queries, candidates, strategy), strategy)


@pytest.mark.parametrize(
    ("rule", "cap", "fault"),
    [
        ("find_other_rows", 1.0, "a row found itself"),
        ("find_within_cap", 0.9, "exceeds the cap"),
        ("find_unlike", 0.9, "two neighbours are too alike"),
    ],
)
def test_a_rule_that_is_removed_is_missed(
    asked: tuple[Queries, Candidates], monkeypatch: pytest.MonkeyPatch, rule: str, cap: float, fault: str
) -> None:
    queries, candidates = asked
    strategy = replace(STRATEGY, max_relevance=cap)
    monkeypatch.setattr(retrieval_strategy, rule, lambda *_: np.array(True))
    with pytest.raises(AssertionError, match=fault):
        check_rules(queries, candidates, choose_neighbors(queries, candidates, strategy), strategy)


def test_pools_are_those_of_the_rules_applied_one_by_one(asked: tuple[Queries, Candidates]) -> None:
    queries, candidates = asked
    pools = choose_neighbors(queries, candidates, STRATEGY).rows
    for number in range(0, NUM_QUERIES, 41):
        assert set(pools[number][pools[number] >= 0].tolist()) == choose_slowly(number, queries, candidates, STRATEGY)


def make(scores: list[float], vectors: np.ndarray, *, num_by_image: int, has_both: list[bool]) -> Candidates:
    """Candidates of one query, those by image first."""
    rows = np.arange(len(scores))[None] + 10
    by_image = np.arange(len(scores)) < num_by_image
    return Candidates(rows, np.array([scores], np.float32), by_image, np.array([has_both]), vectors[None])


def ask(*, image: bool = True, text: bool = True) -> Queries:
    one = np.eye(9, dtype=np.float32)[:1]
    return Queries(np.array([-1]), one, one * image, one * text)


def test_two_come_by_image_and_two_by_text_and_spare_places_go_to_the_other() -> None:
    vectors = np.eye(9, dtype=np.float32)[1:]
    scores = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    candidates = make(scores, vectors, num_by_image=4, has_both=[True] * 8)
    both = choose_neighbors(ask(), candidates, STRATEGY)
    assert sorted(both.rows[0]) == [10, 11, 14, 15] and both.is_settled.all()
    candidates.rows[:, :4] = -1
    by_text = choose_neighbors(ask(image=False), candidates, STRATEGY)
    assert sorted(by_text.rows[0]) == [14, 15, 16, 17] and by_text.is_settled.all()
    assert not choose_neighbors(ask(), candidates, STRATEGY).is_settled.any()  # deeper ones may come by image


def test_documents_with_both_modalities_come_first_whatever_their_score() -> None:
    vectors = np.eye(9, dtype=np.float32)[1:]
    has_both = [False, True, True, False, True, True, False, False]
    scores = [0.9, 0.2, 0.1, 0.8, 0.1, 0.05, 0.7, 0.6]
    found = choose_neighbors(ask(), make(scores, vectors, num_by_image=4, has_both=has_both), STRATEGY)
    assert sorted(found.rows[0]) == [11, 12, 14, 15] and found.is_settled.all()
    has_both[5] = False
    found = choose_neighbors(ask(), make(scores, vectors, num_by_image=4, has_both=has_both), STRATEGY)
    assert found.rows[0].tolist()[3] == 16 and not found.is_settled.any()  # the single one is last


def test_a_pool_is_ordered_by_likeness_to_the_whole_query() -> None:
    vectors = np.zeros((8, 9), dtype=np.float32)
    vectors[:, 0] = [0.1, 0.4, 0.0, 0.0, 0.3, 0.2, 0.0, 0.0]
    vectors[np.arange(8), np.arange(1, 9)] = np.sqrt(1 - vectors[:, 0] ** 2)
    scores = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    found = choose_neighbors(ask(), make(scores, vectors, num_by_image=4, has_both=[True] * 8), STRATEGY)
    assert found.rows[0].tolist() == [11, 14, 15, 10]
    assert np.allclose(found.relevances[0], [0.4, 0.3, 0.2, 0.1])


def test_a_relevance_of_exactly_the_cap_is_within_it() -> None:
    vectors = np.eye(9, dtype=np.float32)[1:]
    vectors[0, :2] = 0.5, np.sqrt(0.75)
    candidates = make([0.9] * 8, vectors, num_by_image=4, has_both=[True] * 8)
    at, below = (replace(STRATEGY, max_relevance=cap) for cap in (0.5, 0.49))
    assert 10 in choose_neighbors(ask(), candidates, at).rows
    assert 10 not in choose_neighbors(ask(), candidates, below).rows


def test_three_of_the_pool_are_drawn_at_random_each_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_neighbors([5, 7, 11, 13], 3, generator) for _ in range(4000)]
    assert all(len(set(three)) == 3 for three in drawn)
    counts = np.bincount(np.ravel(drawn), minlength=14)[[5, 7, 11, 13]]
    assert np.allclose(counts, 3000, atol=120)
    firsts = np.bincount([three[0] for three in drawn], minlength=14)[[5, 7, 11, 13]]
    assert np.allclose(firsts, 1000, atol=120)


def test_a_draw_is_a_function_of_its_generator_and_takes_all_of_a_short_pool() -> None:
    def draw(seed: int, pool: list[int]) -> list[int]:
        return sample_neighbors(pool, 3, torch.Generator().manual_seed(seed))

    assert draw(3, [5, 7, 11, 13]) == draw(3, [5, 7, 11, 13])
    assert sorted(draw(3, [11, 5])) == [5, 11] and draw(3, []) == []
    with pytest.raises(ValueError, match="`num_retrieved`=-1"):
        sample_neighbors([5], -1, torch.Generator())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_by_image": 0, "num_by_text": 0}, "one of them at least 1"),
        ({"num_by_text": -1}, "`num_by_text`=-1"),
        ({"max_relevance": 1.5}, r"`max_relevance`=1.5 must be in \[-1, 1\]"),
        ({"query_dropout": 1.0}, "`query_dropout`=1.0"),
        ({"num_candidates": 4}, "`num_candidates`=4 must be more than the 4 neighbours"),
        ({"num_candidates": 50, "max_candidates": 40}, "at most `max_candidates`=40"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalStrategy(**fields)
