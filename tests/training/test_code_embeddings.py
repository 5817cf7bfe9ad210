"""Embeddings of patches: what is alike is alike, whatever the colours."""

import torch

from hf_mm.training.code_embeddings import embed_patches


def paint(pattern: torch.Tensor, dark: list[float], bright: list[float]) -> torch.Tensor:
    first, second = torch.tensor(dark), torch.tensor(bright)
    return first + pattern[:, None] * (second - first)


def test_patterns_are_alike_in_whatever_colors_and_colors_in_whatever_patterns():
    patterns = torch.eye(16)[:12] * 0.5 + (torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) > 0.5) * 0.5
    patterns = (patterns - patterns.amin(1, keepdim=True)) / (patterns.amax(1) - patterns.amin(1))[:, None]
    pairs = [([-0.9, -0.8, 0.9], [1.0, 1, 1]), ([-0.8, 0.2, -0.9], [0.6, 0.5, 0.4]), ([-1.0, -1, -1], [0.9, -0.3, 0])]
    codes = torch.stack([paint(pattern, *pair) for pair in pairs for pattern in patterns])
    embeddings = embed_patches(codes, 256, torch.Generator().manual_seed(0))
    assert embeddings.shape == (36, 256)
    torch.testing.assert_close(embeddings.square().mean(), torch.tensor(1.0))
    likeness = torch.nn.functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=-1)
    pair, pattern = torch.arange(36) // 12, torch.arange(36) % 12
    same_pair, same_pattern = pair[:, None] == pair, pattern[:, None] == pattern
    neither = likeness[~same_pair & ~same_pattern].mean()
    assert likeness[same_pair & ~same_pattern].mean() > neither + 0.3
    assert likeness[~same_pair & same_pattern].mean() > neither + 0.2


def test_a_red_star_or_a_blue_moon_is_not_a_blue_star_or_a_red_moon():
    star, moon = torch.eye(16)[:2]
    red, blue = ([-1.0, -1, -1], [1.0, 0, 0]), ([-1.0, -1, -1], [0.0, 0, 1])
    codes = torch.stack([paint(star, *red), paint(moon, *blue), paint(star, *blue), paint(moon, *red)])
    codes = torch.cat([codes, paint(torch.eye(16)[2], *red)[None], paint(torch.eye(16)[3], *blue)[None]])
    embeddings = embed_patches(codes, 256, torch.Generator().manual_seed(0))
    asked = (embeddings[:2] - embeddings[2:4]).sum(
        0
    )  # of sums of parts alone this is 0, and no vector tells them apart
    scores = embeddings[:4] @ asked
    assert scores[:2].min() > scores[2:].max() + 20


def test_patches_of_one_color_have_an_embedding():
    plain = torch.tensor([-1.0, 0.0, 1.0])[:, None, None].expand(3, 4, 3)
    embeddings = embed_patches(plain, 64)
    assert embeddings.isfinite().all()
    assert torch.cdist(embeddings, embeddings).triu(1).count_nonzero() == 3
