"""What codes are told of their place in their image, beside the running positions: a vector, and a rotation.

Knows places and vectors, not how places are found.
"""

# Axes: B rows, L sequence, H heads, D width of a head.

from typing import NamedTuple

import torch
from torch import nn


class ImagePlaceEmbedding(nn.Embedding):
    """Tells each code its place in its image."""

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """Embeds places `(B, L)`, -1 for what is no code and gets zeros."""
        return super().forward(places.clamp(min=0)) * (places >= 0)[..., None]


class PlaceRotation(NamedTuple):
    """Cosines and sines, of shape `(B, 1, L, pairs)`, that queries and keys are rotated by."""

    query_cos: torch.Tensor
    query_sin: torch.Tensor
    key_cos: torch.Tensor
    key_sin: torch.Tensor

    @classmethod
    def of(cls, places: torch.Tensor, head_dim: int, tokens_per_image: int, dtype: torch.dtype) -> "PlaceRotation":
        """Finds the angles: keys by the place of their code, queries by the place of the code that they predict.

        Where the next code stands in one image, it is sought in others without any rotation between query and key, so
        that looking there, as copying from a picture given or retrieved asks for, need not be learned first. What is
        no code counts as place 0, and so does a prediction behind it, which may be the first code of an image. Half of
        a head is rotated; the other half compares without regard to places.

        Args:
            places (`torch.LongTensor` of shape `(B, L)`): Of codes in their images; -1 for what is no code.
            head_dim (`int`): Width of a head.
            tokens_per_image (`int`): Sets the slowest rotation, about one radian over an image.
            dtype (`torch.dtype`): Of queries and keys.

        Source: RoPE (arXiv 2104.09864) for the rotation. That it is of places in images is ours.
        """
        pairs = torch.arange(head_dim // 4, device=places.device)
        frequencies = float(tokens_per_image) ** -(pairs / len(pairs))

        def turn(targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = targets[:, None, :, None] * frequencies
            return angles.cos().to(dtype), angles.sin().to(dtype)

        return cls(*turn(places + 1), *turn(places.clamp(min=0)))

    def rotate(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotates the first half of queries and keys, of shape `(B, H, L, D)`, in pairs."""
        return _rotate(query, self.query_cos, self.query_sin), _rotate(key, self.key_cos, self.key_sin)


def _rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second, rest = vectors.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
