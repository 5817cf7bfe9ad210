"""How well texts are foreseen and how well captions agree with others': likelihood and CIDEr. Knows no model."""

import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np


def normalize_words(text: str) -> str:
    """Brings a text to lower-case words without punctuation, single spaces between them.

    Args:
        text (`str`): Any text.

    Returns:
        `str`: the words.

    Source: COCO captions (arXiv 1504.00325), Sec. 4. Differs: words by their letters and digits instead of the Penn
    Treebank tokenizer, which needs Java; hyphenated words come apart.

    Example:
        >>> normalize_words("Two red stars, on the artist's sky-blue.")
        "two red stars on the artist's sky blue"

    """
    return " ".join(re.findall(r"\w+(?:'\w+)?", text.lower()))


def cider_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores captions by the rare word groups they share with the references of their own picture.

    How rare a group is, is counted over the references given, so scores of different sets do not compare.

    Args:
        captions (`Sequence[str]` of length `num_pictures`): One of each picture. An empty one scores 0.
        references (`Sequence[Sequence[str]]` of length `num_pictures`): True captions of each, at least one.

    Returns:
        `np.ndarray` of shape `(num_pictures,)`: from 0 to 10. The mean is the CIDEr of pycocoevalcap; tables of papers
        show it multiplied by 100.

    Raises:
        ValueError: If the numbers differ, there are fewer than two pictures, one has no reference, or every caption
            is empty.

    Source: Vedantam et al. (arXiv 1411.5726), Sec. 3, in its variant CIDEr-D, through pycocoevalcap.
    """
    if len(captions) != len(references):
        raise ValueError(f"{len(captions)} `captions` do not go with {len(references)} lists of `references`.")
    if len(captions) < 2:
        raise ValueError(f"{len(captions)} `captions` say nothing of which words are rare. Give at least two.")
    for number in [number for number, of_one in enumerate(references) if not of_one][:1]:
        raise ValueError(f"`references`[{number}] is empty. Give at least one caption of each picture.")
    said = [normalize_words(caption) for caption in captions]
    if not any(said):
        raise ValueError(f"All {len(said)} `captions` are empty. The model has written nothing that could be scored.")
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CIDEr needs the package `pycocoevalcap`. Install it with `pip install 'hf_mm[eval]'`."
        ) from error
    truths = {number: [normalize_words(text) for text in of_one] for number, of_one in enumerate(references)}
    _, scores = Cider().compute_score(truths, {number: [text] for number, text in enumerate(said)})
    return scores


def sliding_windows(num_tokens: int, *, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a long text into windows so that each token but the first is foreseen exactly once.

    All but the first window repeat `window - stride` tokens, which are read and not counted again.

    Args:
        num_tokens (`int`): Length of the text.
        window (`int`): Tokens that are read at once, at least 2.
        stride (`int`): New tokens of a window, at least 1 and below `window`.

    Yields:
        `tuple[int, int, int]`: begin and end of a window, and the first token in it that counts.

    Raises:
        ValueError: If `window` or `stride` is out of range.

    Example:
        >>> list(sliding_windows(10, window=6, stride=3))
        [(0, 6, 1), (3, 9, 6), (6, 10, 9)]

    """
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"`stride`={stride} must be at least 1 and below `window`={window}, which is at least 2.")
    begin, first = 0, 1
    while first < num_tokens:
        end = min(begin + window, num_tokens)
        yield begin, end, first
        begin, first = begin + stride, end


def token_log_probs(
    next_log_probs: Callable[[Sequence[int]], np.ndarray], ids: Sequence[int], *, window: int, stride: int
) -> np.ndarray:
    """Computes the log-probability of each token of a text but the first, however long the text.

    Args:
        next_log_probs (`Callable`): Of at most `window` tokens, gives the log-probability, in nats, of each but the
            first, given those before it.
        ids (`Sequence[int]`): Tokens of the text, behind the one that it begins with.
        window (`int`): Tokens that the model reads at once.
        stride (`int`): New tokens of a window; fewer give each token more context and take more time.

    Returns:
        `np.ndarray` of shape `(len(ids) - 1,)` and type float64.

    Raises:
        ValueError: If there is nothing to foresee, `window` or `stride` is out of range, or a log-probability is no
            number.
    """
    if len(ids) < 2:
        raise ValueError(f"`ids` has {len(ids)} tokens. Give a token to begin with and at least one to foresee.")
    pieces = []
    for begin, end, first in sliding_windows(len(ids), window=window, stride=stride):
        scores = np.asarray(next_log_probs(ids[begin:end]), dtype=np.float64)
        if scores.shape != (end - begin - 1,) or not np.isfinite(scores).all():
            raise ValueError(
                f"`next_log_probs` gave {scores.shape} scores, {int(np.isfinite(scores).sum())} of them finite, for "
                f"tokens {begin} to {end}; need {end - begin - 1} finite ones."
            )
        pieces.append(scores[first - begin - 1 :])
    return np.concatenate(pieces)


def likelihood(
    log_probs: Sequence[float] | np.ndarray, num_tokens: Sequence[int] | np.ndarray, texts: Sequence[str]
) -> dict[str, float]:
    """Sums up how well texts were foreseen.

    Perplexities of different vocabularies do not compare; bits per byte do.

    Args:
        log_probs (`Sequence[float]` of length `num_texts`): Sum over the tokens of each text, in nats.
        num_tokens (`Sequence[int]` of length `num_texts`): How many were foreseen.
        texts (`Sequence[str]` of length `num_texts`): The texts, for their bytes in UTF-8.

    Returns:
        `dict[str, float]`: `perplexity` per token, `bits_per_byte`, and `num_tokens`.

    Raises:
        ValueError: If the numbers differ, or there is no token or no byte.

    Source: perplexity as in Transfusion (arXiv 2408.11039), Sec. 4.1; bits per byte as in The Pile (arXiv 2101.00027).

    Example:
        >>> likelihood([-4 * math.log(2)], [2], ["four"])
        {'perplexity': 4.0, 'bits_per_byte': 1.0, 'num_tokens': 2}

    """
    if not len(log_probs) == len(num_tokens) == len(texts):
        raise ValueError(
            f"{len(log_probs)} `log_probs`, {len(num_tokens)} `num_tokens` and {len(texts)} `texts` must be as many."
        )
    num_bytes = sum(len(text.encode()) for text in texts)
    total, count = float(np.sum(log_probs)), int(np.sum(num_tokens))
    if not count or not num_bytes:
        raise ValueError("`texts` are empty. Give at least one that is not.")
    return {
        "perplexity": math.exp(-total / count),
        "bits_per_byte": -total / math.log(2) / num_bytes,
        "num_tokens": count,
    }
