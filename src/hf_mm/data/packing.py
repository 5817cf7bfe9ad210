"""Documents into windows: whole documents side by side, none cut, so that no image ever is.

Knows lengths only.
"""

from collections.abc import Sequence


def pack_windows(lengths: Sequence[int], window_length: int) -> list[list[int]]:
    """Places documents into as few windows as first-fit decreasing finds.

    Args:
        lengths (`Sequence[int]`): Tokens of each document.
        window_length (`int`): Tokens a window holds.

    Returns:
        `list[list[int]]`: For each window the indices of its documents, longest first; every index once.

    Raises:
        ValueError: If a document is longer than a window.

    Example:
        >>> pack_windows([3, 6, 4, 5], window_length=9)
        [[1, 0], [3, 2]]

    """
    windows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[index]
        if length > window_length:
            raise ValueError(
                f"document {index} has {length} tokens, more than `window_length`={window_length}. Lower "
                "`max_caption_tokens` or the picture size, or raise `window_length`."
            )
        window = next((number for number, free in enumerate(room) if free >= length), len(windows))
        if window == len(windows):
            windows.append([])
            room.append(window_length)
        windows[window].append(index)
        room[window] -= length
    return windows
