import numpy as np
import pytest

from hf_mm.data.packing import pack_windows


@pytest.mark.parametrize("seed", range(5))
def test_every_document_is_in_one_window_and_no_window_overflows(seed):
    lengths = np.random.default_rng(seed).integers(1, 38, 101).tolist()
    windows = pack_windows(lengths, 37)
    assert sorted(index for window in windows for index in window) == list(range(101))
    assert all(sum(lengths[index] for index in window) <= 37 for window in windows)


@pytest.mark.parametrize("seed", range(5))
def test_windows_are_filled_well(seed):
    lengths = np.random.default_rng(seed).integers(1, 20, 200).tolist()
    fewest = -(-sum(lengths) // 37)
    assert len(pack_windows(lengths, 37)) <= 11 / 9 * fewest + 1  # the bound of first-fit decreasing


def test_nothing_gives_no_windows():
    assert pack_windows([], 5) == []


def test_a_document_that_just_fits_has_a_window_of_its_own():
    assert pack_windows([7, 7, 1], 7) == [[0], [1], [2]]


def test_a_document_longer_than_a_window_is_refused_by_number():
    with pytest.raises(ValueError, match="document 1 has 8 tokens.*window_length.*7"):
        pack_windows([3, 8, 2], 7)
