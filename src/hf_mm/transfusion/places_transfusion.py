"""What attention is told of the place of a patch in its image, beside the running positions.

Knows rows, columns and angles; the model says where the images stand.
"""

# Axes: B rows, L sequence, P patches, D width of a head.

import math

import torch
from torch import nn

from .configuration_transfusion import TransfusionConfig
from .layout_transfusion import refuse_off_grid


def grid_places(height: int, width: int) -> torch.Tensor:
    """Row and column of each patch of one image, `(2, height * width)`, rows first; sides in patches."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).T


def patch_places(shape: torch.Size, image_sizes: torch.Tensor | None, patch_size: int) -> torch.Tensor:
    """Finds row and column of each patch of the images of latents of `shape`, in reading order.

    Nothing asks how many images of one size there are, so that a compiled graph serves any number.

    Args:
        shape (`torch.Size`): `(num_images, channels, height, width)` of the latents.
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
            Height and width of each in latent pixels; `None` where all fill the latents.
        patch_size (`int`): Side of a patch in latent pixels.

    Returns:
        `torch.LongTensor` of shape `(2, num_patches)`, on the CPU.

    Raises:
        ValueError: If an image is no multiple of the patch size.

    Example:
        >>> patch_places(torch.Size([2, 4, 2, 4]), None, patch_size=2).tolist()
        [[0, 0, 0, 0], [0, 1, 0, 1]]

    """
    sizes = [tuple(shape[-2:])] if image_sizes is None else [tuple(size) for size in image_sizes.tolist()]
    places = {}
    for height, width in dict.fromkeys(sizes):
        refuse_off_grid(height, width, patch_size)
        places[height, width] = grid_places(height // patch_size, width // patch_size)
    if image_sizes is None:
        return places[sizes[0]].repeat(1, shape[0])
    return torch.cat([places[size] for size in sizes], dim=1)


def add_places(
    position_ids: torch.Tensor | None,
    is_image: torch.Tensor,
    places: torch.Tensor,
    past_length: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Adds rows and columns of patches to running positions.

    Args:
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Running positions; counted from `past_length` if left out.
        is_image (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): True on patches.
        places (`torch.LongTensor` of shape `(2, num_patches)`): Row and column of each patch, in reading order.
        past_length (`int`, defaults to 0): Positions in the cache.

    Returns:
        `torch.LongTensor` of shape `(3, batch_size, sequence_length)`: position, row and column, the latter 0 on text.

    Example:
        >>> add_places(None, torch.tensor([[False, True, True]]), grid_places(1, 2)).tolist()
        [[[0, 1, 2]], [[0, 0, 0]], [[0, 0, 1]]]

    """
    if position_ids is None:
        position_ids = torch.arange(is_image.shape[1], device=is_image.device)[None] + past_length
    rows, columns = places
    text = torch.zeros_like(is_image, dtype=torch.long)
    return torch.stack(
        [
            position_ids.expand_as(is_image),
            text.masked_scatter(is_image, rows),
            text.masked_scatter(is_image, columns),
        ]
    )


class PlaceRotaryEmbedding(nn.Module):
    """Rotates the faster half of a head by the running position, as the backbone does, and the slower by the place.

    A patch finds the same place of another image without any rotation between query and key, however far back that
    stands, so that keeping what an edit leaves alone need not be learned first. Text counts as row 0, column 0.

    Args:
        config (`TransfusionConfig`): Sets how far rotations slow down: from half a turn a patch towards half a turn
            over a picture of `image_size`, in as many even ratios as there are. Heads narrower than 16 have the
            fastest alone, which tells neighbours apart and no more.
        rotary_emb (`nn.Module`): The backbone's, called as `rotary_emb(hidden_states, position_ids)`.

    Source: RoPE (arXiv 2104.09864) for the rotation, and Qwen2-VL (arXiv 2409.12191) for the three positions of one
    token. That row and column are of the image alone, and not of the sequence with it, is ours.
    """

    def __init__(self, config: TransfusionConfig, rotary_emb: nn.Module) -> None:
        super().__init__()
        self.running = rotary_emb
        self.side = config.image_size // config.image_stride

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Finds cosines and sines of shape `(B, L, D)`.

        Args:
            hidden_states (`torch.Tensor`): Tells the dtype.
            position_ids (`torch.LongTensor` of shape `(B, L)` or `(3, B, L)`):
                Running positions; or those, rows and columns.
        """
        running, places = position_ids, position_ids.new_zeros(2, *position_ids.shape)
        if position_ids.ndim == 3:
            running, places = position_ids[0], position_ids[1:]
        cos, sin = self.running(hidden_states, position_ids=running)
        pairs = cos.shape[-1] // 2
        per_axis = pairs // 4
        slower = 2 * per_axis
        steps = torch.arange(per_axis, device=cos.device) / per_axis
        angles = places[..., None] * (math.pi * float(self.side) ** -steps)  # (2, B, L, per_axis)
        angles = torch.cat([*angles], dim=-1)

        def replace(table: torch.Tensor, slow: torch.Tensor) -> torch.Tensor:
            first, second = table.split(pairs, dim=-1)  # the two members of each pair stand half a head apart
            slow = slow.to(table.dtype)
            return torch.cat([first[..., : pairs - slower], slow, second[..., : pairs - slower], slow], dim=-1)

        return replace(cos, angles.cos()), replace(sin, angles.sin())
