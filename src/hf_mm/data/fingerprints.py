"""Short digests of rows, weights and files, by which one thing is told from another of the same name.

Knows nothing of what is done with them.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset


NUM_PROBED_ROWS = 64


def digest_rows(rows: Dataset) -> str:
    """Hashes the columns and some evenly spaced rows, to notice when other rows are given."""
    digest = hashlib.blake2b(repr(rows.features).encode(), digest_size=16)
    for number in np.unique(np.linspace(0, len(rows) - 1, NUM_PROBED_ROWS).astype(int)).tolist():
        digest.update(repr(rows[number]).encode())
    return digest.hexdigest()


def digest_weights(model: torch.nn.Module) -> str:
    """Hashes the weights, so that other weights under the same name are noticed."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        stored = weight.cpu().contiguous().flatten().view(torch.uint8)  # NumPy knows no bfloat16
        digest.update(name.encode() + stored.numpy().tobytes())
    return digest.hexdigest()


def digest_file(path: str | os.PathLike) -> str:
    """Hashes the bytes of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_text(text: str) -> str:
    """Hashes a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
