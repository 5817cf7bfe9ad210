"""The rules by which documents are chosen among those that a search found, for many queries at once.

Pure functions of arrays: nothing here knows an index, a row or a model. The rules are those of CM3Leon
(arXiv 2309.02591), section 2.1, which takes them from RA-CM3 (arXiv 2211.12561).
"""

from dataclasses import dataclass, field

import numpy as np
import torch


# Axes: Q queries, C candidates of a query (those by its image, then those by its text), P neighbours in its pool,
# D dimension of the vectors. Row -1 is none.

COPY_TOLERANCE = 5e-4  # two roundings to half precision of a number below 1/2


@dataclass
class RetrievalStrategy:
    """What is retrieved for a row, and what is passed over. Numbers of the paper are in section 2.1."""

    num_by_image: int = field(default=2, metadata={"help": "Neighbours by the image query (paper: 2)."})
    num_by_text: int = field(default=2, metadata={"help": "Neighbours by the text query (paper: 2)."})
    max_relevance: float = field(
        default=0.9,
        metadata={"help": "Likeness of a document to the query above which it is passed over (paper); 1: none."},
    )
    max_similarity: float = field(
        default=0.9,
        metadata={"help": "Likeness of two neighbours above which the second is passed over (ours); 1: none."},
    )
    query_dropout: float = field(default=0.2, metadata={"help": "Share of the text query's tokens left out (paper)."})
    num_candidates: int = field(default=64, metadata={"help": "Documents that a query looks at first (ours)."})
    max_candidates: int = field(
        default=1024, metadata={"help": "At most, where the first ones leave places in the pool free (ours)."}
    )

    def __post_init__(self) -> None:
        """Refuses values out of range."""
        if min(self.num_by_image, self.num_by_text) < 0 or self.num_neighbors < 1:
            raise ValueError(
                f"`num_by_image`={self.num_by_image} and `num_by_text`={self.num_by_text} must be at least 0, and one "
                "of them at least 1."
            )
        for name in ("max_relevance", "max_similarity"):
            if not -1 <= (value := vars(self)[name]) <= 1:
                raise ValueError(f"`{name}`={value} must be in [-1, 1], where inner products of unit vectors are.")
        if not 0 <= self.query_dropout < 1:
            raise ValueError(f"`query_dropout`={self.query_dropout} must be at least 0 and below 1.")
        if not self.num_neighbors < self.num_candidates <= self.max_candidates:
            raise ValueError(
                f"`num_candidates`={self.num_candidates} must be more than the {self.num_neighbors} neighbours and at "
                f"most `max_candidates`={self.max_candidates}."
            )

    @property
    def num_neighbors(self) -> int:
        """Size of a full pool."""
        return self.num_by_image + self.num_by_text

    def check_memory(self, num_rows: int) -> None:
        """Refuses a memory bank with too few rows for a pool beside the row that asks.

        Raises:
            ValueError: If it has.
        """
        if num_rows <= self.num_neighbors:
            raise ValueError(
                f"The memory bank has {num_rows} rows; {self.num_neighbors} neighbours need at least "
                f"{self.num_neighbors + 1}. Give a larger one, or ask for fewer neighbours."
            )

    def places(self) -> list[bool]:
        """Lists the places of the pool in the order they are filled, True for those of the image query, in turn."""
        ranks = [(rank, False, True) for rank in range(self.num_by_image)]
        ranks += [(rank, True, False) for rank in range(self.num_by_text)]
        return [by_image for _, _, by_image in sorted(ranks)]


@dataclass
class Queries:
    """Those who ask, Q of them.

    Args:
        rows (`np.ndarray` of shape `(queries,)`): Their own rows in the memory bank, -1 for none.
        vectors (`np.ndarray` of shape `(queries, dimension)`): Their document vectors, of which the cap counts.
        image_vectors (`np.ndarray` of shape `(queries, dimension)`): Vectors of their images, zeros for none.
        text_vectors (`np.ndarray` of shape `(queries, dimension)`): Vectors of their texts, zeros for none.
        refuse_copies (`bool`, defaults to `False`): Whether a document of their own vector is passed over, which is
            the row itself in a memory bank where its number is not known.
    """

    rows: np.ndarray
    vectors: np.ndarray
    image_vectors: np.ndarray
    text_vectors: np.ndarray
    refuse_copies: bool = False

    def __len__(self) -> int:
        """Returns their number."""
        return len(self.rows)

    def __getitem__(self, part: np.ndarray) -> "Queries":
        """Takes some of them."""
        return Queries(
            self.rows[part],
            self.vectors[part],
            self.image_vectors[part],
            self.text_vectors[part],
            refuse_copies=self.refuse_copies,
        )

    def asks_by(self, *, image: bool) -> np.ndarray:
        """Marks those that have an image, or a text."""
        return np.asarray((self.image_vectors if image else self.text_vectors).any(axis=1))


