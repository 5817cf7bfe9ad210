"""Finds pictures that are the same, and pictures that look nearly the same, by hashes.

Works on images and arrays of hashes. It does not know rows, datasets or captions beyond a number that stands for one.
"""

import hashlib

import numpy as np
from PIL import Image as PILImage


NUM_HASH_BITS = 64


def pixel_hash(image: PILImage.Image) -> int:
    """Hashes the decoded pixels and the size, so that the file format and metadata do not matter; 64 bits."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")


def text_hash(words: list[str]) -> int:
    """Hashes a list of words to 64 bits."""
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little")


def difference_hash(image: PILImage.Image) -> int:
    """Computes dHash: 9 x 8 grey pixels, and one bit per neighbouring pair, set where brightness falls to the right.

    Pictures that look alike differ in few bits, whatever their size and compression.

    Args:
        image (`PIL.Image.Image`): The picture.

    Returns:
        `int`: 64 bits.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), PILImage.Resampling.BILINEAR))
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def first_occurrences(*keys: np.ndarray) -> np.ndarray:
    """Marks the rows whose combination of keys has not come before.

    Args:
        keys (`np.ndarray` of shape `(rows,)`): One or more columns of hashes.

    Returns:
        `np.ndarray` of shape `(rows,)` and type bool.
    """
    is_first = np.zeros(len(keys[0]), dtype=bool)
    is_first[_unique_rows(*keys)[0]] = True
    return is_first


def without_near_duplicates(hashes: np.ndarray, groups: np.ndarray, max_distance: int) -> np.ndarray:
    """Marks the rows to keep so that no kept row looks nearly the same as an earlier kept row of its group.

    Two hashes at most `max_distance` bits apart agree in at least one of `max_distance + 1` bands of bits, so only
    rows that share a band are compared, as whole arrays; the cost grows with the number of such pairs, not with rows
    squared.

    Args:
        hashes (`np.ndarray` of shape `(rows,)` and type uint64): Difference hashes.
        groups (`np.ndarray` of shape `(rows,)`): Only rows with equal numbers here are compared. All zero: all are.
        max_distance (`int`): Largest number of differing bits that counts as nearly the same, at least 0, below 64.

    Returns:
        `np.ndarray` of shape `(rows,)` and type bool: True for rows to keep.

    Raises:
        ValueError: If `max_distance` is out of range.
    """
    if not 0 <= max_distance < NUM_HASH_BITS:
        raise ValueError(
            f"`max_distance`={max_distance} must be at least 0 and below {NUM_HASH_BITS} (bits of a hash)."
        )
    firsts, _ = _unique_rows(hashes, groups)
    keep = np.zeros(len(hashes), dtype=bool)
    keep[firsts] = True
    earlier, later = _near_pairs(hashes[firsts], groups[firsts], max_distance)
    for first, second in zip(firsts[earlier].tolist(), firsts[later].tolist(), strict=True):
        if keep[first]:  # pairs come in order of their later row, so the earlier row's fate is settled
            keep[second] = False
    return keep


def _unique_rows(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows where a combination of keys comes first, and for every row its combination's number."""
    order = np.lexsort(keys)  # stable, so the first of equal rows is the earliest
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(is_new) - 1
    return np.sort(order[is_new]), number


def _near_pairs(hashes: np.ndarray, groups: np.ndarray, max_distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pairs (earlier, later) of one group within the distance, in order of the later row."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, NUM_HASH_BITS, max_distance + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        pairs.append(_near_pairs_in_band(hashes, band, groups, max_distance))
    found = np.unique(np.concatenate(pairs), axis=0)
    found = found[np.lexsort((found[:, 0], found[:, 1]))]
    return found[:, 0], found[:, 1]


def _near_pairs_in_band(hashes: np.ndarray, band: np.ndarray, groups: np.ndarray, max_distance: int) -> np.ndarray:
    """Compares rows that share band and group: sorted by both, each with its next, its second next, and so on."""
    order = np.lexsort((band, groups))
    bucket = _unique_rows(band, groups)[1][order]
    start, pairs = np.arange(len(order)), []
    for step in range(1, len(order)):
        start = start[start + step < len(order)]
        start = start[bucket[start] == bucket[start + step]]
        if len(start) == 0:
            break
        first, second = order[start], order[start + step]
        is_near = np.bitwise_count(hashes[first] ^ hashes[second]) <= max_distance
        pairs.append(np.stack([np.minimum(first, second), np.maximum(first, second)], axis=1)[is_near])
    return np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])
