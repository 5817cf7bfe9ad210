"""Neighbours of rows in a memory bank: found once for a training set, or for prompts while sampling.

Joins vectors, index and rules. The result for training is a column of row numbers, read without a search; what
documents are made of the rows is not known here. neighbors.py reads it, which needs no index.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from PIL import Image as PILImage

from .clip_encoder import ClipEncoder, document_vectors
from .formats import open_image
from .neighbors import IDS, SCORES
from .retrieval_index import COLUMN, open_index
from .retrieval_strategy import Candidates, Neighbors, Queries, RetrievalStrategy, choose_neighbors, sample_neighbors
from .retrieval_vectors import ASKING_COLUMNS, DocumentVectors, VectorFolder, find_image, find_text
from .shards import (
    claim_folder,
    map_shards,
)


__all__ = [
    "NeighborFinder",
    "Retrieved",
    "Retriever",
    "RetrievalStrategy",
    "as_document",
    "find_neighbors",
    "sample_neighbors",
]

# Folders that the recipe makes in its output folder.
MEMORY, QUERIES, INDEX, NEIGHBORS = "memory", "queries", "index", "neighbors"
MAX_GATHERED_NUMBERS = 2**25  # of candidate vectors held at once, 128 MiB


class NeighborFinder:
    """Searches a memory bank and applies the rules.

    Args:
        vectors ([`VectorFolder`]): Of the memory bank.
        index_dir (`str` or `os.PathLike`): The index over them.

    Raises:
        ValueError: If the index is not finished, or was built from other vectors.
    """

    def __init__(self, vectors: VectorFolder, index_dir: str | os.PathLike) -> None:
        self.num_rows = vectors.manifest["num_rows"]
        self.memory, self.vectors = open_index(index_dir, vectors), DocumentVectors(vectors)
        facts = self.memory.with_format("numpy", columns=["has_text", "has_image"])
        self.has_both = np.asarray(facts["has_text"][:]) & np.asarray(facts["has_image"][:])

    def find(self, queries: Queries, strategy: RetrievalStrategy) -> Neighbors:
        """Finds the neighbours of many queries, looking deeper for those that the first candidates do not settle.

        Args:
            queries ([`Queries`]): Those who ask.
            strategy ([`RetrievalStrategy`]): The rules.

        Returns:
            [`Neighbors`]: pools of row numbers.

        Raises:
            ValueError: If the memory bank has too few rows for so many neighbours.
        """
        strategy.check_memory(self.num_rows)
        shape = (len(queries), strategy.num_neighbors)
        found = Neighbors(np.full(shape, -1), np.full(shape, np.nan, np.float32), np.zeros(len(queries), dtype=bool))
        deepest, depth = min(strategy.max_candidates, self.num_rows), min(strategy.num_candidates, self.num_rows)
        while True:
            size = max(1, MAX_GATHERED_NUMBERS // (2 * depth * queries.vectors.shape[1]))
            pending = np.flatnonzero(~found.is_settled)
            for part in (pending[start : start + size] for start in range(0, len(pending), size)):
                some = queries[part]
                chosen = choose_neighbors(some, self._find_candidates(some, depth), strategy)
                found.rows[part], found.relevances[part] = chosen.rows, chosen.relevances
                found.is_settled[part] = chosen.is_settled
            if depth == deepest:
                return found
            depth = min(4 * depth, deepest)

    def _find_candidates(self, queries: Queries, depth: int) -> Candidates:
        """Finds `depth` candidates by image and as many by text."""
        searches = [
            self._search(vectors, queries.asks_by(image=image), depth)
            for image, vectors in ((True, queries.image_vectors), (False, queries.text_vectors))
        ]
        rows = np.concatenate([found for _, found in searches], axis=1)  # (Q, 2 * depth)
        distinct, places = np.unique(rows, return_inverse=True)
        vectors = self.vectors.take(np.maximum(distinct, 0))
        return Candidates(
            rows=rows,
            scores=np.concatenate([scores for scores, _ in searches], axis=1),
            by_image=np.arange(2 * depth) < depth,
            has_both=self.has_both[rows] & (rows >= 0),
            vectors=vectors[places.reshape(rows.shape)],
        )

    def _search(self, queries: np.ndarray, asks: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Searches for those that ask; the others find nothing."""
        scores = np.full((len(queries), depth), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), depth), -1)
        if asks.any():
            scores[asks], rows[asks] = self.memory.search_batch(COLUMN, np.ascontiguousarray(queries[asks]), depth)
        return scores, rows


