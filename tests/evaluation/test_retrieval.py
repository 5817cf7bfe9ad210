import numpy as np
import pytest

from hf_mm.evaluation.retrieval import recall_at, retrieval_recall


def test_recall_counts_queries_whose_label_is_among_the_nearest():
    similarity = np.array([[0.9, 0.5, 0.1], [0.8, 0.7, 0.1], [0.3, 0.2, 0.1]])
    labels = ["star", "moon", "kite"]
    assert [recall_at(similarity, labels, labels, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_items_of_one_label_stand_for_each_other():
    similarity = np.array([[0.1, 0.9], [0.9, 0.1]])
    assert recall_at(similarity, "ab", "ab", 1) == 0
    assert recall_at(similarity, "aa", "aa", 1) == 1


def test_both_directions_are_told_apart():
    similarity = np.array([[0.5, 0.6, 0.0], [0.0, 0.7, 0.1], [0.0, 0.8, 0.3]])
    found = retrieval_recall(similarity, "abc", ks=(1, 7))
    assert found["image_to_text_recall@1"] == pytest.approx(1 / 3)  # rows: only b is right
    assert found["text_to_image_recall@1"] == pytest.approx(2 / 3)  # columns: a and c
    assert found["image_to_text_recall@7"] == found["text_to_image_recall@7"] == 1


def test_chance_is_k_of_n():
    similarity = np.random.default_rng(0).normal(size=(500, 500))
    found = retrieval_recall(similarity, range(500), ks=(50,))
    assert all(abs(value - 0.1) < 0.05 for value in found.values())


@pytest.mark.parametrize(
    ("similarity", "k", "match"),
    [
        (np.zeros((2, 3)), 1, r"shape \(2, 3\); 2 queries and 2 items need \(2, 2\)"),
        (np.zeros((2, 2)), 3, "`k`=3 must be between 1 and 2"),
        (np.array([[np.nan, 0], [0, 0]]), 1, "1 entries that are no number"),
    ],
)
def test_what_cannot_be_ranked_is_refused(similarity, k, match):
    with pytest.raises(ValueError, match=match):
        recall_at(similarity, "ab", "ab", k)
