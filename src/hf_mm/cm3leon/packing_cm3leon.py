"""Attention within packed documents: each reads itself, instead of a dense mask over all pairs of a window.

For the CPU, whose kernel computes what a mask forbids; on a GPU flash and flex attention skip it by themselves. Knows
positions and lengths, no weights.
"""

# Axes: B rows, L sequence, T positions of all rows side by side, D head.

from itertools import pairwise

import torch
import torch.nn.functional as F


# Pairs of positions to be spared for one more call of the kernel to be worth it: what 64 positions have.
PAIRS_PER_CALL = 4096


def find_documents(position_ids: torch.Tensor, num_rows: int) -> list[int] | None:
    """Finds the packed documents of a batch, where reading each by itself pays.

    Args:
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)` or `(1, sequence_length)`):
            A document begins wherever they do not go on.
        num_rows (`int`): `batch_size`.

    Returns:
        `list[int]`: lengths of all documents, row by row. `None` where they are too short, too long or too few to be
        worth it, and in a compiled graph, whose shapes are fixed.

    Example:
        >>> find_documents(torch.arange(200)[None] % 100, num_rows=1)
        [100, 100]

    """
    if torch.compiler.is_compiling():
        return None
    position_ids = position_ids.expand(num_rows, -1)
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0), value=True)
    index = starts.flatten().nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in pairwise([*index, position_ids.numel()])]
    num_spared = position_ids.numel() * position_ids.shape[1] - sum(length**2 for length in lengths)
    return lengths if num_spared > PAIRS_PER_CALL * len(lengths) else None


def attend_within_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scaling: float
) -> torch.Tensor:
    """Attends causally within each document.

    Args:
        query (`torch.FloatTensor` of shape `(batch_size, num_heads, sequence_length, head_dim)`): Queries.
        key (`torch.FloatTensor` of the same shape): Keys.
        value (`torch.FloatTensor` of the same shape): Values.
        lengths (`list[int]`): From `find_documents`.
        scaling (`float`): Factor of the products.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, sequence_length, num_heads, head_dim)`.
    """
    # Splitting all at once has one gradient to put together; slices would have one as large as the batch each.
    documents = zip(*(part.transpose(1, 2).flatten(0, 1).split(lengths) for part in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in document), is_causal=True, scale=scaling
        )[0].transpose(0, 1)
        for document in documents
    ]
    return torch.cat(outputs).unflatten(0, (len(query), -1))
