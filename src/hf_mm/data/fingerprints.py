"""Short digests of rows, weights and files, by which one thing is told from another of the same name.

Knows nothing of what is done with them.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset


NUM_PROBED_ROWS = 64
DECODING = ("decoder.", "post_quant_conv.")  # parts of an AutoencoderKL and a VQModel of diffusers


def digest_rows(rows: Dataset) -> str:
    """Hashes the columns and some evenly spaced rows, to notice when other rows are given."""
    digest = hashlib.blake2b(repr(rows.features).encode(), digest_size=16)
    for number in np.unique(np.linspace(0, len(rows) - 1, NUM_PROBED_ROWS).astype(int)).tolist():
        digest.update(repr(rows[number]).encode())
    return digest.hexdigest()


def digest_weights(model: torch.nn.Module) -> str:
    """Hashes the weights, so that other weights under the same name are noticed."""
    return _digest_tensors(model.state_dict())


def digest_encoder(tokenizer: torch.nn.Module) -> str:
    """Hashes those weights of an image tokenizer that decide what pictures become: its decoder may be another."""
    weights = tokenizer.state_dict()
    return _digest_tensors({name: weights[name] for name in weights if not name.startswith(DECODING)})


def _digest_tensors(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in weights.items():
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