def find_neighbors(
    queries: VectorFolder,
    memory: VectorFolder,
    index_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    strategy: RetrievalStrategy,
    *,
    batch_size: int = 256,
    process_index: int = 0,
    num_processes: int = 1,
) -> Path:
    """Writes for each row of a training set the numbers of its neighbours in the memory bank, and their relevances.

    Process `p` writes shards `p, p + num_processes, ...` of the training set and skips those that are there whole. A
    row never finds itself: by its number if training set and memory bank are one folder, else by its vector.

    Args:
        queries ([`VectorFolder`]): Of the training set, with the vectors that ask.
        memory ([`VectorFolder`]): Of the memory bank; may be the same folder.
        index_dir (`str` or `os.PathLike`): The index over the memory bank.
        output_dir (`str` or `os.PathLike`): Folder for the shards.
        strategy ([`RetrievalStrategy`]): The rules.
        batch_size (`int`, defaults to 256): Rows searched for at once.
        process_index (`int`, defaults to 0): Number of this process.
        num_processes (`int`, defaults to 1): How many there are.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If the vectors are of different encoders, do not ask, were made with another `query_dropout`, the
            memory bank is too small, or the folder holds neighbours found otherwise.
    """
    _check_queries(queries, memory, strategy)
    finder, folder = NeighborFinder(memory, index_dir), Path(output_dir)
    index_note = (Path(index_dir) / "index.json").read_text(encoding="utf-8")
    manifest = {
        "queries": queries.fingerprint,
        "memory": memory.fingerprint,
        "index": index_note,
        "strategy": asdict(strategy),
        "num_rows": queries.manifest["num_rows"],
        "num_shards": queries.manifest["num_shards"],
        "rows_digest": queries.manifest["rows_digest"],
        "memory_rows_digest": memory.manifest["rows_digest"],
        "num_memory_rows": memory.manifest["num_rows"],
    }
    claim_folder(folder, manifest, "neighbours found")
    rows, num_shards = queries.load().remove_columns(["has_text", "has_image"]), manifest["num_shards"]
    is_own = queries.fingerprint == memory.fingerprint

    def find(batch: Mapping[str, np.ndarray], numbers: list[int]) -> dict[str, list]:
        own = np.array(numbers) if is_own else np.full(len(numbers), -1)
        by_image, by_text = (batch[name] for name in ASKING_COLUMNS)
        found = finder.find(Queries(own, batch[COLUMN], by_image, by_text, refuse_copies=not is_own), strategy)
        return {
            IDS: [row[row >= 0] for row in found.rows],
            SCORES: [scores[row >= 0] for row, scores in zip(found.rows, found.relevances, strict=True)],
        }

    features = Features({IDS: List(Value("int64")), SCORES: List(Value("float32"))})
    map_shards(
        rows,
        find,
        features,
        folder,
        num_shards,
        process_index=process_index,
        num_processes=num_processes,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        verb="Finding neighbours of",
    )
    return folder


class Retrieved(NamedTuple):
    """What was found for each prompt, best first.

    Args:
        rows (`list[list[dict]]`): Rows of the memory bank.
        scores (`list[list[float]]`): Their relevances, inner products of document vectors.
        ids (`list[list[int]]`): Their numbers.
    """

    rows: list[list[dict[str, Any]]]
    scores: list[list[float]]
    ids: list[list[int]]

    @property
    def documents(self) -> list[list[dict[str, Any]]]:
        """The rows as a prompt takes them, see [`as_document`]; one found twice is one object."""
        numbered = dict(zip(chain(*self.ids), chain(*self.rows), strict=True))
        documents = {number: as_document(row) for number, row in numbered.items()}
        return [[documents[number] for number in ids] for ids in self.ids]


def as_document(row: Mapping[str, Any]) -> dict[str, Any]:
    """Reduces a row to the text that it is found by and its picture, opened, or the codes of that.

    Args:
        row (`Mapping`): Of a memory bank.

    Returns:
        `dict`: `text`, and `image` or `codes` where the row has one.

    Raises:
        ValueError: If its picture is encoded, but not to codes.

    Example:
        >>> as_document({"description": "a red star", "keywords": ["star"], "codes": [3, 1]})
        {'text': 'a red star', 'codes': [3, 1]}

    """
    if row.get("codes") is not None:
        return {"text": find_text(row), "codes": row["codes"]}
    if (image := find_image(row)) is not None:
        return {"text": find_text(row), "image": open_image(image)}
    if encoded := sorted({"pixels", "latent_mean"} & set(row)):
        raise ValueError(f"The memory bank has pictures as {encoded}; a prompt takes them as they are, or as codes.")
    return {"text": find_text(row)}


