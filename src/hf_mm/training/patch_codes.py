"""Codes that are the nearest of a few thousand patches: an encoder and a codebook that need no training.

Knows a `VQModel` and pictures. Does not know the decoder, which is trained to make whole pictures of such patches.
"""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast
from diffusers import VQModel
from torch import nn


_LEVEL = 256.0  # of constant channels, beside which contents, in [-1, 1], do not change a group's deviation
_LIFT = 8.0  # SiLU leaves what lies so high as it is, to 0.1%
_MAX_COLORS = 32  # whose pairs are looked at one after the other
_RAREST_PAIR = 1 / 200  # share of the patches of several colours; below it patches of three colours feign a pair
_MAX_WEIGHT = 30.0  # of a patch among those that are clustered: a plain background is one code in any case


def find_patch_fault(
    block_out_channels: list[int], layers_per_block: int, norm_num_groups: int, latent_channels: int
) -> str | None:
    """Says which field of a `VQModel` keeps its encoder from passing patches on, and what would be right.

    Args:
        block_out_channels (`list[int]`): Channels per level.
        layers_per_block (`int`): Residual blocks per level.
        norm_num_groups (`int`): Groups of the norms.
        latent_channels (`int`): Channels of the latent, and length of a code.

    Returns:
        `str`, or `None` where nothing does.

    """
    num_levels = len(block_out_channels)
    num_values = 3 * 4 ** (num_levels - 1)
    if num_levels < 2:
        return f"`block_out_channels`={block_out_channels} must have at least two levels: patches of 2 x 2 pixels"
    if latent_channels != num_values:
        return f"`latent_channels`={latent_channels} must be {num_values}, the values of a patch"
    if layers_per_block < 1:
        return f"`layers_per_block`={layers_per_block} must be at least 1, so that levels can be widened"
    least = [3 * 4 ** (level + 1) for level in range(num_levels - 1)]
    signs = 2 * (-(-num_values // norm_num_groups) + 1) * norm_num_groups  # of each value, and of a constant a group
    least.append(max(signs, block_out_channels[-2] + 1))
    if any(width < enough for width, enough in zip(block_out_channels, least, strict=True)):
        return f"`block_out_channels`={block_out_channels} must be at least {least}"
    return None


# Axes: N images, C channels, H W pixels, c latent channels (the values of a patch), K codes.
@torch.no_grad()
def set_patch_encoder(vq: VQModel) -> None:
    """Sets an encoder's weights so that a latent pixel is the pixels under it, and nothing of what is around them.

    A trained encoder writes about an object all around it, already because its norms look at whole pictures, and small
    models read such codes slowly. Here each channel of the last norm stands beside its negative, and beside constants
    that outweigh both, so that every group has one mean and one deviation. Not in the papers; ours.

    Args:
        vq (`VQModel`): In which [`find_patch_fault`] finds nothing. Codebook and decoder stay as they are.

    """
    encoder, norm = vq.encoder, vq.encoder.conv_norm_out
    for layer in [part for part in (*encoder.modules(), vq.quant_conv) if isinstance(part, nn.Conv2d | nn.Linear)]:
        nn.init.zeros_(layer.weight)  # so that residual blocks and attention are what they are added to
        nn.init.zeros_(layer.bias)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    num_values = 3
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                resnet.conv_shortcut.weight[range(num_values), range(num_values)] = 1
        for sampler in block.downsamplers or ():
            for place, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                sampler.conv.weight[range(place, 4 * num_values, 4), range(num_values), row, column] = 1
            num_values *= 4

    width = norm.num_channels // norm.num_groups
    per_group = -(-num_values // norm.num_groups)
    values = torch.arange(num_values)
    channels = values // per_group * width + values % per_group * 2
    widest = encoder.down_blocks[-1].resnets[0].conv_shortcut
    nn.init.zeros_(widest.weight)
    widest.weight[channels, values] = 1
    widest.weight[channels + 1, values] = -1
    widest.bias[width - 2 :: width] = _LEVEL
    widest.bias[width - 1 :: width] = -_LEVEL
    nn.init.constant_(norm.weight, _LEVEL * (2 / width) ** 0.5)
    nn.init.constant_(norm.bias, _LIFT)
    encoder.conv_out.weight[values, channels, 1, 1] = 1
    nn.init.constant_(encoder.conv_out.bias, -_LIFT)
    vq.quant_conv.weight[values, values] = 1


def _cut_patches(vq: VQModel, images: torch.Tensor) -> torch.Tensor:
    """Gives what [`set_patch_encoder`] makes of images, but for rounding; channels lie colour by colour."""
    for _ in vq.config.block_out_channels[1:]:
        images = F.pixel_unshuffle(images, 2)
    return images


@torch.no_grad()
def read_patches(vq: VQModel) -> torch.Tensor | None:
    """Reads the pixels that codes stand for.

    Args:
        vq (`VQModel`): Any.

    Returns:
        `torch.FloatTensor` of shape `(K, P, 3)`, or `None` where its encoder does not pass patches on.

    """
    codes = vq.quantize.embedding.weight.float()
    side = 2 ** len(vq.config.block_out_channels)
    images = torch.linspace(-1, 1, 3 * side**2, device=codes.device).view(1, 3, side, side)
    patches = _cut_patches(vq, images)
    latents = vq.encode(images.to(vq.dtype)).latents.float()
    if latents.shape != patches.shape or not torch.allclose(latents, patches, atol=0.05):
        return None
    return codes.unflatten(1, (3, -1)).movedim(1, -1)


@torch.no_grad()
def cluster_patches(vq: VQModel, images: torch.Tensor, seed: int, *, shared_patterns: bool = False) -> None:
    """Makes the codebook the k-means of patches; in several processes it is the main one's.

    A patch that is often seen counts more, by the root of how often.

    Args:
        vq (`VQModel`): Whose codebook is set; its encoder is that of [`set_patch_encoder`].
        images (`torch.FloatTensor` of shape `(N, 3, H, W)`): In [-1, 1].
        seed (`int`): Of the first codes.
        shared_patterns (`bool`, defaults to `False`):
            For drawn pictures of few colours: patterns of two colours are clustered, whatever the colours, and there
            is a code for each pattern in each pair of colours that meet. So a shape has its codes also in colours
            that it was never seen in. Not in the papers; ours.

    Raises:
        ModuleNotFoundError: If FAISS is not installed.
        ValueError: If the pictures have fewer different patches than there are codes, or too many colours for codes
            that share patterns.

    """
    codebook = vq.quantize.embedding.weight
    found = _cut_patches(vq, images).movedim(1, -1).flatten(0, 2).cpu().numpy()
    different, counts = np.unique(found, axis=0, return_counts=True)
    if len(different) < len(codebook) and not shared_patterns:
        raise ValueError(
            f"`num_vq_embeddings`={len(codebook)} is more than the {len(different)} different patches of "
            f"`num_revival_images`={len(images)} pictures. Ask for fewer codes, or look at more pictures."
        )
    make_codes = _cross_patterns if shared_patterns else _find_means
    codes = torch.from_numpy(make_codes(different, counts, len(codebook), seed)).to(codebook)
    codebook.copy_(broadcast(codes))


def _find_means(points: np.ndarray, counts: np.ndarray, num_means: int, seed: int) -> np.ndarray:
    """Clusters points (N, c) into means (K, c)."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Codes of patches are clustered by FAISS. Install it with `pip install 'hf_mm[retrieval]'`."
        ) from error
    all_points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(points)}  # and no warning of few
    means = faiss.Kmeans(points.shape[1], num_means, niter=12, seed=seed, **all_points)
    means.train(points.astype(np.float32), weights=np.sqrt(counts).clip(max=_MAX_WEIGHT).astype(np.float32))
    return np.asarray(means.centroids)


def _cross_patterns(patches: np.ndarray, counts: np.ndarray, num_codes: int, seed: int) -> np.ndarray:
    """Makes codes (K, 3 * P) of plain colours, and of patterns in pairs of these; what is left over repeats the last.

    A pair's first colour is the darker one, and a pattern the share of the other in each pixel.
    """
    pixels = patches.reshape(len(patches), 3, -1).swapaxes(1, 2)  # (N, P, 3)
    is_plain = (pixels == pixels[:, :1]).all((1, 2))
    colors = pixels[is_plain, 0]
    if not 2 <= len(colors) <= _MAX_COLORS:
        raise ValueError(
            f"`shared_patterns`=True is for drawn pictures, and these have {len(colors)} patches of one colour that "
            f"differ. From 2 to {_MAX_COLORS} would be right; leave it at False."
        )
    colors = colors[colors.sum(1).argsort(kind="stable")]
    pairs = np.stack(np.triu_indices(len(colors), 1), axis=1)  # (pairs, 2)
    mixed, counts = pixels[~is_plain], counts[~is_plain]
    nearest, pair_numbers = np.full(len(mixed), np.inf), np.zeros(len(mixed), dtype=int)
    shares = np.zeros(mixed.shape[:2], dtype=np.float32)
    for number, (dark, bright) in enumerate(colors[pairs]):
        contrast = bright - dark
        share = ((mixed - dark) @ contrast / (contrast @ contrast)).clip(0, 1)
        distances = np.square(mixed - dark - share[:, :, None] * contrast).sum((1, 2))
        is_nearer = distances < nearest
        nearest[is_nearer], pair_numbers[is_nearer], shares[is_nearer] = distances[is_nearer], number, share[is_nearer]
    pair_counts = np.bincount(pair_numbers, weights=counts, minlength=len(pairs))
    pairs = pairs[pair_counts > _RAREST_PAIR * counts.sum()]
    patterns, places = np.unique(shares.round(2), axis=0, return_inverse=True)
    num_patterns = (num_codes - len(colors)) // max(len(pairs), 1)
    if not (len(pairs) and 1 <= num_patterns <= len(patterns)):
        raise ValueError(
            f"`num_vq_embeddings`={num_codes} leaves {num_patterns} patterns to each of {len(pairs)} pairs of "
            f"{len(colors)} colours, and the pictures have {len(patterns)}. From 1 to these would be right."
        )
    means = _find_means(patterns, np.bincount(places.ravel(), weights=counts), num_patterns, seed).clip(0, 1)
    dark, bright = colors[pairs].swapaxes(0, 1)[:, :, None, None]  # (pairs, 1, 1, 3)
    crossed = (dark + means[:, :, None] * (bright - dark)).reshape(-1, *pixels.shape[1:])
    plain = np.broadcast_to(colors[:, None], (len(colors), *pixels.shape[1:]))
    codes = np.concatenate([plain, crossed]).swapaxes(1, 2).reshape(-1, patches.shape[1])
    return np.pad(codes, ((0, num_codes - len(codes)), (0, 0)), mode="edge")
