"""CIDEr as pycocoevalcap has it, and likelihoods that count each token once."""

import math

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from hf_mm.evaluation.text_quality import (
    cider_scores,
    likelihood,
    normalize_words,
    sliding_windows,
    token_log_probs,
)


CAPTIONS = ["A red star.", "two blue moons", "a key, in black, on cream!"]
REFERENCES = [
    ["a red star", "there is one red star"],
    ["two blue moons on white"],
    ["a black key on a cream background"],
]


def test_cider_is_that_of_pycocoevalcap_on_the_same_words():
    scores = cider_scores(CAPTIONS, REFERENCES)
    truths = {number: [normalize_words(text) for text in of_one] for number, of_one in enumerate(REFERENCES)}
    mean, theirs = Cider().compute_score(truths, {n: [normalize_words(text)] for n, text in enumerate(CAPTIONS)})
    assert scores == pytest.approx(theirs) and scores.mean() == pytest.approx(mean)
    assert scores.min() > 0 and len(set(scores)) == 3


def test_a_caption_scores_highest_as_its_reference_and_nothing_with_anothers():
    references = [["a red star"], ["two blue moons"], ["one black key"]]
    right = cider_scores([of_one[0] for of_one in references], references)
    wrong = cider_scores([references[number - 1][0] for number in range(3)], references)
    assert (right > 5).all() and wrong == pytest.approx(np.zeros(3))


def test_case_and_punctuation_do_not_matter():
    assert cider_scores(["A RED, star!", "x"], [["a red star"], ["y"]]) == pytest.approx(
        cider_scores(["a red star", "x"], [["A red star."], ["y"]])
    )


def test_one_empty_caption_scores_nothing_and_only_empty_ones_are_refused():
    assert cider_scores(["", "two blue moons"], REFERENCES[:2])[0] == 0
    with pytest.raises(ValueError, match="All 2 `captions` are empty"):
        cider_scores(["", " ."], REFERENCES[:2])


def test_bad_captions_are_refused_by_name():
    with pytest.raises(ValueError, match="2 `captions` do not go with 3 lists of `references`"):
        cider_scores(CAPTIONS[:2], REFERENCES)
    with pytest.raises(ValueError, match=r"`references`\[1\] is empty"):
        cider_scores(CAPTIONS, [REFERENCES[0], [], REFERENCES[2]])
    with pytest.raises(ValueError, match="at least two"):
        cider_scores(CAPTIONS[:1], REFERENCES[:1])


@pytest.mark.parametrize("num_tokens", (2, 5, 7, 8, 23))
@pytest.mark.parametrize(("window", "stride"), ((7, 3), (7, 6), (2, 1), (50, 7)))
def test_every_token_but_the_first_counts_once(num_tokens, window, stride):
    counted = []
    for begin, end, first in sliding_windows(num_tokens, window=window, stride=stride):
        assert begin < first < end <= begin + window
        counted += range(first, end)
    assert counted == list(range(1, num_tokens))


def bigram(ids):
    """Log-probabilities that depend on the token before alone, so that windows must not change them."""
    return np.array([-((before * 7 + token) % 5) - 0.5 for before, token in zip(ids, ids[1:], strict=False)])


def test_windows_give_the_direct_sum():
    ids = np.random.default_rng(0).integers(0, 31, 103).tolist()
    assert token_log_probs(bigram, ids, window=11, stride=5) == pytest.approx(bigram(ids))


def test_a_window_gives_its_tokens_what_came_before_in_it():
    def context(ids):
        return -np.arange(1.0, len(ids))  # how many tokens stand before each

    assert (-token_log_probs(context, range(11), window=6, stride=2)).tolist() == [1, 2, 3, 4, 5, 4, 5, 4, 5, 4]


def test_perplexity_and_bits_per_byte_are_those_of_a_direct_sum():
    probabilities = [[0.5, 0.1], [0.25, 0.2, 0.9]]
    texts = ["äb", "xyz w"]
    found = likelihood([sum(map(math.log, of_one)) for of_one in probabilities], [2, 3], texts)
    product = math.prod(value for of_one in probabilities for value in of_one)
    assert found["perplexity"] == pytest.approx(product ** (-1 / 5))
    assert found["bits_per_byte"] == pytest.approx(-math.log2(product) / 8) and found["num_tokens"] == 5


def test_bad_texts_are_refused_by_name():
    with pytest.raises(ValueError, match="`stride`=7 must be at least 1 and below `window`=7"):
        list(sliding_windows(9, window=7, stride=7))
    with pytest.raises(ValueError, match="`ids` has 1 tokens"):
        token_log_probs(bigram, [3], window=5, stride=2)
    with pytest.raises(ValueError, match=r"gave \(4,\) scores, 0 of them finite, for tokens 0 to 5; need 4"):
        token_log_probs(lambda ids: np.full(len(ids) - 1, np.nan), range(5), window=5, stride=2)
    with pytest.raises(ValueError, match="2 `log_probs`, 1 `num_tokens` and 1 `texts`"):
        likelihood([1.0, 2.0], [1], ["a"])
    with pytest.raises(ValueError, match="`texts` are empty"):
        likelihood([0.0], [0], [""])
