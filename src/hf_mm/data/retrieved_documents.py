"""Pairs of a memory bank in front of the pair that is trained on: which, how many, and which go where room is short.

Neighbours were found beforehand; all draws are the sample's own, so a document depends on its number alone. Knows rows
and parts of documents, neither tokens nor a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .caption_text import FORM_WEIGHTS, sample_caption
from .formats import RowError
from .neighbors import IDS
from .retrieval_strategy import sample_neighbors


Part = dict[str, Any]
ROW_NUMBER = "row_number"


@dataclass
class RetrievalArguments:
    """What a model of codes is trained to look at before its pairs. Numbers are of CM3Leon (arXiv 2309.02591)."""

    neighbors_dir: str | None = field(
        default=None,
        metadata={
            "help": "Neighbours of the rows, the folder `neighbors` of build_retrieval_index.py; none: no retrieval."
        },
    )
    memory_name: str | None = field(
        default=None,
        metadata={"help": "Memory bank, a folder of encode_images.py; none: the rows of training themselves."},
    )
    eval_neighbors_dir: str | None = field(
        default=None,
        metadata={
            "help": "Neighbours in the same memory bank of held-out rows with a source of their own; none: they are "
            "evaluated without retrieval."
        },
    )
    retrieved_counts: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={
            "help": "Numbers of retrieved pairs, one of which is drawn for each document. Ours, as in RA-CM3 (arXiv "
            "2211.12561); Sec. 2.1 has always 3, which with a fourth pair exceed the 4096 positions."
        },
    )
    query_caption_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of documents with retrieved pairs that leave out the caption of their own, for guidance. "
            "Ours, the usual value."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values out of range, and fields that nothing would read."""
        if not self.retrieved_counts or min(self.retrieved_counts) < 0 or max(self.retrieved_counts) == 0:
            raise ValueError(
                f"`retrieved_counts`={self.retrieved_counts} must hold numbers of at least 0, and one above 0. Leave "
                "`neighbors_dir` out to train without retrieval."
            )
        if not 0 <= self.query_caption_dropout <= 1:
            raise ValueError(f"`query_caption_dropout`={self.query_caption_dropout} must be in [0, 1].")
        if self.neighbors_dir is None:
            for name in ("memory_name", "eval_neighbors_dir"):
                if vars(self)[name] is not None:
                    raise ValueError(f"`{name}`={vars(self)[name]!r} needs `neighbors_dir`, the rows' neighbours.")


