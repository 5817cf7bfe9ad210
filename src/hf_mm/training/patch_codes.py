"""Codes that are the nearest of a few thousand patches: a codebook that needs no training.

Knows a `VQModel` whose latents are patches, and pictures. Does not know the layers that make them so.
"""

from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import VQModel


_MAX_COLORS = 32  # whose pairs are looked at one after the other
_RAREST_PAIR = 1 / 200  # share of the patches of several colours; below it patches of three colours feign a pair
_MAX_WEIGHT = 30.0  # of a patch among those that are clustered: a plain background is one code in any case


def _cut_patches(vq: VQModel, images: torch.Tensor) -> torch.Tensor:
    """Gives what an encoder of patches makes of images, but for rounding; channels lie colour by colour."""
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
    if vq.config.in_channels != 3:
        return None
    codes = vq.quantize.embedding.weight.float()
    side = 2 ** len(vq.config.block_out_channels)
    images = torch.linspace(-1, 1, 3 * side**2, device=codes.device).view(1, 3, side, side)
    patches = _cut_patches(vq, images)
    latents = vq.encode(images.to(vq.dtype)).latents.float()
    if latents.shape != patches.shape or not torch.allclose(latents, patches, atol=0.05):
        return None
    return codes.unflatten(1, (3, -1)).movedim(1, -1)


def require_faiss() -> None:
    """Raises a `ModuleNotFoundError` that says what to install, before pictures are read in vain."""
    if find_spec("faiss") is None:
        raise ModuleNotFoundError(
            "Codes of patches are clustered by FAISS. Install it with `pip install 'hf_mm[retrieval]'`."
        )


@torch.no_grad()
def cluster_patches(vq: VQModel, images: torch.Tensor, seed: int, *, shared_patterns: bool = False) -> None:
    """Makes the codebook the k-means of patches.

    A patch that is often seen counts more, by the root of how often.

    Args:
        vq (`VQModel`): Of [`build_patch_autoencoder`], whose codebook is set.
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
            f"`num_pictures`={len(images)}. Ask for fewer codes, or look at more pictures."
        )
    make_codes = _cross_patterns if shared_patterns else _find_means
    codebook.copy_(torch.from_numpy(make_codes(different, counts, len(codebook), seed)))


def _find_means(points: np.ndarray, counts: np.ndarray, num_means: int, seed: int) -> np.ndarray:
    """Clusters points (N, c) into means (K, c)."""
    import faiss

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