@dataclass
class Candidates:
    """What the searches found for Q queries.

    Args:
        rows (`np.ndarray` of shape `(queries, candidates)`): Numbers of the documents, -1 for none.
        scores (`np.ndarray` of shape `(queries, candidates)`): Inner products with the query that found them.
        by_image (`np.ndarray` of shape `(candidates,)` and type bool): Whether the image query found them or the text.
        has_both (`np.ndarray` of shape `(queries, candidates)` and type bool): Whether they have text and image.
        vectors (`np.ndarray` of shape `(queries, candidates, dimension)`): Unit vectors of the documents.
    """

    rows: np.ndarray
    scores: np.ndarray
    by_image: np.ndarray
    has_both: np.ndarray
    vectors: np.ndarray


@dataclass
class Neighbors:
    """The pools of Q queries, those with both modalities first, then by relevance.

    Args:
        rows (`np.ndarray` of shape `(queries, pool)`): Numbers of the documents, -1 in places left free.
        relevances (`np.ndarray` of shape `(queries, pool)`): Inner products with the query's own document vector.
        is_settled (`np.ndarray` of shape `(queries,)` and type bool): Whether more candidates would change nothing:
            all places are filled as planned, with documents of both modalities.
    """

    rows: np.ndarray
    relevances: np.ndarray
    is_settled: np.ndarray


def find_other_rows(rows: np.ndarray, query_rows: np.ndarray) -> np.ndarray:
    """Marks candidates that are there and are not the row that asks.

    Args:
        rows (`np.ndarray` of shape `(queries, candidates)`): Numbers of the candidates.
        query_rows (`np.ndarray` of shape `(queries,)`): Number of each query's own row in the memory bank, -1 if it
            has none there.

    Returns:
        `np.ndarray` of shape `(queries, candidates)` and type bool.

    Example:
        >>> find_other_rows(np.array([[3, 5, -1]]), np.array([5]))
        array([[ True, False, False]])

    """
    return (rows >= 0) & (rows != query_rows[:, None])


def find_no_copies(vectors: np.ndarray, query_vectors: np.ndarray) -> np.ndarray:
    """Marks candidates whose vectors are not the query's own, up to the rounding of stored ones.

    Args:
        vectors (`np.ndarray` of shape `(queries, candidates, dimension)`): Document vectors of the candidates.
        query_vectors (`np.ndarray` of shape `(queries, dimension)`): Those of the queries.

    Returns:
        `np.ndarray` of shape `(queries, candidates)` and type bool.
    """
    return np.abs(vectors - query_vectors[:, None]).max(axis=-1) > COPY_TOLERANCE


def find_within_cap(relevances: np.ndarray, max_relevance: float) -> np.ndarray:
    """Marks candidates that are not too like the query: copies teach copying.

    The likeness is that of document vectors, so one cap holds for both queries, and near-duplicates of the query
    exceed it whichever of its parts found them. A relevance equal to the cap is within it; a cap of 1 is none.

    Args:
        relevances (`np.ndarray` of shape `(queries, candidates)`): Inner products with the query's document vector.
        max_relevance (`float`): The cap.

    Returns:
        `np.ndarray` of shape `(queries, candidates)` and type bool.

    Source: section 2.1, relevance at most 0.9.
    """
    return (relevances <= max_relevance) | (max_relevance >= 1)  # 1 with itself is 1.0000001 at times


