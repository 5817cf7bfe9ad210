"""Neighbours of rows that retrieval.py found and wrote, read back: a column of row numbers, without a search.

Knows nothing of vectors and indexes, so that training on found neighbours needs no library of indexes.
"""

import os
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from .shards import open_shards, read_manifest


IDS, SCORES = "neighbor_ids", "neighbor_scores"


def open_neighbors(folder: str | os.PathLike) -> Dataset:
    """Opens what [`~data.retrieval.find_neighbors`] wrote: columns `neighbor_ids` and `neighbor_scores`, best first.

    Args:
        folder (`str` or `os.PathLike`): Of the neighbours.

    Returns:
        `Dataset`: one row for each of the training set.

    Raises:
        ValueError: If the folder is no such folder or not finished.
    """
    manifest = read_manifest(folder)
    if manifest is None or "memory_rows_digest" not in manifest:
        raise ValueError(f"{str(folder)!r} holds no neighbours. Find them with recipes/build_retrieval_index.py.")
    return open_shards(Path(folder), manifest["num_shards"])


def with_neighbors(
    rows: Dataset, folder: str | os.PathLike, *, rows_digest: str, memory: Dataset, memory_digest: str
) -> Dataset:
    """Adds the columns `neighbor_ids` and `neighbor_scores` to the rows of a training set.

    Args:
        rows (`Dataset`): As they were encoded, none dropped since.
        folder (`str` or `os.PathLike`): That [`~data.retrieval.find_neighbors`] wrote.
        rows_digest (`str`): Digest of the rows with pictures: the `rows_digest` in the manifest of encoded ones.
        memory (`Dataset`): The memory bank, into which the numbers point.
        memory_digest (`str`): Likewise of the memory bank.

    Returns:
        `Dataset`: in the format of `rows`.

    Raises:
        ValueError: If the neighbours are of other rows, or in another memory bank.
    """
    neighbors, manifest = open_neighbors(folder), read_manifest(folder)
    assert manifest is not None
    given = {
        "num_rows": len(rows),
        "rows_digest": rows_digest,
        "num_memory_rows": len(memory),
        "memory_rows_digest": memory_digest,
    }
    if different := {key: (manifest[key], value) for key, value in given.items() if manifest[key] != value}:
        raise ValueError(
            f"The neighbours in {str(folder)!r} are of other rows or another memory bank: {different} (there, here)."
            " Find them again for these with recipes/build_retrieval_index.py, with the same preparation of rows."
        )
    joined = concatenate_datasets([rows.with_format(None), neighbors], axis=1)
    form = rows.format
    joined.set_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])
    return joined
