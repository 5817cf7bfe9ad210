"""How well pictures find their captions and captions their pictures. Knows arrays and labels, no model."""

from collections.abc import Hashable, Sequence

import numpy as np


def recall_at(
    similarity: np.ndarray, query_labels: Sequence[Hashable], item_labels: Sequence[Hashable], k: int
) -> float:
    """Share of queries with an item of their own label among the `k` most similar items.

    Args:
        similarity (`np.ndarray` of shape `(queries, items)`): Higher is more similar.
        query_labels (`Sequence[Hashable]`): What each query shows or says.
        item_labels (`Sequence[Hashable]`): The same of the items; several may have one label.
        k (`int`): Items looked at.

    Returns:
        `float`: in [0, 1].

    Raises:
        ValueError: If shapes do not fit, `k` is out of range, or a similarity is not a number.
    """
    if similarity.shape != (len(query_labels), len(item_labels)):
        raise ValueError(
            f"`similarity` has shape {similarity.shape}; {len(query_labels)} queries and {len(item_labels)} items "
            f"need {(len(query_labels), len(item_labels))}."
        )
    if not 1 <= k <= len(item_labels):
        raise ValueError(f"`k`={k} must be between 1 and {len(item_labels)}, the number of items.")
    if np.isnan(similarity).any():
        raise ValueError(f"`similarity` has {int(np.isnan(similarity).sum())} entries that are no number.")
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    hits = [
        label in {item_labels[item] for item in row.tolist()}
        for label, row in zip(query_labels, best, strict=True)
    ]  # fmt: skip
    return float(np.mean(hits))


def retrieval_recall(
    similarity: np.ndarray, labels: Sequence[Hashable], ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Recall in both directions among pairs of a picture and a caption.

    Args:
        similarity (`np.ndarray` of shape `(pairs, pairs)`): Of each picture (row) with each caption (column).
        labels (`Sequence[Hashable]`): What each pair is about; finding another pair of the same label is right.
        ks (`Sequence[int]`, defaults to `(1, 5)`): Items looked at; more than there are means all.

    Returns:
        `dict[str, float]`: `image_to_text_recall@k` and `text_to_image_recall@k` for each `k`.
    """
    directions = {"image_to_text": similarity, "text_to_image": similarity.T}
    return {
        f"{name}_recall@{k}": recall_at(scores, labels, labels, min(k, len(labels)))
        for name, scores in directions.items()
        for k in ks
    }
