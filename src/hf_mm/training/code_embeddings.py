"""Embeddings that are what codes look like, so that what is learned of one code holds for those like it.

Knows a codebook of patches and an embedding matrix. Does not know the model.
"""

import torch


_COLOR_SCALE = 0.5  # distance of colours, in units of [-1, 1], at which they are told apart
_PATTERN_SCALE = 1.0  # of patterns, the root of summed squared differences of coverage


# Axes: K codes, P pixels of a patch, D hidden.
@torch.no_grad()
def embed_patches(codes: torch.Tensor, hidden_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Embeds patches by their two colours, by the pattern that these make, and by all of them at once.

    An embedding is the sum of four vectors. Three are of the darkest and of the brightest pixel's colour and of how
    near each pixel is to the latter; so a pattern is the same direction in whatever colours, and a model that has seen
    it in some can write it in others. The fourth is of the three together: without it whatever makes a red star and a
    blue moon likely would make a blue star and a red moon as likely, and so a scene of two objects would mix them. Not
    in the papers; ours.

    Args:
        codes (`torch.FloatTensor` of shape `(K, P, 3)`): Pixels in [-1, 1].
        hidden_size (`int`): Length of an embedding.
        generator (`torch.Generator`, *optional*): Of the random features.

    Returns:
        `torch.FloatTensor` of shape `(K, hidden_size)`: Of mean square 1.

    Source: Random Fourier features (Rahimi and Recht, NIPS 2007), whose products are Gaussians of distances.
    """
    lightness = codes.sum(-1)
    rows = torch.arange(len(codes))
    dark, bright = codes[rows, lightness.argmin(1)], codes[rows, lightness.argmax(1)]  # (K, 3)
    contrast = bright - dark
    offsets = ((codes - dark[:, None]) * contrast[:, None]).sum(-1)  # (K, P)
    pattern = offsets / contrast.square().sum(-1, keepdim=True).clamp(min=1e-4)
    parts = [dark / _COLOR_SCALE, bright / _COLOR_SCALE, pattern / _PATTERN_SCALE]
    parts.append(torch.cat(parts, dim=1))
    embeddings = sum(_fourier(values, hidden_size, generator) for values in parts)
    embeddings = embeddings - embeddings.mean(0)
    return embeddings / embeddings.square().mean().sqrt()


def _fourier(values: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Cosines of random projections."""
    weights = torch.randn(values.shape[1], size, generator=generator)
    phases = 2 * torch.pi * torch.rand(size, generator=generator)
    return torch.cos(values @ weights + phases)
