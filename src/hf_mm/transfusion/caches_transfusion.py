"""Caches of prefixes: of several streams as one, and with room for an image that is read again and again.

Knows keys and values, not what they are of.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


def join_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Stacks the rows of caches, padding the shorter ones on the left.

    Args:
        caches (`list[DynamicCache]`): Keys and values of `(rows, heads, length, head_dim)` per layer, any length each.

    Returns:
        `DynamicCache`: a new cache; those given stay as they are.
    """
    length = max(cache.get_seq_length() for cache in caches)

    def stack(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([F.pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts])

    layers = zip(*(cache.layers for cache in caches), strict=True)
    return DynamicCache(
        [(stack([one.keys for one in layer]), stack([one.values for one in layer])) for layer in layers]
    )


class ImageBlockLayer(DynamicLayer):
    """One layer of a prefix with room behind it for an image block, which every reading overwrites in place.

    Appending the block to the prefix anew at each denoising step would copy the prefix as often.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_patches: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.prefix_length = keys.shape[-2]
        self.keys, self.values = F.pad(keys, (0, 0, 0, num_patches)), F.pad(values, (0, 0, 0, num_patches))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the block in its place."""
        self.keys[..., self.prefix_length :, :] = key_states
        self.values[..., self.prefix_length :, :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Returns the length of the prefix."""
        return self.prefix_length


def with_image_room(cache: DynamicCache, num_patches: int) -> Cache:
    """Copies a prefix with room for an image of `num_patches` behind it, of layers [`ImageBlockLayer`]."""
    return Cache([ImageBlockLayer(layer.keys, layer.values, num_patches) for layer in cache.layers])