class Retriever:
    """Finds documents of a memory bank for prompts.

    Args:
        folder (`str` or `os.PathLike`): That build_retrieval_index.py wrote.
        memory (`Dataset`): Rows of the memory bank, with pictures or encoded; what is returned of it.
        encoder ([`ClipEncoder`]): That made the vectors.
        memory_digest (`str`, *optional*): Digest of the rows that `memory` was encoded from, if it is encoded: the
            `rows_digest` of its manifest.
        strategy ([`RetrievalStrategy`], *optional*): The rules; how many documents is said with each call.

    Raises:
        ValueError: If the index is unfinished, or of other rows or another encoder.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        memory: Dataset,
        encoder: ClipEncoder,
        *,
        memory_digest: str | None = None,
        strategy: RetrievalStrategy | None = None,
    ) -> None:
        self.folder, self.memory, self.encoder = Path(folder), memory, encoder
        self.strategy = strategy or RetrievalStrategy()
        self.vectors = VectorFolder.open(self.folder / MEMORY)
        self.vectors.check_encoder(encoder)
        self.vectors.check_rows(memory, memory_digest)
        self.finder = NeighborFinder(self.vectors, self.folder / INDEX)

    def retrieve(
        self,
        texts: Sequence[str | None] | None = None,
        images: Sequence[PILImage.Image | None] | None = None,
        num_retrieved: int = 2,
    ) -> Retrieved:
        """Finds documents for prompts of text, image or both; with both, half by each, the odd one by the text.

        Nothing is dropped from the text here.

        Args:
            texts (`Sequence[str | None]`, *optional*): One a prompt.
            images (`Sequence[PIL.Image.Image | None]`, *optional*): One a prompt.
            num_retrieved (`int`, defaults to 2): Documents for each.

        Returns:
            [`Retrieved`]: fewer than `num_retrieved` where the rules leave no more.

        Raises:
            ValueError: If there are more documents asked for than rows, `texts` is one text, or texts and images
                differ in number.
            VectorError: If a prompt has neither text nor image.
        """
        if isinstance(texts, str):
            raise ValueError(f"`texts`={texts!r} is one text; give a list of one for each prompt.")
        if not 0 <= num_retrieved < self.finder.num_rows:
            raise ValueError(
                f"`num_retrieved`={num_retrieved} must be at least 0 and below the {self.finder.num_rows} rows of the "
                "memory bank."
            )
        if texts is None and images is None:
            raise ValueError("Give `texts`, `images` or both to retrieve by.")
        texts = [None] * len(images or ()) if texts is None else list(texts)
        images = [None] * len(texts) if images is None else list(images)
        if len(texts) != len(images):
            raise ValueError(
                f"`texts` has {len(texts)} prompts and `images` {len(images)}. Use None where one is not there."
            )
        if num_retrieved == 0:
            return Retrieved([[] for _ in texts], [[] for _ in texts], [[] for _ in texts])
        found = self._find(texts, images, num_retrieved)
        ids = [row[row >= 0].tolist() for row in found.rows]
        scores = [values[row >= 0].tolist() for row, values in zip(found.rows, found.relevances, strict=True)]
        return Retrieved([[self.memory[number] for number in row] for row in ids], scores, ids)

    def _find(self, texts: list[str | None], images: list[Any], num_retrieved: int) -> Neighbors:
        has_text, has_image = (
            np.array([bool(text) for text in texts]),
            np.array([image is not None for image in images]),
        )
        text_vectors, image_vectors = np.zeros((2, len(texts), self.encoder.dimension), dtype=np.float32)
        text_vectors[has_text] = self.encoder.encode_texts([text for text in texts if text])
        image_vectors[has_image] = self.encoder.encode_images(
            [open_image(image) for image in images if image is not None]
        )
        names = [f"Prompt {number}" for number in range(len(texts))]
        vectors = document_vectors(text_vectors, image_vectors, has_text, has_image, names)
        wanted = replace(
            self.strategy,
            num_by_image=num_retrieved // 2,
            num_by_text=num_retrieved - num_retrieved // 2,
            num_candidates=max(self.strategy.num_candidates, num_retrieved + 1),
            max_candidates=max(self.strategy.max_candidates, num_retrieved + 1),
        )
        own = np.full(len(texts), -1)
        return self.finder.find(Queries(own, vectors, image_vectors, text_vectors), wanted)


def _check_queries(queries: VectorFolder, memory: VectorFolder, strategy: RetrievalStrategy) -> None:
    """Refuses vectors that cannot ask this memory bank."""
    if queries.manifest["encoder"] != memory.manifest["encoder"]:
        raise ValueError(
            f"The vectors in {str(queries.folder)!r} were made with {queries.manifest['encoder_name']!r} and those in "
            f"{str(memory.folder)!r} with {memory.manifest['encoder_name']!r}, of other weights. Make both with one."
        )
    if queries.manifest["query_dropout"] != strategy.query_dropout:
        raise ValueError(
            f"`query_dropout`={strategy.query_dropout}, and the vectors in {str(queries.folder)!r} were made with "
            f"{queries.manifest['query_dropout']}. Make them again in another folder."
        )