class MemoryBank:
    """Pairs with codes, under the numbers that neighbours have.

    Args:
        rows (`datasets.Dataset`): Those that may be retrieved.
        places (`np.ndarray` of shape `(num_numbers,)`, *optional*): For each number the place in `rows`, or -1 for
            what may not be retrieved; without it numbers are places.
    """

    def __init__(self, rows: Any, places: np.ndarray | None = None) -> None:
        self.rows, self.places = rows, places

    @classmethod
    def of_numbered(cls, rows: Any, num_numbers: int) -> "MemoryBank":
        """Makes a bank of those rows that are left, whose column `row_number` says where they stood among all."""
        if len(rows) == num_numbers:
            return cls(rows)
        places = np.full(num_numbers, -1, dtype=np.int64)
        places[np.asarray(rows.with_format("numpy")[ROW_NUMBER][:], dtype=np.int64)] = np.arange(len(rows))
        return cls(rows, places)

    def find_pool(self, row: Mapping[str, Any], name: str) -> list[int]:
        """Lists the places of a row's neighbours, best first, without the row itself and what may not be retrieved.

        Args:
            row (`Mapping`): With `neighbor_ids`, and with `row_number` if it is of this bank.
            name (`str`): What an error calls it.

        Raises:
            RowError: If `neighbor_ids` is no list of numbers, or one of them the bank has not.
        """
        ids, num_numbers = row[IDS], len(self.rows if self.places is None else self.places)
        if not isinstance(ids, Sequence | np.ndarray) or not all(isinstance(one, int | np.integer) for one in ids):
            raise RowError(f"{name}, column `{IDS}`: {ids!r} must be a list of row numbers.")
        if outside := [number for number in ids if not 0 <= number < num_numbers]:
            raise RowError(
                f"{name}: its neighbour {outside[0]} is not in the memory bank, which has {num_numbers} rows. Find "
                "the neighbours again with recipes/build_retrieval_index.py."
            )
        others = [int(number) for number in ids if number != row.get(ROW_NUMBER)]
        places = others if self.places is None else self.places[others].tolist()
        return [place for place in places if place >= 0]

    def read(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Reads rows together, in the order asked for."""
        return self.rows.__getitems__(list(places)) if places else []


@dataclass(frozen=True)
class Retrieved:
    """What stands in front of a pair.

    Args:
        pairs (`tuple[list[dict], ...]`): Parts of each retrieved pair, in the order of the document.
        ranks (`tuple[int, ...]`): Their places by relevance, the lowest being the most relevant.
        drops_caption (`bool`): Whether the pair's own caption is left out behind them.
    """

    pairs: tuple[list[Part], ...] = ()
    ranks: tuple[int, ...] = ()
    drops_caption: bool = False

    def without_least_relevant(self) -> "Retrieved":
        """Leaves one pair out."""
        least = self.ranks.index(max(self.ranks))
        pairs, ranks = (values[:least] + values[least + 1 :] for values in (self.pairs, self.ranks))
        return replace(self, pairs=pairs, ranks=ranks)  # type: ignore[arg-type]

    def before(self, own: list[Part]) -> list[Part]:
        """Lists the parts of the whole document.

        Without its caption a pair in front of which nothing stands would be an image alone, which is no prompt: there
        the caption stays, to be masked or not.
        """
        if self.pairs and self.drops_caption:
            own = [part for part in own if part["type"] == "image"]
        return [part for pair in self.pairs for part in pair] + own


class RetrievedPairs:
    """Draws what stands in front of each pair.

    Args:
        memory ([`MemoryBank`]): What is retrieved.
        counts (`Sequence[int]`): Numbers of pairs, one of which is drawn for each document; repeated ones weigh more.
        query_caption_dropout (`float`): Share of documents that leave out the caption of their own pair.

    Source: CM3Leon (arXiv 2309.02591), section 2.1, and figure 8 for the layout. Differs: there are always three
    pairs; how the stream without a prompt is trained behind retrieved pairs is not told, so it is done as captions are
    dropped elsewhere.
    """

    def __init__(self, memory: MemoryBank, *, counts: Sequence[int], query_caption_dropout: float) -> None:
        self.memory, self.counts, self.query_caption_dropout = memory, list(counts), query_caption_dropout

    def draw(
        self,
        row: Mapping[str, Any],
        name: str,
        generator: torch.Generator,
        form_weights: Mapping[str, float] | None = None,
    ) -> Retrieved:
        """Draws for one row; as many as it has neighbours where that is fewer, none where it has no such column.

        Args:
            row (`Mapping`): With `neighbor_ids`, best first.
            name (`str`): What an error calls it.
            generator (`torch.Generator`): The sample's.
            form_weights (`Mapping`, *optional*): Chances of the caption forms of the retrieved pairs.

        Returns:
            [`Retrieved`]: pairs in random order, each caption before its image.
        """
        if IDS not in row:
            return Retrieved()
        count = self.counts[int(torch.randint(len(self.counts), (1,), generator=generator))]
        drops_caption = float(torch.rand(1, generator=generator)) < self.query_caption_dropout
        pool = self.memory.find_pool(row, name)
        chosen = sample_neighbors(pool, count, generator)
        pairs = []
        for found in self.memory.read(chosen):
            caption = sample_caption(found, generator, form_weights or FORM_WEIGHTS)
            pairs.append([{"type": "text", "text": caption}, {"type": "image", "codes": found["codes"]}])
        return Retrieved(tuple(pairs), tuple(pool.index(place) for place in chosen), drops_caption)