def order_candidates(scores: np.ndarray, has_both: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Orders candidates: documents with both modalities before all others, then by score, then by number.

    Args:
        scores (`np.ndarray` of shape `(queries, candidates)`): Inner products with the query.
        has_both (`np.ndarray` of shape `(queries, candidates)` and type bool): Whether text and image are there.
        rows (`np.ndarray` of shape `(queries, candidates)`): Numbers, so that equal scores have an order too.

    Returns:
        `np.ndarray` of shape `(queries, candidates)`: places of the candidates, best first.

    Example:
        >>> order_candidates(np.array([[0.5, 0.8, 0.7]]), np.array([[True, False, True]]), np.array([[4, 5, 6]]))
        array([[2, 0, 1]])

    """
    return np.lexsort((rows, -scores, ~has_both), axis=-1)


def choose_neighbors(queries: Queries, candidates: Candidates, strategy: RetrievalStrategy) -> Neighbors:
    """Fills the pools of many queries: the places of the image and of the text query in turn, each with the best left.

    A candidate is passed over if it is the row itself, exceeds the cap, or is too like a neighbour chosen before.
    Places that a query cannot fill, because it has no image, no text, or nothing more to offer, go to the other.

    Args:
        queries ([`Queries`]): Those who ask.
        candidates ([`Candidates`]): What the searches found.
        strategy ([`RetrievalStrategy`]): The numbers of the rules.

    Returns:
        [`Neighbors`]: the pools.
    """
    relevances = np.einsum("qd,qcd->qc", queries.vectors, candidates.vectors)
    allowed = find_other_rows(candidates.rows, queries.rows) & find_within_cap(relevances, strategy.max_relevance)
    if queries.refuse_copies:
        allowed &= find_no_copies(candidates.vectors, queries.vectors)
    order = order_candidates(candidates.scores, candidates.has_both, candidates.rows)
    by_image = candidates.by_image[order]  # (Q, C), as all that follows, best first
    rows, allowed, relevances, has_both = (
        np.take_along_axis(values, order, axis=1)
        for values in (candidates.rows, allowed, relevances, candidates.has_both)
    )
    vectors = np.take_along_axis(candidates.vectors, order[..., None], axis=1)
    plan = strategy.places()
    chosen = np.full((len(rows), len(plan)), -1)  # places among the candidates
    as_planned = np.ones(len(rows), dtype=bool)
    num_chosen = np.zeros(len(rows), dtype=int)
    for wanted in [*plan, *[None] * len(plan)]:
        eligible = allowed & (num_chosen < len(plan))[:, None]
        if wanted is not None:
            eligible &= by_image == wanted
            as_planned &= eligible.any(axis=1) | ~queries.asks_by(image=wanted)
        served = np.flatnonzero(eligible.any(axis=1))
        places = eligible[served].argmax(axis=1)  # the first, so the best
        chosen[served, num_chosen[served]] = places
        num_chosen[served] += 1
        allowed[served] &= find_unlike(vectors[served], places, strategy.max_similarity)
        allowed[served] &= rows[served] != rows[served, places][:, None]
    return _lay_out_pools(chosen, rows, relevances, has_both, as_planned)


def find_unlike(vectors: np.ndarray, places: np.ndarray, max_similarity: float) -> np.ndarray:
    """Marks candidates that are not too like the neighbour just chosen, so that a pool is diverse.

    Args:
        vectors (`np.ndarray` of shape `(queries, candidates, dimension)`): Document vectors of the candidates.
        places (`np.ndarray` of shape `(queries,)`): Which was chosen.
        max_similarity (`float`): Largest likeness allowed; 1 allows all.

    Returns:
        `np.ndarray` of shape `(queries, candidates)` and type bool.
    """
    chosen = vectors[np.arange(len(places)), places]
    return (np.einsum("qd,qcd->qc", chosen, vectors) <= max_similarity) | (max_similarity >= 1)


def sample_neighbors(pool: list[int], num_retrieved: int, generator: torch.Generator) -> list[int]:
    """Draws neighbours of a pool at random, none twice; all of them, in random order, where there are no more.

    Args:
        pool (`list[int]`): Numbers of documents.
        num_retrieved (`int`): How many to draw.
        generator (`torch.Generator`): Source of the draw.

    Returns:
        `list[int]`: at most `num_retrieved` numbers.

    Source: section 2.1, three of the pool at random per pair.
    """
    if num_retrieved < 0:
        raise ValueError(f"`num_retrieved`={num_retrieved} must be at least 0.")
    return [int(pool[place]) for place in torch.randperm(len(pool), generator=generator)[:num_retrieved].tolist()]


def _lay_out_pools(
    chosen: np.ndarray, rows: np.ndarray, relevances: np.ndarray, has_both: np.ndarray, as_planned: np.ndarray
) -> Neighbors:
    """Orders the chosen (Q, P) of each query and looks up what they are."""
    is_there = chosen >= 0
    rows, relevances, has_both = (
        np.take_along_axis(values, np.maximum(chosen, 0), axis=1) for values in (rows, relevances, has_both)
    )
    order = np.lexsort((rows, -relevances, ~has_both, ~is_there), axis=-1)
    pool = np.take_along_axis(np.where(is_there, rows, -1), order, axis=1)
    relevances = np.take_along_axis(np.where(is_there, relevances, np.nan), order, axis=1).astype(np.float32)
    return Neighbors(pool, relevances, as_planned & (is_there & has_both).all(axis=1))
